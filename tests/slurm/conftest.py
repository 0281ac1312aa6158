from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm import Cluster, available


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM cluster of two nodes; `make test-slurm` installs what it needs."""
    if not available():
        pytest.skip("needs root, slurmctld, slurmd and munged")
    folder: Path = tmp_path_factory.mktemp("slurm")
    started = Cluster(folder)
    try:
        started.start()
        yield started
    finally:
        started.stop()
