"""W ranks, each with its own part of the batch, equal one process on the whole batch: values and all derivatives.

`PYTHONPATH=tests python tests/core/test_distributed.py` prints the table.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.exactness import TOLERANCE, error, flat, mine, my_views
from support.ranks import Ranks
from support.toys import METHODS, make_method, make_regularizer, make_views, skip_refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from icl_msr.core.distributed import all_reduce_sum, average, gather, rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.views import Views
from icl_msr.methods import Method, Step
from icl_msr.methods.base import Targets
from icl_msr.models.batchnorm import GlobalBatchNorm, frozen_statistics, global_batch_norm
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.regularizers.bilevel import trainable

STEP = Step(0, 10, noise=3)
REGULARIZERS: dict[str, dict[str, Any]] = {
    "none": {},
    # gamma = 0 leaves the signal alone, which the uniformity loss would hide otherwise.
    "meta": {"weights": "meta", "gamma": 0.0},
    "difference": {"weights": "meta", "gamma": 0.0, "mode": "difference"},
    "near_free": {"weights": "meta", "gamma": 0.0, "mode": "near_free"},
    "projector": {"weights": "meta", "gamma": 0.0, "scope": "projector"},
    "sums": {"weights": "meta", "gamma": 0.0, "reduction": "sum", "alpha": "lr"},
    "double_backward": {"weights": "meta", "gamma": 0.0, "mode": "double_backward"},
    "joint": {"weights": "joint", "gamma": 0.0},
    "uniform_only": {"weights": "uniform_only"},
}
QUICK = ("none", "meta", "difference")
"""The other kinds are slow tests."""
IMAGES = 8


# ---------------------------------------------------------------------------------------------- one optimiser step


class Training(nn.Module):
    """The training loss as Lightning calls it: the module that DDP wraps."""

    def __init__(self, method: Method, regularizer: MetaSemanticRegularizer | None):
        super().__init__()
        self.method, self.regularizer = method, regularizer

    def forward(self, views: Views, targets: Targets) -> Tensor:
        output = self.method(views, targets, STEP)
        loss: Tensor = output.loss
        if self.regularizer is not None:
            loss = loss + self.regularizer(views, output, STEP)
        return loss


def one_step(name: str, kind: str, negatives: int) -> dict[str, dict[str, Tensor]]:
    """theta's and phi's gradients and the state after a step, on this rank."""
    method, views = make_method(name), my_views(make_views(IMAGES, negatives=negatives))
    regularizer = None if kind == "none" else make_regularizer(method, **REGULARIZERS[kind])
    training: nn.Module = Training(method, regularizer)
    if world_size() > 1:
        global_batch_norm(training)
        ignored = [name for name, _ in training.named_parameters() if name.startswith("regularizer.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(training, ignored)
        training = DistributedDataParallel(training, broadcast_buffers=False)
    targets = method.targets(views)
    training(views, targets).backward()
    theta = {n: p.grad.clone() for n, p in trainable(method).items() if p.grad is not None}
    phi: dict[str, Tensor] = {}
    if regularizer is not None:
        assert regularizer.optimizer is not None
        assert regularizer.network is not None
        network = regularizer.network

        def note(*_: Any) -> None:
            phi.update({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})

        regularizer.optimizer.register_step_pre_hook(note)
        regularizer.meta_step(method, views, targets, STEP, theta, 0.1)
    with torch.no_grad(), frozen_statistics(method):
        method.observe(targets, method(views, targets, STEP).embeddings)
    return {"theta": theta, "phi": phi, "buffers": dict(method.named_buffers())}


def groups(kind: str, negatives: int) -> list[str]:
    """What a method must not refuse."""
    return [*(["regularizer"] if kind != "none" else []), *(["negatives"] if negatives else [])]


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in REGULARIZERS])
@pytest.mark.parametrize("name", list(METHODS))
def test_ranks_equal_one_process(ranks: Ranks, name: str, kind: str, negatives: int) -> None:
    method = make_method(name)
    skip_refused(method, *groups(kind, negatives))
    expected = one_step(name, kind, negatives)
    assert flat(expected["theta"]).any() == any(p.requires_grad for p in method.backbone.parameters())
    assert bool(expected["phi"]) == (kind != "none")
    assert kind == "none" or flat(expected["phi"]).any()
    for found in ranks(one_step, name, kind, negatives):
        for part, tensors in expected.items():
            assert found[part].keys() == tensors.keys()
            if tensors:
                assert error(flat(found[part]), flat(tensors)) <= TOLERANCE, part


def inner_and_step(name: str) -> tuple[Tensor, Tensor]:
    """The inner gradient as the regularizer computes it by itself, and phi after such a step."""
    method, views = make_method(name), my_views(make_views(IMAGES))
    regularizer = make_regularizer(method)
    if world_size() > 1:
        global_batch_norm(method)
    targets = method.targets(views)
    with frozen_statistics(method):
        inner = regularizer.inner_gradient(method, views, targets, STEP)
    regularizer.meta_step(method, views, targets, STEP, None, 0.1)
    return flat(inner), flat(dict(regularizer.named_parameters())).detach()


@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_without_an_ordinary_one_is_exact_too(ranks: Ranks, name: str) -> None:
    skip_refused(make_method(name), "regularizer")
    expected = inner_and_step(name)
    for found in ranks(inner_and_step, name):
        assert error(found[0], expected[0]) <= TOLERANCE
        assert error(found[1], expected[1]) <= TOLERANCE


# ---------------------------------------------------------------------------------------------- the parts


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor, directions: list[Tensor]) -> list[Tensor]:
    """Value, jvp, the jvp's gradient, and one order of gradient more for each direction, on this rank."""
    x = x.clone().requires_grad_()
    value, tangent = torch.func.jvp(function, (x,), (directions[0],))
    along, found = function(x), [value.detach(), tangent.detach(), *torch.autograd.grad(tangent, x)]
    for direction in directions:
        (gradient,) = torch.autograd.grad(along, x, create_graph=True)
        found.append(gradient.detach())
        along = (gradient * direction).sum()
    return found


