"""The shuffled BatchNorm of MoCo: each rank normalises by itself, and keys visit another rank than their queries."""

import pytest
import torch
from support.exactness import my_views
from support.ranks import Ranks
from support.tiny import composed
from support.toys import make_method, make_views
from torch import Tensor

from icl_msr.cli.assemble import require_meaning
from icl_msr.core.config import check
from icl_msr.core.distributed import rank
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.methods import MoCo, Step

N = 8


def moco() -> MoCo:
    method = make_method("moco", batch_norm=False, shuffle_batch_norm=True)
    assert isinstance(method, MoCo)
    return method


def on_this_rank() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    method, views = moco(), my_views(make_views(n=N, negatives=1))
    targets = method.targets(views)
    queries = method.project(method.encode(views))[0]
    method.advance(Step(0, 10))
    statistics = torch.cat([b.double().flatten() for b in method.backbone.buffers()])
    assert targets.negatives is not None
    return targets.embeddings[0], targets.features[0], queries.detach(), statistics


def test_keys_are_normalised_on_other_ranks(ranks: Ranks) -> None:
    embeddings, features, queries, statistics = zip(*ranks(on_this_rank), strict=True)
    method, views = moco(), make_views(n=N, negatives=1)
    index = views.index
    order = keys(0, 0, index + index.sum(), -7).argsort(stable=True)
    share = N // ranks.size
    expected, of_features = torch.empty_like(torch.cat(embeddings)), torch.empty_like(torch.cat(features))
    for part in order.split(share):  # the images that one rank encodes
        found = method.momentum_encoder.backbone(views.views[1][part])
        of_features[part], expected[part] = found, method.momentum_encoder.projector(found)
    torch.testing.assert_close(torch.cat(embeddings), expected)
    torch.testing.assert_close(torch.cat(features), of_features)
    own = [method.projector(method.backbone(part)) for part in views.views[0].split(share)]
    torch.testing.assert_close(torch.cat(queries), torch.cat(own))
    assert all(torch.equal(statistics[0], other) for other in statistics)
    together = method.momentum_encoder(views.views[1])
    assert not torch.allclose(expected, together)  # statistics of the ranks differ from those of all images
    in_place = torch.cat([method.momentum_encoder(part) for part in views.views[1].split(share)])
    assert not torch.allclose(expected, in_place)  # and the keys were dealt out
    assert rank() == 0


def test_what_it_needs_is_said() -> None:
    words = ("method=moco", "method.batch_norm=false", "method.shuffle_batch_norm=true")
    with pytest.raises(UserError, match=r"needs two devices or more.*hardware\.devices=2"):
        require_meaning(check(composed(*words, "regularizer=none")), moco(), 1)
    with pytest.raises(UserError, match=r"^regularizer: method\.shuffle_batch_norm=true .*; add regularizer=none"):
        require_meaning(check(composed(*words, "regularizer=msr")), moco(), 2)
    with pytest.raises(UserError, match=r"method\.batch_norm=false"):
        make_method("moco", batch_norm=True, shuffle_batch_norm=True)
