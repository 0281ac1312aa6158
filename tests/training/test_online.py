"""The online probe and kNN watch, and take no part."""

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from support.tiny import AfterBatch, dataset, trained

from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import knn_predict
from icl_msr.training.online import OnlineEvaluation

WORDS = ("method=simclr", "regularizer.every=1")


def online(data: Dataset | None = None, **keys: Any) -> OnlineEvaluation:
    return OnlineEvaluation(
        data or dataset(), 128, **{"every_n_epochs": 1, "seed": 0, "bank": 4000, "queries": 1000, **keys}
    )


def relabelled(change: dict[int, int]) -> Dataset:
    """The tiny data set with other labels at some places."""
    data = dataset()
    assert isinstance(data.train, ArraySplit)
    labels = data.train.labels.clone()
    for place, label in change.items():
        labels[place] = label
    return replace(data, train=ArraySplit(data.train.images, labels))


def test_watching_changes_nothing() -> None:
    watched = trained(*WORDS, callbacks=[online()], max_epochs=2)[0].state_dict()
    alone = trained(*WORDS, max_epochs=2)[0].state_dict()
    tensors = {name: value for name, value in alone.items() if isinstance(value, torch.Tensor)}
    assert tensors
    assert all(torch.equal(value, watched[name]) for name, value in tensors.items())


def test_knn_is_the_evaluations_knn_on_held_out_images() -> None:
    watch = online(bank=20, queries=16)
    module, trainer = trained(*WORDS, callbacks=[watch])
    assert len(watch.held) == 16
    assert len(watch.bank) == 20
    assert not set(watch.held.tolist()) & set(watch.fit.tolist())
    data = dataset()
    how: Any = {"mean": data.mean, "std": data.std, "device": "cpu", "batch_size": 64}
    bank, queries = (
        extract(module.method.backbone, data.train, index=index, **how) for index in (watch.bank, watch.held)
    )
    labels = data.train.labels
    expected = knn_predict(bank, labels[watch.bank], queries, "dino", 10) == labels[watch.held]
    assert float(trainer.callback_metrics["online/knn"]) == pytest.approx(float(expected.float().mean()))
    assert watch.probe is not None
    with torch.no_grad():
        hits = watch.probe(F.layer_norm(queries, queries.shape[1:])).argmax(1) == labels[watch.held]
    assert float(trainer.callback_metrics["online/probe"]) == pytest.approx(float(hits.float().mean()))


def test_the_probe_never_sees_a_held_out_label() -> None:
    """Other labels there leave its weights alone; other labels elsewhere do not."""

    def probe(data: Dataset) -> torch.Tensor:
        watch = online(data, queries=16)
        trained("method=simclr", "regularizer=none", callbacks=[watch], data=data, limit_train_batches=8)
        assert watch.probe is not None
        return watch.probe.weight

    watch = online(queries=16)
    weight = probe(dataset())
    assert torch.equal(weight, probe(relabelled(dict.fromkeys(watch.held.tolist(), 0))))
    assert not torch.equal(weight, probe(relabelled(dict.fromkeys(watch.fit.tolist(), 0))))


def test_unlabelled_images_are_neither_bank_nor_question() -> None:
    watch = online(relabelled(dict.fromkeys(range(0, 64, 2), -1)))
    assert all(place % 2 for place in [*watch.fit.tolist(), *watch.held.tolist(), *watch.bank.tolist()])
    assert watch.fits.nonzero().flatten().tolist() == sorted(watch.fit.tolist())


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2]), (2, [1, 2]), (5, [2])])
def test_every_few_epochs_and_at_the_end(every: int, expected: list[int]) -> None:
    seen: list[int] = []

    class Watch(OnlineEvaluation):
        def _features(self, module: Any, index: torch.Tensor) -> torch.Tensor:
            seen.append(module.current_epoch)
            return super()._features(module, index)

    callbacks: list[pl.Callback] = [Watch(dataset(), 128, every_n_epochs=every, seed=0, bank=4000, queries=1000)]
    trained("method=simclr", "regularizer=none", callbacks=callbacks, max_epochs=3, limit_train_batches=1)
    assert seen == expected


def test_the_encoder_stays_in_training_mode() -> None:
    modes = AfterBatch(lambda module: module.method.backbone.training)
    trained(*WORDS, callbacks=[online(), modes], max_epochs=2, limit_train_batches=1)
    assert modes.seen == [True, True]


def test_a_probe_learns() -> None:
    """Where the features say the class (it is the grey level), both are right."""
    data = dataset()
    labels = torch.arange(64) % 4
    images = (labels * 60)[:, None, None, None].byte().expand(-1, 3, 32, 32).contiguous()
    split = ArraySplit(images, labels)
    told = Dataset("grey", ["0", "1", "2", "3"], 32, split, {"test": split}, mean=data.mean, std=data.std)
    words = ("method=simclr", "regularizer=none", "augment.jitter_probability=0.0", "optimizer.lr=1e-9")
    _, trainer = trained(*words, callbacks=[online(told)], data=told, max_epochs=6, limit_train_batches=8)
    assert float(trainer.callback_metrics["online/knn"]) > 0.9
    assert float(trainer.callback_metrics["online/probe"]) > 0.9
