"""A cluster loads as written; hostile or mistaken input is refused before anything runs, with file and line."""

import dataclasses
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from dsllm.config.check_cluster import seconds_of
from dsllm.config.cluster import ClusterConfig, HostConfig
from dsllm.config.hostfile import hostfile_text, read_hostfile
from dsllm.config.load_cluster import load_cluster
from dsllm.errors import ConfigError

GOOD = """\
hosts:
  - {name: n1, slots: 8}
  - {name: 10.0.0.2, slots: 4}
interface: ib0
environment: {NCCL_DEBUG: WARN, OMP_NUM_THREADS: 4, NOTE: "it's $HOME\\n`x`"}
ssh: {options: [-i, /home/me/a key]}
"""


def load(folder: Path, text: str) -> ClusterConfig:
    (folder / "cluster.yaml").write_text(text)
    return load_cluster(str(folder / "cluster.yaml"))


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return [problem.removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_what_is_written_is_what_is_read(tmp_path):
    cluster = load(tmp_path, GOOD)
    assert cluster.chosen_launcher == "deepspeed" and cluster.num_ranks == 12
    assert cluster.environment == {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": 4, "NOTE": "it's $HOME\n`x`"}


@pytest.mark.parametrize(
    ("text", "launcher"),
    [("", "local"), ("slurm: {}", "slurm"), (GOOD, "deepspeed"), (GOOD + "launcher: mpi", "mpi"), ("ssh:\n", "local")],
)
def test_the_launcher_follows_from_the_sections(tmp_path, text, launcher):
    assert load(tmp_path, text).chosen_launcher == launcher


def test_all_problems_are_reported_at_once_with_line_and_suggestion(tmp_path):
    found = problems(tmp_path, "slurm:\n  partitoin: gpu\n  nodes: many\ntimeouts: {save: 3}\n")
    found.sort()
    assert found[0] == "cluster.yaml:2: slurm.partitoin: unknown key; did you mean 'partition'?"
    assert found[1].startswith("cluster.yaml:3: slurm.nodes: ") and "'many'" in found[1]
    assert found[2].startswith("cluster.yaml:4: timeouts.save: unknown key")
    two = problems(tmp_path, "port: 99999\nhosts:\n  - {name: a, slots: 0}\n")
    assert [p.split(": ")[:2] for p in two] == [["cluster.yaml:3", "hosts.0.slots"], ["cluster.yaml:1", "port"]]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("hosts: [{name: 'n1;touch x', slots: 1}]", "1: hosts.0.name", "is not a host name"),
        ("hosts: [{name: '-oProxyCommand=x', slots: 1}]", "1: hosts.0.name", "is not a host name"),
        ("hosts: [{name: 'n$(x)', slots: 1}]", "1: hosts.0.name", "is not a host name"),
        ("hosts:\n- {name: n1, slots: 1}\n- {name: n1, slots: 2}", "3: hosts.1.name", "already host 0"),
        ("hosts: [{name: n1, slots: -1}]", "1: hosts.0.slots", "at least 1"),
        ("hosts: [{name: n1, slots: two}]", "1: hosts.0.slots", "valid integer"),
        ("launcher: deepspeed", "1: launcher", "needs hosts or a hostfile"),
        ("launcher: slurm", "1: launcher", "needs a section slurm"),
        ("launcher: torchrun\nhosts: [{name: a, slots: 1}, {name: b, slots: 2}]", "2: hosts", "same number of slots"),
        ("environment: {'A B': x}", "1: environment.A B", "not a variable name"),
        ("environment: {'A=1;x': x}", "1: environment.A=1;x", "not a variable name"),
        ('environment: {A: "x\\0y"}', "1: environment.A", "NUL"),
        ("environment: {A: true}", "1: environment.A", "in quotes"),
        ("environment: {A: [1]}", "1: environment.A", "text or a number"),
        ("environment: {RANK: 1}", "1: environment.RANK", "set by the launcher"),
        ("environment: {MASTER_ADDR: n1}", "1: environment.MASTER_ADDR", "set by the launcher"),
        ("modules: ['cuda; rm x']", "1: modules.0", "not the name of a module"),
        ("interface: 'ib0 -x'", "1: interface", "network interface"),
        ("master_address: '$(x)'", "1: master_address", "neither a host name"),
        ('slurm: {partition: "gpu\\n#SBATCH --wrap=x"}', "1: slurm.partition", "letters, digits"),
        ('slurm: {time_limit: "1:00\\nx"}', "1: slurm.time_limit", "is not minutes"),
        ("slurm: {time_limit: 9}", "slurm.signal_seconds", "300 leaves too little of time_limit 9 (540 s)"),
        ('slurm: {options: ["--comment=a b"]}', "1: slurm.options.0", "is not an option"),
        ('slurm: {options: ["--a=b\\nx"]}', "1: slurm.options.0", "is not an option"),
        ("slurm: {gres: 'gpu:1', gpus_per_node: 1}", "1: slurm.gpus_per_node", "requests GPUs too"),
        ("slurm: {nodes: 0}", "1: slurm.nodes", "at least 1"),
        ("shared_directory: relative/path", "1: shared_directory", "must be absolute"),
        ("shared_directory: '${NO_SUCH_VARIABLE}/x'", "1: shared_directory", "${NO_SUCH_VARIABLE} is not set"),
        ('shared_directory: "/a\\nb"', "1: shared_directory", "line break"),
        ("container: {image: x, runtime: docker}", "1: container.runtime", "'pyxis' or 'apptainer'"),
        ("container: {image: x, runtime: pyxis}", "1: container.runtime", "works only under srun"),
        ("hostfile: nowhere", "hostfile", "no such file; without it the job would run on this machine alone"),
        ("- a", "", "a list where a mapping"),
    ],
)
def test_hostile_or_mistaken_input_is_refused(tmp_path, text, where, says):
    found = problems(tmp_path, text)
    assert any(where in problem and says in problem for problem in found), found


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("90", 5400), ("10:30", 630), ("1:30:00", 5400), ("1-6", 108_000), ("1-0:30", 88_200), ("2-0:0:1", 172_801)],
)
def test_time_limits_mean_what_they_mean_to_slurm(written, seconds):
    assert seconds_of(written) == seconds  # sbatch's manual page, --time


