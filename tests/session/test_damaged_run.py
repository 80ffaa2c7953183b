"""Every file of a run directory, damaged in every way: an attempt is right or refused in words, and checkpoints stay.

An attempt on 11 files x 14 damages, of a run with a checkpoint and of one without: 308, with all that it reads and writes in
the directory except the engine; the quick test takes 15 of them (seeded). And 12 as a whole `dsllm train`.
"""

import contextlib
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsllm.config.load import load_run
from dsllm.config.run import RunConfig
from dsllm.engine.processes.process_group import World
from dsllm.errors import DsllmError
from dsllm.run_directory import (
    CHECKPOINTS,
    DATA_CARD_FILE,
    DEEPSPEED_FILE,
    LAYER_STATISTICS_FILE,
    LOCK_FILE,
    LOSS_PICTURE,
    METRICS_FILE,
    RUN_FILE,
    STATUS_FILE,
    TOKENIZER,
    read_metrics,
    read_status,
)
from dsllm.session.directory import free_directory_state, held_directory
from dsllm.session.resume import check_unsaved_run, clean_up, find_resumable
from dsllm.train.metrics import RowFile
from dsllm.train.picture import draw_loss_curve
from tests.helpers.jobs import train
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_job import budget, prepare_folder, tree

FILES = (
    STATUS_FILE, METRICS_FILE, RUN_FILE, DEEPSPEED_FILE, LOCK_FILE, DATA_CARD_FILE, LOSS_PICTURE, LAYER_STATISTICS_FILE,
    f"{TOKENIZER}/tokenizer.json", TOKENIZER, "eval",
)  # fmt: skip
SECONDS = 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes() or b" ")
    content[random.Random(path.name).randrange(len(content))] ^= 4
    path.write_bytes(content)


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(content), None)[1]


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        if path.exists():
            path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "flipped": flip,
    "absent": in_its_place(lambda path: None),
    "empty": written(b""),
    "null": written(b"null"),
    "a list": written(b"[1]"),
    "no fields": written(b"{}"),
    "zeros": written(bytes(300)),
    "not UTF-8": written(b"\xff\xfe{"),
    "deep": written(b"[" * 10**5),
    "huge": written(b"[" + b"1," * 10**6),
    "a folder": in_its_place(lambda path: path.mkdir()),
    "a pipe": in_its_place(os.mkfifo),
    "a link to a device": in_its_place(lambda path: path.symlink_to("/dev/zero")),
}
CASES = list(itertools.product(FILES, DAMAGES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of 4 steps with a checkpoint, and one without."""
    folder = prepare_folder(tmp_path_factory.mktemp("job"))
    shutil.rmtree(folder / "runs")
    codes, output = train(folder, 1, ["tiny.yaml", budget(4), "train.schedule.shape=constant"])
    assert codes == [0], output
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "unsaved")
    shutil.rmtree(folder / "runs" / "unsaved" / CHECKPOINTS)
    (folder / "runs" / "tiny" / "eval").mkdir()
    return folder


def damaged_copy(run: Path, file: str, damage: str) -> Path:
    copy = run.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    path = copy / file
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    if not path.exists():
        path.write_bytes(b"{}\n")
    DAMAGES[damage](path)
    return copy


def attempt(world: World, run: Path, config: RunConfig) -> list[str]:
    """All that an attempt does with its directory, except to train: what was reported, the error last."""
    lines: list[str] = []
    try:
        free_directory_state(run, world, lines.append)
        reader, _ = find_resumable(run, world, lines.append)
        if reader is None:
            check_unsaved_run(run, config, lines.append)
        with held_directory(run, world, lines.append, step=4) as held:
            clean_up(run, world)
            rows = RowFile(run / METRICS_FILE, lines.append)
            with contextlib.suppress(OSError):
                rows.open()
            rows.append([{"step": 5, "tokens": 5, "loss": 1.0, "attempt": held.attempt}])
            rows.close()
            held.write_status("finished", step=5)
            with contextlib.suppress(OSError):
                draw_loss_curve(run)
                assert read_metrics(run)[-1]["step"] == 5
        assert not (run / STATUS_FILE).is_file() or read_status(run)["state"] == "finished"
    except DsllmError as error:
        lines.append(str(error))
    return lines


def attempts(world: World, folder: Path, cases: list[tuple[str, tuple[str, str]]]) -> list[str]:
    """What went wrong over these cases."""
    config, problems = load_run(str(folder / "tiny.yaml"), []), []
    for run, (file, damage) in cases:
        copy = damaged_copy(folder / "runs" / run, file, damage)
        before, began = tree(copy / CHECKPOINTS), time.monotonic()
        try:
            lines = attempt(world, copy, config)
        except Exception as error:  # noqa: BLE001 - that is what the test looks for
            problems.append(f"{run}/{file} {damage}: {error!r}")
        else:
            problems += [f"{run}/{file} {damage}: Traceback" for line in lines if "Traceback" in line]
        if run == "tiny" and tree(copy / CHECKPOINTS) != before:
            problems.append(f"{run}/{file} {damage}: a checkpoint changed")
        if time.monotonic() - began > SECONDS:
            problems.append(f"{run}/{file} {damage}: took {time.monotonic() - began:.1f} s")
    return problems


ALL = list(itertools.product(("tiny", "unsaved"), CASES))


@pytest.mark.parametrize("num_cases", [15, pytest.param(308, marks=pytest.mark.long)])
def test_every_damage_of_every_file_ends_in_words_or_in_a_right_attempt(folder, num_cases):
    cases = random.Random(7).sample(ALL, num_cases)
    assert run_ranks(1, attempts, folder, cases, timeout_seconds=280) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "damage"), random.Random(1).sample(CASES, 12))
def test_a_damaged_run_resumes_or_is_refused_in_words(folder, file, damage):
    """A process each: DeepSpeed cannot be initialised twice in one."""
    copy = damaged_copy(folder / "runs" / "tiny", file, damage)
    words = ["tiny.yaml", budget(6), "train.schedule.shape=constant", "run.directory=runs/copy"]
    (code,), output = train(folder, 1, words)
    assert code in (0, 1) and "Traceback" not in output, output
    assert code == 1 or "resuming runs/copy/checkpoints/step-00000004" in output, output
    assert (copy / CHECKPOINTS / "step-00000004" / "manifest.json").is_file()
