"""Resume or refuse: all ranks find the same checkpoint, and what it was saved by must be what is asked for."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.find import list_checkpoints
from dsllm.checkpoint.read import CheckpointReader
from dsllm.config.load import run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.yaml_file import write_yaml
from dsllm.data import fingerprint
from dsllm.data.position import Position
from dsllm.engine.processes.process_group import World
from dsllm.errors import CheckpointError, DataError, RunError
from dsllm.run_directory import CHECKPOINTS, RUN_FILE
from dsllm.session.progress import Progress
from dsllm.session.resume import (
    check_counts,
    check_data,
    check_delivery,
    check_same_run,
    check_unsaved_run,
    clean_up,
    find_resumable,
    find_weights,
    progress_of,
    saved_run,
)
from dsllm.slices import WEIGHTS, ParameterSlice, Region, whole
from tests.helpers.checkpoints import RUN, edit_manifest, save_slices
from tests.helpers.ranks import run_ranks
from tests.helpers.training_data import G, data, training, two_sources


def save(directory: Path, step: int, config: RunConfig = RUN, **fields: Any) -> Path:
    """A checkpoint of one parameter, of which each of two ranks has saved a half."""
    halves = [
        ParameterSlice(
            name="a", shape=(8,), region=Region(whole((8,)), start, start + 4),
            tensors={WEIGHTS: torch.arange(4.0), "exp_avg": torch.ones(4)}, scalars={"step": float(step)},
        )
        for start in (0, 4)
    ]  # fmt: skip
    return save_slices(directory / CHECKPOINTS, [[half] for half in halves], step, config, fields)


def find_on_each_rank(world: World, directories: list[Path]) -> tuple:
    """What this rank finds in a folder that it sees in its own way."""
    lines: list[str] = []
    directory = directories[world.rank]
    reader, damaged = find_resumable(directory, world, lines.append)
    weights = find_weights(directory, world, lines.append)
    return reader.folder if reader else None, damaged, weights.folder, lines


def test_ranks_that_see_different_folders_agree(tmp_path: Path):
    """Rank 0's list counts: a network file system may show another host an older listing, or none."""
    current, stale = tmp_path / "current" / CHECKPOINTS, tmp_path / "stale" / CHECKPOINTS
    for directory, steps in ((current, (1, 2, 3)), (stale, (1,))):
        for step in steps:
            save(directory.parent, step)
    newest, second, _ = list_checkpoints(current)
    (newest / "optimizer-00001.safetensors").unlink()
    for other in (stale.parent, tmp_path):
        one, two = run_ranks(2, find_on_each_rank, [current.parent, other])
        assert one == two
        assert one[:3] == (second, [newest], newest)  # the newest has sound weights, but cannot be resumed
        (line,) = one[3]
        assert f"{newest} is damaged and skipped" in line and "optimizer-00001" in line


def find_none(world: World, directory: Path) -> tuple[object, list[Path]]:
    return find_resumable(directory, world, print)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert run_ranks(2, find_none, tmp_path / "absent") == [(None, [])] * 2


def find_among_damaged(world: World, directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_resumable(directory, world, lambda line: None)
    return str(caught.value)


def test_damaged_checkpoints_alone_are_refused_on_all_ranks(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "manifest.json").write_text("{")
    one, two = run_ranks(2, find_among_damaged, tmp_path)
    assert one == two and "none of the 2 checkpoints verifies" in one


def clean(world: World, directory: Path) -> None:
    clean_up(directory, world)


def test_what_a_kill_has_left_is_removed_and_checkpoints_stay(tmp_path):
    saved = save(tmp_path, 3)
    for leftover in (".step-00000001.removing", ".step-00000002.partial"):
        (saved.parent / leftover).mkdir()
    run_ranks(2, clean, tmp_path)
    assert list(saved.parent.iterdir()) == [saved]


def with_train(**changes: Any) -> RunConfig:
    return dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, **changes))


def test_what_may_change_is_reported_and_the_rest_is_refused_in_one_list():
    lines: list[str] = []
    check_same_run(RUN, RUN, Path("x"), lines.append)
    check_same_run(RUN, with_train(total_tokens=7_000_000), Path("x"), lines.append)
    (line,) = lines
    assert line.startswith("changed since the last attempt: train.total_tokens: saved ") and line.endswith(
        "now 7000000"
    )
    other = dataclasses.replace(with_train(gradient_clipping=7.0), run=dataclasses.replace(RUN.run, seed=3))
    with pytest.raises(CheckpointError) as caught:
        check_same_run(RUN, other, Path("step-4"), lines.append)
    text = str(caught.value)
    assert text.startswith(
        "step-4 belongs to a run that differs in:\n- run.seed: saved 1234, now 3\n- train.gradient_clipping"
    )
    assert "model.init_from=step-4" in text and len(lines) == 1


@pytest.mark.parametrize("recorded", ["auto", "bf16"])
def test_a_run_saved_in_bf16_does_not_resume_in_what_auto_means_elsewhere(tmp_path, recorded):
    """The same YAML with `auto`: bf16 on the GPUs that saved it, fp32_compute_bf16 on this CPU. Records of before this was
    resolved have `auto`, but say next to it what was used."""
    engine = {"precision": "bf16", "loss_scaler": {}}
    saved = saved_run(CheckpointReader(save(tmp_path, 4, with_train(precision=recorded), engine=engine)))
    assert saved.train.precision == "bf16"
    check_same_run(saved, with_train(precision="bf16"), tmp_path, print)
    with pytest.raises(CheckpointError, match=r"train\.precision: saved 'bf16', now 'fp32_compute_bf16'"):
        check_same_run(saved, with_train(precision="fp32_compute_bf16"), tmp_path, print)


