"""Lightning's Trainer (bf16-mixed; DDP on several ranks, started by torchrun) over the plain model."""

import tempfile

import lightning
import torch
from torch.utils.data import DataLoader

from bench.peers.common import announce, command_line, micro_batch, random_sequences, world_size
from bench.peers.models import PlainModel
from bench.workloads import WORKLOADS, Workload


class Module(lightning.LightningModule):
    """The plain model, with the methods that Lightning calls."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.model, self.shape = PlainModel(shape), shape

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.model(batch[:, :-1], batch[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.shape.learning_rate, fused=True)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **limits: float | str | None) -> None:
        """Clip as torch does: Lightning's own clipping refuses a fused AdamW, and a slower AdamW would not be fair."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.shape.gradient_clipping)

    def on_train_batch_end(self, outputs: dict, batch: torch.Tensor, index: int) -> None:
        announce(index + 1, outputs["loss"].item())


def main() -> None:
    shape = WORKLOADS[command_line(__doc__).parse_args().workload]
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=world_size(),
        strategy="ddp" if world_size() > 1 else "auto",
        precision="bf16-mixed",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tempfile.mkdtemp(prefix="lightning-"),
    )
    sequences = random_sequences(shape, 4096 * micro_batch(shape) // 4)
    trainer.fit(Module(shape), DataLoader(sequences, batch_size=micro_batch(shape)))


if __name__ == "__main__":
    main()
