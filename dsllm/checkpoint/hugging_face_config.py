"""Converts a model's config to a Hugging Face config.json and back: Llama, GPT-2 and GPT-NeoX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.config.model import ModelConfig, RopeScaling
from dsllm.errors import CheckpointError

Json = dict[str, Any]
_ADAPTER = TypeAdapter(ModelConfig)

NO_EFFECT = {
    *("architectures", "_name_or_path", "transformers_version", "model_type", "dtype", "torch_dtype"),
    *("tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "n_ctx"),
    *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "task_specific_params"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}
"""Fields that do not change what the model computes. Dropout is each training run's choice, not part of the model."""

FIXED: Json = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pretraining_tp": 1,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}
"""Fields of which only this value is implemented."""

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
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
    to_fields: Callable[["_Fields"], Json]
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
        CheckpointError: another architecture, or fields that are not implemented; names all of them.
    """
    known = {a.model_type: a for a in ARCHITECTURES}
    model_type = fields.get("model_type")
    if model_type not in known:
        raise CheckpointError(f"{origin}: model_type {model_type!r} is not implemented; there are: {', '.join(known)}")
    reader = _Fields(fields)
    fields = known[model_type].to_fields(reader)
    fields |= {"vocab_size": reader.take("vocab_size"), "initial_std": reader.take("initializer_range", 0.02)}
    reader.close()
    if reader.problems:
        raise CheckpointError(f"{origin}: fields that are not implemented: " + "; ".join(reader.problems))
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        raise CheckpointError(f"{origin}: {error}") from error


class _Fields:
    """The fields of a config.json. Each is taken once; problems are collected."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = dict(fields)
        self.problems: list[str] = []

    def take(self, name: str, *default: Any) -> Any:
        """A field's value, or its default where it is absent or null."""
        value = self.fields.pop(name, None)
        if value is None and not default:
            self.problems.append(f"{name} is missing")
        return default[0] if value is None and default else value

    def choose(self, name: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """Our value for the value of a field, by the table of choices."""
        value = self.take(name, default)
        if value not in choices:
            self.problems.append(f"{name}: {value!r} (implemented: {', '.join(map(repr, choices))})")
        return choices.get(value)

    def close(self) -> None:
        """Add a problem for each field that was not taken and changes what the model computes."""
        for name, value in self.fields.items():
            if name in FIXED and value not in (None, FIXED[name]):
                self.problems.append(f"{name}: {value!r} (implemented: {FIXED[name]!r})")
            if name not in FIXED and name not in NO_EFFECT and value is not None:
                self.problems.append(f"{name}: {value!r}")


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


def _llama_fields(fields: _Fields) -> Json:
    heads, bias = fields.take("num_attention_heads"), fields.take("attention_bias", False)
    return {
        "hidden_size": fields.take("hidden_size"),
        "mlp_size": fields.take("intermediate_size"),
        "num_layers": fields.take("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.take("num_key_value_heads", heads),
        "head_size": fields.take("head_dim", None),
        "mlp": fields.choose("hidden_act", {"silu": "swiglu"}, "silu"),
        "norm": "rmsnorm",
        "norm_epsilon": fields.take("rms_norm_eps", 1e-6),
        "context_length": fields.take("max_position_embeddings", 2048),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": fields.take("mlp_bias", False),
        "tie_embeddings": fields.take("tie_word_embeddings", False),
        **_rope_fields(fields, "rope_theta", {}),
    }


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


def _gpt2_fields(fields: _Fields) -> Json:
    return {
        "hidden_size": fields.take("n_embd"),
        "num_layers": fields.take("n_layer"),
        "num_heads": fields.take("n_head"),
        "mlp_size": fields.take("n_inner", None),
        "mlp": fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        "norm": "layernorm",
        "norm_epsilon": fields.take("layer_norm_epsilon", 1e-5),
        "context_length": fields.take("n_positions"),
        "positions": "learned",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": fields.take("tie_word_embeddings", True),
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


def _neox_fields(fields: _Fields) -> Json:
    bias = fields.take("attention_bias", True)
    return {
        "hidden_size": fields.take("hidden_size"),
        "mlp_size": fields.take("intermediate_size"),
        "num_layers": fields.take("num_hidden_layers"),
        "num_heads": fields.take("num_attention_heads"),
        "mlp": fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        "norm": "layernorm",
        "norm_epsilon": fields.take("layer_norm_eps", 1e-5),
        "context_length": fields.take("max_position_embeddings", 2048),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": True,
        "parallel_residual": fields.take("use_parallel_residual", True),
        "tie_embeddings": fields.take("tie_word_embeddings", False),
        **_rope_fields(fields, "rotary_emb_base", {"partial_rotary_factor": fields.take("rotary_pct", 0.25)}),
    }


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


def _rope_fields(fields: _Fields, theta_name: str, more: Json) -> Json:
    """ModelConfig's rotary fields from those of either version; if both are there, they must agree."""
    theta, scaling = fields.take(theta_name, None), fields.take("rope_scaling", None)
    old = {"rope_type": "default"} | more | (scaling or {}) | ({} if theta is None else {"rope_theta": theta})
    new = fields.take("rope_parameters", None) or old
    if "type" in old:
        old["rope_type"] = old.pop("type")
    for name in sorted({*new} & {*old}):
        if new[name] != old[name] and not (theta is None and scaling is None):
            fields.problems.append(
                f"rope_parameters.{name}: {new[name]!r} contradicts {old[name]!r} in the older fields"
            )
    return _rope_values(_Fields(new), fields.problems)


def _rope_values(rope: _Fields, problems: list[str]) -> Json:
    fields: Json = {"positions": "rope", "rope_theta": rope.take("rope_theta", 10000.0)}
    fields["rope_fraction"] = rope.take("partial_rotary_factor", 1.0)
    if rope.choose("rope_type", {"default": False, "llama3": True}, "default"):
        fields["rope_scaling"] = RopeScaling(
            factor=rope.take("factor"),
            low_frequency_factor=rope.take("low_freq_factor"),
            high_frequency_factor=rope.take("high_freq_factor"),
            original_context_length=rope.take("original_max_position_embeddings"),
        )
    rope.close()
    problems.extend(f"rope_parameters.{problem}" for problem in rope.problems)
    return fields


ARCHITECTURES = (
    Architecture("llama", "LlamaForCausalLM", _llama_clashes, _llama_json, _llama_fields),
    Architecture("gpt2", "GPT2LMHeadModel", _gpt2_clashes, _gpt2_json, _gpt2_fields),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", _neox_clashes, _neox_json, _neox_fields),
)
