"""Kills tiny runs at chosen moments, starts the same command again, and counts what was lost, different, left over or untrue.

    python -m bench.crash_campaign --kills 120 [--seed 1] [--folder FOLDER]

Each kill is a run of its own: ZeRO 0 to 3, on 1 or 2 ranks, with a save every 3 steps and 2 checkpoints kept. In most ranks
every fsync, rename and removal takes up to 30 ms longer, so that kills hit them. Kill N is the same for the same seed. With
a folder the campaign continues where it was stopped; kills that are in its campaign.jsonl are not made again. The figures
are the last line of the output, progress is on standard error.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from dsllm.checkpoint.find import list_checkpoints, looks_sound, step_of
from dsllm.errors import EXIT_INTERRUPTED
from dsllm.run_directory import CHECKPOINTS, METRICS_FILE, STATUS_FILE, read_metrics, read_status
from tests.helpers.jobs import Job, start_job
from tests.helpers.tiny_job import budget, prepare_folder

NUM_STEPS = 10
TIMEOUT_SECONDS = 15
HUNG_SECONDS = 240
"""A busy machine needs a while; a run that hangs needs for ever."""
MOST_ATTEMPTS = 3
SLOWER_SECONDS = 0.03
FIGURES = ("lost", "different", "orphans", "untrue", "hung", "not resumed")
KINDS = ("time", "step", "save", "retention", "joining", "end")
OPERATIONS = {"save": ("fsync", "replace", "rename"), "retention": ("rmtree", "rename"), "end": ("finished",)}
"""The file operations at which a rank kills itself, by kind of moment."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: the run's shape, who gets which signal, and when."""

    number: int
    stage: int
    num_ranks: int
    signal: str
    victims: tuple[int, ...]
    kind: str
    operation: str
    """For save, retention and end: the victim's file operation; which one of them is `count`."""
    count: int
    seconds: float
    slow: tuple[bool, ...]
    """By rank: whether its file operations are slowed down."""


@dataclass
class Outcome:
    """What came of a kill."""

    kill: Kill
    hit: bool = False
    """The signal met a live process."""
    codes: list[int] = field(default_factory=list)
    state: str = ""
    problems: list[str] = field(default_factory=list)
    """Each begins with one of FIGURES."""


def kill_of(number: int, seed: int) -> Kill:
    """The kill of this number, the same for the same seed."""
    chance = random.Random(f"{seed} {number}")
    num_ranks = chance.choice((1, 2, 2))
    name = chance.choices(("SIGKILL", "SIGTERM", "SIGSTOP"), (70, 24, 6 if num_ranks == 2 else 0))[0]
    kind = KINDS[number % len(KINDS)]
    victim = chance.randrange(num_ranks)
    operation = chance.choice(OPERATIONS.get(kind, ("",)))
    if operation not in ("", "fsync"):
        victim = 0  # the other ranks only write their slices
    everybody = kind in ("time", "step") and name != "SIGSTOP" and chance.random() < 0.4
    return Kill(
        number=number,
        stage=chance.randrange(4),
        num_ranks=num_ranks,
        signal=name,
        victims=tuple(range(num_ranks)) if everybody else (victim,),
        kind=kind,
        operation=operation,
        count=chance.randint(
            1, {"fsync": 6 if victim else 40, "replace": 14, "rename": 6, "rmtree": 2}.get(operation, 1)
        ),
        seconds=chance.uniform(0, 0.7 if kind == "joining" else 5),
        slow=tuple(chance.random() < 0.7 for _ in range(num_ranks)),
    )


