"""Each wrapper of DeepSpeed's is known by its class; another one, or one without what is read, is refused by name."""

import itertools

import pytest

from dsllm.engine.processes.process_group import World
from dsllm.engine.wrappers.flat_partitions import Bf16Wrapper, FlatWrapper
from dsllm.engine.wrappers.registry import wrapper_of
from dsllm.engine.wrappers.stage_3 import Stage3Wrapper
from dsllm.engine.wrappers.whole_parameters import NoWrapper, UnfusedWrapper
from dsllm.engine.wrappers.wrapper import Wrapper
from dsllm.errors import LaunchError
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run

STAGES = (0, 1, 2, 3)
KNOWN: dict[tuple[str, int], type[Wrapper]] = {
    ("fp32", 0): NoWrapper,
    ("fp32", 1): FlatWrapper,
    ("fp32", 2): FlatWrapper,
    ("fp32", 3): Stage3Wrapper,
    ("bf16", 0): UnfusedWrapper,
    ("bf16", 1): Bf16Wrapper,
    ("bf16", 2): FlatWrapper,
    ("bf16", 3): Stage3Wrapper,
}


def kinds(world: World) -> dict[tuple[str, int], type[Wrapper]]:
    return {
        (precision, stage): type(tiny_engine(world, tiny_run(precision=precision), stage).wrapper)
        for precision, stage in itertools.product(("fp32", "bf16"), STAGES)
    }


def test_each_layout_has_its_wrapper():
    assert run_ranks(1, kinds) == [KNOWN]


def unknown(world: World, stage: int) -> str:
    """What is said of a real wrapper under another class, as a new version of DeepSpeed would bring it."""
    engine = tiny_engine(world, tiny_run(precision="bf16"), stage)
    engine.optimizer.__class__ = type("ZeroOptimizerOfTomorrow", (type(engine.optimizer),), {})
    with pytest.raises(LaunchError) as caught:
        wrapper_of(engine.deepspeed, world)
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_wrapper_is_refused_by_its_class(stage):
    (text,) = run_ranks(1, unknown, stage)
    assert "does not know how to read the state of ZeroOptimizerOfTomorrow;" in text
    assert "it was tested with deepspeed 0.19.8: install that version" in text


def incomplete(world: World, stage: int, precision: str, names: list[str]) -> str:
    """What is said of a real wrapper that has lost some attributes."""
    engine = tiny_engine(world, tiny_run(precision=precision), stage)
    for name in names:
        setattr(engine.optimizer, name, None)  # a method cannot be deleted from an instance
    with pytest.raises(LaunchError) as caught:
        wrapper_of(engine.deepspeed, world)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [case for case, kind in KNOWN.items() if kind is not NoWrapper])
def test_every_private_attribute_that_is_missing_is_named(precision, stage):
    kind = KNOWN[precision, stage]
    (text,) = run_ranks(1, incomplete, stage, precision, list(kind.attributes))
    assert f"(missing: {', '.join(kind.attributes)})" in text
    (text,) = run_ranks(1, incomplete, stage, precision, [kind.attributes[0]])
    assert f"(missing: {kind.attributes[0]})" in text
