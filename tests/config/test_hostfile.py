"""Hostfiles as they are in the field: the forms of DeepSpeed and Open MPI are read, all others are refused by line."""

import os
import random
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from dsllm.config.hostfile import hostfile_text, read_hostfile
from dsllm.config.load_cluster import load_cluster
from dsllm.errors import ConfigError


def write(folder: Path, content: str | bytes) -> Path:
    file = folder / "hosts"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("content", "hosts"),
    [
        ("alice@node1 slots=8\n", {"alice@node1": 8}),
        ("a.b-c_1@10.0.0.1 slots=8\n", {"a.b-c_1@10.0.0.1": 8}),
        ("2001:db8::2 slots=8\n", {"2001:db8::2": 8}),
        ("[2001:db8::2] slots=8\n", {"2001:db8::2": 8}),
        ("root@fd00::1 slots=1", {"root@fd00::1": 1}),
        ("node1 slots=4 max_slots=8\nnode2 slots=4 max-slots=4\n", {"node1": 4, "node2": 4}),
        (b"\xef\xbb\xbfnode1 slots=8\r\n", {"node1": 8}),
        ("# hosts\n\n  node1\tslots=08   # eight \n\nNode_2.local slots=1   ", {"node1": 8, "Node_2.local": 1}),
        ("node1 slots=1\rnode2 slots=1\r", {"node1": 1, "node2": 1}),
    ],
)
def test_forms_that_are_read(tmp_path, content, hosts):
    assert {host.name: host.slots for host in read_hostfile(write(tmp_path, content))} == hosts


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("node1", "write slots=N, the number of ranks on this host"),
        ("node1 slots = 8", "write slots=N"),
        ("node1 SLOTS=8", "write slots=N"),
        ("node1 slots=8 max_slots=4", "max_slots=4 is below slots=8"),
        ("node1 slots=8 port=22", "write slots=N"),
        ("node1 max_slots=8", "write slots=N"),
        ("node1 slots=0", "at least 1"),
        ("node1 slots=-1", "write slots=N"),
        ("node1 slots=9999999", "write slots=N"),
        ("node1 slots=\u0663", "write slots=N"),
        ("node[1-4] slots=8", "is not a host name"),
        ("node1:22 slots=8", "a port belongs in ssh.port"),
        ("fe80::1%eth0 slots=8", "is not a host name"),
        ("-oProxyCommand=x@node1 slots=8", "is not a user name"),
        ("@node1 slots=8", "is not a user name"),
        ("a b@node1 slots=8", "write slots=N"),
        ("x;y@node1 slots=8", "is not a user name"),
        ("user@-oX slots=8", "is not a host name"),
        ("node1\0 slots=8", "is not a host name"),
        ("n" * 10_000 + "$ slots=8", "is not a host name"),
    ],
)
def test_lines_that_are_refused_with_their_number(tmp_path, line, says):
    file = write(tmp_path, f"first slots=1\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(file)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(f"{file}:2: ")
    assert says in caught.value.problems[0] and len(caught.value.problems[0]) < 400


@pytest.mark.parametrize("again", ["node1 slots=1", "NODE1 slots=1", "bob@node1 slots=1", "node1 slots=2 max_slots=2"])
def test_a_host_twice_is_refused_however_it_is_written(tmp_path, again):
    with pytest.raises(ConfigError, match=r":2: .*is already on line 1"):
        read_hostfile(write(tmp_path, f"node1 slots=2\n{again}\n"))


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_hostfile(write(tmp_path, "node\n" * 1000))
    assert len(caught.value.problems) == 21 and caught.value.problems[-1] == "and 980 more lines"


def test_what_is_no_readable_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"node1 slots=1\n" * 2**19)
    refused = {
        "absent": "no such file; without it the job would run on this machine alone",
        ".": "is a folder",
        "pipe": "is a device, a pipe or a socket",
        "large": "bytes long; at most",
        "a\0b": "cannot be read",
    }
    for name, says in refused.items():
        with pytest.raises(ConfigError, match=says):
            read_hostfile(tmp_path / name)
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 5\)"):
        read_hostfile(write(tmp_path, b"node1\xff slots=1"))


def test_users_and_ipv6_addresses_reach_ssh_and_rank_0_as_each_takes_them(tmp_path):
    cluster = load_cluster(None, str(write(tmp_path, "alice@node1 slots=8\n2001:db8::2 slots=8\n")))
    assert [host.address for host in cluster.hosts] == ["node1", "2001:db8::2"]
    assert [host.name for host in cluster.hosts] == ["alice@node1", "2001:db8::2"]
    with pytest.raises(ConfigError, match="IPv6 address, which Open MPI does not read in a hostfile"):
        load_cluster(None, str(tmp_path / "hosts"), "mpi")


PARTS = [
    *("node1", "node2", "alice@", "10.0.0.1", "2001:db8::2", " ", "\t", " slots=", " max_slots=", "8", "4", "0", "-1"),
    *("\n", "\r\n", "#", "[", "]", "=", "\0", "\ufeff", "\u2028", "\x0c", "x" * 300, "9" * 50, "é", ";", "$(x)", "'"),
    *("%", ":", "@", "-", ",", "\\"),
]
GOOD = "node1 slots=8\nalice@node2.local slots=4 max_slots=8 # four\n2001:db8::2 slots=2\n"


def damaged(numbers: random.Random) -> bytes:
    """A hostfile with parts inserted, cut out, doubled, or of parts alone; sometimes with a byte changed."""
    text = GOOD if numbers.random() < 0.7 else ""
    for _ in range(numbers.randint(1, 6)):
        at = numbers.randint(0, len(text))
        cut = at + numbers.choice([0, 0, 1, 5])
        text = text[:at] + numbers.choice(PARTS) + text[cut:]
    content = bytearray(text.encode())
    if content and numbers.random() < 0.2:
        content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    return bytes(content)


def check_damaged(folder: Path, seeds: range) -> set[str]:
    outcomes = set()
    for seed in seeds:
        file = write(folder, content := damaged(random.Random(seed)))
        try:
            hosts = read_hostfile(file)
        except ConfigError as error:
            assert str(error) and len(str(error)) < 10_000
            outcomes.add("refused")
        else:
            assert hosts and all(host.slots >= 1 for host in hosts), content
            written = write(folder, hostfile_text(hosts))
            assert read_hostfile(written) == hosts  # and for DeepSpeed the file means the same
            assert dict(fetch_hostfile(str(written))) == {host.name: host.slots for host in hosts}, content
            outcomes.add("read")
    return outcomes


def test_damaged_hostfiles_are_read_right_or_refused(tmp_path):
    """1,000 files."""
    assert check_damaged(tmp_path, range(1000)) == {"read", "refused"}


@pytest.mark.slow
def test_many_damaged_hostfiles(tmp_path):
    """20,000 files."""
    check_damaged(tmp_path, range(1000, 21_000))
