"""This rank's state as slices: frozen parameters at every stage, and a state that another optimizer has saved."""

import itertools
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.find import checkpoint_name
from dsllm.checkpoint.read import CheckpointReader
from dsllm.engine.build import Engine
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_state, owned_slices
from dsllm.errors import CheckpointError
from dsllm.run_directory import CHECKPOINTS
from dsllm.session.progress import Progress
from dsllm.session.record import RunRecord
from dsllm.slices import WEIGHTS, Region, whole
from dsllm.train.saver import Saver
from tests.helpers.engines import MOMENTS, NumberedState, changed_table, engine_of, whole_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import TABLE, first_state, tiny_run, tiny_step

STAGES = (0, 1, 2, 3)
FROZEN = ("embed.weight", "layers.0.attention_norm.weight", "layers.1.mlp.up.weight", "head.weight")
STEPS = 2


def frozen_engine(world: World, precision: str, stage: int) -> Engine:
    return engine_of(world, tiny_run(precision=precision), stage, changed_table(FROZEN, trainable=False))


def train_and_save(world: World, precision: str, directory: Path) -> None:
    """At each stage: some steps, which leave the frozen parameters as they were, and a checkpoint."""
    config = tiny_run(precision=precision)
    for stage in STAGES:
        engine = frozen_engine(world, precision, stage)
        before = whole_weights(engine)
        for step in range(STEPS):
            set_learning_rate(engine.optimizer, 1e-2)
            assert tiny_step(engine, config, step).applied
        for name, after in whole_weights(engine).items():
            assert torch.equal(after, before[name]) == (name in FROZEN), (stage, name)
        saver = Saver(directory / str(stage), RunRecord(config=config, deepspeed={}), print)
        saver.start(engine, Progress(step=STEPS))


def load_and_compare(world: World, precision: str, folder: Path) -> None:
    """At each stage: load a checkpoint, find its numbers in the slices and in the layers, and continue."""
    config, reader = tiny_run(precision=precision), CheckpointReader(folder)
    losses = []
    for stage in STAGES:
        engine = frozen_engine(world, precision, stage)
        load_state(engine, reader)
        for piece in owned_slices(engine):
            assert piece.trainable == (piece.name not in FROZEN)
            assert set(piece.tensors) == ({WEIGHTS, *MOMENTS} if piece.trainable else {WEIGHTS})
            assert piece.scalars == ({"step": STEPS} if piece.trainable else {})
            for key, tensor in piece.tensors.items():
                assert torch.equal(tensor, reader.read(piece.name, key, piece.region)), (stage, piece.name, key)
        for name, seen in whole_weights(engine).items():
            assert torch.equal(seen, reader.read_whole(name).to(seen.dtype)), (stage, name)
        losses.append(tiny_step(engine, config, STEPS).loss)
    # the forward pass is the same at every stage; ZeRO-3's gathered weights are bit for bit the others'
    assert losses == pytest.approx([losses[0]] * len(STAGES), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "world_size"),
    [("bf16", 2), *(pytest.param(p, w, marks=pytest.mark.slow) for p, w in (("fp32", 2), ("fp32", 1), ("bf16", 1)))],
)
def test_frozen_parameters_stay_are_saved_and_load_at_every_stage(tmp_path, precision, world_size):
    run_ranks(world_size, train_and_save, precision, tmp_path)
    for stage in STAGES:
        folder = tmp_path / str(stage) / CHECKPOINTS / checkpoint_name(STEPS)
        reader, first = CheckpointReader(folder), first_state(tiny_run())
        assert set(reader.names()) == {row.name for row in TABLE}
        for name in FROZEN:
            assert reader.keys(name) == (WEIGHTS,)
            weights = reader.read_whole(name)
            expected = first.read(name, WEIGHTS, Region(whole(tuple(weights.shape)), 0, weights.numel()))
            expected = expected.to(torch.bfloat16 if precision == "bf16" else torch.float32).float()
            assert torch.equal(weights.flatten(), expected)
        run_ranks(3 - world_size if stage == 3 else world_size, load_and_compare, precision, folder)


def covered(world: World, stage: int, precision: str) -> list[tuple[str, int, int]]:
    """What this rank saves of a state in which each element is another number: all of it is what was loaded."""
    state = NumberedState()
    engine = engine_of(world, tiny_run(precision=precision), stage, reader=state)
    found = []
    for piece in owned_slices(engine):
        assert piece.scalars == {"step": 5.0}
        for key, tensor in piece.tensors.items():
            assert torch.equal(tensor, state.read(piece.name, key, piece.region)), (piece.name, key)
        found.append((piece.name, piece.region.start, piece.region.stop))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_ranks_save_every_element_once_as_it_was_loaded(stage, precision):
    regions = sorted(itertools.chain(*run_ranks(2, covered, stage, precision)))
    for row in TABLE:
        own = [(start, stop) for name, start, stop in regions if name == row.name]
        assert own[0][0] == 0 and own[-1][1] == row.num_elements
        assert all(left[1] == right[0] for left, right in itertools.pairwise(own))


def load_another_optimizers(world: World, stage: int) -> str:
    """The refusal of a state with one moment only; the engine is as before."""
    engine = engine_of(world, tiny_run(), stage)
    before = whole_weights(engine)
    with pytest.raises(CheckpointError) as caught:
        load_state(engine, NumberedState((WEIGHTS, "momentum_buffer")))
    assert all(torch.equal(now, before[name]) for name, now in whole_weights(engine).items())
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_of_another_optimizer_is_refused_in_words(stage):
    one, two = run_ranks(2, load_another_optimizers, stage)
    assert one == two
    assert "momentum_buffer are saved, but the run's optimizer keeps exp_avg, exp_avg_sq" in one
    assert one.startswith(tuple(f"{row.name}: " for row in TABLE)) and "model.init_from" in one


def restart(world: World) -> bool:
    """Steps, then weights alone: no state is left."""
    engine = engine_of(world, config := tiny_run(), 2)
    tiny_step(engine, config, 0)
    load_state(engine, NumberedState((WEIGHTS,)))
    return all(set(piece.tensors) == {WEIGHTS} and not piece.scalars for piece in owned_slices(engine))


def test_weights_alone_start_the_optimizer_anew():
    assert run_ranks(1, restart) == [True]
