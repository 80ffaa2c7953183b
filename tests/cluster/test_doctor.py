"""dsllm doctor on two hosts: it sees both, the network between them, and a folder that only one of them has."""

import json
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESSES, NODES
from tests.helpers.launched import BIN, ROOT, launch

pytestmark = pytest.mark.long


def examine(hosts, folder: Path, *words: str) -> tuple[int, dict, str]:
    """Exit code, JSON and output of the doctor on both nodes."""
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NODES))
    command = [
        str(BIN / "deepspeed"),
        "--hostfile",
        "hosts",
        str(ROOT / "launch" / "doctor.py"),
        "--json",
        "doctor.json",
    ]
    job = launch(hosts.login.command([*command, *words], folder), folder)
    code = job.wait()
    return code, json.loads((folder / "doctor.json").read_text()), job.output()


def test_both_hosts_are_seen(hosts, folder):
    code, data, output = examine(hosts, folder)
    assert [rank["place"]["host"] for rank in data["ranks"]] == list(NODES)
    for rank in data["ranks"]:
        assert rank["network"]["gloo"].endswith(ADDRESSES[rank["place"]["host"]])
    assert (code == 0) == data["passed"] and "2 ranks on 2 hosts" in output, output
    assert not [finding for finding in data["findings"] if finding["check"] == "network"], output


def test_a_folder_that_is_not_shared_is_named(hosts, folder):
    """/run is each node's own."""
    code, data, output = examine(hosts, folder, "tiny.yaml", "run.directory=/run/job")
    assert code != 0 and not data["passed"]
    assert any("another disk" in f["problem"] and f["where"] == "rank 1 on n2" for f in data["findings"]), output
