from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from icl_msr.evaluation.linear import LinearProbe, fit_linear_probe, hold_out

Blobs = Callable[..., tuple[Tensor, Tensor]]
SETTINGS = {"epochs": 30, "batch_size": 256, "held_out": 0.2, "seed": 0}
GRID = [1e-4, 1e-3, 3e-3, 1e-2, 1e-1]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def test_as_good_as_scikit_learn(blobs: Blobs) -> None:
    (features, labels), (queries, targets) = blobs(8000, seed=1), blobs(20000, seed=2)
    probe = fit_linear_probe(features, labels, 10, learning_rates=GRID, **(SETTINGS | {"epochs": 50}))
    scale = lambda values: ((values - features.mean(0)) / features.std(0)).numpy()  # noqa: E731
    reference = LogisticRegression(max_iter=1000).fit(scale(features), labels.numpy())
    ours = accuracy(probe(queries).argmax(1), targets)
    theirs = float(reference.score(scale(queries), targets.numpy()))
    assert 0.4 < theirs < 0.9
    assert abs(ours - theirs) <= 0.002


def test_heads_in_one_pass_equal_heads_alone(blobs: Blobs) -> None:
    features, labels = blobs(600, seed=1)
    together = fit_linear_probe(features, labels, 10, learning_rates=GRID, **SETTINGS).held_out_accuracies
    assert list(together) == GRID
    for rate, held_out_accuracy in list(together.items())[::2]:
        alone = fit_linear_probe(features, labels, 10, learning_rates=[rate], **SETTINGS)
        assert abs(alone.held_out_accuracies[rate] - held_out_accuracy) <= 1 / 120 + 1e-6


def test_the_best_held_out_rate_is_chosen_and_edges_are_flagged(blobs: Blobs) -> None:
    features, labels = blobs(1000, seed=1)
    probe = fit_linear_probe(features, labels, 10, learning_rates=GRID, **SETTINGS)
    assert probe.held_out_accuracies[probe.learning_rate] == max(probe.held_out_accuracies.values())
    assert not probe.at_edge
    low = fit_linear_probe(features, labels, 10, learning_rates=[1e-5, 1e-3], **SETTINGS)
    assert low.learning_rate == 1e-3
    assert low.at_edge
    assert not fit_linear_probe(features, labels, 10, learning_rates=[1e-3], **SETTINGS).at_edge


def test_works_on_inference_tensors_and_repeats_itself(blobs: Blobs) -> None:
    features, labels = blobs(300, seed=1)
    once = fit_linear_probe(features, labels, 10, learning_rates=GRID, **SETTINGS)
    with torch.inference_mode():
        again = fit_linear_probe(features.clone(), labels.clone(), 10, learning_rates=GRID, **SETTINGS)
    assert torch.equal(once.weight, again.weight)


def test_dead_channels_decide_nothing(blobs: Blobs) -> None:
    features, labels = blobs(300, seed=1)
    probe = fit_linear_probe(torch.cat([features, torch.zeros(300, 1)], 1), labels, 10, learning_rates=GRID, **SETTINGS)
    plain = fit_linear_probe(features, labels, 10, learning_rates=GRID, **SETTINGS)
    alive = torch.cat([features, torch.full((300, 1), 0.5)], 1)
    assert torch.equal(probe(alive).argmax(1), plain(features).argmax(1))
    assert isinstance(probe, LinearProbe)


def test_held_out_images() -> None:
    fit, held = hold_out(100, 0.2, seed=3)
    assert len(held) == 20
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(100))
    assert torch.equal(held, hold_out(100, 0.2, seed=3)[1])
    assert not torch.equal(held, hold_out(100, 0.2, seed=4)[1])
    assert [len(part) for part in hold_out(2, 0.01, seed=0)] == [1, 1]