def plant(kill: Kill, rank: int) -> None:
    """Slow down this rank's file operations, and let one of them send the signal. Called in the rank's process."""
    chance = random.Random(f"{kill.number} {rank}")
    calls: Counter[str] = Counter()
    armed = rank in kill.victims and kill.operation

    def before(operation: str) -> None:
        if kill.slow[rank]:
            time.sleep(chance.uniform(0, SLOWER_SECONDS))
        calls[operation] += 1
        if armed and operation == kill.operation and calls[operation] == kill.count:
            Path("hit").touch()
            os.kill(os.getpid(), signal.Signals[kill.signal])

    def slowed(operation: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before(operation)
            result = plain(*arguments, **options)
            if operation == "replace" and Path(arguments[1]).name == STATUS_FILE and _says_finished(Path(arguments[1])):
                before("finished")
            return result

        return call

    os.fsync = slowed("fsync", os.fsync)
    os.replace = slowed("replace", os.replace)
    os.rename = slowed("rename", os.rename)
    shutil.rmtree = slowed("rmtree", shutil.rmtree)  # type: ignore[assignment]


def _says_finished(path: Path) -> bool:
    return '"finished"' in path.read_text(encoding="utf-8")


class Campaign:
    """The kills over one prepared folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "tiny.yaml").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            prepare_folder(folder)
        self.whole = cache(self._whole)

    def make(self, kill: Kill) -> Outcome:
        """Make one kill, and resume the run to its end."""
        expected = self.whole(kill.stage, kill.num_ranks)
        folder = self._new_folder(f"kill-{kill.number}")
        planted = {rank: partial(plant, kill, rank) for rank in range(kill.num_ranks)}
        job = start_job(folder, kill.num_ranks, self._words(kill.stage), planted=planted)
        outcome = Outcome(kill)
        _attack(job, folder, outcome)
        outcome.codes, outcome.state = [process.exitcode or 0 for process in job.processes], _state(folder)
        saved = [int(line.rsplit("-", 1)[1]) for line in job.output().splitlines() if line.startswith("saved ")]
        outcome.problems += untrue(outcome, job.output()) + _orphans(folder)
        newest = next((step_of(p) for p in list_checkpoints(folder / "run" / CHECKPOINTS) if looks_sound(p)), 0)
        if newest < max(saved, default=0):
            outcome.problems.append(f"lost: step {max(saved)} was saved, the newest sound checkpoint is {newest}")
        self._resume(kill, folder, newest, outcome)
        if not any(problem.startswith("not resumed") for problem in outcome.problems) and _losses(folder) != expected:
            outcome.problems.append("different: the losses are not those of the run that nothing disturbed")
        if not outcome.problems:
            shutil.rmtree(folder)
        return outcome

    def _resume(self, kill: Kill, folder: Path, newest: int, outcome: Outcome) -> None:
        for _ in range(MOST_ATTEMPTS):
            job = start_job(folder, kill.num_ranks, self._words(kill.stage))
            codes = _codes(job)
            if newest and f"step-{newest:08d}" not in job.output() and "is finished" not in job.output():
                outcome.problems.append(f"lost: the next attempt did not resume from step {newest}")
            if codes == [0] * kill.num_ranks and _state(folder) == "finished":
                break
        else:
            outcome.problems.append(f"not resumed: exit codes {codes}, {_state(folder)}: {job.output()[-2000:]}")
        outcome.problems += _orphans(folder)
        left = [p.name for p in (folder / "run" / CHECKPOINTS).iterdir() if not looks_sound(p)]
        if left:
            outcome.problems.append(f"orphans: {', '.join(left)} left at the end")

    def _whole(self, stage: int, num_ranks: int) -> list[tuple[int, float]]:
        """The losses of a run that nothing disturbs."""
        folder = self._new_folder(f"whole-{stage}-{num_ranks}")
        job = start_job(folder, num_ranks, self._words(stage))
        assert _codes(job) == [0] * num_ranks, job.output()
        return _losses(folder)

    def _new_folder(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _words(self, stage: int) -> list[str]:
        return [
            str(self.folder / "tiny.yaml"),
            f"data.directory={self.folder / 'data' / 'tiny'}",
            "run.directory=run",
            f"deepspeed=ds_configs/zero{stage}.json",
            budget(NUM_STEPS),
            "checkpoint.every_steps=3",
            "checkpoint.keep_last=2",
            "train.validate_every_steps=0",
            f"train.timeout_minutes={TIMEOUT_SECONDS / 60}",
        ]


def _attack(job: Job, folder: Path, outcome: Outcome) -> None:
    """Send the signal at its moment, and wait until all ranks have ended."""
    kill, began = outcome.kill, time.monotonic()
    victims, number = [job.processes[rank] for rank in kill.victims], signal.Signals[kill.signal]
    step = 1 + int(kill.seconds / 5 * (NUM_STEPS - 1))
    sent = bool(kill.operation)
    while any(process.is_alive() for process in job.processes):
        now = time.monotonic() - began
        due = now >= kill.seconds if kill.kind in ("time", "joining") else _rows(folder) >= step
        if not sent and due:
            sent, outcome.hit = True, all(process.is_alive() for process in victims)
            _send(victims, number)
        others = [process for process in job.processes if process not in victims]
        if number == signal.SIGSTOP and others and not any(process.is_alive() for process in others):
            _send(victims, signal.SIGCONT)
        if now > HUNG_SECONDS:
            outcome.problems.append(f"hung: {[process.exitcode for process in job.processes]}: {job.output()[-2000:]}")
            job.kill()
        time.sleep(0.005)
    outcome.hit = outcome.hit or (folder / "hit").exists()
    _codes(job)


def _send(processes: Sequence[Any], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def untrue(outcome: Outcome, output: str) -> list[str]:
    """Exit codes and a status that do not say what happened."""
    kill, state = outcome.kill, outcome.state
    # SIGTERM kills too, in the moment before a new process can handle it
    killed = [rank for rank in kill.victims if outcome.codes[rank] == -signal.Signals[kill.signal]]
    codes = [code for rank, code in enumerate(outcome.codes) if rank not in killed]
    silent = 0 in killed or (kill.signal == "SIGSTOP" and 0 in kill.victims)  # rank 0 alone writes the status
    expected = {"finished": {0}, "interrupted": {EXIT_INTERRUPTED}, "failed": {1}, "": {1, EXIT_INTERRUPTED}}
    problems = []
    if state == "running" and not silent:
        problems.append("untrue: running, and rank 0 was not killed")
    if state in expected and not set(codes) <= expected[state] and not (silent and state == "" and set(codes) <= {1}):
        problems.append(f"untrue: {state or 'no status'} with exit codes {outcome.codes}")
    if "Traceback" in output:
        problems.append(f"untrue: a traceback: {output[-2000:]}")
    return problems


def _codes(job: Job) -> list[int]:
    return job.wait(HUNG_SECONDS)


def _rows(folder: Path) -> int:
    with suppress(OSError):
        return (folder / "run" / METRICS_FILE).read_bytes().count(b"\n")
    return 0


def _state(folder: Path) -> str:
    return str(read_status(folder / "run").get("state", ""))


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "run")]


def _orphans(folder: Path) -> list[str]:
    """Processes that still run in the folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"orphans: process {process.pid}: {' '.join(process.cmdline())}")
    return found


