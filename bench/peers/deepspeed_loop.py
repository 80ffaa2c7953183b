"""DeepSpeed's own bf16 (bf16 parameters, fp32 masters) over the plain model, as its documentation shows, without dsllm."""

import itertools

import deepspeed
import torch

from bench.peers.common import announce, batches, command_line, device, micro_batch
from bench.peers.models import PlainModel
from bench.workloads import WORKLOADS


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    options = parser.parse_args()
    shape = WORKLOADS[options.workload]
    torch.manual_seed(1234)
    deepspeed.ops.__compatible_ops__ = {}  # in the peer's favour: it does not compile for a minute at its first start
    model = PlainModel(shape).to(device())
    config = {
        "train_micro_batch_size_per_gpu": micro_batch(shape),
        "gradient_clipping": shape.gradient_clipping,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": options.zero,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 20_000_000,
        },
        "steps_per_print": 10**9,
    }
    # in the peer's favour: DeepSpeed would compile its own Adam first, which is no faster
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, fused=True)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for step, batch in enumerate(itertools.cycle(batches(shape)), start=1):
        loss = engine(batch[:, :-1], batch[:, 1:])
        engine.backward(loss)
        engine.step()
        announce(step, loss.item())


if __name__ == "__main__":
    main()