def curved(rows: Tensor, everyone: Tensor, total: Tensor) -> Tensor:
    """A scalar that depends on local rows, on all rows and on their sum, with all derivatives."""
    return (rows @ everyone.T).sin().sum() + (rows * total.tanh()).exp().sum()


def collectives(x: Tensor, directions: list[Tensor]) -> list[Tensor]:
    return derivatives(
        lambda rows: curved(rows, gather(rows.exp()), all_reduce_sum(rows.cos().sum(0))),
        mine(x),
        [mine(d) for d in directions],
    )


def test_collectives_have_the_closed_forms_derivatives(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *directions = list(torch.randn(4, IMAGES, 3, dtype=torch.float64, generator=generator))

    def everything(rows: Tensor) -> Tensor:
        """What the ranks' losses sum to, as a function of all rows."""
        return torch.stack([curved(r, rows.exp(), rows.cos().sum(0)) for r in rows.chunk(ranks.size)]).sum()

    expected = derivatives(everything, x, directions)
    found = ranks(collectives, x, directions)
    for order in range(2):
        assert error(sum(f[order] for f in found), expected[order]) <= 1e-12
    for order in range(2, 6):
        assert error(torch.cat([f[order] for f in found]), expected[order]) <= 1e-12


def gathered(x: Tensor) -> list[Tensor]:
    local = mine(x)
    return [gather(local), gather(local.to(torch.bfloat16)), *average([local, local[0, :1] * 2])]


def test_values_of_the_collectives(ranks: Ranks) -> None:
    x = torch.arange(IMAGES * 3.0).view(IMAGES, 3).mul_(2).long()
    parts = x.chunk(ranks.size)
    for everyone, half, mean, scaled in ranks(gathered, x.double()):
        assert torch.equal(everyone, x.double())
        assert torch.equal(half, x.to(torch.bfloat16))
        assert torch.equal(mean, torch.stack(parts).double().mean(0))
        assert torch.equal(scaled, 2 * torch.stack(parts).double().mean(0)[0, :1])


def test_one_process_needs_no_process_group() -> None:
    x = torch.randn(3, 2)
    assert gather(x) is x
    assert all_reduce_sum(x) is x
    assert average([x])[0] is x


def normalise(layer: nn.Module, parts: list[Tensor], directions: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives of a curved function of BatchNorm's output, on this rank's part, and the running statistics."""
    here = rank() if world_size() > 1 else 0
    layer.load_state_dict({**layer.state_dict(), "weight": torch.linspace(0.5, 2, 3), "bias": torch.arange(3.0)})

    def function(x: Tensor) -> Tensor:
        normalised: Tensor = layer(x)
        return normalised.sin().square().sum()

    sizes = [len(part) for part in parts]
    with frozen_statistics(layer):
        found = derivatives(function, parts[here], [torch.split(d, sizes)[here] for d in directions])
    for _ in range(3):
        layer(parts[here])
    return found, [b.detach() for b in layer.buffers()]


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_batch_norm_over_ranks(ranks: Ranks, shape: tuple[int, ...], momentum: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    # Torch's own BatchNorm has no third derivative, and its tangent a wrong gradient, which has to be H d.
    x, *directions = list(torch.randn(3, 10, *shape, dtype=torch.float64, generator=generator).add(2))
    sizes = [3, 7] if ranks.size == 2 else [1, 4, 3, 2]
    kind = nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d
    expected, buffers = normalise(kind(3, momentum=momentum).double(), [x], directions)
    layer = GlobalBatchNorm(3, momentum=momentum).double()
    expected[2] = expected[4]
    results = ranks(normalise, layer, list(torch.split(x, sizes)), directions)
    for order in range(2):
        assert error(sum(found[order] for found, _ in results), expected[order]) <= 1e-12
    for order in range(2, 5):
        assert error(torch.cat([found[order] for found, _ in results]), expected[order]) <= 1e-10
    for _, found in results:
        for a, b in zip(found, buffers, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (4, 3, 2, 2)])
def test_batch_norm_of_one_process_is_torchs(shape: tuple[int, ...], options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).mul_(3).add_(5)
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3, **options).double()
    ours = GlobalBatchNorm(3, **options).double()
    ours.load_state_dict(theirs.state_dict())
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_batch_norm_checks_its_own_derivatives() -> None:
    torch.manual_seed(0)
    layer = GlobalBatchNorm(3).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    with frozen_statistics(layer):
        assert torch.autograd.gradcheck(layer, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(layer, x)


def test_batch_norm_keeps_dtype_and_layout() -> None:
    x = torch.randn(4, 3, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    out = GlobalBatchNorm(3)(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, nn.BatchNorm2d(3)(x))


def test_conversion_is_in_place() -> None:
    layer, deeper = nn.BatchNorm2d(4), nn.BatchNorm1d(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Sequential(deeper))
    parameters, keys = list(net.parameters()), list(net.state_dict())
    assert global_batch_norm(net) is net
    assert net[1] is layer
    assert isinstance(layer, GlobalBatchNorm)
    assert isinstance(deeper, GlobalBatchNorm)
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert isinstance(global_batch_norm(nn.BatchNorm1d(2)), GlobalBatchNorm)


def test_a_batch_norm_that_does_more_is_refused() -> None:
    class NormAndActivation(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match=r"layer 0 is a NormAndActivation.*one device"):
        global_batch_norm(nn.Sequential(NormAndActivation(3)))


def gather_on(ranks: int) -> None:
    if rank() < ranks:
        gather(torch.zeros(1))


def test_a_deadlock_fails_instead_of_hanging() -> None:
    pool = Ranks(2)
    pool(gather_on, 2)
    pool.timeout = 1
    with pytest.raises(TimeoutError, match=r"ranks \{0\} of 2 .* deadlock"):
        pool(gather_on, 1)
    assert not pool.processes


# ---------------------------------------------------------------------------------------------- the table


def print_table() -> None:
    print("| method | regularizer | negatives | W | theta error | phi error |\n|---|---|---|---|---|---|")
    for size in (2, 4):
        pool = Ranks(size)
        for name in METHODS:
            for kind in REGULARIZERS:
                for negatives in (0, 2):
                    if make_method(name).refuses.keys() & groups(kind, negatives):
                        continue
                    expected = one_step(name, kind, negatives)
                    found = pool(one_step, name, kind, negatives)
                    worst = {
                        part: f"{max(error(flat(f[part]), flat(expected[part])) for f in found):.0e}"
                        for part in ("theta", "phi")
                        if expected[part]
                    }
                    cells = (name, kind, str(negatives), str(size), worst["theta"], worst.get("phi", ""))
                    print("| " + " | ".join(cells) + " |")
        pool.close()


if __name__ == "__main__":
    print_table()
