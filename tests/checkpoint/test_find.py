"""The newest sound checkpoint is found, old ones are removed, and never the newest sound one."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.find import (
    CHECKPOINTS,
    candidates,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    looks_sound,
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
from tests.helpers.tiny_job import tree


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


def test_what_does_not_look_sound_neither_counts_nor_is_removed_before_its_time():
    """14 and 12 are damaged on the disk: two sound ones stay, 10 next to 20, and 12 and 14 as they are."""
    sound = {20, 10, 8, 4}
    found = obsolete(paths(4, 6, 8, 10, 12, 14, 20), *paths(20), (), 2, 0, lambda folder: step_of(folder) in sound)
    assert [step_of(folder) for folder in found] == [8, 6, 4]


def test_a_checkpoint_looks_sound_by_its_manifest_and_the_sizes_of_its_files(tmp_path: Path):
    folder = save(tmp_path, 4)
    assert looks_sound(folder)
    assert not looks_sound(tmp_path / "step-00000005")
    shutil.copytree(folder, tmp_path / "step-00000007")
    assert not looks_sound(tmp_path / "step-00000007"), "a copy under the name of another step"
    for content in (
        "",
        "null",
        "[1]",
        "{}",
        '{"parts": 3}',
        '{"parts": [3]}',
        "[" * 10**5,
        '{"progress": {"step": 4}}',
    ):
        other = shutil.copytree(folder, tmp_path / "other" / "step-00000004", dirs_exist_ok=True)
        (other / "manifest.json").write_text(content)
        assert not looks_sound(other), content
    with (folder / "weights-00000.safetensors").open("ab") as file:
        file.write(b"x")
    assert not looks_sound(folder)


def strays(directory: Path, archive: Path) -> None:
    """What users leave among checkpoints: notes, copies, links to an archive, to nowhere, and a file."""
    (directory / "step-99999999").mkdir()
    (directory / "step-99999999" / "notes.txt").write_text("mine")
    (directory / "step-00000003").mkdir()
    (directory / "step-00000003" / "notes.txt").write_text("mine")
    (directory / "step-1234").symlink_to(archive, target_is_directory=True)
    (directory / "step-00000002").symlink_to(directory / "nowhere")
    (directory / "step-5").write_text("a file")


def test_strays_do_not_count_and_are_not_removed(tmp_path: Path):
    archive = save(tmp_path / "archive", 1)
    checkpoints = tmp_path / "checkpoints"
    saved = [save(checkpoints, step) for step in (4, 8, 12)]
    strays(checkpoints, archive)
    before = tree(archive, checkpoints / "step-99999999", checkpoints / "step-00000003")
    listed = list_checkpoints(checkpoints)
    assert listed == [checkpoints / "step-1234", *reversed(saved)]
    assert remove_checkpoints(obsolete(listed, saved[2], [listed[0]], 2, 0, looks_sound)) == []
    assert not saved[0].exists() and saved[1].exists() and saved[2].exists()
    assert not (checkpoints / "step-1234").is_symlink(), "a link goes, and what it points to stays"
    assert tree(archive, checkpoints / "step-99999999", checkpoints / "step-00000003") == before


def test_a_copy_under_another_name_and_a_folder_of_other_things_are_left_alone(tmp_path: Path):
    copy = shutil.copytree(save(tmp_path, 4), tmp_path / "step-00000100")
    (notes := tmp_path / "step-00000101").mkdir()
    (notes / "notes.txt").write_text("mine")
    problems = remove_checkpoints([copy, notes])
    assert problems == [
        f"{copy}: is not removed: it is a copy of step 4",
        f"{notes}: is not removed: it is no checkpoint",
    ]
    assert (
        looks_sound(tmp_path / "step-00000004")
        and (copy / "manifest.json").is_file()
        and (notes / "notes.txt").is_file()
    )


@pytest.mark.parametrize("kind", ["folder of notes", "link", "dangling link", "file", "damaged"])
def test_what_is_in_the_way_of_a_checkpoint_is_put_aside(tmp_path: Path, kind):
    place, archive = tmp_path / "run" / checkpoint_name(4), save(tmp_path / "archive", 4)
    place.parent.mkdir()
    if kind == "folder of notes":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    elif kind == "damaged":
        shutil.copytree(archive, place)
        (place / "manifest.json").write_text("{")
    else:
        place.symlink_to(archive if kind == "link" else tmp_path / "nowhere")
    before = tree(archive)
    assert looks_sound(save(place.parent, 4)) and not place.is_symlink()
    assert tree(archive) == before
    kept = [] if kind == "damaged" else [f"{place.name}.replaced"]
    assert sorted(p.name for p in place.parent.iterdir()) == [place.name, *kept]
    if kind == "folder of notes":
        assert (place.parent / kept[0] / "notes.txt").read_text() == "mine"


def test_leftovers_that_are_links_or_files_do_not_block_a_save(tmp_path: Path):
    archive = save(tmp_path / "archive", 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / ".step-00000004.partial").symlink_to(archive)
    (run / ".step-00000003.removing").write_text("a file")
    before = tree(archive)
    folder = save(run, 4)
    assert list(run.iterdir()) == [folder] and tree(archive) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_what_cannot_be_removed_blocks_neither_a_removal_nor_a_save(tmp_path: Path):
    """A file system is mounted in a folder: it can neither be renamed nor removed."""
    run = tmp_path / "run"
    old = save(run, 1)
    busy = [run / ".step-00000004.partial" / "x", run / ".step-00000001.removing" / "x", old / "x"]
    for folder in busy:
        folder.mkdir(parents=True)
    mounted = []
    try:
        for folder in busy:
            if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False).returncode:
                pytest.skip("no mounts here")
            mounted.append(folder)
        new = save(run, 4)
        (problem,) = remove_checkpoints([old])
        assert problem.startswith(f"{old}: could not be removed: ")
        assert looks_sound(new) and list_checkpoints(run) == [new]
        remove_leftovers(run)
    finally:
        for folder in mounted:
            subprocess.run(
                ["umount", *run.glob(f"*{folder.parent.name}*/x"), *run.glob(f".{old.name}*/x")], check=False
            )


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
