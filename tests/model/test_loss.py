"""Chunked losses equal torch's cross-entropy, in value and gradient, and never hold all logits in fp32."""

import pytest
import torch
from torch.nn import functional as F

from dsllm.model import loss
from dsllm.model.loss import token_losses

N, WIDTH, VOCABULARY, PADDED = 30, 12, 37, 40


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(2, N // 2, WIDTH, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator).to(weight_dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (2, N // 2), generator=generator)
    upstream = torch.rand(2, N // 2, generator=generator)  # each token counts differently, one not at all
    upstream[0, 0] = 0
    return hidden, weight, targets, upstream


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """torch's cross-entropy in double precision, over the real entries only."""
    logits = hidden.double() @ weight.double()[:VOCABULARY].t()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@pytest.fixture(params=["one chunk, kept", "one chunk, recomputed", "many chunks, kept", "many chunks, recomputed"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "many" in request.param:
        monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", 7 * PADDED)  # 30 rows = 4 chunks of 7 and one of 2
        monkeypatch.setattr(loss, "WIDE_ELEMENTS_CPU", 2 * PADDED)
    if "recomputed" in request.param:
        monkeypatch.setattr(loss, "KEPT_ELEMENTS", 0)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),  # sums of 12 and of 37 terms in fp32
        # Logits of up to 10 are rounded to bf16, half a step of 2^-5 = 0.03 at the largest, with losses of up to 20;
        # gradients have roundings of 2^-9 in probabilities, in hidden and in the result.
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
)
def test_value_and_gradients(chunking: None, dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float):
    hidden, weight, targets, upstream = inputs(dtype, weight_dtype)
    # the head casts its weight, so the reference starts from the weight as it is used
    cast = weight.detach().to(dtype).double().requires_grad_()
    found = token_losses(hidden, weight, targets, VOCABULARY)
    wanted = reference(hidden, cast, targets)
    assert found.dtype == torch.float32 and found.shape == targets.shape
    grads = torch.autograd.grad(found, (hidden, weight), upstream)
    wanted_grads = torch.autograd.grad(wanted, (hidden, cast), upstream.double())
    assert [g.dtype for g in grads] == [dtype, weight_dtype]
    for one, other in zip([found, *grads], [wanted, *wanted_grads], strict=True):
        one, other = one.detach().double(), other.detach().double()
        assert float((one - other).abs().max() / other.abs().max()) < tolerance


def test_padding_takes_no_part(chunking: None):
    hidden, weight, targets, upstream = inputs(torch.float32, torch.float32)
    before = token_losses(hidden, weight, targets, VOCABULARY)
    with torch.no_grad():
        weight[VOCABULARY:] = 100.0
    after = token_losses(hidden, weight, targets, VOCABULARY)
    assert torch.equal(before, after)
    (grad,) = torch.autograd.grad(after, weight, upstream)
    assert (grad[VOCABULARY:] == 0).all()


def test_the_gradient_of_a_nearly_certain_token_does_not_vanish_in_bf16():
    # p = 0.9995 rounds to 1 in bf16, and p - 1 to 0; the loss knows better.
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.5]], requires_grad=True)  # logits 8 and 0.5
    losses = token_losses(hidden, weight, torch.zeros(1, dtype=torch.long), 2)
    (grad,) = torch.autograd.grad(losses.sum(), weight)
    exact = -torch.special.expit(torch.tensor(-7.5, dtype=torch.float64))
    assert float(grad[0]) == pytest.approx(float(exact), rel=2**-8)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets, _ = inputs(torch.float32, torch.float32)
    assert torch.autograd.grad(token_losses(hidden, weight.detach(), targets, VOCABULARY).sum(), hidden)
    assert torch.autograd.grad(token_losses(hidden.detach(), weight, targets, VOCABULARY).sum(), weight)


def test_logits_are_kept_in_low_precision_and_only_when_they_are_few(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets, _ = inputs(torch.bfloat16, torch.float32)

    def kept() -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            token_losses(hidden, weight, targets, VOCABULARY)
        return [t for t in tensors if t.numel() == N * PADDED]

    assert [t.dtype for t in kept()] == [torch.bfloat16]
    monkeypatch.setattr(loss, "KEPT_ELEMENTS", 0)
    assert kept() == []


def test_the_scale_of_the_loss_is_not_rounded():
    """1/768 is no bf16 number: a rounded factor would show in the whole gradient, 0.26 % off."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(96, 32).bfloat16(), torch.randn(256, 32)
    targets = torch.randint(0, 256, (96,))
    grads = {}
    for factor in (1.0, 1 / 768):
        leaf = weight.clone().requires_grad_()
        (token_losses(hidden, leaf, targets, 256).sum() * factor).backward()
        grads[factor] = leaf.grad.double()
    # the ratio over 8192 entries, each rounded by itself to 2^-9, averages to far below one rounding
    ratio = (grads[1 / 768] * grads[1.0]).sum() / (grads[1.0] ** 2).sum() * 768
    assert abs(float(ratio) - 1) < 2**-9 / 10
