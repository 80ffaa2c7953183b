"""Converts a model's config to a Hugging Face config.json and back: Llama, GPT-2, GPT-NeoX and Qwen2; reads Mistral's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsllm.checkpoint.hugging_face_fields import Fields, Json, rope_fields, shown
from dsllm.config.check import problems_in_model
from dsllm.config.model import ModelConfig, RopeScaling
from dsllm.errors import CheckpointError

ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
}
"""Hugging Face's name of the MLP's non-linearity -> dsllm's."""


@dataclass(frozen=True)
class Architecture:
    """One of the architectures of transformers that can hold a model."""

    model_type: str
    class_name: str
    clashes: Callable[[ModelConfig], list[str]]
    """Lists the fields of a model that this architecture cannot express."""
    to_json: Callable[[ModelConfig, int], Json]
    """Makes the fields of config.json from a model and its context length."""
    to_fields: Callable[[Fields], Json]
    """Makes ModelConfig's fields, context_length included, from those of config.json."""


def architecture_for(config: ModelConfig) -> Architecture:
    """The architecture that computes exactly what a model computes.

    Raises:
        CheckpointError: there is none; names the fields that each of them cannot express.
    """
    clashes = {a.class_name: a.clashes(config) for a in ARCHITECTURES}
    for architecture in ARCHITECTURES:
        if not clashes[architecture.class_name]:
            return architecture
    reasons = "\n".join(f"- {name} cannot express {', '.join(fields)}" for name, fields in clashes.items())
    raise CheckpointError(
        f"none of the Hugging Face architectures that can be written computes what this model computes:\n{reasons}"
    )


def config_to_json(config: ModelConfig, context_length: int, dtype: str, end_of_text_id: int) -> Json:
    """The config.json of a model, in a form that transformers 4 and 5 both read correctly.

    Version 4 reads rope_theta and rope_scaling, version 5 reads rope_parameters; each silently ignores the other's fields.
    """
    architecture = architecture_for(config)
    ends = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id, "pad_token_id": None}
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        **architecture.to_json(config, context_length),
        "initializer_range": config.initial_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **ends,
    }


def config_from_json(fields: Mapping[str, Any], origin: str) -> ModelConfig:
    """The model that a config.json describes, context length included.

    Raises:
        CheckpointError: another architecture, fields that are not implemented, or values that no model can have; names all
            of them.
    """
    readers = {a.model_type: a.to_fields for a in ARCHITECTURES} | READ_ONLY
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in readers:
        raise CheckpointError(
            f"{origin}: model_type {shown(model_type)} is not implemented; there are: {', '.join(readers)}"
        )
    reader = Fields(fields)
    found = readers[model_type](reader)
    found |= {"vocab_size": reader.integer("vocab_size"), "initial_std": reader.number("initializer_range", 0.02)}
    reader.close()
    if reader.problems:
        raise CheckpointError(f"{origin}: fields that are not implemented: " + "; ".join(reader.problems))
    scaling = found.pop("rope_scaling", None)
    config = ModelConfig(**found, rope_scaling=RopeScaling(**scaling) if scaling else None)
    problems = [f"{field}: {problem}" for field, problem in problems_in_model(config)]
    if problems:
        raise CheckpointError(f"{origin}: describes a model that cannot be: " + "; ".join(problems))
    return config


def _clashes(config: ModelConfig, wanted: Mapping[str, Any]) -> list[str]:
    """The fields of a model that differ from the wanted value, or from all of a tuple of values."""
    found = []
    for name, value in wanted.items():
        actual = getattr(config, name)
        if actual not in (value if isinstance(value, tuple) else (value,)):
            found.append(f"{name}: {actual!r}")
    return found


def _uneven_heads(config: ModelConfig) -> list[str]:
    """The fields that make a model's attention differ from plain multi-head attention over the hidden size."""
    found = [] if config.kv_heads == config.num_heads else [f"num_kv_heads: {config.num_kv_heads}"]
    even = config.num_heads * config.head_width == config.hidden_size
    return found if even else [*found, f"head_size: {config.head_width}"]


