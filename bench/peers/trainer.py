"""transformers.Trainer with its own Llama of the workload's shape, with or without DeepSpeed."""

import argparse
import tempfile

from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from workload import Workload, announce, random_sequences


class RandomSequences(Dataset):
    """Made-up sequences; the model shifts the labels itself."""

    def __init__(self, shape: Workload):
        self.sequences = random_sequences(shape, 4096)[:, : shape.sequence_length]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


class AnnounceSteps(TrainerCallback):
    """Prints the bench's line after each optimizer step."""

    def on_step_end(self, arguments, state, control, **others) -> None:
        announce(state.global_step, float("nan"))


def deepspeed_config(stage: int) -> dict:
    """What Trainer's documentation asks for; the rest is filled in by Trainer."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # in the peer's favour: no minute of compiling at its first start
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zero", type=int, help="ZeRO stage; without it, no DeepSpeed")
    parser.add_argument("--local_rank", help="given by deepspeed's launcher")
    options, shape = parser.parse_args(), Workload()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="trainer-"),
        per_device_train_batch_size=shape.micro_batch_sequences,
        max_steps=100_000,
        learning_rate=shape.learning_rate,
        max_grad_norm=shape.gradient_clipping,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        deepspeed=None if options.zero is None else deepspeed_config(options.zero),
    )
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.sequence_length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    Trainer(model=model, args=arguments, train_dataset=RandomSequences(shape), callbacks=[AnnounceSteps()]).train()


if __name__ == "__main__":
    main()
