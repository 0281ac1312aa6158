import copy

import pytest
import torch
from support.ranks import Ranks
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset, normalise
from icl_msr.evaluation.features import extract

HERE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "device": "cpu"}


def test_features_are_those_of_evaluation_mode(dataset: Dataset, background_encoder: nn.Module) -> None:
    reference = copy.deepcopy(background_encoder).eval()
    expected = reference(normalise(dataset.train.load(torch.arange(400)), HERE["mean"], HERE["std"]))  # type: ignore[arg-type]
    features = extract(background_encoder, dataset.train, batch_size=64, **HERE)
    torch.testing.assert_close(features, expected)
    assert features.dtype == torch.float32
    assert not features.is_inference()


def test_batch_size_and_index(dataset: Dataset, background_encoder: nn.Module) -> None:
    features = extract(background_encoder, dataset.train, batch_size=64, **HERE)
    torch.testing.assert_close(features, extract(background_encoder, dataset.train, batch_size=7, **HERE))
    index = torch.tensor([5, 2, 399])
    some = extract(background_encoder, dataset.train, batch_size=2, index=index, **HERE)
    torch.testing.assert_close(some, features[index])


def test_encoder_is_left_as_it_was(dataset: Dataset, background_encoder: nn.Module) -> None:
    state = copy.deepcopy(background_encoder.state_dict())
    modes = {name: module.training for name, module in background_encoder.named_modules()}
    assert set(modes.values()) == {True, False}
    extract(background_encoder, dataset.train, batch_size=64, **HERE)
    assert modes == {name: module.training for name, module in background_encoder.named_modules()}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in background_encoder.parameters())
    for name, value in background_encoder.state_dict().items():
        assert torch.equal(value, state[name])


def features_over_ranks(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    split = ArraySplit(pixels, torch.zeros(images, dtype=torch.int64))
    return extract(encoder, split, batch_size=8, over_ranks=True, **HERE)


@pytest.mark.parametrize("images", [70, 64, 3])  # a last batch that is short; even; fewer batches than ranks
def test_ranks_share_the_work_and_give_the_same_bits(two_ranks: Ranks, images: int) -> None:
    expected = features_over_ranks(images)
    for found in two_ranks(features_over_ranks, images):
        assert torch.equal(found, expected)


def test_autocast(dataset: Dataset) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    full = extract(encoder, dataset.train, batch_size=64, **HERE)
    half = extract(encoder, dataset.train, batch_size=64, autocast=torch.bfloat16, **HERE)
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


def test_divergence_is_said_in_words(dataset: Dataset) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    nn.init.constant_(encoder[1].bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        extract(encoder, dataset.train, batch_size=64, **HERE)


def test_progress_bar_shows_itself_only_when_it_takes_long(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    monkeypatch.setenv("FORCE_COLOR", "1")
    extract(encoder, dataset.train, batch_size=64, label="LABEL", **HERE)
    assert "LABEL" not in capsys.readouterr().err
    monkeypatch.setattr("icl_msr.evaluation.features._PATIENCE", 0.0)
    extract(encoder, dataset.train, batch_size=64, label="LABEL", **HERE)
    assert "LABEL" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    extract(encoder, dataset.train, batch_size=64, label="LABEL", **HERE)
    assert capsys.readouterr().err == ""  # a file would get blank lines
