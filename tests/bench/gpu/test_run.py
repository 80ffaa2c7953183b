"""The GPU bench from end to end, as far as a CPU can take it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.candidates import BIN, ROOT
from bench.gpu import checks, run, speed


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_a_dry_run_checks_and_measures_everything_a_cpu_can_do(tmp_path: Path) -> None:
    command = ["bash", "bench/gpu/run.sh", "--device", "cpu", "--tiny", "--minutes", "14", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHON": str(BIN / "python")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all passed"
    record = json.loads((tmp_path / "gpu.json").read_text())
    passed = {check["name"] for check in record["checks"] if check["passed"]}
    assert passed >= {check.name for check in checks.CHECKS if not check.gpu_only}
    assert record["parity"]
    assert [m["name"] for m in record["speed"]] == list(speed.candidates("tiny", tmp_path, gpu=False))
    for measured in record["speed"]:
        assert len(measured["step_seconds"]) == speed.STEPS and measured["peak_memory_gib"] > 0


def test_the_table_gives_ratio_and_both_bases_of_mfu() -> None:
    about = {"device": "a GPU", "torch": "2", "gemm_flops": 8e14, "sheet_flops": 1e15, "sheet_origin": "its sheet"}
    base = speed.Measured("125m", speed.BASE, [0.2] * 5, 10.0, 30.0)
    twice = speed.Measured("125m", "dsllm, ZeRO-1", [0.1] * 5, 8.0, 20.0)
    late = speed.Measured("1.3b", "dsllm, ZeRO-3", problem="not run: out of time")
    text = run.summary(about, [checks.Result("bf16", True, "", 1.0)], [base, twice, late])
    assert twice.tokens_per_second == pytest.approx(16 * 2048 / 0.1)
    assert (
        f"| 125m | dsllm, ZeRO-1 | 2.00 | 327,680 | {twice.flops / 8e14:.1%} | {twice.flops / 1e15:.1%} | 8.0 | 20 |"
        in text
    )
    assert "| 1.3b | dsllm, ZeRO-3 | not run: out of time | | | | | |" in text
    assert "1 of 1 checks passed" in text


def test_candidates_that_say_most_come_first_at_every_size(tmp_path: Path) -> None:
    order = [(size, name) for size, name, _ in speed.in_order(["125m", "1.3b"], tmp_path, gpu=True)]
    assert order[:4] == [(size, name) for name in (speed.BASE, "dsllm, ZeRO-1") for size in ("125m", "1.3b")]
    assert len(set(order)) == len(order) == 2 * len(speed.candidates("125m", tmp_path, gpu=True))
