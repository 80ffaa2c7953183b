"""torchrun: it starts a killed worker again, and the run resumes from its last checkpoint."""

import signal

import pytest

from dsllm.processes import free_port
from tests.helpers import jobs
from tests.helpers.launched import (
    BIN,
    ENTRY,
    ENVIRONMENT,
    EXACT,
    budget,
    copy_of,
    fingerprint,
    launch,
    losses,
    rank_process,
    seconds_until_gone,
    status,
)

pytestmark = pytest.mark.long

STEPS = 160
"""Enough that the kill comes before the end: steps take over 10 ms."""


def test_a_killed_worker_is_restarted_and_the_curve_is_the_same(prepared, folder, tmp_path):
    words = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--max-restarts", "1"]
    # without these two the second attempt finds the first one's addresses and fails (docs/launch.md)
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = ["--config", "tiny.yaml", EXACT, "checkpoint.every_steps=20", *budget(STEPS)]
    job = launch([*words, ENTRY, *run], folder, environment)
    job.wait_for_step(50)
    rank_process(folder, 1).send_signal(signal.SIGKILL)
    assert job.wait() == 0, job.output()
    assert "resuming runs/tiny/checkpoints/step-" in job.output() and status(folder)["attempt"] == 2
    seconds_until_gone(folder, 10)

    whole = copy_of(prepared, tmp_path / "whole")
    codes, text = jobs.train(whole, 2, ["tiny.yaml", EXACT, *budget(STEPS)])
    assert codes == [0, 0], text
    assert losses(folder) == losses(whole) and fingerprint(folder) == fingerprint(whole)
