from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.tiny import composed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from icl_msr.core.config import build, check
from icl_msr.core.randomness import permutation
from icl_msr.evaluation.linear import PROBES, LinearProbe, fit_linear_probe, hold_out

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


def test_wmse_is_their_loop(blobs: Blobs) -> None:
    """Raw features, a layer of nn, Adam with decay inside the gradient, one exponential from 1e-2 to 1e-6."""
    features, labels = blobs(600, seed=1)
    features = features.double()  # or Adam makes rounding large
    epochs, settings = 20, {"epochs": 20, "batch_size": 200, "held_out": 0.2, "seed": 3}
    probe = fit_linear_probe(features, labels, 10, learning_rates=[1e-2], preset="wmse", **settings)
    layer = zero_layer(features.shape[1], 10)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-6 / 1e-2) ** (1 / epochs))
    for epoch in range(epochs):
        for batch in permutation(3, epoch, 600).view(-1, 200):
            optimizer.zero_grad()
            cross_entropy(layer(features[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe(features), layer(features).detach())
    assert list(probe.held_out_accuracies) == [1e-2]


def test_moco_is_their_loop(blobs: Blobs) -> None:
    """Raw features, SGD with momentum, a tenth of the learning rate after 30, 40 and 50 of 60 epochs."""
    features, labels = blobs(256, seed=1)
    features = 0.02 * features.double()  # as small as those that a learning rate of 10 is meant for
    settings = {"epochs": 60, "batch_size": 128, "held_out": 0.2, "seed": 3}
    probe = fit_linear_probe(features, labels, 10, learning_rates=[10.0], preset="moco", **settings)
    layer = zero_layer(features.shape[1], 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0, momentum=0.9, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 40, 50], gamma=0.1)
    for epoch in range(60):
        for batch in permutation(3, epoch, 256).view(-1, 128):
            optimizer.zero_grad()
            cross_entropy(layer(features[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe(features), layer(features).detach())
    assert accuracy(probe(features).argmax(1), labels) > 0.5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("wmse_probe", {"probe": "wmse", "learning_rates": [1e-2], "probe_epochs": 500, "probe_batch_size": 1000}),
        ("moco_probe", {"probe": "moco", "learning_rates": [10.0], "probe_epochs": 60, "probe_batch_size": 128}),
    ],
)
def test_the_papers_settings(name: str, values: dict[str, Any]) -> None:
    node = check(composed(f"evaluation={name}")).evaluation[name]
    assert {key: node[key] for key in values} == values
    evaluation = build(node)
    assert str(evaluation.classifiers[-1]) == f"linear-{values['probe']}"


def test_schedules() -> None:
    """The shares of the learning rate at the first and the last epoch, and where it drops."""
    assert PROBES["ours"].factor(0, 50) == 1
    assert PROBES["ours"].factor(25, 50) == pytest.approx(0.5)
    assert PROBES["wmse"].factor(0, 500) == 1
    assert 1e-2 * PROBES["wmse"].factor(500, 500) == pytest.approx(1e-6)
    drops = [PROBES["moco"].factor(epoch, 60) for epoch in (0, 29, 30, 39, 40, 49, 50, 59)]
    assert drops == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def zero_layer(channels: int, classes: int) -> nn.Linear:
    layer = nn.Linear(channels, classes, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def test_one_image_a_class_chooses_no_learning_rate() -> None:
    """Held-out classes were never seen, so that nothing that is measured on them means anything."""
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    keys: Any = {"epochs": 5, "batch_size": 10, "held_out": 0.2, "seed": 0}
    for labels, rate in ((torch.arange(10), 1e-2), (torch.arange(10) % 2, None)):
        probe = fit_linear_probe(features, labels, 10, learning_rates=[1e-4, 1e-2, 1.0], **keys)
        best = max(probe.held_out_accuracies, key=probe.held_out_accuracies.__getitem__)
        assert probe.learning_rate == rate or (rate is None and probe.held_out_accuracies[best] > 0)
