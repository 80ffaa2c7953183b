"""What a checkpoint records of its run can be loaded back, and names the libraries that made it."""

import re

from dsllm.config.load import run_from_dict
from dsllm.session.record import RunRecord
from dsllm.version import __version__
from tests.helpers.tiny import tiny_run


def test_the_recorded_run_is_the_run():
    resolved = run_from_dict(RunRecord(config=tiny_run(), deepspeed={}).config_as_dict, "x")
    record = RunRecord(config=resolved, deepspeed={})
    assert run_from_dict(record.config_as_dict, "x") == resolved and resolved.model == tiny_run().model
    assert list(record.versions) == ["dsllm", "torch", "deepspeed", "safetensors"]
    assert record.versions["dsllm"] == __version__
    assert all(re.match(r"\d+\.\d+", version) for version in record.versions.values())
