"""What is said of strata is what they are."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ranks import Ranks
from support.tiny import trained
from support.toys import make_method, make_regularizer, make_views
from torch import Tensor, nn

from icl_msr.core.distributed import average
from icl_msr.methods import Step
from icl_msr.methods.base import Pair
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.regularizers.strata import diversity, random_partition, uniform

WEIGHTS = ("meta", "uniform_only", "joint", "random_net", "random", "ones")
STEP = Step(0, 10, noise=3)


def test_entropy_counts_the_channels_that_matter() -> None:
    one_channel = torch.eye(8)[:3].expand(5, 3, 8)
    for strata, expected in (
        (uniform(8).expand(5, 1, 8), 1.0),
        (one_channel, 0.0),
        (random_partition(12, 3, 0).expand(5, 3, 12), math.log(4) / math.log(12)),
        (torch.cat([uniform(8).expand(5, 3, 8), one_channel], 1), 0.5),
    ):
        assert float(diversity(strata)["entropy"]) == pytest.approx(expected, abs=1e-6)


def test_overlap_is_the_mean_cosine_of_two_different_strata() -> None:
    turn = torch.tensor([0.0, 0.3, 1.2])
    strata = torch.stack([turn.cos(), turn.sin()], 1)[None]
    expected = (math.cos(0.3) + math.cos(1.2) + math.cos(0.9)) / 3
    assert float(diversity(strata)["overlap"]) == pytest.approx(expected, abs=1e-6)
    assert float(diversity(random_partition(12, 3, 0)[None])["overlap"]) == 0
    assert "overlap" not in diversity(uniform(8)[None])


def test_variation_is_between_images_alone() -> None:
    assert float(diversity(random_partition(12, 3, 0).expand(9, 3, 12))["variation"]) == pytest.approx(0, abs=1e-6)
    of_their_own = torch.eye(8)[:, None]  # image i has channel i
    assert float(diversity(of_their_own)["variation"]) == pytest.approx(1 - 1 / 8)
    half = torch.cat([of_their_own, torch.eye(8)[:1].expand(8, 1, 8)], 1)
    assert float(diversity(half)["variation"]) == pytest.approx((1 - 1 / 8) / 2)


def make_pairs(head: nn.Module, n: int = 6) -> list[Pair]:
    torch.manual_seed(2)
    features = torch.rand(2, n, 8, dtype=torch.float64)
    keys = [head(z) for z in features]
    return [Pair(keys[i], keys[1 - i], features[1 - i], head) for i in (0, 1)]


@pytest.mark.parametrize("negatives", ["method", "none"])
def test_the_loss_of_a_stratum_is_the_penalty_with_it_alone(negatives: str) -> None:
    """Of a head that sees each row by itself."""
    regularizer = make_regularizer(make_method("simclr"), negatives=negatives)
    pairs, images = make_pairs(nn.Linear(8, 5).double()), make_views().images
    found, strata = regularizer.diagnostics(images, pairs), regularizer.strata(images)
    alone = torch.stack([found[f"loss_{t}"] for t in (1, 2, 3)])
    for t, loss in enumerate(alone):
        torch.testing.assert_close(loss, regularizer.penalty(pairs, strata[:, t : t + 1]))
    assert regularizer.penalty(pairs, strata).detach() < alone.mean()  # the log of a mean against a mean of logs


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_diagnostics_of_every_control(weights: str, n: int) -> None:
    method, views = make_method("simclr"), make_views()
    regularizer = make_regularizer(method, weights=weights, n=n)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    found = regularizer.diagnostics(views.images, method(views, method.targets(views), STEP).pairs)
    count = 1 if weights == "ones" else n
    overlap = {"overlap"} if count > 1 else set()
    assert found.keys() == {"entropy", "variation", *(f"loss_{t + 1}" for t in range(count))} | overlap
    assert all(value.shape == () and value.isfinite() and not value.requires_grad for value in found.values())
    # The forward pass above is the only one that moves the running statistics.
    again = make_method("simclr")
    again(views, again.targets(views), STEP)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in method.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in method.state_dict().items())


def diagnostics_of_a_rank() -> dict[str, Tensor]:
    """Averaged over ranks, as training logs it; each rank has its own half of the images."""
    method, views = global_batch_norm(make_method("simclr")), make_views(n=8)
    regularizer = make_regularizer(method)
    if torch.distributed.is_initialized():
        rows = slice(4, 8) if torch.distributed.get_rank() else slice(0, 4)
        parts: Any = {name: getattr(views, name)[rows] for name in ("whole", "index", "labels")}
        views = replace(views, views=[view[rows] for view in views.views], **parts)
    found = regularizer.diagnostics(views.images, method(views, method.targets(views), STEP).pairs)
    return dict(zip(found, average(list(found.values())), strict=True))


def test_ranks_say_what_one_process_says(two_ranks: Ranks) -> None:
    expected = diagnostics_of_a_rank()
    for found in two_ranks(diagnostics_of_a_rank):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", ["meta", "ones"])
def test_training_logs_them_and_is_not_changed_by_it(weights: str) -> None:
    words = ("method=simclr", f"regularizer.weights={weights}", "regularizer.every=1")
    watched, trainer = trained(*words)
    unwatched, silent = trained(*words, log_every_n_steps=50)
    logged = {name for name in trainer.logged_metrics if name.startswith("msr/")}
    assert {"msr/entropy", "msr/variation", "msr/loss_1"} <= logged
    assert ("msr/overlap" in logged) == (weights == "meta")
    assert "msr/entropy" not in silent.logged_metrics
    for name, value in watched.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, unwatched.state_dict()[name]), name
