"""A Slurm, which ends with the tests that use it."""

import pytest
from cluster import Cluster
from private_slurm import missing, private_slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Of two nodes with four GPUs each; all clusters are this one."""
    if reason := missing():
        pytest.skip(reason)
    with private_slurm(tmp_path_factory.mktemp("slurm")) as Cluster.slurm:
        yield Cluster.slurm
