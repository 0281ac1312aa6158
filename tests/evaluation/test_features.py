import copy

import pytest
import torch
from torch import nn

from icl_msr.data.dataset import Dataset, normalise
from icl_msr.errors import UserError
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
