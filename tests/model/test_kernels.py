"""Liger's kernels equal torch's, where Triton is: its interpreter runs them on a CPU, slowly and exactly."""

import numpy
import pytest
import torch

from dsllm.errors import ConfigError, MissingExtra
from dsllm.model.kernels import TORCH, Kernels, liger_kernels, load_kernels


def test_liger_is_refused_on_a_cpu_by_name():
    with pytest.raises(ConfigError, match=r"train.kernels: liger, but this device \(cpu\) has no Triton: use torch"):
        load_kernels("liger", "cpu")
    assert load_kernels("torch", "cpu") is TORCH


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        kernels = liger_kernels()
    except MissingExtra as error:
        pytest.skip(str(error))
    if not torch.cuda.is_available():
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "_implicit_cvt", also_floats(interpreter))
        # the interpreter has no libdevice, whose rsqrt Liger calls; Triton's own is the same function
        monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: interpreter.tl.math.rsqrt(x))
    return kernels


def also_floats(interpreter):
    """The interpreter hands a kernel its float arguments as Python's, which have no `.to`; a compiled kernel gets fp32."""
    convert, language = interpreter._implicit_cvt, interpreter.tl

    def converted(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), language.float32)
            return language.tensor(handle, language.float32)
        return convert(argument)

    return converted


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_liger_equals_torch(liger: Kernels, name: str):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, y = (torch.randn(3, 5, 48, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(48, device=device, requires_grad=True)
    arguments = (x, weight) if name == "rms_norm" else (x, y)
    upstream = torch.randn(3, 5, 48, device=device)
    results = []
    for kernels in (TORCH, liger):
        out = kernels.rms_norm(x, weight, 1e-5) if name == "rms_norm" else kernels.swiglu(x * 1, y * 1)
        results.append([out, *torch.autograd.grad(out, arguments, upstream)])
    for wanted, found in zip(*results, strict=True):
        # sums of 48 terms (15 for the weight's gradient) in fp32: a few roundings of 2^-24 of the largest element
        found, wanted = found.detach(), wanted.detach()
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-6
