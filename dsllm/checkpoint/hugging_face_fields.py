"""Reads the fields of a config.json one by one, so that a field that changes what the model computes cannot be overlooked."""

import math
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

_TRAINING = (
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout_prob", "dropout", "embd_dropout"),
    *("resid_dropout", "gradient_checkpointing", "use_reentrant_checkpointing", "neftune_noise_alpha"),
    *("tf_legacy_loss", "use_bfloat16", "router_aux_loss_coef", "make_vocab_size_divisible_by"),
)
"""Dropout is each training run's choice, not part of the model; the others are how a model was or is trained."""

_GENERATION = (
    *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "force_words_ids", "num_return_sequences", "output_scores"),
    *("output_logits", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "renormalize_logits"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("penalty_alpha", "guidance_scale", "prefix", "cache_implementation", "generation_config", "custom_pipelines"),
)
"""How text is drawn from the model."""

_NAMES = (
    *("architectures", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "model_type", "dtype"),
    *("torch_dtype", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
    *("unk_token_id", "mask_token_id", "decoder_start_token_id", "pad_token", "id2label", "label2id", "num_labels"),
    *("_num_labels", "problem_type", "task_specific_params", "finetuning_task", "transformers.js_config", "license"),
    *("is_llama_config", "is_qwen2_config", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"),
    *(
        "unsloth_version",
        "unsloth_fixed",
        "unsloth_optimized",
        "model_name",
        "vocab_file",
        "chat_template",
        "bos_token",
    ),
    *("eos_token", "use_auth_token", "trust_remote_code"),
)
"""What the model, its files, its tokens and its labels are called."""

_HOW = (
    *("use_cache", "return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "torchscript"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "n_ctx"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("pretraining_tp", "is_decoder", "max_sequence_length", "max_seq_len", "seq_length", "seq_len", "output_past"),
    *("n_special", "predict_special_tokens", "summary_type", "summary_use_proj", "summary_activation"),
    *("summary_proj_to_labels", "summary_first_dropout", "max_window_layers", "device_map", "ddp_config"),
)
"""Other ways to compute the same (`pretraining_tp` cuts a product into parts), what is returned, and heads for other tasks."""

NO_EFFECT = {*_TRAINING, *_GENERATION, *_NAMES, *_HOW}
"""Fields that do not change what the model computes."""

FIXED: Json = {
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "qk_norm": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "qk_layer_norms": False,
    "use_resampler": False,
    "alibi": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Fields of which only this value is implemented."""

_REQUIRED = object()


def shown(value: object) -> str:
    """A value of a config.json for a message: on one line, and not longer than that."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Fields:
    """The fields of a config.json. Each is taken once; problems are collected."""

    def __init__(self, fields: Mapping[str, Any], path: str = ""):
        self.fields = dict(fields)
        self.problems: list[str] = []
        self._path = path

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number of at most 63 bits; the default where it is absent or null."""
        value = self._take(name, default)
        if value is not default and (type(value) is not int or abs(value) >= 2**63):
            self.problem(name, value, "a whole number is needed")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite number, as a float; the default where it is absent or null."""
        value = self._take(name, default)
        if value is default:
            return value
        try:
            if type(value) in (int, float) and math.isfinite(float(value)):
                return float(value)
        except OverflowError:
            pass
        self.problem(name, value, "a finite number is needed")
        return None

    def switch(self, name: str, default: bool) -> bool:
        """True or false; the default where it is absent or null."""
        value = self._take(name, default)
        if type(value) is not bool:
            self.problem(name, value, "true or false is needed")
        return bool(value)

    def choose(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """Our value for the value of a field, by the table of choices."""
        value = self._take(name, default)
        if not isinstance(value, str) or value not in choices:
            self.problem(name, value, f"implemented: {', '.join(map(repr, choices))}")
            return None
        return choices[value]

    def mapping(self, name: str) -> Json:
        """An object of fields; empty where it is absent or null."""
        value = self._take(name, {})
        if not isinstance(value, dict):
            self.problem(name, value, "an object is needed")
            return {}
        return dict(value)

    def has(self, name: str) -> bool:
        """Whether a field is there, even as null."""
        return name in self.fields

    def value(self, name: str) -> Any:
        """A field of any type; None where it is absent or null."""
        return self._take(name, None)

    def problem(self, name: str, value: object, why: str = "") -> None:
        """Note that a field has a value that cannot be used."""
        self.problems.append(f"{self._path}{shown(name)[1:-1]}: {shown(value)}" + (f" ({why})" if why else ""))

    def close(self) -> None:
        """Add a problem for each field that was not taken and changes what the model computes."""
        for name, value in self.fields.items():
            if value is None or name in NO_EFFECT:
                continue
            if name not in FIXED:
                self.problem(name, value)
            elif value != FIXED[name]:
                self.problem(name, value, f"implemented: {FIXED[name]!r}")

    def _take(self, name: str, default: Any) -> Any:
        value = self.fields.pop(name, None)
        if value is not None:
            return value
        if default is _REQUIRED:
            self.problems.append(f"{self._path}{name} is missing")
        return default


def rope_fields(fields: Fields, theta: str = "rope_theta", fraction: str = "", default_fraction: float = 1.0) -> Json:
    """ModelConfig's rotary fields.

    transformers 4 reads the fields of config.json itself and `rope_scaling`, version 5 `rope_scaling` or else
    `rope_parameters`, and takes what is missing in it from the fields of config.json. Where both forms are there they must
    mean the same, because each version silently ignores a part of them.

    Args:
        theta: the field of config.json with the base of the frequencies
        fraction: that with the share of each head that is rotated; "": the whole head is, whatever any field says
    """
    outer = {"rope_theta": fields.number(theta, None), "partial_rotary_factor": None}
    if fraction:
        outer["partial_rotary_factor"] = fields.number(fraction, None)
    echoes = {name: fields.number(name, None) for name in outer if fields.has(name)}  # the same under another name
    defaults = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": default_fraction}
    found = {name: _one_form(fields, name) for name in ("rope_scaling", "rope_parameters")}
    forms = {name: form for name, form in found.items() if form} or {"rope_parameters": {}}
    name, form = next(iter(forms.items()))  # transformers 5 takes rope_scaling first
    given = {key: value for key, value in outer.items() if value is not None}
    result = defaults | given | form
    for other, values in forms.items():
        for key in sorted({*result, *values}):
            _agree(fields, f"{other}.{key}", (defaults | given | values).get(key), result.get(key), name)
            if key in given and key in values:
                _agree(fields, f"{other}.{key}", values[key], given[key], "the older fields")
    for key, value in echoes.items():
        if value is not None:
            _agree(fields, f"{name}.{key}", result[key], value, "the older fields")
    return _rope_values(Fields(result, f"{name}."), fields, bool(fraction))


def _one_form(fields: Fields, name: str) -> Json:
    """The entries of `rope_scaling` or `rope_parameters` that are not null, with the type under its newer name."""
    form = {key: value for key, value in fields.mapping(name).items() if value is not None}
    if "type" in form:
        older = form.pop("type")
        _agree(fields, f"{name}.rope_type", form.setdefault("rope_type", older), older, f"{name}.type")
    return form


def _agree(fields: Fields, name: str, value: object, other: object, where: str) -> None:
    """Note a contradiction, once."""
    text = f"{name}: {shown(value)} contradicts {shown(other)} in {where}"
    if value != other and not any(problem.startswith(f"{name}: ") for problem in fields.problems):
        fields.problems.append(text)


def _rope_values(rope: Fields, fields: Fields, partial: bool) -> Json:
    values: Json = {"positions": "rope", "rope_theta": rope.number("rope_theta")}
    values["rope_fraction"] = rope.number("partial_rotary_factor")
    if not partial and values["rope_fraction"] != 1.0:
        rope.problem(
            "partial_rotary_factor", values["rope_fraction"], "implemented: 1.0, because transformers ignores it here"
        )
    kind = rope.choose("rope_type", {"default": "", "llama3": "llama3", "linear": "linear"}, "default")
    if kind == "llama3":
        values["rope_scaling"] = {
            "factor": rope.number("factor"),
            "low_frequency_factor": rope.number("low_freq_factor"),
            "high_frequency_factor": rope.number("high_freq_factor"),
            "original_context_length": rope.integer("original_max_position_embeddings"),
        }
    elif kind == "linear" and rope.number("factor") != 1.0:  # by 1 it changes nothing
        rope.problem("rope_type", "linear", "implemented: 'default', 'llama3'")
    rope.close()
    fields.problems.extend(rope.problems)
    return values
