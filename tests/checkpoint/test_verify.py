"""Damage to any file of a checkpoint is found, by the rank that reads it; weights can be verified alone."""

import errno
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.read_manifest import UnavailableCheckpointError
from dsllm.checkpoint.verify import damage_in
from dsllm.slices import WEIGHTS, ParameterSlice, Region, whole
from tests.helpers.checkpoints import save_slices
from tests.helpers.damage import NO_FILES, put_in_place


def save(directory: Path, num_ranks: int = 3) -> Path:
    """A checkpoint of one parameter [5, 7] with a moment, cut over some ranks."""
    numbers, box, size = torch.arange(35.0), whole((5, 7)), 35
    cuts = [size * i // num_ranks for i in range(num_ranks + 1)]
    ranks = [
        [
            ParameterSlice(
                name="w",
                shape=(5, 7),
                region=Region(box, a, b),
                tensors={WEIGHTS: numbers[a:b], "exp_avg": numbers[a:b]},
            )
        ]
        for a, b in pairwise(cuts)
    ]
    return save_slices(directory, ranks)


def harm_file(file: Path, harm: str) -> None:
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()


@pytest.mark.parametrize("kind", ["weights", "optimizer"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_to_a_file_is_found_by_one_rank(tmp_path: Path, harm: str, kind: str):
    folder = save(tmp_path)
    assert damage_in(folder) is None
    file = folder / f"{kind}-00002.safetensors"
    harm_file(file, harm)
    problem = damage_in(folder)
    assert problem and str(file) in problem
    for num_ranks in (2, 3, 4, 9):
        answers = [damage_in(folder, rank, num_ranks) for rank in range(num_ranks)]
        assert [answer for answer in answers if answer] == [problem]
    assert damage_in(folder, what="weights") == (problem if kind == "weights" else None)


def test_a_damaged_manifest_is_found_by_every_rank(tmp_path: Path):
    folder = save(tmp_path)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-5])
    for rank in range(3):
        assert str(manifest) in (damage_in(folder, rank, 3) or "")


def test_verifying_weights_reads_four_bytes_per_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counted where the files are opened: the weights and their header, nothing of the optimizer's state."""
    folder, opened = save(tmp_path), []

    def counting_open(path, *arguments, **options):
        opened.append(Path(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr("dsllm.checkpoint.verify.open", counting_open, raising=False)
    verify = partial(damage_in, folder)
    assert verify(what="weights") is None
    assert sorted(p.name for p in opened) == [f"weights-0000{rank}.safetensors" for rank in range(3)]
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in opened)
    assert sum(p.stat().st_size for p in opened) == 4 * 35 + headers
    opened.clear()
    assert verify(what="all") is None and len(opened) == 6


def test_a_checkpoint_under_the_name_of_another_step_is_found(tmp_path: Path):
    folder = save(tmp_path)
    for name, sound in (("step-99999999", False), ("step-4", True), ("kept", True)):
        folder = folder.rename(tmp_path / name)
        assert (damage_in(folder) is None) == sound


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_damage_and_is_not_opened(tmp_path: Path, kind: str):
    folder = save(tmp_path)
    file = folder / "weights-00000.safetensors"
    put_in_place(file, kind)
    assert str(file) in (damage_in(folder) or "")


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The errors that a lack of permission and a network file system give, which root in a test does not get."""
    folder = save(tmp_path)
    file = folder / "weights-00001.safetensors"
    for code, damaged in ((errno.EACCES, False), (errno.ESTALE, False), (errno.EIO, True)):

        def failing_open(path, *arguments, code=code, **options):
            if Path(path) == file:
                raise OSError(code, os.strerror(code), str(path))
            return open(path, *arguments, **options)

        monkeypatch.setattr("dsllm.checkpoint.verify.open", failing_open, raising=False)
        if damaged:
            assert os.strerror(code) in (damage_in(folder) or "")
            continue
        with pytest.raises(UnavailableCheckpointError, match=f"{os.strerror(code)}. The checkpoint may well be sound"):
            damage_in(folder)
