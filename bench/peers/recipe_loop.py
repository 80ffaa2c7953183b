"""dsllm's engine, with elements of its recipe for CPUs replaced by what torch does otherwise."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers.common import announce, batches, command_line, device
from bench.peers.dsllm_engine import build
from bench.workloads import WORKLOADS
from dsllm.batches import MicroBatch
from dsllm.config.train import Precision
from dsllm.engine.processes.device import set_up_process
from dsllm.engine.processes.process_group import process_group
from dsllm.engine.processes.ranks import discover_ranks
from dsllm.engine.step import take_step
from dsllm.model import transformer
from dsllm.objectives import TokenLoss


def replace(name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function that dsllm/model/transformer.py calls."""
    setattr(transformer, name, make(getattr(transformer, name)))


def without_attention() -> None:
    """torch's fused kernel instead of the block-causal one."""

    def fused(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)

    replace("causal_attention", lambda _: fused)


def without_loss() -> None:
    """All logits in fp32 at once, and torch's cross-entropy."""

    def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab_size].float()
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)

    replace("token_losses", lambda _: token_losses)


def without_precision() -> None:
    """torch.autocast chooses the dtype per operation, instead of bf16 activations and weights cast inside Linear."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)

    def plainly(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Cast as autocast would inside a function that has its own backward pass, which autocast does not reach."""

        def function(first: Tensor, *others: Any, **more: Any) -> Tensor:
            with autocast(enabled=False):
                return inner(first.bfloat16(), *others, **more)

        return function

    replace("linear", lambda _: F.linear)
    replace("causal_attention", plainly)
    replace("token_losses", plainly)
    transformer.Transformer.forward = autocast()(transformer.Transformer.forward)


PATCHES = {"attention": without_attention, "loss": without_loss, "precision": without_precision}
ELEMENTS = (*PATCHES, "allocator", "optimizer")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--without", default="", help=f"by comma: {', '.join(ELEMENTS)}")
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage")
    parser.add_argument("--reduce-scatter", action="store_true", help="zero_optimization.reduce_scatter: true")
    options = parser.parse_args()
    without = set(filter(None, options.without.split(",")))
    if without - set(ELEMENTS):
        parser.error(f"--without {options.without}: there are {', '.join(ELEMENTS)}")
    shape = WORKLOADS[options.workload]
    for name, patch in PATCHES.items():  # in this order: precision wraps the functions that the others have put in
        if name in without:
            patch()
    ranks = discover_ranks()
    if "allocator" not in without:
        set_up_process(ranks.local_size)
    precision: Precision = "fp32" if "precision" in without else "fp32_compute_bf16"
    zero = {"reduce_scatter": True} if options.reduce_scatter else {}
    with process_group(ranks, device()) as world, contextlib.suppress(KeyboardInterrupt):
        engine = build(shape, world, options.zero, precision, **zero)
        for group in engine.optimizer.param_groups:
            group["fused"] = "optimizer" not in without
            group["foreach"] = None if group["fused"] else False
        for step, tokens in enumerate(itertools.cycle(batches(shape)), start=1):
            announce(
                step,
                take_step(
                    engine, [MicroBatch(inputs=tokens[:, :-1], targets=tokens[:, 1:])], TokenLoss(), seed=step
                ).loss,
            )


if __name__ == "__main__":
    main()
