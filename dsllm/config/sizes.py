"""Named model sizes: the fields of ModelConfig for each."""

from typing import Any

from dsllm.config.suggest import did_you_mean


def _llama(num_layers: int, hidden_size: int, num_heads: int, mlp_size: int, **more: Any) -> dict[str, Any]:
    """Llama's shape: RMSNorm, rotary positions, SwiGLU, no biases (Touvron et al. 2023)."""
    shape = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads, "mlp_size": mlp_size}
    return shape | {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"} | more


def _llama3(num_layers: int, hidden_size: int, num_heads: int, mlp_size: int, factor: float) -> dict[str, Any]:
    """Llama 3.1 and 3.2: 8 key and value heads, a larger rotary base, scaled to 128 k tokens (Llama team 2024)."""
    scaling = {
        "factor": factor,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_context_length": 8192,
    }
    rotary = {"rope_theta": 500000.0, "rope_scaling": scaling}
    return _llama(num_layers, hidden_size, num_heads, mlp_size, num_kv_heads=8, **rotary)


def _gpt2(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, Any]:
    """GPT-2's shape: LayerNorm, learned positions, GELU, biases, tied embeddings (Radford et al. 2019)."""
    shape = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads, "mlp_size": 4 * hidden_size}
    kind = {"norm": "layernorm", "positions": "learned", "mlp": "gelu_tanh", "tie_embeddings": True}
    return shape | kind | {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


def _pythia(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, Any]:
    """GPT-NeoX's shape: a quarter of each head rotated, exact GELU, parallel branches (Biderman et al. 2023)."""
    rotary = {"positions": "rope", "rope_fraction": 0.25}
    kind = {"mlp": "gelu", "tie_embeddings": False, "parallel_residual": True}
    return _gpt2(num_layers, hidden_size, num_heads) | rotary | kind


SIZES: dict[str, dict[str, Any]] = {
    "llama-300k": _llama(4, 64, 4, 192, tie_embeddings=True),
    "llama-5m": _llama(5, 256, 4, 704, tie_embeddings=True),
    "llama-20m": _llama(8, 384, 6, 1024),
    "llama-125m": _llama(12, 768, 12, 2048, tie_embeddings=True),
    "llama-350m": _llama(24, 1024, 16, 2816, tie_embeddings=True),
    "llama-1b": _llama3(16, 2048, 32, 8192, factor=32.0) | {"tie_embeddings": True},
    "llama-3b": _llama3(28, 3072, 24, 8192, factor=32.0) | {"tie_embeddings": True},
    "llama-7b": _llama(32, 4096, 32, 11008),
    "llama-8b": _llama3(32, 4096, 32, 14336, factor=8.0),
    "llama-13b": _llama(40, 5120, 40, 13824),
    "llama-70b": _llama(80, 8192, 64, 28672, num_kv_heads=8),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32),
    "pythia-12b": _pythia(36, 5120, 40),
}
"""Fields per size. The vocabulary and the context are not among them: they come from the tokenizer and the data."""


def resolve_size(model: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Fill in the fields of the named size that the model section does not set itself.

    Returns:
        the section, and the problem with its `size`; None: no problem
    """
    size = model.get("size")
    if not isinstance(size, str):
        return model, None  # no size, or one of a wrong type, which validation reports
    if size in SIZES:
        return SIZES[size] | model, None
    hint = did_you_mean(size, SIZES)
    return model, f"unknown size '{size}'{hint}; the sizes are {', '.join(SIZES)}"
