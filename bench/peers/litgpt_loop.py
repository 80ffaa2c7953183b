"""litgpt's own pretraining (Fabric, bf16-mixed, compiled) of workload (a); runs in an environment of its own."""

import sys
import tempfile
from pathlib import Path

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.model import Config
from litgpt.pretrain import setup
from torch.utils.data import DataLoader

from bench.peers.common import micro_batch, random_sequences
from bench.workloads import WORKLOADS, Workload


class RandomSequences(DataModule):
    """Made-up sequences, with the methods that litgpt's trainer calls."""

    def __init__(self, shape: Workload):
        self.shape = shape

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Do nothing: the sequences need no tokenizer."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(random_sequences(self.shape, 4096), batch_size=micro_batch(self.shape))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(random_sequences(self.shape, 8), batch_size=micro_batch(self.shape))


def main() -> None:
    shape = WORKLOADS["a"]
    sys.stdout.reconfigure(line_buffering=True)  # litgpt prints its step lines itself
    config = Config(
        name="workload-a",
        block_size=shape.sequence_length,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_embd=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    batch = micro_batch(shape)
    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=batch,
        micro_batch_size=batch,
        max_tokens=10**12,
        max_norm=shape.gradient_clipping,
        max_seq_length=shape.sequence_length,
        lr_warmup_steps=2,
        min_lr=0.0,
        tie_embeddings=False,
    )
    setup(
        model_name="workload-a",
        model_config=config,
        out_dir=Path(tempfile.mkdtemp(prefix="litgpt-")),
        precision="bf16-mixed",
        data=RandomSequences(shape),
        train=train,
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        devices=1,
        logger_name="csv",
    )


if __name__ == "__main__":
    main()
