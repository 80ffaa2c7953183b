"""The newest sound checkpoint is found, old ones are removed, and never the newest sound one."""

import itertools
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.find import (
    CHECKPOINTS,
    candidates,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    newest_sound,
    obsolete,
    remove_checkpoints,
    remove_leftovers,
    step_of,
)
from dsllm.checkpoint.verify import damage_in
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, ParameterSlice, Region, whole
from tests.helpers.checkpoints import save_slices


def save(directory: Path, step: int = 4) -> Path:
    """A checkpoint of one parameter with a moment."""
    tensors = {WEIGHTS: torch.ones(3), "exp_avg": torch.ones(3)}
    piece = ParameterSlice(name="w", shape=(3,), region=Region(whole((3,)), 0, 3), tensors=tensors)
    return save_slices(directory, [[piece]], step)


def test_the_newest_sound_one_is_taken_and_the_damage_reported(tmp_path: Path):
    old, new = save(tmp_path, 4), save(tmp_path, 12)
    (new / "optimizer-00000.safetensors").unlink()
    lines: list[str] = []
    assert newest_sound(list_checkpoints(tmp_path), lines.append, damage_in) == (old, [new])
    assert len(lines) == 1 and f"{new} is damaged and skipped" in lines[0]
    (old / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints verifies"):
        newest_sound(list_checkpoints(tmp_path), lines.append, damage_in)
    assert newest_sound(list_checkpoints(tmp_path / "absent"), lines.append, damage_in) == (None, [])


def test_listing_sorts_by_step_and_ignores_everything_else(tmp_path: Path):
    for name in ("step-9", "step-00000010", "step-100000000", ".step-11.partial", "step-x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-12").write_text("a file")
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [100000000, 10, 9]


def test_a_path_means_a_run_or_a_checkpoint(tmp_path: Path):
    old, folder = save(tmp_path / CHECKPOINTS, 4), save(tmp_path / CHECKPOINTS, 5)
    assert candidates(tmp_path) == [folder, old] and candidates(folder) == [folder]
    assert find_checkpoint(tmp_path, print) == find_checkpoint(folder, print) == folder
    with pytest.raises(CheckpointError, match="is neither a run directory with checkpoints nor a checkpoint"):
        find_checkpoint(tmp_path / CHECKPOINTS, print)


def test_finding_a_model_does_not_need_the_optimizer_state(tmp_path: Path):
    old, new = save(tmp_path / CHECKPOINTS, 4), save(tmp_path / CHECKPOINTS, 5)
    (new / "optimizer-00000.safetensors").write_bytes(b"garbled")
    assert find_checkpoint(tmp_path, print) == find_checkpoint(new, print) == new
    (new / "weights-00000.safetensors").write_bytes(b"garbled")
    assert find_checkpoint(tmp_path, print) == old
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors: has 7 bytes"):
        find_checkpoint(new, print)


def paths(*steps: int) -> list[Path]:
    return [Path(checkpoint_name(step)) for step in steps]


@pytest.mark.parametrize(
    ("steps", "published", "damaged", "keep", "removed"),
    [
        ((5, 10, 15, 20, 25), 25, (), (2, 10), (5, 15)),  # the newest two, and milestones
        ((400, 450, 500), 450, (500,), (1, 0), (400, 500)),  # 500 was skipped: 450 is the only sound one and stays
        ((300, 400, 450, 500), 450, (400, 500), (2, 0), (400, 500)),  # damaged ones do not count: 300 is the second
        ((400, 500), 500, (500,), (2, 0), ()),  # the damaged one was replaced
        ((10, 20, 30), 20, (), (1, 0), (10,)),  # later steps are not this run's to judge
        ((10, 20, 30), 30, (20,), (1, 10), (20,)),  # a milestone is kept, unless it is damaged
        ((10,), 10, (), (1, 0), ()),
        ((10, 20), 20, (), (0, 0), (10,)),  # the one just published always stays
    ],
)
def test_what_is_obsolete(steps, published, damaged, keep, removed):
    found = obsolete(paths(*steps), *paths(published), paths(*damaged), *keep)
    assert sorted(step_of(folder) for folder in found) == list(removed)


def test_the_newest_sound_checkpoint_always_stays():
    """Over every set of checkpoints up to a published one, and every choice of damaged ones among the others."""
    for others in itertools.chain.from_iterable(itertools.combinations([1, 2, 3, 5, 6], n) for n in range(5)):
        for damaged in itertools.chain.from_iterable(itertools.combinations(others, n) for n in range(len(others) + 1)):
            if any(step > 4 and step not in damaged for step in others):
                continue  # a sound later one would have been resumed
            for keep_last, keep_every in itertools.product((1, 2, 3), (0, 2)):
                gone = obsolete(paths(*others, 4), *paths(4), paths(*damaged), keep_last, keep_every)
                left = [step for step in (*others, 4) if step not in map(step_of, gone)]
                assert 4 in left and not set(left) & set(damaged)
                assert len(left) >= min(keep_last, 1 + len(others) - len(damaged))


def test_removing_reports_what_cannot_be_removed(tmp_path: Path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    problems = remove_checkpoints([first, tmp_path / checkpoint_name(9), second])
    assert list(tmp_path.iterdir()) == []
    assert len(problems) == 1 and "step-00000009: could not be removed: No such file" in problems[0]


def test_what_killed_attempts_left_is_removed(tmp_path: Path):
    kept = save(tmp_path, 1)
    for name in (".step-00000002.partial", ".step-00000001.removing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights-00000.safetensors").write_text("half")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    remove_leftovers(tmp_path / "absent")


def test_a_removal_that_was_killed_does_not_block_the_next(tmp_path: Path):
    folder = save(tmp_path, 1)
    (tmp_path / ".step-00000001.removing").mkdir()
    (tmp_path / ".step-00000001.removing" / "half").write_text("")
    assert remove_checkpoints([folder]) == [] and list(tmp_path.iterdir()) == []
