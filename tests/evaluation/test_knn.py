from collections.abc import Callable

import pytest
import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn_predict
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize

from icl_msr.evaluation.knn import PRESETS, PresetName, knn_predict, knn_scores, neighbours

Blobs = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("preset", ["wmse", "icl"])
def test_majority_equals_scikit_learn(blobs: Blobs, preset: PresetName) -> None:
    (bank, bank_labels), (queries, _) = blobs(2000, seed=1), blobs(1000, seed=2)
    scale = normalize if preset == "icl" else torch.clone
    reference = KNeighborsClassifier(5).fit(scale(bank).numpy(), bank_labels.numpy()).predict(scale(queries).numpy())
    assert (knn_predict(bank, bank_labels, queries, preset, 10).numpy() == reference).all()


@pytest.mark.parametrize("preset", ["instdisc", "dino"])
def test_weighted_equals_lightly(blobs: Blobs, preset: PresetName) -> None:
    (bank, bank_labels), (queries, _) = blobs(2000, seed=1), blobs(1000, seed=2)
    k, temperature = PRESETS[preset].k, PRESETS[preset].temperature
    reference = lightly_knn_predict(normalize(queries), normalize(bank).T, bank_labels, 10, k, temperature)[:, 0]
    assert torch.equal(knn_predict(bank, bank_labels, queries, preset, 10), reference)


def test_presets_together_equal_presets_alone(blobs: Blobs) -> None:
    (bank, bank_labels), (queries, _) = blobs(300, seed=1), blobs(100, seed=2)
    together = knn_scores(bank, bank_labels, queries, list(PRESETS), 10)
    assert list(together) == list(PRESETS)
    for name, scores in together.items():
        assert torch.equal(scores, knn_scores(bank, bank_labels, queries, [name], 10)[name])


def test_chunks_do_not_matter_even_with_ties(blobs: Blobs) -> None:
    bank, _ = blobs(500, seed=1)
    bank, queries = torch.cat([bank, bank]), bank[:100]
    whole = neighbours(bank, queries, 8, normalised=True)
    for chunk_bytes in (1, 16 * 1000 * 7):
        chunked = neighbours(bank, queries, 8, normalised=True, chunk_bytes=chunk_bytes)
        assert torch.equal(whole[1], chunked[1])
        torch.testing.assert_close(whole[0], chunked[0], atol=1e-5, rtol=0)


def test_ties_go_to_the_earlier_image_and_the_smaller_class() -> None:
    bank, queries = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    _, positions = neighbours(bank, queries, 3, normalised=True)
    assert positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    labels = torch.tensor([3, 3, 1, 1, 2, 2, 2, 2])
    assert knn_predict(bank, labels, queries[:1], "wmse", 4).item() == 1  # two votes each for 1 and 3, one for 2


@pytest.mark.parametrize("k", [1, 5, 100, 599])
def test_more_ties_than_candidates(k: int) -> None:
    bank = torch.randint(
        3, (600, 3), generator=torch.Generator().manual_seed(0)
    ).float()  # 27 places, so about 22 at each
    _, positions = neighbours(bank, bank[:50], k, normalised=False)
    every = torch.cdist(bank[:50].double(), bank.double()).square().round().sort(stable=True).indices
    assert torch.equal(positions, every[:, :k])


@pytest.mark.parametrize("spread", [1.0, 1e-5])
@pytest.mark.parametrize("rough", [False, True])
def test_neighbours_are_those_of_float64(spread: float, rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where float32 cannot tell images apart, and where a setting makes its products rougher."""
    noise = torch.Generator().manual_seed(0)
    bank, queries = (spread * torch.randn(n, 8, generator=noise, dtype=torch.float64) for n in (3000, 50))
    bank[:, 0] += torch.tensor([3.0, 6.0]).repeat(1500)  # two groups, so that a shift of all images does not help
    if rough:
        exact = torch.mm
        monkeypatch.setattr(torch, "mm", lambda a, b, out: out.copy_(exact(a.bfloat16(), b.bfloat16())))
    order = torch.cdist(queries, bank).sort()
    distances, positions = neighbours(bank, queries, 20, normalised=False)
    assert torch.equal(positions, order.indices[:, :20])
    torch.testing.assert_close(distances, order.values[:, :20])


def test_distances_are_euclidean_and_k_is_clipped(blobs: Blobs) -> None:
    bank, queries = blobs(30, seed=1)[0], blobs(20, seed=2)[0]
    distances, positions = neighbours(bank, queries, 99, normalised=False)
    assert positions.shape == (20, 30)
    expected = torch.cdist(queries.double(), bank.double()).sort().values
    torch.testing.assert_close(distances, expected)


def test_collapsed_features_are_no_error() -> None:
    bank = torch.zeros(10, 3)
    for scores in knn_scores(bank, torch.arange(10), bank, list(PRESETS), 10).values():
        assert scores.isfinite().all()