def _uneven_biases(config: ModelConfig) -> list[str]:
    """Finds the field in the way where one switch must set the biases of all attention projections."""
    even = config.attention_bias == config.attention_output_bias
    return (
        []
        if even
        else [f"attention_output_bias: {config.attention_output_bias} with attention_bias: {config.attention_bias}"]
    )


def _llama_clashes(config: ModelConfig) -> list[str]:
    wanted = {"norm": "rmsnorm", "positions": "rope", "rope_fraction": 1.0, "mlp": "swiglu"}
    return _clashes(config, wanted | {"parallel_residual": False, "qk_norm": False}) + _uneven_biases(config)


def _llama_json(config: ModelConfig, context_length: int) -> Json:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": context_length,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        **_rope_json(config, {}),
    }


def _llama_fields(fields: Fields) -> Json:
    heads, bias = fields.integer("num_attention_heads"), fields.switch("attention_bias", False)
    biases = {"attention_bias": bias, "attention_output_bias": bias, "mlp_bias": fields.switch("mlp_bias", False)}
    return _llama_shape(fields, context_length=2048) | biases | _heads(fields, heads, heads)


def _llama_shape(fields: Fields, context_length: int) -> Json:
    """The fields that Llama, Mistral and Qwen2 share; by default they differ only in the context."""
    return {
        "hidden_size": fields.integer("hidden_size"),
        "mlp_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "head_size": fields.integer("head_dim", None),
        "mlp": fields.choose("hidden_act", {"silu": "swiglu", "swish": "swiglu"}, "silu"),
        "norm": "rmsnorm",
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "context_length": fields.integer("max_position_embeddings", context_length),
        "tie_embeddings": fields.switch("tie_word_embeddings", False),
        **rope_fields(fields),
    }


def _heads(fields: Fields, heads: int, absent: int) -> Json:
    """Query heads, and key and value heads: `absent` of them where their field is absent, `heads` where it is null."""
    default = heads if fields.has("num_key_value_heads") else absent
    return {"num_heads": heads, "num_kv_heads": fields.integer("num_key_value_heads", default)}


def _mistral_fields(fields: Fields) -> Json:
    """Mistral's graph is Llama's without biases, except for the window of its attention."""
    window = fields.integer("sliding_window", None if fields.has("sliding_window") else 4096)  # transformers' default
    shape = _llama_shape(fields, context_length=131072)
    _check_window(fields, window, shape["context_length"])
    _check_layer_types(fields)
    return shape | _heads(fields, fields.integer("num_attention_heads"), 8)


def _qwen2_fields(fields: Fields) -> Json:
    """Qwen2's graph is Llama's with biases on queries, keys and values only; its window can be switched on for some layers."""
    shape = _llama_shape(fields, context_length=32768)
    window = fields.integer("sliding_window", None if fields.has("sliding_window") else 4096)
    first = fields.integer("max_window_layers", 28)
    if fields.switch("use_sliding_window", False) and not (type(first) is int and first >= (shape["num_layers"] or 0)):
        _check_window(fields, window, shape["context_length"])
    _check_layer_types(fields)
    fields.value("attention_bias")  # transformers ignores it: the biases are always there
    return shape | {"attention_bias": True} | _heads(fields, fields.integer("num_attention_heads"), 32)


def _check_window(fields: Fields, window: int | None, context_length: int) -> None:
    """Refuse attention to the newest tokens only, unless every token of the context is among them."""
    if type(window) is int and type(context_length) is int and window < context_length:
        fields.problem(
            "sliding_window", window, f"implemented: null, or at least the context of {context_length} tokens"
        )


