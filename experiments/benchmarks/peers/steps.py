"""A whole training step without a loader: forward and backward pass, optimiser, momentum encoder, queue.

All libraries train the same backbone with heads of the same sizes. Ours runs with the precision and the memory format
of `hardware=auto`, and once more with those that the others have by default: fp32, contiguous. lightly's parts are put
together as its examples do; stable-pretraining's are its own modules, which compute the loss of a step.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from experiments.benchmarks.peers.rows import OURS, OURS_AS_THEIRS, Calls, Row, Size, installed, plan
from icl_msr.core.config import build, check, config_dir
from icl_msr.core.views import Views
from icl_msr.methods import Method, Step

HIDDEN, EMBEDDING, QUEUE = 512, 64, 2048


def rows(size: Size) -> list[Row]:
    """Return a row for each method and backbone."""
    bodies = [("tiny", size(256, 8), 32), ("resnet18", 64, 32), ("resnet50", 8, 224)]
    return [
        Row(f"{name} step, {body}, {batch} images of {side} px", partial(_steps, name, body, batch, side))
        for body, batch, side in bodies[: size(3, 1)]
        for name in ("simclr", "moco", "byol")
    ]


def _steps(name: str, backbone: str, batch: int, side: int) -> Calls:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = check(compose("config", [f"method={name}", f"backbone={backbone}", "regularizer=none"]))
    body = build(settings.backbone, image_size=side)
    images = [torch.randn(batch, 3, side, side) for _ in range(3)]
    here = plan()

    def method() -> Method:
        part: Method = build(settings.method, backbone=copy.deepcopy(body), classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
        return part

    work: Calls = {
        OURS: _ours(method(), images, here.precision == "bf16-mixed", torch.channels_last),
        OURS_AS_THEIRS: _ours(method(), images, False, torch.contiguous_format),
    }
    if installed("lightly"):
        work["lightly"] = _lightly(name, copy.deepcopy(body), images[1:])
    if installed("stable_pretraining"):
        work["stable-pretraining"] = _stable(name, copy.deepcopy(body), images[1:])
    return work


def _ours(method: Method, images: list[Tensor], half: bool, layout: torch.memory_format) -> Callable[[], None]:
    method.to(memory_format=layout)
    whole, *views = [picture.contiguous(memory_format=layout) for picture in images]
    here = Views(whole, views, torch.arange(len(whole)), torch.zeros(len(whole), dtype=torch.long))
    adam, now = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-3), Step(0, 10)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            targets = method.targets(here)
            output = method(here, targets, now)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        method.advance(now)
        method.observe(targets, [e.detach() for e in output.embeddings])

    return step


def _lightly(name: str, body: Any, views: list[Tensor]) -> Callable[[], None]:
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    heads = {"simclr": SimCLRProjectionHead, "moco": MoCoProjectionHead, "byol": BYOLProjectionHead}
    head = heads[name](body.channels, HIDDEN, EMBEDDING)
    predictor = BYOLPredictionHead(EMBEDDING, HIDDEN, EMBEDDING) if name == "byol" else nn.Identity()
    slow_body, slow_head = copy.deepcopy(body), copy.deepcopy(head)
    deactivate_requires_grad(slow_body)
    deactivate_requires_grad(slow_head)
    contrast = NTXentLoss(0.2, memory_bank_size=(QUEUE, EMBEDDING)) if name == "moco" else NTXentLoss(0.2)
    cosine = NegativeCosineSimilarity()
    adam = torch.optim.Adam([*body.parameters(), *head.parameters(), *predictor.parameters()], 1e-3)
    first, second = views

    def slow(images: Tensor) -> Tensor:
        with torch.no_grad():
            keys: Tensor = slow_head(slow_body(images)).detach()
        return keys

    def step() -> None:
        if name != "simclr":
            update_momentum(body, slow_body, m=0.99)
            update_momentum(head, slow_head, m=0.99)
        if name == "simclr":
            loss = contrast(head(body(first)), head(body(second)))
        elif name == "moco":
            loss = contrast(head(body(first)), slow(second))
        else:
            predicted = [predictor(head(body(images))) for images in views]
            loss = (cosine(predicted[0], slow(second)) + cosine(predicted[1], slow(first))) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def _stable(name: str, body: Any, views: list[Tensor]) -> Callable[[], None]:
    import stable_pretraining as spt
    from stable_pretraining import forward

    head = _mlp(body.channels)
    batch = {"views": [{"image": images} for images in views]}
    if name == "simclr":
        module = spt.Module(
            forward=forward.simclr, backbone=body, projector=head, simclr_loss=spt.losses.NTXEntLoss(0.2)
        )
    elif name == "moco":
        module = spt.methods.MoCov2(body, projector_dims=(HIDDEN, EMBEDDING), queue_length=QUEUE)
    else:
        module = spt.Module(
            forward=forward.byol,
            backbone=spt.TeacherStudentWrapper(body),
            projector=spt.TeacherStudentWrapper(head),
            predictor=_mlp(EMBEDDING),
            byol_loss=spt.losses.BYOLLoss(),
        )
    module.log = lambda *_, **__: None  # there is no trainer
    adam = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-3)
    followers = [part for part in module.modules() if hasattr(part, "update_teacher")]

    def step() -> None:
        loss = module(*views).loss if name == "moco" else module(batch, stage="fit")["loss"]
        loss.backward()
        adam.step()
        adam.zero_grad()
        for follower in followers:
            follower.update_teacher()

    return step


def _mlp(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(channels, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, EMBEDDING)
    )
