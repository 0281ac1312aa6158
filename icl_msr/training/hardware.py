"""The devices, the precision, the memory format and the compilation of training."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt

from icl_msr.core.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The resolved choices, as arguments of Lightning's Trainer."""

    accelerator: str
    devices: int
    """Number of devices on each node."""
    nodes: int
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    channels_last: bool
    compile: bool
    name: str
    why: str
    """The reason for the precision that `auto` chose; empty if the precision was given."""

    @property
    def world_size(self) -> int:
        """Number of processes that train together, one per device."""
        return self.devices * self.nodes

    @property
    def device(self) -> torch.device:
        """The device of this process, if it is the only one or the first one."""
        return torch.device("cuda" if self.accelerator == "gpu" else "cpu")

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.world_size} x {self.name}, {self.precision}{self.why}, {layout}{', compiled' * self.compile}"


class Hardware:
    """Settings of devices, precision, memory format and compilation. `auto` takes what is fastest on this machine.

    `compile` compiles the backbones with `torch.compile`. The first steps take a minute longer, and the names of the
    weights stay. `tf32` lets a GPU round the factors of fp32 products to TF32. The meta pass never does. `requeue` lets
    the program ask SLURM to run its job again after a signal has stopped it.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu"],
        devices: PositiveInt,
        nodes: PositiveInt,
        precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
        channels_last: bool,
        compile: bool,
        tf32: bool,
        requeue: bool,
    ):
        self.accelerator, self.devices, self.nodes = accelerator, devices, nodes
        self.precision, self.channels_last = precision, channels_last
        self.compile, self.tf32, self.requeue = compile, tf32, requeue

    def plan(self) -> Plan:
        """Return the plan for this machine, and set the use of TF32.

        Raises:
            UserError: the config asks for more GPUs than the machine has.
        """
        there = torch.cuda.device_count()
        gpu = there > 0 if self.accelerator == "auto" else self.accelerator == "gpu"
        if gpu and self.devices > there:
            raise UserError(
                f"hardware asks for {self.devices} GPU but there are {there}; type hardware=cpu or fewer devices."
            )
        name = torch.cuda.get_device_name() if gpu else f"CPU ({torch.get_num_threads()} threads)"
        precision, why = self.precision, ""
        if precision == "auto":
            # bf16 convolutions are about three times as fast on processors that have them, above all in channels_last.
            fast_bf16 = torch.cuda.is_bf16_supported() if gpu else torch.cpu._is_avx512_bf16_supported()
            precision = "bf16-mixed" if fast_bf16 else "32-true"
            why = f" (auto: {'fast' if fast_bf16 else 'no fast'} bf16 here)"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.tf32
        return Plan(
            accelerator="gpu" if gpu else "cpu",
            devices=self.devices,
            nodes=self.nodes,
            precision=precision,
            channels_last=self.channels_last,
            compile=self.compile,
            name=name,
            why=why,
        )