def test_progress_of_a_checkpoint_names_the_checkpoint(tmp_path):
    saved = save(tmp_path, 4, progress={"step": 4, "tokens": 12})
    batch = RUN.train.global_batch_sequences
    assert progress_of(CheckpointReader(saved), RUN) == Progress(step=4, tokens=12, position=Position(4 * batch))
    saved = save(tmp_path, 5, progress={"step": 5, "tokens": "many"})
    with pytest.raises(CheckpointError, match=f"^{saved}: "):
        progress_of(CheckpointReader(saved), RUN)


def test_a_directory_without_a_checkpoint_belongs_to_the_run_that_it_names(tmp_path):
    lines: list[str] = []
    check_unsaved_run(tmp_path, RUN, lines.append)
    assert not lines
    (tmp_path / RUN_FILE).write_text(write_yaml(run_to_dict(RUN)))
    check_unsaved_run(tmp_path, RUN, lines.append)
    assert lines == [f"{tmp_path} has no checkpoint yet: starting over"]
    other = dataclasses.replace(RUN, run=dataclasses.replace(RUN.run, name="other"))
    with pytest.raises(RunError, match=r"belongs to the run 'tiny', not to 'other': set another run.directory"):
        check_unsaved_run(tmp_path, other, lines.append)


def test_other_data_is_refused():
    progress = Progress(step=1, data_sha256="ab")
    check_data(progress, "ab", RUN, Path("step-1"))
    with pytest.raises(DataError, match="is not the data that step-1 was trained on"):
        check_data(progress, "cd", RUN, Path("step-1"))


def deliver_again(world: World, directory: Path) -> list[str]:
    """Three steps, a range skipped on purpose before the last; then the delivery is checked, and with wrong expectations."""
    config = data(a=0.7, b=0.3)
    own_copy = directory / str(world.rank)
    batches = training(own_copy, two_sources(own_copy), config, world.rank, world.size)
    progress = Progress(position=Position(0).skipping([(2 * G + 3, 3 * G + 1)]))
    for _ in range(3):
        own = fingerprint.add(*(batch.fingerprint for batch in batches.step(progress.position)))
        step = fingerprint.from_halves(*world.sum(fingerprint.halves(own)))
        progress = dataclasses.replace(
            progress, step=progress.step + 1, position=progress.position.after(G), last_step_fingerprint=step
        )
    check_delivery(Progress(), batches, world)  # nothing was delivered yet
    check_delivery(progress, batches, world)
    found = []
    for wrong in (
        dataclasses.replace(progress, last_step_fingerprint=progress.last_step_fingerprint ^ 1),
        dataclasses.replace(progress, position=Position(progress.position.next_sample)),  # the range is forgotten
    ):
        with pytest.raises(DataError) as caught:
            check_delivery(wrong, batches, world)
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_last_steps_samples_must_be_delivered_again(tmp_path, world_size):
    for found in run_ranks(world_size, deliver_again, tmp_path):
        assert len(found) == 2
        assert all(
            text.startswith("the loaders deliver other samples for step 3 than those trained on") for text in found
        )


def find_newer(world: World, directories: list[Path]) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_resumable(directories[world.rank], world, lambda line: None)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_checkpoint_of_a_newer_dsllm_is_refused_on_all_ranks_and_not_passed_over(tmp_path: Path):
    """Also by a rank that sees it as damaged: its steps would be lost if the older one were used."""
    for name in ("one", "two"):
        save(tmp_path / name, 4)
        edit_manifest(save(tmp_path / name, 8), lambda raw: raw.update(format_version=4))
    (tmp_path / "two" / CHECKPOINTS / "step-00000008" / "manifest.json").write_text("{")
    folders = [tmp_path / "one", tmp_path / "two"]
    one, two = run_ranks(2, find_newer, folders)
    assert one == two and one.startswith("UnavailableCheckpointError: ") and "has format version 4" in one
    assert all(len(list_checkpoints(folder / CHECKPOINTS)) == 2 for folder in folders)


def test_progress_with_one_more_counter_resumes_where_it_means_nothing(tmp_path: Path):
    """As a later minor version may save it."""
    saved = save(tmp_path, 4, progress={"step": 4, "tokens": 12, "rewinds": 0})
    assert progress_of(CheckpointReader(saved), RUN).tokens == 12
    saved = save(tmp_path, 5, progress={"step": 5, "tokens": 12, "rewinds": 2})
    with pytest.raises(CheckpointError, match=r"a newer dsllm saved it.*rewinds: 2.*update dsllm"):
        progress_of(CheckpointReader(saved), RUN)


def test_counters_that_contradict_each_other_are_refused():
    batch, tokens = RUN.train.global_batch_sequences, RUN.tokens_per_step
    sound = Progress(step=4, position=Position(4 * batch), tokens=4 * tokens)
    check_counts(sound, RUN, Path("x"))
    check_counts(dataclasses.replace(sound, position=Position(4 * batch + 8, ((16, 24),))), RUN, Path("x"))
    check_counts(Progress(), RUN, Path("x"))
    for change in (
        {"step": 5},
        {"tokens": 1},
        {"position": Position(2)},
        {"position": Position(4 * batch, ((16, 24),))},
    ):
        with pytest.raises(CheckpointError, match=r"^x: is damaged: .*move it away"):
            check_counts(dataclasses.replace(sound, **change), RUN, Path("x"))
