"""The package on a GPU, as far as a CPU can tell: every tensor is on the device, and the host never waits for it."""

import sys
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from support.tiny import composed, dataset, trained
from support.toys import METHODS, SMALLER, make_method, make_regularizer, method_config, skip_refused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from icl_msr.augment import colour
from icl_msr.core.config import build
from icl_msr.core.views import Views
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.losses.contrastive import _LogSumExp
from icl_msr.methods import BYOL, Method, SimCLR, Step
from icl_msr.regularizers import MetaSemanticRegularizer, Pass
from icl_msr.regularizers.bilevel import difference_tangent, trainable
from icl_msr.training.datamodule import Batch, DataModule
from icl_msr.training.module import Pretraining

Module = TypeVar("Module", bound=nn.Module)

NEGATIVES = ["none", "patch", "texture", "phase"]
READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten._linalg_check_errors,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten.repeat_interleave,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_dim,
}
"""Operators whose result, or its size, the host has to know."""
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}


class Waited(Exception):
    """The host would wait for the device here."""


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a value that is read back, a copy that has to be complete.

    Torch's optimisers and loaders and Lightning may do it: what they read lies on the host, or is logged.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.waits(func, args, kwargs) and asked_by_us():
            raise Waited(func)
        return func(*args, **kwargs)

    def waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        on_it = any(isinstance(a, Tensor) and a.device.type == self.device for a in args)
        operator = func.overloadpacket
        if operator in READS:
            return on_it
        if operator in INDEXING:
            return on_it and any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in args[1])
        if operator is torch.ops.aten._to_copy:
            to = kwargs.get("device") or args[0].device
            return to.type != args[0].device.type and not (kwargs.get("non_blocking") and to.type == self.device)
        if operator is torch.ops.aten.copy_:
            into, of, *non_blocking = args
            other = into.device.type != of.device.type
            return other and not ((non_blocking or [False])[0] and into.device.type == self.device)
        return False


def asked_by_us() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if frame.f_code is Pretraining.step.__code__:  # the host's own arithmetic
            return False
        if "icl_msr/" in file or file == __file__:
            return True
        if any(
            package in file
            for package in ("torch/optim/", "torch/utils/data/", "pytorch_lightning/", "lightning_fabric/")
        ):
            return False
        frame = frame.f_back
    return True


# ---------------------------------------------------------------------------------------------- a GPU that is not there


@pytest.fixture(scope="module")
def mode() -> Iterator[FakeTensorMode]:
    """Tensors with a shape and a device, here or not, and without values."""
    colour.channels.cache_clear()
    yield FakeTensorMode()
    colour.channels.cache_clear()
    batch.cache_clear()


