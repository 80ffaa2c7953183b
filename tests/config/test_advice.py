"""What a run can do and nobody means to is said, and sound runs are left alone."""

import pytest

from dsllm.config.advice import advice_on
from dsllm.config.load import load_run

STEPS = "train.total_tokens=40960"  # 10 steps of the embedded recipe


def test_a_sound_run_gets_no_advice():
    assert list(advice_on(load_run(None))) == []
    assert list(advice_on(load_run(None, [STEPS, "train.schedule.warmup_steps=10"]))) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.optimizer.learning_rate=50", "train.schedule={}"], "train.optimizer.learning_rate: 50 is far above"),
        (["train.optimizer.learning_rate=0", "train.schedule={}"], "no weight will change"),
        (["train.schedule={warmup_steps: 20}"], "warmup_steps: the warm-up takes 20 steps and the run has 10: the learning "
         "rate ends at 0.0015 and never reaches its peak of 0.003"),
        (["train.schedule={warmup_tokens: 81920}"], "warmup_tokens: the warm-up takes 20 steps and the run has 10"),
        (["train.schedule={shape: wsd, warmup_steps: 4, decay_steps: 8}"],
         "the decay of 8 steps is cut to the 6 that are left of 10 after the warm-up"),
    ],
)  # fmt: skip
def test_what_nobody_means_is_said(overrides, says):
    (text,) = advice_on(load_run(None, [STEPS, *overrides]))
    assert says in text
