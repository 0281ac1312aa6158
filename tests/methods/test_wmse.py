"""Where the sub-batches come from, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.toys import make_method, make_views

from icl_msr.core.errors import UserError
from icl_msr.losses.whitening import partition, wmse
from icl_msr.methods import Step


def test_sub_batches_depend_on_the_step_and_not_on_the_noise_of_a_rank() -> None:
    method, views = make_method("wmse"), make_views(n=8)  # two sub-batches of 4
    targets = method.targets(views)
    losses = [
        float(method(views, targets, step).loss.detach()) for step in (Step(3, 9, 1), Step(3, 9, 2), Step(4, 9, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_four_views_are_six_pairs() -> None:
    method, views = make_method("wmse"), make_views(n=8)
    four = replace(views, views=[*views.views, *make_views(n=8, seed=1).views])
    output = method(four, method.targets(four), Step(0, 9))
    parts = partition(8, 4, 1, 0)
    pairs = [wmse(torch.stack(pair), parts, 0.0) for pair in itertools.combinations(output.embeddings, 2)]
    assert len(pairs) == 6
    torch.testing.assert_close(output.loss, torch.stack(pairs).mean())
    assert len(output.pairs) == 2  # a regularizer compares the first two views


def test_a_batch_smaller_than_a_sub_batch_is_refused() -> None:
    method, views = make_method("wmse", whitening_size=8), make_views(n=6)
    with pytest.raises(UserError, match=r"whitening_size=8 is more than the 6 images.*loader.batch_size=8"):
        method(views, method.targets(views), Step(0, 10))


def test_a_sub_batch_too_small_for_the_embedding_is_refused() -> None:
    with pytest.raises(UserError, match=r"whitening_size=7 is too small to whiten 4 .*whitening_size=8 or more"):
        make_method("wmse", embedding_dim=4, whitening_size=7)
