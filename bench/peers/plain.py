"""The base: a plain PyTorch loop with bf16 autocast over its own model, or without autocast over dsllm's (--model dsllm)."""

import itertools

import torch
import torch.distributed
from torch import nn

from bench.peers.common import announce, backend, batches, command_line, device, world_size
from bench.peers.models import PlainModel, dsllm_model
from bench.workloads import WORKLOADS


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", choices=("plain", "dsllm"), default="plain")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    shape, autocast = WORKLOADS[options.workload], options.model == "plain"
    torch.manual_seed(1234)
    if options.model == "dsllm":
        from dsllm.engine.processes.device import set_up_process

        set_up_process(world_size())  # also the allocator's settings, so that dsllm differs by its engine only
    model = (PlainModel(shape) if autocast else dsllm_model(shape)).to(device())
    if options.compile:
        model.compile(dynamic=False)
    if world_size() > 1:
        torch.distributed.init_process_group(backend())
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, fused=True)
    for step, batch in enumerate(itertools.cycle(batches(shape)), start=1):
        with torch.autocast(device().type, torch.bfloat16, enabled=autocast):
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shape.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        announce(step, loss.item())


if __name__ == "__main__":
    main()
