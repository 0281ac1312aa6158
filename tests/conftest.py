from collections.abc import Callable, Iterator

import pytest
from support.ranks import Ranks
from support.toys import METHODS, make_method

from icl_msr.methods import Method


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Ranks]]:
    """Processes that work together, by their number; started once, since each imports torch for seconds."""
    made: dict[int, Ranks] = {}
    yield lambda size: made.setdefault(size, Ranks(size))
    for pool in made.values():
        pool.close()


@pytest.fixture(scope="session")
def two_ranks(pools: Callable[[int], Ranks]) -> Ranks:
    """Two processes that work together."""
    return pools(2)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, pools: Callable[[int], Ranks]) -> Ranks:
    """Two and, among the slow tests, four processes that work together."""
    return pools(request.param)


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    """Every method in turn, small, smooth and in float64."""
    return make_method(request.param)