def _check_layer_types(fields: Fields) -> None:
    """Refuse layers that do not attend to all earlier tokens."""
    types = fields.value("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        fields.problem("layer_types", types, "implemented: 'full_attention' in every layer")


def _gpt2_clashes(config: ModelConfig) -> list[str]:
    wanted = {"norm": "layernorm", "positions": "learned", "mlp": ("gelu", "gelu_tanh"), "parallel_residual": False}
    biases = {"qk_norm": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    return _clashes(config, wanted | biases) + _uneven_heads(config)


def _gpt2_json(config: ModelConfig, context_length: int) -> Json:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": context_length,
        "activation_function": "gelu_new" if config.mlp == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _gpt2_fields(fields: Fields) -> Json:
    return {
        "hidden_size": fields.integer("n_embd"),
        "num_layers": fields.integer("n_layer"),
        "num_heads": fields.integer("n_head"),
        "mlp_size": fields.integer("n_inner", None),
        "mlp": fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        "norm": "layernorm",
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-5),
        "context_length": fields.integer("n_positions"),
        "positions": "learned",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": fields.switch("tie_word_embeddings", True),
    }


def _neox_clashes(config: ModelConfig) -> list[str]:
    kind = {"norm": "layernorm", "positions": "rope", "mlp": ("gelu", "gelu_tanh")}
    wanted = kind | {"qk_norm": False, "mlp_bias": True}
    return _clashes(config, wanted) + _uneven_heads(config) + _uneven_biases(config)


def _neox_json(config: ModelConfig, context_length: int) -> Json:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu" if config.mlp == "gelu" else "gelu_pytorch_tanh",
        "layer_norm_eps": config.norm_epsilon,
        "max_position_embeddings": context_length,
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
        "attention_dropout": config.dropout,
        "hidden_dropout": config.dropout,
        "rotary_pct": config.rope_fraction,
        "rotary_emb_base": config.rope_theta,
        **_rope_json(config, {"partial_rotary_factor": config.rope_fraction}),
    }


def _neox_fields(fields: Fields) -> Json:
    bias = fields.switch("attention_bias", True)
    return {
        "hidden_size": fields.integer("hidden_size"),
        "mlp_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": fields.integer("num_attention_heads"),
        "mlp": fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        "norm": "layernorm",
        "norm_epsilon": fields.number("layer_norm_eps", 1e-5),
        "context_length": fields.integer("max_position_embeddings", 2048),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": True,
        "parallel_residual": fields.switch("use_parallel_residual", True),
        "tie_embeddings": fields.switch("tie_word_embeddings", False),
        **rope_fields(fields, "rotary_emb_base", "rotary_pct", 0.25),
    }


def _qwen2_clashes(config: ModelConfig) -> list[str]:
    wanted = {"norm": "rmsnorm", "positions": "rope", "rope_fraction": 1.0, "mlp": "swiglu", "mlp_bias": False}
    biases = {"attention_bias": True, "attention_output_bias": False}
    return _clashes(config, wanted | biases | {"parallel_residual": False, "qk_norm": False})


def _qwen2_json(config: ModelConfig, context_length: int) -> Json:
    fields = _llama_json(config, context_length)
    for name in ("attention_bias", "mlp_bias"):  # Qwen2 has no such fields
        del fields[name]
    return fields | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}


def _rope_json(config: ModelConfig, more: Json) -> Json:
    """The rotary fields for version 4 (rope_scaling) and version 5 (rope_parameters) of transformers."""
    scaling = config.rope_scaling
    base = {"rope_theta": config.rope_theta} | more
    if scaling is None:
        return {"rope_scaling": None, "rope_parameters": {"rope_type": "default"} | base}
    stretch = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }
    return {"rope_scaling": stretch, "rope_parameters": stretch | base}


ARCHITECTURES = (
    Architecture("llama", "LlamaForCausalLM", _llama_clashes, _llama_json, _llama_fields),
    Architecture("gpt2", "GPT2LMHeadModel", _gpt2_clashes, _gpt2_json, _gpt2_fields),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", _neox_clashes, _neox_json, _neox_fields),
    Architecture("qwen2", "Qwen2ForCausalLM", _qwen2_clashes, _qwen2_json, _qwen2_fields),
)

READ_ONLY: dict[str, Callable[[Fields], Json]] = {"mistral": _mistral_fields}
"""Architectures that are read, and written as another one that computes the same."""
