"""transformers.Trainer with transformers' own Llama or GPT-2 of the workload's shape, with or without DeepSpeed."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.peers.common import announce, command_line, micro_batch, random_sequences
from bench.workloads import WORKLOADS, Workload


class RandomSequences(Dataset):
    """Made-up sequences, also as labels: the model shifts them itself."""

    def __init__(self, shape: Workload):
        self.sequences = random_sequences(shape, 1024)[:, : shape.sequence_length]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


class AnnounceSteps(TrainerCallback):
    """Announces each optimizer step."""

    def on_step_end(self, arguments, state, control, **others) -> None:
        announce(state.global_step)


def deepspeed_config(stage: int) -> dict:
    """The DeepSpeed config that Trainer's documentation suggests; Trainer fills in the rest."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # in the peer's favour: it does not compile for a minute at its first start
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000},
    }


def build_model(shape: Workload) -> PreTrainedModel:
    """transformers' own model of the shape, without dropout."""
    if shape.kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=shape.vocab_size,
                n_positions=shape.sequence_length,
                n_embd=shape.hidden_size,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_inner=shape.mlp_size,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.mlp_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            max_position_embeddings=shape.sequence_length,
            tie_word_embeddings=shape.tied,
            use_cache=False,
        )
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--zero", type=int, help="ZeRO stage; without it, no DeepSpeed")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    shape = WORKLOADS[options.workload]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="trainer-"),
        per_device_train_batch_size=micro_batch(shape),
        max_steps=100_000,
        learning_rate=shape.learning_rate,
        max_grad_norm=shape.gradient_clipping,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=options.compile,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        deepspeed=None if options.zero is None else deepspeed_config(options.zero),
    )
    sequences = RandomSequences(shape)
    Trainer(model=build_model(shape), args=arguments, train_dataset=sequences, callbacks=[AnnounceSteps()]).train()


if __name__ == "__main__":
    main()
