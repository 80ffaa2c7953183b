"""Compares two models in everything that decides what they compute from the same weights."""

from typing import Any

from dsllm.config.model import ModelConfig

RESOLVED = {"num_kv_heads": "kv_heads", "head_size": "head_width", "mlp_size": "mlp_width"}
"""Fields of ModelConfig whose default follows from other fields, and the property with the value that is used."""

ALWAYS = (
    *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "mlp_size", "vocab_size"),
    *("norm", "norm_epsilon", "positions", "mlp", "parallel_residual", "tie_embeddings"),
    *("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm"),
)
"""Fields that the forward pass of every model reads. `vocab_size` is one of them even where the padded sizes are equal: the
softmax runs over the real token ids only."""

ROTARY = ("rope_theta", "rope_fraction", "rope_scaling")
"""Fields that the forward pass reads where positions are rotary."""

NOT_COMPARED = {
    "size": "a name for values of the other fields",
    "context_length": "with rotary positions the first tokens mean the same in any context; learned ones have it as a shape",
    "dropout": "each training run's choice; off where a model is used",
    "initial_std": "used before the first step only",
    "init_from": "where the weights once came from",
}
"""Fields that may differ, and why."""


def differences_in_function(saved: ModelConfig, current: ModelConfig) -> list[str]:
    """The fields in which two models differ so that the same weights compute something else; empty: they are the same.

    Shapes are not enough: 16 heads of 128 and 32 of 64 have the same matrices, and a rotary base has no weights at all.
    """
    names = [*ALWAYS]
    if saved.positions == current.positions == "rope":
        names += ROTARY
    found = [(name, _value(saved, name), _value(current, name)) for name in names]
    return [f"model.{name}: {there!r} there, {here!r} here" for name, there, here in found if there != here]


def _value(config: ModelConfig, name: str) -> Any:
    return getattr(config, RESOLVED.get(name, name))