def campaign(folder: Path, num_kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Make the kills that the folder's record does not have yet; yields each outcome as plain values."""
    record, made = folder / "campaign.jsonl", {}
    if record.is_file():
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        made = {row["kill"]["number"]: row for row in rows if row["seed"] == seed}
    runs = Campaign(folder)
    for number in range(num_kills):
        if number in made:
            yield made[number]
            continue
        outcome = runs.make(kill_of(number, seed))
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": seed, **asdict(outcome)}) + "\n")
        yield asdict(outcome)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the kills; 1 if anything was lost, different, left over or untrue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="keep everything here, and continue; default: a temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).resolve()
        figures: Counter[str] = Counter(dict.fromkeys((*FIGURES, "kills", "hit"), 0))
        for row in campaign(folder, options.kills, options.seed):
            kill = row["kill"]
            figures["kills"] += 1
            figures["hit"] += row["hit"]
            figures.update({problem.partition(":")[0] for problem in row["problems"]})
            shape = f"ZeRO {kill['stage']}, {kill['num_ranks']} ranks, {kill['signal']} to {kill['victims']}"
            where = f"{kill['kind']} {kill['operation']} {kill['count']}" if kill["operation"] else kill["kind"]
            verdict = "; ".join(row["problems"]) or "ok"
            line = f"kill {kill['number']}: {shape}, {where}: {row['codes']}, {row['state'] or 'no status'}: {verdict}"
            print(line, file=sys.stderr, flush=True)
    print(json.dumps({"seed": options.seed, **figures}))
    return 1 if any(figures[name] for name in FIGURES) else 0


if __name__ == "__main__":
    sys.exit(main())
