from collections.abc import Iterator

import pytest
from support.ranks import Ranks
from support.toys import METHODS, make_method

from icl_msr.methods import Method


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two processes that work together, for a whole file."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    """Every method in turn, small, smooth and in float64."""
    return make_method(request.param)
