"""Tries every launcher: a start, a resume, a failing rank, a killed rank and a stop. Writes the table in docs/launch.md.

    python -m bench.launchers [--only NAME ...] [--write]

Needs what tests/cluster needs: root, ssh, pdsh, SLURM and Open MPI on a Linux machine. Takes half an hour on two cores,
and leaves nothing behind.
"""

import argparse
import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.report import ROOT, marks, write
from tests.cluster.hosts import NODES, Hosts, start_hosts
from tests.cluster.slurm import Slurm, start_slurm
from tests.helpers import jobs
from tests.helpers.launched import (
    BIN,
    ENDLESS,
    ENTRY,
    ENVIRONMENT,
    EXACT,
    FAULTY,
    Launched,
    budget,
    copy_of,
    free_port,
    launch,
    losses,
    num_steps,
    prepare_folder,
    processes_in,
    rank_process,
    status,
    wait_for,
)

PAGE = ROOT / "docs" / "launch.md"
PLACE = "launchers"
WHOLE_STEPS = 300
"""Length of the uninterrupted run that curves are compared with; a stop comes at about step 20 to 100."""
MORE_STEPS = 5
"""Steps that a resumed run takes."""
END_SECONDS = 150
"""Longest wait for a launcher's end; when one host has failed, dsllm launch gives the others 90 s."""
VARIABLES = {
    **ENVIRONMENT,
    "PYTHONPATH": FAULTY,  # SIGUSR2 to a rank makes it fail
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
CLUSTER = """
hosts: [{name: n1, slots: 1}, {name: n2, slots: 1}]
environment: {OMP_NUM_THREADS: 1, PYTHONPATH: FAULTY, OMPI_ALLOW_RUN_AS_ROOT: 1, OMPI_ALLOW_RUN_AS_ROOT_CONFIRM: 1}
"""
SLURM = """
slurm: {nodes: 2, tasks_per_node: 1, gres: gpu:1, time_limit: 30, signal_seconds: 60}
environment: {OMP_NUM_THREADS: 1, PYTHONPATH: FAULTY}
"""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """One way to start the run."""

    name: str
    words: tuple[str, ...]
    """The whole command, without the overrides of a trial."""
    num_ranks: int = 2
    on_login: bool = False
    """True: it is started on the login host and runs on the nodes. False (default): it runs on this machine."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files in the folder, by name."""


def launchers() -> list[Launcher]:
    """All launchers, the plain ones first."""
    run = (ENTRY, "--config", "tiny.yaml", EXACT)
    nodes = {"hosts": "".join(f"{name} slots=1\n" for name in NODES), "cluster.yaml": CLUSTER, "slurm.yaml": SLURM}
    here = ("--num_gpus", "2", "--master_port", free_port())
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1")
    dsllm = (str(BIN / "dsllm"), "launch", "tiny.yaml", EXACT)
    sbatch = ("sbatch", "--wait", f"--export=ALL,VENV={BIN.parent}", "--output=output.txt")
    return [
        Launcher(name="`python`", words=(str(BIN / "python"), *run), num_ranks=1),
        Launcher(name="`deepspeed --num_gpus 2`", words=(str(BIN / "deepspeed"), *here, *run)),
        Launcher(name="`torchrun`", words=(str(BIN / "torchrun"), "--nproc-per-node", "2", *rendezvous, *run)),
        Launcher(
            name="`mpirun -np 2`",
            words=(str(BIN / "mpirun"), "--oversubscribe", "-np", "2", str(BIN / "python"), "-u", *run),
        ),
        Launcher(
            name="`deepspeed --hostfile` (pdsh)",
            words=(str(BIN / "deepspeed"), "--hostfile", "hosts", *run),
            on_login=True,
            files=nodes,
        ),
        Launcher(
            name="`sbatch multi_node.sbatch`",
            words=(*sbatch, str(ROOT / "launch" / "slurm" / "multi_node.sbatch"), "tiny.yaml", EXACT),
            on_login=True,
        ),
        Launcher(name="`dsllm launch`, this machine", words=dsllm, files={"here.yaml": "slots: 2\n"}),
        *(
            Launcher(
                name=f"`dsllm launch --with {name}`",
                words=(*dsllm, "--cluster", "slurm.yaml" if name == "slurm" else "cluster.yaml", "--with", name),
                on_login=True,
                files=nodes,
            )
            for name in ("deepspeed", "torchrun", "mpi", "slurm")
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The clusters and the prepared run that the launchers are tried with."""

    hosts: Hosts
    slurm: Slurm
    prepared: Path
    whole: Mapping[int, Sequence[float]]
    """Losses of the uninterrupted run, by number of ranks."""


def start(place: Place, launcher: Launcher, folder: Path, overrides: Sequence[str]) -> Launched:
    """Start the run with the launcher, in the folder."""
    for name, text in launcher.files.items():
        (folder / name).write_text(text.replace("FAULTY", FAULTY))
    words = [*launcher.words, *(["--cluster", "here.yaml"] if "here.yaml" in launcher.files else []), *overrides]
    return launch(place.hosts.login.command(words, folder) if launcher.on_login else words, folder, VARIABLES)


@dataclass
class Event:
    """How a job ended after something was done to it."""

    code: int | None
    """None: the launcher was still running when we gave up."""
    seconds: float
    """Until the launcher had ended and no process was left on any host."""
    orphans: int
    """Processes that outlived the launcher by more than a second."""
    state: str
    """The state in status.json."""

    def text(self) -> str:
        """As a cell of the table."""
        ended = "did not end" if self.code is None else f"code {self.code}"
        left = f", outlived by {self.orphans} of its processes" if self.orphans else ""
        return f"{ended}, {self.seconds:.0f} s{left}; `{self.state}`"


def try_launcher(place: Place, launcher: Launcher, root: Path) -> list[str]:
    """Try a launcher; its row of the table: start, resume, failing rank, killed rank, stop."""
    folder = copy_of(place.prepared, root / "stopped")
    began = time.monotonic()
    job = start(place, launcher, folder, ENDLESS)
    job.wait_for_step(1)
    started = time.monotonic() - began
    job.wait_for_step(20)
    stopped = watch(job, folder, lambda: stop(place, launcher, job))
    resumed = _resume(place, launcher, folder)
    cells = [f"{started:.0f} s", resumed]
    for name, number in (("failed", signal.SIGUSR2), ("killed", signal.SIGKILL)):
        folder = copy_of(place.prepared, root / name)
        job = start(place, launcher, folder, ENDLESS)
        job.wait_for_step(5)
        rank = rank_process(folder, 1) if launcher.num_ranks > 1 else psutil.Process(job.process.pid)
        cells.append(watch(job, folder, lambda rank=rank, number=number: rank.send_signal(number)).text())
    return [launcher.name, *cells, stopped.text()]


def _resume(place: Place, launcher: Launcher, folder: Path) -> str:
    step = num_steps(folder)
    began = time.monotonic()
    job = start(place, launcher, folder, budget(step + MORE_STEPS))
    try:
        code = job.wait(END_SECONDS)
    except TimeoutError:
        return "did not end"
    seconds = time.monotonic() - began
    same = losses(folder) == list(place.whole[launcher.num_ranks][: step + MORE_STEPS])
    return f"code {code}, {seconds:.0f} s; curve {'the same to the last bit' if same else '**differs**'}"


def stop(place: Place, launcher: Launcher, job: Launched) -> None:
    """Stop a job as a user would: Ctrl-C in the terminal, or scancel for a batch job."""
    if launcher.words[0] == "sbatch":
        number = place.slurm.run("squeue", "--noheader", "--format=%i").split()[0]
        place.slurm.run("scancel", number)
    else:
        job.send(signal.SIGINT, to_all=True)


def watch(job: Launched, folder: Path, act: Callable[[], None]) -> Event:
    """Do something to a job, see how it ends, and kill what is left."""
    began = time.monotonic()
    act()
    try:
        code: int | None = job.wait(END_SECONDS)
    except TimeoutError:
        code = None
    time.sleep(1)
    left = processes_in(folder)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not processes_in(folder), 60, str)
    seconds = time.monotonic() - began - (0 if left else 1)
    for process in processes_in(folder):
        process.kill()
    return Event(code, seconds, len(left), str(status(folder)["state"]))


@contextlib.contextmanager
def prepare() -> Iterator[tuple[Place, Path]]:
    """Start the clusters, prepare the run's data, and train the uninterrupted runs."""
    with tempfile.TemporaryDirectory(prefix="dsllm-launchers-") as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "hosts").mkdir()
        prepare_folder(root / "prepared")
        whole = {}
        for num_ranks in (1, 2):
            folder = copy_of(root / "prepared", root / f"whole-{num_ranks}")
            codes, text = jobs.train(folder, num_ranks, ["tiny.yaml", EXACT, *budget(WHOLE_STEPS)])
            assert codes == [0] * num_ranks, text
            whole[num_ranks] = losses(folder)
        with start_hosts(root / "hosts") as hosts, start_slurm(hosts) as slurm:
            yield Place(hosts=hosts, slurm=slurm, prepared=root / "prepared", whole=whole), root


def rows_in(page: Path) -> dict[str, list[str]]:
    """The rows that the page already has, by launcher."""
    begin, end = marks(PLACE)
    text = page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    return {row[0]: row for row in rows if row[0].startswith("`")}


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows, under their headings."""
    heads = ["", "first step after", "resume after the stop, to the end", "a rank fails", "a rank is killed", "stop"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def main() -> None:
    """Measure the whole table, or some of its rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.launchers", description=__doc__)
    parser.add_argument("--only", nargs="*", help="launchers whose name has one of these words")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/launch.md")
    options = parser.parse_args()
    every = launchers()
    chosen = [x for x in every if not options.only or any(word in x.name for word in options.only)]
    rows = rows_in(PAGE)
    with prepare() as (place, root):
        for i, launcher in enumerate(chosen):
            (root / str(i)).mkdir()
            try:
                row = try_launcher(place, launcher, root / str(i))
            except (AssertionError, TimeoutError) as error:  # the other launchers are still worth trying
                row = [launcher.name, f"did not get so far: {str(error).splitlines()[0]}"]
                print(error, flush=True)
            for process in processes_in(root / str(i)):
                process.kill()
            print("  ".join(row), flush=True)
            rows[launcher.name] = row
            if options.write:  # each row as soon as it is measured
                write(table([rows[x.name] for x in every if x.name in rows]), PLACE, PAGE)


if __name__ == "__main__":
    main()