def test_paths_take_variables_of_this_machine_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "a b"))
    assert load(tmp_path, "shared_directory: ${SCRATCH}/$(x)").shared_directory == f"{tmp_path}/a b/$(x)"


def test_a_hostfile_is_found_in_its_clusters_folder_and_read_like_an_option(tmp_path):
    hosts = (HostConfig(name="n1", slots=2), HostConfig(name="n-2.local", slots=1))
    (tmp_path / "hosts").write_text(f"# two hosts\n\n{hostfile_text(hosts)}")
    assert load(tmp_path, "hostfile: hosts").hosts == hosts
    assert load_cluster(None, str(tmp_path / "hosts")).hosts == hosts
    with_hosts = load(tmp_path, GOOD)
    again = load_cluster(str(tmp_path / "cluster.yaml"), str(tmp_path / "hosts"), "mpi")
    assert again == dataclasses.replace(with_hosts, hosts=hosts, hostfile=again.hostfile, launcher="mpi")


def test_every_bad_line_of_a_hostfile_is_reported(tmp_path):
    file = tmp_path / "my hosts"
    bad = ["n1 slots=2", "n2", "n3 slots=0", "n4 slots=two", "$(touch x) slots=1", "n5 slots=1 more=1", "n6;x slots=1"]
    file.write_text("\n".join(["n1 slots=2", *bad]))
    with pytest.raises(ConfigError) as caught:
        read_hostfile(file)
    lines = [problem.removeprefix(f"{file}:").partition(": ") for problem in caught.value.problems]
    assert [int(number) for number, _, _ in lines] == [2, 3, 4, 5, 6, 7, 8]
    assert "already on line 1" in lines[0][2] and "not a host name" in lines[4][2] and not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["", "# n1 slots=1\n"])
def test_a_hostfile_without_hosts_is_refused(tmp_path, content):
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(tmp_path / "hosts")


def test_what_deepspeed_reads_in_our_hostfile_is_what_we_mean(tmp_path):
    hosts = (HostConfig(name="n1", slots=2), HostConfig(name="10.0.0.2", slots=16))
    (tmp_path / "hosts").write_text(hostfile_text(hosts))
    assert dict(fetch_hostfile(str(tmp_path / "hosts"))) == {"n1": 2, "10.0.0.2": 16}
