"""One private cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe.errors import SuiteError
from tests.slurm.cluster import Slurm, private_slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running cluster of two nodes."""
    try:
        with private_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except SuiteError as error:
        pytest.exit(str(error), returncode=1)
