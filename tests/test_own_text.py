"""docs/own_text.md: its run and its commands work as they are written, on a small text and for fewer tokens."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "own_text.md").read_text(encoding="utf-8")
FEWER = ["train.total_tokens=8192", "tokenizer.vocab_size=512", "train.schedule.warmup_steps=1"]


@pytest.mark.slow
def test_the_page_as_a_newcomer_follows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(yaml)
    words = random.Random(7).choices(
        ["river", "stone", "cloud", "the", "a", "of", "and", "under", "over", "walks", "sings", "deep"], k=20_000
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(
        "\n\n".join(" ".join(words[i : i + 50]) for i in range(0, len(words), 50))
    )
    for line in commands.splitlines():
        name, *arguments = shlex.split(line)
        assert name == "dsllm"
        if "mine.yaml" in arguments:
            arguments += FEWER
        subprocess.run([sys.executable, "-m", "dsllm", *arguments], check=True, capture_output=True, timeout=200)
    assert json.loads((tmp_path / "runs" / "mine" / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / "out" / "mine" / "config.json").is_file() and list(
        (tmp_path / "runs" / "mine" / "eval").iterdir()
    )
