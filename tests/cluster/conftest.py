"""The clusters, started once for all tests that need them; absent packages skip a test, or fail it where they must be there."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster import slurm as slurm_module
from tests.cluster.hosts import Hosts, problems, start_hosts
from tests.cluster.slurm import Slurm, start_slurm
from tests.helpers import jobs
from tests.helpers.launched import EXACT, copy_of, kill_left_over, prepare_folder

REQUIRED = "DSLLM_REQUIRE_CLUSTER"
"""Set to 1 where the packages are known to be installed (.ci/run): then a missing one is a failure."""


def need(found: Sequence[str]) -> None:
    """Skip the test, or fail it, where something that it needs is missing."""
    if not found:
        return
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but: {'; '.join(found)}")
    pytest.skip("; ".join(found))


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """A login host and two nodes with ssh and pdsh."""
    need(problems())
    folder = Path(tempfile.mkdtemp(prefix="dsllm-cluster-"))
    folder.chmod(0o755)  # munged insists that its socket can be reached by everybody
    try:
        with start_hosts(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def slurm(hosts) -> Iterator[Slurm]:
    """SLURM on the hosts."""
    need(problems(slurm_module.PROGRAMS))
    with start_slurm(hosts) as started:
        yield started


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with a run's YAML and its data."""
    folder = tmp_path_factory.mktemp("prepared") / "job"
    prepare_folder(folder)
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Iterator[Path]:
    """A folder of its own for a job; no process may be left in it."""
    yield copy_of(prepared, tmp_path / "job")
    left = kill_left_over(tmp_path)
    assert not left, f"left over: {left}"


@pytest.fixture(scope="session")
def reference(prepared, tmp_path_factory) -> Path:
    """The same run on two ranks of this machine, without a launcher."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("reference") / "job")
    codes, output = jobs.train(folder, 2, ["tiny.yaml", EXACT])
    assert codes == [0, 0], output
    return folder
