"""A job that every rank would refuse is refused before it waits in a queue, whatever machine `dsllm launch` runs on."""

import dataclasses

import pytest

from dsllm.cli import run_command
from dsllm.cli.launch_checks import check_ranks, notes, ranks_of_hosts
from dsllm.config.cluster import ClusterConfig, HostConfig, SlurmConfig
from dsllm.config.data import DataConfig
from dsllm.config.parallel import ParallelConfig
from dsllm.errors import ConfigError
from tests.helpers.tiny import tiny_run

SLURM = ClusterConfig(slurm=SlurmConfig(nodes=3, tasks_per_node=8))
HOSTS = ClusterConfig(hosts=(HostConfig(name="n1", slots=2), HostConfig(name="n2", slots=1)))
RUN = "run: {name: tiny}\ntrain: {global_batch_sequences: 512, micro_batch_sequences: 32}\n"


@pytest.mark.parametrize(
    ("cluster", "ranks"),
    [
        (SLURM, (8, 8, 8)),
        (HOSTS, (2, 1)),
        (ClusterConfig(slots=5), (5,)),
        (ClusterConfig(launcher="torchrun", slots=2), (2,)),
        (ClusterConfig(launcher="local", hosts=HOSTS.hosts, slots=4), (4,)),
    ],
)
def test_ranks_of_each_host(cluster, ranks):
    assert ranks_of_hosts(cluster) == ranks


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "real"])
@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ("slurm: {nodes: 3, tasks_per_node: 8}", "512 is not divisible by micro-batch 32 x 24 ranks"),
        ("hosts: [{name: n1, slots: 2}, {name: n2, slots: 1}]", "512 is not divisible by micro-batch 32 x 3 ranks"),
        ("slots: 3", "512 is not divisible by micro-batch 32 x 3 ranks"),
        ("launcher: mpi\nslots: 3", "512 is not divisible"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, cluster, says, dry
):
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "cluster.yaml").write_text(cluster)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_command("launch", ["run.yaml", "--cluster", "cluster.yaml", *(["--dry-run"] if dry else [])]) == 2
    assert says in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_a_mesh_and_a_deepspeed_json_are_checked_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(RUN + "deepspeed: bad.json\n")
    (tmp_path / "bad.json").write_text('{"zero_optimization": {"stage": 9}}')
    monkeypatch.chdir(tmp_path)
    assert run_command("launch", ["run.yaml", "--dry-run"]) == 2
    assert "stage" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        check_ranks(dataclasses.replace(tiny_run(), parallel=ParallelConfig(tensor=5)), {}, SLURM)


def test_a_login_node_needs_no_gpu_for_a_run_that_needs_one():
    """fp16 works on GPUs only."""
    check_ranks(tiny_run(precision="fp16", global_batch_sequences=48), {"zero_optimization": {"stage": 1}}, SLURM)


def test_uneven_hosts_are_known_before_they_start():
    given = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    with pytest.raises(ConfigError, match="the hosts have 2 and 1 ranks"):
        check_ranks(tiny_run(global_batch_sequences=12), given, HOSTS)


def test_notes_on_what_only_this_machine_may_see(tmp_path):
    shared = tmp_path / "shared"
    (shared / "data").mkdir(parents=True)
    inside, outside = shared / "run.yaml", tmp_path / "run.yaml"
    cluster = ClusterConfig(hosts=HOSTS.hosts, shared_directory=str(shared))
    here, nowhere = (dataclasses.replace(tiny_run(), data=DataConfig(directory=name)) for name in ("data", "nowhere"))
    assert list(notes(here, inside, cluster, shared)) == []
    (note,) = notes(here, outside, cluster, shared)
    assert "is outside shared_directory" in note and str(outside) in note
    (note,) = notes(dataclasses.replace(here, deepspeed="own.json"), inside, cluster, shared)
    assert "own.json: is in this working directory, but the ranks start in" in note
    (shared / "own.json").touch()
    assert not list(notes(dataclasses.replace(here, deepspeed="own.json"), inside, cluster, shared))
    (note,) = notes(nowhere, inside, cluster, shared)
    assert "rank 0 would prepare it inside the job" in note and "dsllm prepare" in note
    assert list(notes(nowhere, outside, ClusterConfig(slots=2), tmp_path)) == []
