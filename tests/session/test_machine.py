"""A run on this machine: auto precision is resolved, and all hosts make the same DeepSpeed config."""

import dataclasses

import pytest

from dsllm.config.parallel import ParallelConfig
from dsllm.engine.processes.process_group import World
from dsllm.engine.processes.ranks import Ranks
from dsllm.errors import CheckpointError, ConfigError, LaunchError
from dsllm.session.machine import in_saved_precision, run_on_machine
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_run

TWO = Ranks(
    rank=0, local_rank=0, world_size=2, local_size=2, launcher="none", master_address="127.0.0.1", master_port=1
)  # fmt: skip


def test_auto_precision_is_resolved_before_the_run_is_recorded():
    run = run_on_machine(tiny_run(precision="auto"), {}, TWO)
    assert run.layout.precision == run.config.train.precision == "fp32_compute_bf16"
    assert run.device.type == run.layout.device == "cpu" and run.layout.mesh.data == 2
    assert run_on_machine(tiny_run(precision="bf16"), {}, TWO).config == tiny_run(precision="bf16")


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ({"parallel": ParallelConfig(tensor=2)}, {}, "parallel.tensor: 2"),
        ({}, {"zero_optimization": {"stage": 9}}, "zero_optimization"),
        ({"train": {"micro_batch_sequences": 3}}, {}, "8 is not divisible by micro-batch 3 x 2 ranks"),
        ({"train": {"precision": "fp16"}}, {}, "has no fp16"),
    ],
)
def test_what_cannot_work_is_refused_before_the_ranks_meet(change, given, message):
    config = dataclasses.replace(tiny_run(**change.get("train", {})), parallel=change.get("parallel", ParallelConfig()))
    with pytest.raises(ConfigError, match=message):
        run_on_machine(config, given, TWO)


HOSTS = {"one": [(0, 3), (1, 3), (2, 3)], "uneven": [(0, 2), (1, 2), (0, 1)], "three": [(0, 1)] * 3}
"""Local rank and local size of three ranks."""


def config_on_hosts(world: World, hosts: str) -> object:
    """The final config of this rank, or its refusal, as if the ranks ran on these hosts."""
    local_rank, local_size = HOSTS[hosts][world.rank]
    ranks = dataclasses.replace(world.ranks, local_rank=local_rank, local_size=local_size)
    given = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    run = run_on_machine(tiny_run(global_batch_sequences=12), given, ranks)
    try:
        return run.final_config(dataclasses.replace(world, ranks=ranks))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("hosts", HOSTS)
def test_every_rank_makes_the_same_config(hosts):
    one, two, three = run_ranks(3, config_on_hosts, hosts)
    assert one == two == three
    if hosts == "uneven":
        assert isinstance(one, str) and "zero_hpz_partition_size" in one
    else:
        assert one["zero_optimization"]["zero_hpz_partition_size"] == HOSTS[hosts][0][1]


@pytest.mark.parametrize(
    "size", [{"num_layers": 10_000}, {"hidden_size": 2**17, "num_heads": 64}, {"vocab_size": 2**24}]
)
def test_a_model_that_no_memory_holds_is_refused_in_words(size):
    config = tiny_run()
    model = dataclasses.replace(config.model, **{"hidden_size": 2**14, "num_heads": 64, "head_size": None, **size})
    with pytest.raises(
        ConfigError, match=r"parameters need .* GiB of model states for 2 ranks on this host, which has"
    ):
        run_on_machine(dataclasses.replace(config, model=model), {}, TWO)


def test_a_gpu_is_demanded_only_by_name():
    assert run_on_machine(tiny_run(device="cpu"), {}, TWO).device.type == "cpu"
    with pytest.raises(LaunchError, match=r"train\.device: cuda, but torch sees no GPU here"):
        run_on_machine(tiny_run(device="cuda"), {}, TWO)


def continued_in_fp16(world: World) -> str:
    run = run_on_machine(tiny_run(precision="auto"), {}, world.ranks)
    with pytest.raises(CheckpointError) as caught:
        in_saved_precision(run, "fp16", world, print)
    return str(caught.value)


def test_a_precision_that_this_device_has_not_is_refused_with_what_to_do():
    (text,) = run_ranks(1, continued_in_fp16)
    assert text.startswith("run.directory runs/tiny: began in fp16, in which it cannot continue here: ")
    assert "train.precision=fp32_compute_bf16, another run.directory, and model.init_from=runs/tiny" in text
