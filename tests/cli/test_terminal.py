"""A reader that leaves does not end a run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsllm.cli.terminal import Terminal

SPEAKER = """
import sys
from dsllm.cli.terminal import Terminal
terminal = Terminal()
for line in range(100_000):
    terminal(f"line {line} of many")
print("spoken", file=sys.stderr)
"""


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c '{SPEAKER}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["line 0 of many", "0"]
    assert done.stderr == "spoken\n"


def test_the_other_ranks_are_silent(capfd):
    Terminal(speaks=False)("nothing")
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_run_whose_reader_leaves_is_finished_and_saved(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "data" / "golden.txt", tmp_path / "golden.txt")
    run = {
        "run": {"name": "tiny"},
        "data": {
            "sources": [{"name": "golden", "paths": ["golden.txt"]}],
            "sequence_length": 32,
            "validation_share": 0.0,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2},
        "train": {"total_tokens": 30 * 8 * 32, "global_batch_sequences": 8, "micro_batch_sequences": 8},
        "log": {"every_steps": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(run))
    command = f"{sys.executable} -m dsllm train tiny.yaml | head -n 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
    assert json.loads((tmp_path / "runs" / "tiny" / "status.json").read_text())["state"] == "finished"