@pytest.fixture
def fake(mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """The same, with what needs a real GPU taken out: its random state, and the backward pass.

    Gradients are taken to be like what they are gradients of, which is true of torch's own; those that this package
    writes by hand have a test below.
    """
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    like = lambda outputs, inputs, *_, **__: tuple(torch.empty_like(i) for i in inputs)  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", like)
    return mode


def there(module: Module, fake: FakeTensorMode) -> Module:
    """The module on the GPU: `.cuda()` cannot replace parameters that are not fake by such as are."""
    state: dict[str, Any] = dict(module.state_dict())
    for name, value in state.items():
        if isinstance(value, Tensor):
            with fake:
                state[name] = fake.from_tensor(value).cuda(non_blocking=True)
    module.load_state_dict(state, assign=True)
    return module


@cache
def batch(mode: FakeTensorMode, negatives: str) -> Views:
    """As the DataModule makes it on the device, the second one: the first brings what is kept there."""
    labels = torch.zeros(12, dtype=torch.int64)
    data = Dataset("nothing", ["a", "b", "c"], 8, ArraySplit(torch.zeros(12, 3, 8, 8), labels), {})
    parts = build(node("augment", "imagenet")), build(node("negatives", negatives))
    with mode:
        labels = torch.zeros(12, dtype=torch.int64, device="cuda")
        data.train = ArraySplit(torch.zeros(12, 3, 8, 8, dtype=torch.uint8, device="cuda"), labels)
        loader = DataModule(data, *parts, batch_size=12, num_workers=0, seed=0, channels_last=True)
        loader.views(Batch(0, torch.arange(12, device="cuda")))
        with NoWait("cuda"):
            return loader.views(Batch(0, torch.arange(12, device="cuda")))


def node(group: str, name: str) -> dict[str, Any]:
    """The values of a YAML file."""
    return dict(composed(f"{group}={name}", "dataset=cifar10")[group])  # a data set has an augmentation of its own


def steps(method: Method, views: Views, regularizer: MetaSemanticRegularizer | None, meta: bool = False) -> None:
    """All that is done with a batch on the device, but for torch's optimisers."""
    step = Step(0, 10)
    targets = method.targets(views)
    output = method(views, targets, step)
    loss = output.loss
    if regularizer is not None:
        loss = loss + regularizer(views, output, step)
    assert loss.device.type == "cuda"
    for parameter in trainable(method).values():
        parameter.grad = torch.empty_like(parameter)
    if meta:
        assert regularizer is not None
        assert regularizer.optimizer is not None
        regularizer.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
        log = regularizer.before_step(Pass(method, views, targets, step, 0.1, None, output))
        assert log
        assert all(value.device.type == "cuda" for value in log.values())
    method.observe(targets, [embedding.detach() for embedding in output.embeddings])
    method.advance(step)
    assert all(tensor.device.type == "cuda" for tensor in method.state_dict().values())


@pytest.mark.parametrize("name", METHODS)
def test_all_is_on_the_device_and_nothing_waits_for_it(name: str, fake: FakeTensorMode) -> None:
    method = make_method(name, dtype=torch.float32)
    refused = {"regularizer", "negatives"} & method.refuses.keys()
    regularizer = None if refused else there(make_regularizer(method).float(), fake)
    there(method, fake)
    for negatives in NEGATIVES[:1] if refused else NEGATIVES:
        views = batch(fake, negatives)
        with fake, NoWait("cuda"):
            steps(method, views, None)
            if regularizer is not None:
                steps(method, views, regularizer, meta=negatives == "patch")


def test_a_tangent_by_difference_is_on_the_device(fake: FakeTensorMode) -> None:
    method, views = there(make_method("simclr", dtype=torch.float32), fake), batch(fake, "none")
    with fake, NoWait("cuda"):
        v = {name: torch.empty_like(parameter) for name, parameter in trainable(method).items()}
        for known in (None, method.encode(views)):
            parts = difference_tangent(method, views, Step(0, 10), v, 1e-5, known)
            assert all(z.device.type == "cuda" for part in parts for z in part)


def test_a_gradient_written_by_hand_is_on_the_device(fake: FakeTensorMode) -> None:
    with fake, NoWait("cuda"):
        anchors, bank = torch.empty(6, 4, device="cuda"), torch.empty(9, 4, device="cuda")
        left_out = torch.empty(6, 1, device="cuda", dtype=torch.long)
        context = SimpleNamespace(needs_input_grad=(True, True, False))
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        with torch.no_grad():
            sums = _LogSumExp.forward(context, anchors, bank, left_out)
            found = _LogSumExp.backward(context, sums)
        assert [(g.shape, g.device.type) for g in found[:2]] == [(anchors.shape, "cuda"), (bank.shape, "cuda")]


# ------------------------------------------------------------------------------------------------------- a real step


def words(name: str, negatives: str) -> list[str]:
    """Of a short run with MSR at every step."""
    config, sizes = method_config(name), {"hidden_dim": 16, "embedding_dim": 8, **SMALLER.get(name, {})}
    keys = [f"method.{key}={size}" for key, size in sizes.items() if key in config]
    return [f"method={name}", *keys, "regularizer=msr", "regularizer.every=1", f"negatives={negatives}"]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU may look at what it has drawn; a GPU never does."""
    monkeypatch.setattr(colour, "applies", lambda chosen: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", METHODS)
def test_training_reads_nothing_back(name: str) -> None:
    skip_refused(make_method(name), "regularizer", "negatives")
    data = dataset()
    with NoWait("cpu"):
        trained(*words(name, "patch"), data=data, log_every_n_steps=1000)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("negatives", ["texture", "phase"])
def test_making_negatives_reads_nothing_back(negatives: str) -> None:
    data = dataset()
    with NoWait("cpu"):
        trained(*words("simclr", negatives), data=data, log_every_n_steps=1000)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("keys", [("exact", "lr"), ("near_free", "relative"), ("double_backward", "lr")])
def test_no_meta_gradient_reads_anything_back(keys: tuple[str, str]) -> None:
    data, (mode, alpha) = dataset(), keys
    with NoWait("cpu"):
        of = [f"regularizer.mode={mode}", f"regularizer.alpha={alpha}"]
        trained(*words("simclr", "none"), *of, data=data, log_every_n_steps=1000)


# ------------------------------------------------------------------------------------------- and the tests would see it

FORGETS = {
    "a tensor on the host": lambda loss: loss.cpu(),
    "a number read back": lambda loss: loss * loss.detach().item(),
    "a list read back": lambda loss: loss * loss.detach().tolist(),
    "a decision": lambda loss: loss if loss > -1e9 else -loss,
    "a mask": lambda loss: loss[None][loss[None] > -1e9].sum(),
    "a choice": lambda loss: loss + 0 * loss.reshape(1).nonzero().sum(),
    "a number from the host": lambda loss: loss * torch.tensor(2.0, device=loss.device),
}


@pytest.mark.parametrize("what", FORGETS)
def test_it_is_seen_on_the_device(what: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SimCLR.loss
    monkeypatch.setattr(SimCLR, "loss", lambda *args: FORGETS[what](plain(*args)))
    method, views = there(make_method("simclr", dtype=torch.float32), fake), batch(fake, "none")
    with fake, NoWait("cuda"), pytest.raises((Waited, AssertionError)):
        steps(method, views, None)


@pytest.mark.parametrize("what", ["a number read back", "a decision", "a mask", "a choice"])
def test_it_is_seen_in_training(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BYOL.loss
    monkeypatch.setattr(BYOL, "loss", lambda *args: FORGETS[what](plain(*args)))
    data = dataset()
    with NoWait("cpu"), pytest.raises(Waited):
        trained(*words("byol", "patch"), data=data, log_every_n_steps=1000)
