"""Damaged cluster files: each is refused in words, or loads as a cluster that can be written, read again and launched."""

import random
import re
from pathlib import Path

import pytest

from dsllm.config.load_cluster import cluster_text, load_cluster
from dsllm.errors import ConfigError
from dsllm.launch.commands import make_launch
from dsllm.launch.job import Job

SHIPPED = Path(__file__).parents[2] / "launch" / "cluster"
GOOD = [
    *(file.read_text() for file in sorted(SHIPPED.glob("*.yaml"))),
    """\
hosts:
  - {name: n1, slots: 8}
  - {name: alice@10.0.0.2, slots: 4}
interface: ib0
port: 29500
environment: {NCCL_DEBUG: WARN, OMP_NUM_THREADS: 4}
ssh: {options: [-i, /home/me/a key], port: 22}
timeouts: {save_seconds: 600, end_seconds: 90, connect_seconds: 15}
shared_directory: /scratch
modules: [cuda/12]
virtual_environment: ~/venv
""",
    """\
slurm:
  partition: gpu
  nodes: 2
  tasks_per_node: 8
  gres: gpu:8
  time_limit: 1-00:00:00
  signal_seconds: 300
  memory: 0
  options: [--exclusive]
  start: ssh
container: {image: /x.sif, runtime: apptainer, mounts: [/a, '/b:/c'], options: []}
mpi: {program: mpirun, options: [--bind-to, none]}
master_address: n1
""",
]
ODD = [
    *("null", "~", "[]", "{}", "[1]", "{a: 1}", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "9" * 30, "true", "no", "''"),
    *("' '", '"\\0"', '"a\\nb"', "2001:db8::1", "a@b", "x" * 3000, "1.5", "0x1F", "é", "$(x)", "!!python/object:x", "? ", "- "),
    *("'", '"', "|", "[", "{", ": ", "%", "@", "\t", "\x00", "\ud7ff", "${HOME}", "~/x", "${NO_SUCH}", "$", "1-", "--x", "1e9"),
    *("mpi", "slurm", "torchrun", "local", "deepspeed", "srun", "pyxis"),
]  # fmt: skip
VALUE = re.compile(r"(?<=:)( +)([^,{}\[\]\n#]+)")


def damaged(numbers: random.Random) -> str:
    """A good file with values replaced, texts put in, parts cut out, or the end lost."""
    text = numbers.choice(GOOD)
    for _ in range(numbers.randint(1, 4)):
        kind, values = numbers.random(), list(VALUE.finditer(text))
        at = numbers.randint(0, len(text))
        if kind < 0.6 and values:
            value = numbers.choice(values)
            text = text[: value.start(2)] + numbers.choice(ODD) + text[value.end(2) :]
        elif kind < 0.75:
            text = text[:at] + numbers.choice(ODD) + text[at:]
        elif kind < 0.9:
            text = text[:at] + text[at + numbers.randint(1, 30) :]
        else:
            text = text[:at]
    return text


def check_damaged(folder: Path, seeds: range) -> set[str]:
    outcomes, file = set(), folder / "cluster.yaml"
    job = Job(name="x-1", run_name="x", words=(), directory=folder, run_directory=folder / "runs" / "x")
    for seed in seeds:
        file.write_bytes(damaged(random.Random(seed)).encode("utf-8", "surrogatepass"))
        try:
            cluster = load_cluster(str(file))
        except ConfigError as error:
            assert str(error) and len(str(error)) < 30_000
            outcomes.add("refused")
            continue
        outcomes.add(cluster.chosen_launcher)
        launch = make_launch(job, cluster)
        assert launch.commands and all("\0" not in text for text in launch.files.values())
        file.write_text(cluster_text(cluster))
        assert load_cluster(str(file)) == cluster
    return outcomes


def test_damaged_files_are_read_right_or_refused(tmp_path):
    """600 files."""
    assert check_damaged(tmp_path, range(600)) >= {"refused", "slurm", "deepspeed", "mpi"}


@pytest.mark.slow
def test_many_damaged_files(tmp_path):
    """2,000 files."""
    check_damaged(tmp_path, range(600, 2600))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slurm: {nodes: 9999999999999}", "slurm.nodes: must be at least 1 and at most 1000000"),
        ("slurm: {nodes: 1000000, tasks_per_node: 8}", "at most 1,000,000 ranks"),
        ("slurm: {signal_seconds: 100000}", "slurm.signal_seconds: must be at least 1 and at most 65535"),
        ("slots: 9999999999999", "slots: must be at least 1"),
        ("hosts: [{name: a, slots: 999999}, {name: b, slots: 999999}]", "have 1,999,998 slots together"),
        ("timeouts: {save_seconds: .inf}", "timeouts.save_seconds"),
        ("timeouts: {end_seconds: .nan}", "timeouts.end_seconds"),
        ("timeouts: {connect_seconds: 9999999999}", "timeouts.connect_seconds"),
        ("hosts: [{name: N1, slots: 1}, {name: n1, slots: 1}]", "already host 0"),
        ("hosts: [{name: a@n1, slots: 1}, {name: b@n1, slots: 1}]", "already host 0"),
        ("hosts: [{name: '-x@n1', slots: 1}]", "is not a user name"),
        ("hosts: [{name: 'n1:22', slots: 1}]", "a port belongs in ssh.port"),
        ("launcher: mpi\nhosts: [{name: '2001:db8::1', slots: 1}]", "IPv6 address, which Open MPI does not read"),
        ("hosts: n1", "hosts"),
        ("hosts: [n1]", "hosts.0"),
        ("slurm: [1]", "slurm"),
    ],
)
def test_absurd_numbers_and_names_are_refused(tmp_path, text, says):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_cluster(str(tmp_path / "cluster.yaml"))


def test_ipv6_addresses_are_hosts_and_masters(tmp_path):
    (tmp_path / "cluster.yaml").write_text("hosts: [{name: 'a@2001:db8::1', slots: 1}]\nmaster_address: fd00::1\n")
    cluster = load_cluster(str(tmp_path / "cluster.yaml"))
    assert cluster.hosts[0].address == "2001:db8::1" and cluster.master_address == "fd00::1"
