"""An operator that cannot be built is an error for a run that needs it, and advice otherwise."""

import pytest

from dsllm.doctor.operators import check_operators
from dsllm.engine.instruments.operators import Operator, Operators
from tests.doctor.test_findings import places

BUILT = Operator(purpose="offload", ready=True, missing_tools=("ninja",))
BUILDABLE = Operator(purpose="Adam", ready=False, missing_tools=())
MISSING = Operator(purpose="offload to NVMe", ready=False, missing_tools=("C++ compiler", "ninja"))


def check(needed: set[str] | None = None, **operators: Operator):
    seen = dict.fromkeys(places("a", "a"), Operators(tools={}, operators=operators))
    return list(check_operators(seen, frozenset(needed or ())))


def test_operators_that_are_built_or_can_be_have_no_findings():
    assert not check({"pin_memory", "cpu_adam"}, pin_memory=BUILT, cpu_adam=BUILDABLE)


@pytest.mark.parametrize(("needed", "level"), [({"async_io"}, "error"), (set(), "advice")])
def test_a_missing_operator_is_found_once_per_host(needed, level):
    (found,) = check(needed, async_io=MISSING, cpu_adam=BUILDABLE)
    assert found.level == level and found.where == "a"
    assert "async_io" in found.problem and "no C++ compiler, no ninja" in found.problem


def test_an_operator_is_not_reported_twice():
    error, advice = check({"async_io"}, async_io=MISSING, quantizer=MISSING)
    assert "quantizer" not in error.problem and "async_io" not in advice.problem
