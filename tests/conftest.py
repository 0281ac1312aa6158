import pytest
from toys import METHODS, make_method

from icl_msr.methods import Method


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    """Every method in turn, small, smooth and in float64."""
    return make_method(request.param)
