"""Hugging Face folders for tests: from a config.json, with random weights, and transformers as the judge of ours."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from dsllm.evaluate.load import load_model, open_saved

Json = dict[str, Any]
CONTEXT, VOCABULARY = 64, 200


def shrunk(fields: Json) -> Json:
    """A config.json of the same architecture with small sizes: every field stays, and which sizes are equal stays too."""
    small = {**fields, "vocab_size": VOCABULARY}
    if isinstance(fields.get("pad_token_id"), int):
        small["pad_token_id"] = min(fields["pad_token_id"], VOCABULARY - 1)
    heads, kv = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    context = fields.get("max_position_embeddings", 2048)
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT, "n_ctx": CONTEXT, "n_inner": 96}
    sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": CONTEXT, "max_sequence_length": CONTEXT}
    small |= {name: size for name, size in sizes.items() if fields.get(name) is not None}
    if kv is not None:
        small["num_key_value_heads"] = 4 if kv == heads else 2
    if fields.get("head_dim") is not None:
        small["head_dim"] = 16 if fields["head_dim"] * heads == fields["hidden_size"] else 24
    if fields.get("sliding_window") is not None:
        small["sliding_window"] = CONTEXT if fields["sliding_window"] >= context else CONTEXT // 4
    if "max_window_layers" in fields:
        small["max_window_layers"] = 2 if fields["max_window_layers"] >= fields["num_hidden_layers"] else 1
    if "layer_types" in fields:
        small["layer_types"] = fields["layer_types"][:2]
    for name in ("rope_scaling", "rope_parameters"):
        if "original_max_position_embeddings" in (fields.get(name) or {}):
            small[name] = fields[name] | {"original_max_position_embeddings": CONTEXT // 2}
    return small


def write_folder(folder: Path, fields: Json, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with this config.json as it is, and random weights from transformers' own model of it, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    config = _quiet(lambda: transformers.AutoConfig.from_pretrained(folder))
    model = _quiet(lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=dtype))
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
            is_norm = tensor.dim() == 1 and name.endswith("weight")
            tensor.copy_(1 + 0.5 * noise if is_norm else 0.15 * noise)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@torch.no_grad()
def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes from a folder, in fp32."""
    model = _quiet(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="eager", dtype=torch.float32
        )
    )
    return model.eval()(tokens).logits


@torch.no_grad()
def our_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What dsllm computes from a folder, in fp32."""
    model = load_model(open_saved(folder, print), "fp32", torch.device("cpu"))
    return model(tokens)[..., :VOCABULARY]


def some_tokens() -> torch.Tensor:
    """Token ids [2, CONTEXT]."""
    return torch.randint(0, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(1))


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _quiet(call: Any) -> Any:
    """transformers warns of unknown rotary fields, which the tests give it on purpose."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return call()
    finally:
        logger.setLevel(level)
