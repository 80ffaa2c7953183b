"""Models go to Hugging Face folders and come back: transformers computes the same logits, both ways."""

import dataclasses
import json
import os
import resource
import signal
import stat
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_config import config_from_json, config_to_json
from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.evaluate.load import load_model, open_saved
from dsllm.slices import WEIGHTS, Box, Region, whole
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, SHAPES, WeightsOf, random_model, tokens_for

# Both sides compute in fp32 and differ by the order of sums only, about 4e-7 of the largest logit. A norm's epsilon of
# 1e-6 for 1e-5 shows as 6e-6, other mistakes as 2e-5 and more.
RELATIVE = 5e-6


def export(model, folder: Path, **more) -> Path:
    settings = {"config": model.config, "context_length": CONTEXT, "end_of_text_id": 3}
    export_hugging_face(WeightsOf(model), Export(**settings | more), folder)
    return folder


def load_theirs(folder: Path):
    """The model as transformers loads it; nothing may be missing, left over or misshapen."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", local_files_only=True
    )
    assert not any(info.values()), info
    return theirs.eval()


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_an_exported_model_computes_the_same_logits(name: str, tmp_path: Path):
    ours = random_model(SHAPES[name]).eval()
    theirs = load_theirs(export(ours, tmp_path / "hf"))
    tokens = tokens_for(ours.config)
    assert deviation(ours(tokens), theirs(tokens).logits) < RELATIVE


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_what_transformers_saves_is_read_back_with_the_same_logits(name: str, tmp_path: Path):
    config_file = config_to_json(SHAPES[name], CONTEXT, "float32", 3)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config_file), attn_implementation="eager"
    ).eval()
    for tensor_name, tensor in theirs.named_parameters():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor_name)))
        is_norm = "norm" in tensor_name or ".ln_" in tensor_name
        tensor.copy_(1 + 0.5 * noise if is_norm and tensor_name.endswith("weight") else 0.15 * noise)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(open_saved(tmp_path / "hf", print), "fp32", torch.device("cpu"))
    tokens = tokens_for(SHAPES[name])
    assert deviation(ours(tokens), theirs(tokens).logits) < RELATIVE


@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_config_come_back_as_they_went(name: str, tmp_path: Path):
    model = random_model(SHAPES[name])
    reader = HuggingFaceReader(export(model, tmp_path / "hf"))
    sent, back = WeightsOf(model), reader
    assert sorted(back.names()) == sorted(sent.names())
    for parameter in sent.names():
        assert back.shape(parameter) == sent.shape(parameter)
        assert torch.equal(back.read_whole(parameter), sent.weights[parameter])
    described = dataclasses.asdict(reader.model_config)
    wanted = dataclasses.asdict(model.config) | {"context_length": CONTEXT}
    resolved = {"num_kv_heads": model.config.kv_heads, "head_size": model.config.head_width}
    for field, value in wanted.items():
        assert described[field] in (value, resolved.get(field)), field


def test_any_region_is_read_even_past_the_last_token_id(tmp_path: Path):
    """Flat ranges of the whole, of a part of the rows and of a part of the columns; the vocabulary ends at row 200 of 256."""
    model = random_model(GPT2)
    reader = HuggingFaceReader(export(model, tmp_path / "hf"))
    for name in ("embed.weight", "layers.1.attention.k.weight", "layers.0.mlp.up.weight", "norm.bias"):
        values, shape = WeightsOf(model).weights[name], reader.shape(name)
        rows = Box((shape[0] * 2 // 3, *(0 for _ in shape[1:])), shape)
        columns = Box((*(0 for _ in shape[1:]), shape[-1] // 3), shape)
        for box in (whole(shape), rows, columns):
            size = box.num_elements
            for start, stop in ((0, 1), (5, min(48, size)), (7, size - 3), (size - 2, size), (0, size)):
                region = Region(box, start, stop)
                assert torch.equal(reader.read(name, WEIGHTS, region), region.of(values))


def test_padding_rows_are_not_exported(tmp_path: Path):
    model = random_model(LLAMA)
    weights = load_file(export(model, tmp_path / "hf") / "model.safetensors")
    assert model.embed.weight.shape[0] == 256
    assert weights["model.embed_tokens.weight"].shape == (200, 48)
    assert weights["lm_head.weight"].shape == (200, 48)


@torch.no_grad()
def test_large_models_are_cut_into_shards_that_load(tmp_path: Path):
    model = random_model(LLAMA).eval()
    folder = export(model, tmp_path / "hf", shard_bytes=40_000)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    largest_tensor = 200 * 48 * 4
    assert len(shards) > 3 and all(s.stat().st_size < 40_000 + largest_tensor for s in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    tokens = tokens_for(LLAMA)
    assert deviation(model(tokens), load_theirs(folder)(tokens).logits) < RELATIVE
    assert HuggingFaceReader(folder).shape("head.weight") == (256, 48)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_files_is_the_one_that_the_config_names(dtype: str, tmp_path: Path):
    folder = export(random_model(LLAMA), tmp_path / "hf", dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert {t.dtype for t in weights.values()} == {getattr(torch, dtype)}
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert load_theirs(folder).dtype == getattr(torch, dtype)


def test_files_are_readable_as_the_umask_says(tmp_path: Path):
    before = os.umask(0o027)
    try:
        folder = export(random_model(LLAMA), tmp_path / "hf")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").write_text("keep")
    with pytest.raises(CheckpointError, match=r"not empty \(it contains precious\)"):
        export(random_model(LLAMA), tmp_path / "hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "precious"]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a model"])
def test_a_disk_that_is_full_is_named_and_leaves_what_was_there(there: str, tmp_path: Path):
    """A limit on the size of files stands for the disk: the write fails in the same way, inside safetensors."""
    folder = tmp_path / "hf"
    if there == "an empty folder":
        folder.mkdir()
    if there == "a model":
        export(random_model(LLAMA, seed=1), folder)
    before, was_there = everything_in(tmp_path), folder.is_dir()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"{folder}: could not be written: .*File too large"):
            export(random_model(LLAMA), folder, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything_in(tmp_path) == before and folder.is_dir() == was_there
    assert [path.name for path in tmp_path.iterdir()] == (["hf"] if was_there else [])


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path):
    model = random_model(LLAMA)
    with torch.no_grad():
        model.norm.weight[3] = -70_000.0
    with pytest.raises(CheckpointError, match=r"norm\.weight: contains 7e\+04, which float16 cannot hold"):
        export(model, tmp_path / "hf", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "hf", dtype="bfloat16")


class Failing(WeightsOf):
    """Weights that cannot all be read."""

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        if name == "norm.weight":
            raise OSError(28, "No space left on device")
        return super().read(name, key, region)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path):
    settings = Export(config=LLAMA, context_length=CONTEXT, end_of_text_id=3)
    with pytest.raises(CheckpointError, match="No space left"):
        export_hugging_face(Failing(random_model(LLAMA)), settings, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def head_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["lm_head.weight"]


@pytest.mark.parametrize("moment", ["before its own was in place", "before the old one was removed"])
def test_an_export_that_was_killed_while_replacing_does_not_block_the_next(tmp_path: Path, moment: str):
    """It had moved the old model to .hf.replaced and perhaps published its own."""
    old, new = random_model(LLAMA, seed=1), random_model(LLAMA, seed=2)
    if moment == "before the old one was removed":
        export(old, tmp_path / "hf")
    export(old, tmp_path / ".hf.replaced")
    settings = Export(config=LLAMA, context_length=CONTEXT, end_of_text_id=3, replace=True)
    with pytest.raises(CheckpointError, match="No space left"):
        export_hugging_face(Failing(new), settings, tmp_path / "hf")
    assert torch.equal(head_of(tmp_path / "hf"), old.head.weight[:200])  # the old model is there until a new one is
    export(new, tmp_path / "hf", replace=True)
    assert torch.equal(head_of(tmp_path / "hf"), new.head.weight[:200])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qk_norm": True}, "qk_norm: True"),
        ({"attention_output_bias": True}, "attention_output_bias: True with attention_bias: False"),
        ({"parallel_residual": True}, "parallel_residual: True"),
        ({"norm": "layernorm"}, "norm: 'layernorm'"),
    ],
)
def test_a_shape_that_no_architecture_holds_is_refused_by_field(change: dict, named: str, tmp_path: Path):
    config = dataclasses.replace(LLAMA, **change)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM cannot express") as refusal:
        export(random_model(config), tmp_path / "hf")
    assert named in str(refusal.value)
    assert not (tmp_path / "hf").exists()


def test_old_and_new_readers_find_their_rotary_fields():
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters; neither warns about the other's.
    fields = config_to_json(SHAPES["llama-scaled"], CONTEXT, "float32", 3)
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 500.0
    assert fields["rope_scaling"]["rope_type"] == "llama3"
    assert fields["rope_scaling"].items() <= fields["rope_parameters"].items()
    neox = config_to_json(NEOX, CONTEXT, "float32", 3)
    assert neox["rotary_pct"] == neox["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert neox["rotary_emb_base"] == neox["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("version", ["4", "5"])
@pytest.mark.parametrize("name", ["llama-scaled", "neox-tied-no-attention-bias"])
def test_the_fields_of_either_version_alone_are_understood(name: str, version: str):
    fields = config_to_json(SHAPES[name], CONTEXT, "float32", 3)
    of_version_4 = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base"}
    dropped = {"rope_parameters"} if version == "4" else of_version_4
    fields = {key: value for key, value in fields.items() if key not in dropped}
    found = config_from_json(fields, "config.json")
    assert (found.rope_theta, found.rope_fraction, found.rope_scaling) == (
        SHAPES[name].rope_theta,
        SHAPES[name].rope_fraction,
        SHAPES[name].rope_scaling,
    )


REFUSED = [
    (LLAMA, {"hidden_act": "relu"}, "hidden_act: 'relu'"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved: True (implemented: False)"),
    (LLAMA, {"hidden_size": "64"}, "hidden_size: '64' (a whole number is needed)"),
    (LLAMA, {"rms_norm_eps": [1e-5]}, "rms_norm_eps: [1e-05] (a finite number is needed)"),
    (LLAMA, {"hidden_act": ["silu"]}, "hidden_act: ['silu']"),
    (LLAMA, {"rope_scaling": "linear"}, "rope_scaling: 'linear' (an object is needed)"),
    (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' (true or false is needed)"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window: 4096"),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters.rope_type: 'yarn'",
    ),
    (LLAMA, {"rope_theta": 1e6}, "rope_parameters.rope_theta: 10000.0 contradicts 1000000.0"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention: True"),
    (GPT2, {"activation_function": "silu"}, "activation_function: 'silu'"),
    (NEOX, {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu'"),
    (NEOX, {"num_key_value_heads": 2}, "num_key_value_heads: 2"),
]


@pytest.mark.parametrize(
    ("config", "change", "named"), REFUSED, ids=[f"{r[0].norm}-{next(iter(r[1]))}" for r in REFUSED]
)
def test_a_field_that_is_not_implemented_is_refused_by_name(config: ModelConfig, change: dict, named: str):
    fields = config_to_json(config, CONTEXT, "float32", 3) | change
    with pytest.raises(CheckpointError) as refusal:
        config_from_json(fields, "folder/config.json")
    assert named in str(refusal.value) and "folder/config.json" in str(refusal.value)


def test_all_problems_are_named_at_once():
    fields = config_to_json(LLAMA, CONTEXT, "float32", 3) | {
        "hidden_act": "relu",
        "sliding_window": 9,
        "logit_scale": 2,
    }
    with pytest.raises(CheckpointError) as refusal:
        config_from_json(fields, "config.json")
    assert all(name in str(refusal.value) for name in ("hidden_act", "sliding_window", "logit_scale"))


def test_default_configs_of_transformers_are_understood():
    for kind in (
        transformers.LlamaConfig,
        transformers.GPT2Config,
        transformers.GPTNeoXConfig,
        transformers.Qwen2Config,
    ):
        assert config_from_json(json.loads(kind().to_json_string(use_diff=False)), "defaults").vocab_size


def test_another_architecture_is_refused():
    with pytest.raises(CheckpointError, match=r"model_type 'mamba'.*llama, gpt2, gpt_neox, qwen2, mistral"):
        config_from_json({"model_type": "mamba"}, "config.json")


def changed(folder: Path, change) -> None:
    """Rewrite an export's weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_refused(tmp_path: Path):
    folder = export(random_model(LLAMA), tmp_path / "hf")
    changed(folder, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        HuggingFaceReader(folder)
    changed(folder, lambda w: w.update({"lm_head.weight": torch.zeros(200, 48), "adapter.a": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"has adapter\.a, which the model has no place for"):
        HuggingFaceReader(folder)
    changed(folder, lambda w: (w.pop("adapter.a"), w.update({"lm_head.weight": torch.zeros(300, 48)})))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[300, 48\], not \[200, 48\]"):
        HuggingFaceReader(folder)


def test_a_matrix_of_another_size_than_config_json_says_is_refused(tmp_path: Path):
    """Also where our parameters are fused or transposed in it."""
    folder = export(random_model(GPT2), tmp_path / "hf")
    changed(folder, lambda w: w.update({"transformer.h.1.attn.c_attn.weight": torch.zeros(48, 150)}))
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_attn\.weight is \[48, 150\], not \[48, 144\]"):
        HuggingFaceReader(folder)


def test_a_tied_model_may_repeat_its_embedding_but_not_have_another_head(tmp_path: Path):
    folder = export(random_model(SHAPES["llama-tied"]), tmp_path / "hf")
    changed(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in HuggingFaceReader(folder).names()
    changed(folder, lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        HuggingFaceReader(folder)


def test_files_of_the_bare_model_and_old_buffers_are_read(tmp_path: Path):
    # GPT-2 on the hub: no "transformer." before the names, and the causal mask as a buffer
    model = random_model(GPT2)
    folder = export(model, tmp_path / "hf")

    def bare(weights: dict) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    changed(folder, bare)
    assert torch.equal(HuggingFaceReader(folder).read_whole("embed.weight"), model.embed.weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_names_without_their_prefix_mixed_types_and_old_buffers_are_read(kind: str, tmp_path: Path):
    """As saved from the bare model, in 16 and 32 bits, with the buffers of older versions."""
    model = random_model(SHAPES[kind]).eval()
    folder = export(model, tmp_path / "hf")

    def as_older(weights: dict) -> None:
        for name in list(weights):
            values = weights.pop(name)
            bare = name.removeprefix("transformer.").removeprefix("model.").removeprefix("gpt_neox.")
            weights[bare] = values.bfloat16().float().to(torch.bfloat16 if "mlp" in name else torch.float64)
        weights["rotary_emb.inv_freq"] = torch.ones(8)
        weights["layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)
        weights["layers.1.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    changed(folder, as_older)
    ours = load_model(open_saved(folder, print), "fp32", torch.device("cpu"))
    for name, parameter in model.named_parameters():
        rounded = parameter.bfloat16().float()
        assert torch.equal(dict(ours.named_parameters())[name], rounded), name


def test_a_head_under_the_name_that_transformers_5_has_in_memory_is_read(tmp_path: Path):
    model = random_model(NEOX)
    folder = export(model, tmp_path / "hf")
    changed(folder, lambda w: w.update({"lm_head.weight": w.pop("embed_out.weight")}))
    assert torch.equal(HuggingFaceReader(folder).read_whole("head.weight"), model.head.weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantized_weights_are_refused_by_name_and_type(dtype: torch.dtype, tmp_path: Path):
    folder = export(random_model(LLAMA), tmp_path / "hf")
    changed(folder, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"quantized or of a type .*: model\.norm\.weight is [FIU]8"):
        HuggingFaceReader(folder)


def test_a_single_file_is_used_before_an_index_as_in_transformers(tmp_path: Path):
    one, other = random_model(LLAMA, seed=1), random_model(LLAMA, seed=2)
    folder = export(one, tmp_path / "hf")
    for path in export(other, tmp_path / "other", shard_bytes=40_000).glob("model*"):
        path.rename(folder / path.name)
    tokens = tokens_for(LLAMA)
    ours = load_model(open_saved(folder, print), "fp32", torch.device("cpu"))
    with torch.no_grad():
        assert deviation(ours(tokens), load_theirs(folder)(tokens).logits) < RELATIVE
    assert torch.equal(ours.embed.weight, one.embed.weight)


def test_an_adapter_is_not_ignored(tmp_path: Path):
    folder = export(random_model(LLAMA), tmp_path / "hf")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has an adapter"):
        HuggingFaceReader(folder)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_named_with_what_to_do(tmp_path: Path):
    folder = export(random_model(SHAPES["llama-tied"]), tmp_path / "hf")
    changed(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match='set "tie_word_embeddings": false'):
        HuggingFaceReader(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": False}))
    assert "head.weight" in HuggingFaceReader(folder).names()


def test_pickles_and_folders_without_weights_are_refused(tmp_path: Path):
    folder = export(random_model(LLAMA), tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        HuggingFaceReader(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(CheckpointError, match="cannot be read"):
        HuggingFaceReader(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        HuggingFaceReader(folder)
