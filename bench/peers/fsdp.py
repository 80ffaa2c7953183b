"""FSDP2: the plain model under torch's fully_shard, bf16 compute and fp32 gradients; started by torchrun."""

import itertools

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bench.peers.common import announce, backend, batches, command_line, device, world_size
from bench.peers.models import PlainModel
from bench.workloads import WORKLOADS


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    shape = WORKLOADS[options.workload]
    torch.manual_seed(1234)
    torch.distributed.init_process_group(backend())
    mesh = init_device_mesh(device().type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = PlainModel(shape).to(device())
    for block in model.blocks:
        if options.compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, fused=True)
    for step, batch in enumerate(itertools.cycle(batches(shape)), start=1):
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shape.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        announce(step, loss.item())


if __name__ == "__main__":
    main()
