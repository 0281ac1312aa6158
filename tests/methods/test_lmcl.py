"""What is special to LMCL: SimCLR plus the polarization of distances."""

import pytest
import torch
from support.toys import make_method, make_views

from icl_msr.core.errors import UserError
from icl_msr.losses.penalties import polarization
from icl_msr.methods import Step


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_it_is_simclr_and_the_weighted_polarization(weight: float) -> None:
    views, outputs = make_views(negatives=1), {}
    for name, keys in (("simclr", {}), ("lmcl", {"weight": weight, "delta_plus": 0.2, "delta_minus": 0.6})):
        method = make_method(name, temperature=0.3, **keys)
        outputs[name] = method(views, method.targets(views), Step(0, 10))
    penalty = polarization(*outputs["lmcl"].embeddings, 0.2, 0.6)
    assert penalty > 0
    torch.testing.assert_close(outputs["lmcl"].loss, outputs["simclr"].loss + weight * penalty)


@pytest.mark.parametrize("delta_plus", [0.5, 0.7])
def test_a_margin_that_is_none_is_refused(delta_plus: float) -> None:
    with pytest.raises(UserError, match=r"delta_plus=.* is not below .*delta_minus=0.5"):
        make_method("lmcl", delta_plus=delta_plus, delta_minus=0.5)
