"""Progress survives in a checkpoint's manifest, across minor versions."""

import pytest

from dsllm.data.position import Position
from dsllm.errors import CheckpointError
from dsllm.session.progress import Progress, read_progress

BATCH = 8
"""Sequences per step."""


def test_progress_is_read_as_it_was_written():
    progress = Progress(step=3, position=Position(40, ((24, 32),)), fingerprint=2**63, data_sha256="ab")
    assert read_progress(progress.to_dict(), BATCH, "x") == progress


def test_before_there_were_positions_the_step_was_the_position():
    expected = Progress(step=4, tokens=12, position=Position(4 * BATCH))
    assert read_progress({"step": 4, "tokens": 12}, BATCH, "x") == expected


def test_what_a_newer_version_counts_may_be_left_out_where_it_is_empty():
    saved = {"step": 4, "tokens": 12}
    assert read_progress(saved | {"rollbacks": 0, "ranges": []}, BATCH, "x") == read_progress(saved, BATCH, "x")
    with pytest.raises(CheckpointError, match=r"x: a newer dsllm saved it.*\(ranges: \[1\]\): update dsllm to resume"):
        read_progress(saved | {"rollbacks": 0, "ranges": [1]}, BATCH, "x")


@pytest.mark.parametrize("saved", [{}, {"step": "four"}, {"step": 4, "position": {"next_sample": "x"}}])
def test_damage_is_named_with_the_checkpoint(saved):
    with pytest.raises(CheckpointError, match=r"^step-4: "):
        read_progress(saved, BATCH, "step-4")
