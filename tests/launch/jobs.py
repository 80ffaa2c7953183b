"""Jobs for the tests of dsllm launch: hostile words, and a Python that writes down what it was started with."""

import json
from pathlib import Path

from dsllm.config.cluster import ClusterConfig, HostConfig
from dsllm.launch.job import Job

HOSTILE = (
    "a=b c; touch F",
    "x=b;>F",
    "s=$(touch F)",
    "t=`touch F`",
    "h=$HOME x",
    "amp=a&touch F",
    'j={"a": 1}',
    'k={"a":1}',
    "it's",
    'quote"d',
    "br={1,2}",
    "u=%u h=%h n=%n %% 100%",
    "star=*",
    "back=\\n\\\\",
    "lines=1\n2\ntouch F",
    "tilde=~",
    "history=!x",
    "hash=# no comment",
    "umlaut=Größe",
    "",
    " ",
    "-x",
    "last=one",
)
"""Words that a shell would read as something else; each has broken a launcher (`deepspeed` with pdsh, most of them)."""

HOSTS = (HostConfig(name="n1", slots=1), HostConfig(name="n2", slots=1))
ENVIRONMENT = {f"V{i}": word for i, word in enumerate(HOSTILE)}

WRITER = """\
#!/usr/bin/python3
import json, os, sys
record = {"argv": sys.argv[1:], "environment": {k: v for k, v in os.environ.items() if k[0] == "V"}, "cwd": os.getcwd()}
open(f"record.{os.environ.get('SLURM_PROCID', 0)}.json", "w").write(json.dumps(record))
sys.exit(int(os.environ.get("EXIT_CODE", 0)))
"""


def make_job(folder: Path, name: str = "tiny-1") -> Job:
    """A job in a folder whose name is as hostile as its words."""
    directory = folder / "a b$(touch F);'%h"
    directory.mkdir(exist_ok=True)
    return Job(
        name=name, run_name="tiny", words=HOSTILE, directory=directory, run_directory=directory / "runs" / "tiny"
    )


def recording_cluster(folder: Path, **fields: object) -> ClusterConfig:
    """A cluster whose virtual environment has a `python` that records its words, variables and folder."""
    bin_folder = folder / "venv $(touch F)" / "bin"
    bin_folder.mkdir(parents=True, exist_ok=True)
    (bin_folder / "python").write_text(WRITER)
    (bin_folder / "python").chmod(0o755)
    (bin_folder / "activate").write_text('export PATH="$(dirname "${BASH_SOURCE[0]}"):$PATH"\n')
    return ClusterConfig(virtual_environment=str(bin_folder.parent), environment=ENVIRONMENT, **fields)


def record(job: Job, rank: int = 0) -> dict:
    """What the recording Python saw."""
    seen = json.loads((job.directory / f"record.{rank}.json").read_text())
    assert seen["cwd"] == str(job.directory) and seen["environment"].items() >= ENVIRONMENT.items()
    assert not list(job.directory.parent.rglob("F")), "a word was executed"
    return seen
