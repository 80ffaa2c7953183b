"""GPUs that torch does not see, that differ between ranks, or that another program uses are found, by values only."""

import dataclasses

import pytest

from dsllm.byte_units import GIB
from dsllm.doctor.gpus import check_gpus
from dsllm.engine.processes.device import Gpu
from tests.doctor.test_findings import places

FREE = Gpu(name="H100", memory_total=80 * GIB, memory_free=79 * GIB)
RANKS = places("a", "a", "b")


def check(*gpus: Gpu | None, driver: bool = True):
    return list(check_gpus(dict(zip(RANKS, gpus, strict=True)), dict.fromkeys(RANKS, driver)))


def test_equal_and_free_gpus_have_no_findings():
    assert not check(FREE, FREE, FREE)
    assert not check(None, None, None, driver=False)


def test_a_driver_without_a_gpu_for_torch_is_an_error_once_per_host():
    found = check(None, None, None)
    assert [(finding.level, finding.where) for finding in found] == [("error", "a"), ("error", "b")]
    assert "torch sees no GPU" in found[0].problem


@pytest.mark.parametrize(("other", "level"), [(dataclasses.replace(FREE, name="A100"), "advice"), (None, "error")])
def test_another_kind_is_found(other, level):
    (found,) = [finding for finding in check(FREE, FREE, other) if "computes on" in finding.problem]
    assert found.level == level and found.where == "rank 2 on b"


def test_memory_in_use_is_found():
    (found,) = check(FREE, dataclasses.replace(FREE, memory_free=70 * GIB), FREE)
    assert found.problem == "10.0 of 80.0 GiB are already in use" and found.where == "rank 1 on a"
