"""Real launchers set the variables that we read: every form in which SLURM starts processes, MPICH, Intel MPI, prterun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launched import BIN, ENTRY, ENVIRONMENT, EXACT, ROOT, fingerprint, launch, losses, status

pytestmark = pytest.mark.long

WHO = """
import dataclasses, json, os
from dsllm.engine.processes.ranks import discover_ranks
from dsllm.errors import DsllmError
try:
    said = dataclasses.asdict(discover_ranks())
except DsllmError as error:
    said = {"refused": str(error)}
os.write(1, (json.dumps(said) + chr(10)).encode())
"""
"""Prints where this process stands, in one write."""


@pytest.fixture
def who(tmp_path) -> str:
    """The command of a process that says which rank it is."""
    (tmp_path / "who.py").write_text(WHO)
    return f"env PYTHONPATH={ROOT} {BIN / 'python'} {tmp_path / 'who.py'}"


def answers(output: str) -> list[dict]:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda answer: answer.get("rank", -1))


def places(output: str) -> list[tuple[int, int, int, int]]:
    """Rank, world size, local rank and local size of each process."""
    found = answers(output)
    return [(a.get("rank"), a.get("world_size"), a.get("local_rank"), a.get("local_size")) for a in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-N2 -n2 --mpi=none", [(0, 2, 0, 1), (1, 2, 0, 1)]),
        ("-N2 --ntasks-per-node=2", [(0, 4, 0, 2), (1, 4, 1, 2), (2, 4, 0, 2), (3, 4, 1, 2)]),
        ("-N2 -n3 --distribution=block", [(0, 3, 0, 2), (1, 3, 1, 2), (2, 3, 0, 1)]),
        ("-N2 -n3 --distribution=cyclic", [(0, 3, 0, 2), (1, 3, 0, 1), (2, 3, 1, 2)]),
        ("-N1 -n2", [(0, 2, 0, 2), (1, 2, 1, 2)]),
        ("-N1 -n1", [(0, 1, 0, 1)]),
        ("-N2 -n2 --mpi=pmi2", [(0, 2, 0, 1), (1, 2, 0, 1)]),
    ],
)
def test_srun(slurm, who, words, expected):
    """Without a batch script, and so without MASTER_ADDR: the step's first node is the master."""
    output = slurm.run("srun", *words.split(), *who.split())
    assert places(output) == expected, output
    found = answers(output)
    masters = {(a["master_address"], a["master_port"]) for a in found}
    assert len(masters) == 1 and (found[0]["master_address"] == "n1") == ("-N2" in words), output


SALLOC = {
    "the shell of an allocation": ("-N2 -n4", "{who}", [(0, 1, 0, 1)]),
    "a step of fewer tasks": ("-N2 -n4", "srun -n2 -N2 {who}", [(0, 2, 0, 1), (1, 2, 0, 1)]),
    "a step of one task": ("-N2 -n4", "srun -n1 -N1 {who}", [(0, 1, 0, 1)]),
    "uneven": ("-N2 -n3", "srun {who}", [(0, 3, 0, 2), (1, 3, 1, 2), (2, 3, 0, 1)]),
    "a shell that starts a process of a task": ("-N1 -n2", "srun -n1 bash -c '{who}'", [(0, 1, 0, 1)]),
}


@pytest.mark.parametrize("name", SALLOC)
def test_salloc(slurm, who, name):
    allocation, command, expected = SALLOC[name]
    output = slurm.run("salloc", *allocation.split(), "bash", "-c", command.replace("{who}", who))
    assert places(output) == expected, output


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("{who}", [(0, 1, 0, 1)]),  # the script itself is one process, whatever it has allocated
        ("srun --ntasks=2 --ntasks-per-node=1 {who}", [(0, 2, 0, 1), (1, 2, 0, 1)]),
        ("srun {who}", [(0, 4, 0, 2), (1, 4, 1, 2), (2, 4, 0, 2), (3, 4, 1, 2)]),
        ("export RANK=0 WORLD_SIZE=1; srun --ntasks=2 --ntasks-per-node=1 {who}", [(None,) * 4] * 2),  # left over
    ],
)
def test_sbatch(slurm, who, tmp_path, command, expected):
    script, output = tmp_path / "job.sbatch", tmp_path / "output"
    script.write_text(f"#!/bin/bash\n{command.replace('{who}', who)}\n")
    words = ["--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={output}", f"--chdir={tmp_path}", str(script)]
    number = slurm.run("sbatch", *words).strip()
    slurm.wait_for_state(number, ["COMPLETED", "FAILED"], 60)
    assert places(output.read_text()) == expected, output.read_text()


def hydra() -> str:
    """MPICH's or Intel MPI's mpiexec; DSLLM_HYDRA may name one that is not on the PATH."""
    program = os.environ.get("DSLLM_HYDRA") or shutil.which("mpiexec.hydra")
    if program is None:
        pytest.skip("no mpiexec.hydra (MPICH, Intel MPI)")
    return program


def test_hydra_starts_ranks_that_train(reference, folder):
    program = hydra()
    words = [program, "-n", "2", "-genv", "MASTER_ADDR", "127.0.0.1", "-genv", "MASTER_PORT", "29871"]
    job = launch([*words, str(BIN / "python"), "-u", ENTRY, "--config", "tiny.yaml", EXACT], folder, ENVIRONMENT)
    assert job.wait() == 0, job.output()
    assert "2 ranks on cpu (started by mpiexec" in job.output()
    assert losses(folder) == losses(reference) and fingerprint(folder) == fingerprint(reference)
    assert status(folder)["state"] == "finished"


def test_hydra_without_a_master_is_refused_on_every_rank(who):
    """The mpi4py of the extra belongs to Open MPI: asked through it, each process would be the only one."""
    done = subprocess.run(
        [hydra(), "-n", "2", *who.split()], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )
    refused = answers(done.stdout)
    assert len(refused) == 2 and all("MASTER_ADDR and MASTER_PORT" in answer["refused"] for answer in refused), done


def test_prterun_is_refused_in_words(who):
    program = Path(sys.executable).parent / "prterun"
    if not program.is_file():
        pytest.skip("no prterun (Open MPI 5)")
    words = [str(program), "--allow-run-as-root", "--map-by", ":oversubscribe", "-np", "2", *who.split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert [("PMIx has started this process" in answer["refused"]) for answer in answers(done.stdout)] == [True] * 2, (
        done
    )
