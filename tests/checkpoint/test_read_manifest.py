"""What is not a sound manifest of a known version is refused in words: damaged ones so that an older one takes their place."""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.find import list_checkpoints, newest_sound
from dsllm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.read_manifest import UnavailableCheckpointError, not_the_parameters_of, read_manifest
from dsllm.checkpoint.verify import damage_in
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.parameters import parameter_table
from dsllm.slices import WEIGHTS, Box, ParameterSlice, Region, whole
from tests.helpers.checkpoints import edit_manifest, save_slices
from tests.helpers.damage import DAMAGE

FORMAT_1 = Path(__file__).parent / "format_1" / "step-00000003"
FORMAT_3 = Path(__file__).parent / "format_3" / "step-00000003"
FORMAT_2 = Path(__file__).parent / "format_2" / "step-00000003"


def save(directory: Path, step: int = 4) -> Path:
    """A checkpoint of one parameter [4, 3] that two ranks cut along its columns."""
    weights = torch.arange(12.0).view(4, 3) + step
    regions = [Region(Box((0, 0), (4, 2)), 0, 8), Region(Box((0, 2), (4, 3)), 0, 4)]
    ranks = [
        [
            ParameterSlice(
                name="w", shape=(4, 3), region=r, tensors={WEIGHTS: r.of(weights), "m": r.of(weights)},
                scalars={"step": float(step)},
            )
        ]
        for r in regions
    ]  # fmt: skip
    return save_slices(directory, ranks, step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path)


@pytest.fixture
def format_2(tmp_path: Path) -> Path:
    """A copy of the stored checkpoint of format 2; the tensors are links."""
    return copy_of(FORMAT_2, tmp_path / "step-00000003")


def copy_of(source: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            (to / file.name).write_bytes(file.read_bytes())
        else:
            (to / file.name).hardlink_to(file)
    return to


Change = Callable[[dict[str, Any]], object]

WRONG: list[tuple[Change, str]] = [
    (lambda raw: raw.pop("format_version"), "is not a readable checkpoint manifest: it has no format version"),
    (lambda raw: raw.update(format_version=True), "it has no format version"),
    (lambda raw: raw.update(format_version="3"), "it has no format version"),
    (lambda raw: raw.pop("progress"), r"is not a checkpoint manifest of version 3: progress: "),
    (lambda raw: raw["progress"].pop("step"), "progress.step is None"),
    (lambda raw: raw["progress"].update(step="many"), "progress.step is 'many'"),
    (lambda raw: raw["progress"].update(step=-4), "progress.step is -4"),
    (lambda raw: raw["progress"].update(loss=float("nan")), "NaN is not a finite number"),
    (lambda raw: raw["engine"].pop("loss_scaler"), "engine.loss_scaler is None"),
    (lambda raw: raw["engine"].update(loss_scaler={"scale": "1"}), "engine.loss_scaler is "),
    (lambda raw: raw["parameters"]["w"]["scalars"].update(step=float("inf")), "Infinity is not a finite number"),
    (lambda raw: raw["parameters"]["w"].pop("keys"), r"parameters\.w\.keys"),
    (lambda raw: raw["parameters"]["w"].update(shape=[4, 3, 2**40]), "is not a part of any of its parameters"),
    (lambda raw: raw["parameters"].update(v={"shape": [2**40], "keys": [WEIGHTS]}), r"take 4,398,\d+,\d+,\d+ bytes"),
    (lambda raw: raw["parameters"].update(v={"shape": [-1], "keys": [WEIGHTS]}), r"v has the shape \(-1,\)"),
    (lambda raw: raw["parameters"]["w"].update(keys=["m"]), r"w has \('m',\) and no weights"),
    (lambda raw: raw["parts"][0]["weights"].update(name="../../weights.safetensors"), "String should match pattern"),
    (lambda raw: raw["parts"][0]["weights"].update(name="/dev/zero"), "String should match pattern"),
    (lambda raw: raw["parts"][0].pop("weights"), r"parts\.0\.weights"),
    (lambda raw: raw["parts"][0]["slices"][0].update(name="v"), "is not a part of any of its parameters"),
    (lambda raw: raw["parts"][0]["slices"][0].update(stop=9), "is not a part of any of its parameters"),
    (lambda raw: raw["parts"][0]["slices"][0].update(start=8), "is not a part of any of its parameters"),
    (lambda raw: raw["parts"][0]["slices"][0]["box"].update(stop=[4, 4]), "is not a part of any of its parameters"),
    (lambda raw: raw["parts"][0]["slices"][0]["box"].update(stop=[4]), "is not a part of any of its parameters"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_what_is_not_a_manifest_is_refused(folder: Path, change: Change, problem: str):
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=problem) as refusal:
        read_manifest(folder)
    assert str(folder / "manifest.json") in str(refusal.value) and "\n" not in str(refusal.value)
    assert not isinstance(refusal.value, UnavailableCheckpointError) and damage_in(folder) == str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"x"',
        '{"format_version": 3}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "\0" * 5000,
        "9" * 10_000,
    ],
)
def test_any_other_file_is_refused(folder: Path, content: str):
    (folder / "manifest.json").write_text(content)
    assert "is not a" in (damage_in(folder) or "") or "is damaged" in (damage_in(folder) or "")


@pytest.mark.parametrize("kind", ["absent", "folder", "fifo", "device", "link to itself", "not UTF-8"])
def test_what_is_no_file_is_refused_and_not_opened(folder: Path, kind: str):
    path = folder / "manifest.json"
    if kind == "not UTF-8":
        path.write_bytes(b'{"format_version": "\xff"}')
    else:
        DAMAGE[kind](path, random.Random(0))
    assert str(path) in (damage_in(folder) or "")


def content_of(folder: Path) -> CheckpointManifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return None


@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.long)])
def test_no_flipped_bit_changes_what_is_read(tmp_path: Path, count: int):
    """Single bits of a manifest, at random places: none is accepted, and the older checkpoint is used instead."""
    older, newer = save(tmp_path, 4), save(tmp_path, 8)
    path, source = newer / "manifest.json", random.Random(11)
    content = path.read_bytes()
    for bit in source.sample(range(8 * len(content)), min(count, 8 * len(content))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        lines: list[str] = []
        assert newest_sound(list_checkpoints(tmp_path), lines.append, damage_in) == (older, [newer]), bit
        assert len(lines) == 1 and "is damaged and skipped" in lines[0]
    path.write_bytes(content)
    assert newest_sound(list_checkpoints(tmp_path), print, damage_in) == (newer, [])


@pytest.mark.parametrize("source", [FORMAT_1, FORMAT_2], ids=["format 1", "format 2"])
@pytest.mark.parametrize("count", [150, pytest.param(6000, marks=pytest.mark.long)])
def test_a_flipped_bit_in_an_old_format_is_damage_or_is_read(tmp_path: Path, source: Path, count: int):
    """These have no checksum: a name, a shape or a record that changed is found, a counter is not."""
    folder, generator = copy_of(source, tmp_path / "step-00000003"), random.Random(13)
    path = folder / "manifest.json"
    content = path.read_bytes()
    for bit in generator.sample(range(8 * len(content)), count):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if damage_in(folder) is None:
            reader = CheckpointReader(folder)
            for name in reader.names():
                reader.read_whole(name)
            try:
                reader.run()
            except CheckpointError as error:
                assert str(folder) in str(error)


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.long)])
def test_random_edits_of_a_resealed_manifest_are_refused_or_read(folder: Path, count: int):
    """Somebody who knows the format writes a wrong value of another type, or removes a member, anywhere."""
    path, generator = folder / "manifest.json", random.Random(17)
    content = path.read_bytes()
    values: list[Any] = [None, True, -1, 0, 2**63, 10**30, 1e308, "", "../x", "\0", [], {}, [[]], {"a": 1}]
    for _ in range(count):
        path.write_bytes(content)

        def change(raw: dict[str, Any]) -> None:
            node: Any = raw
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                key = generator.choice(keys)
                if isinstance(node[key], dict | list) and node[key] and generator.random() < 0.8:
                    node = node[key]
                    continue
                if generator.random() < 0.3:
                    del node[key]
                else:
                    node[key] = generator.choice(values)
                return

        edit_manifest(folder, change)
        if content_of(folder) is None:
            continue
        try:
            reader = CheckpointReader(folder)
            reader.read_whole("w")
            reader.run()
            assert reader.model_config
        except CheckpointError as error:
            assert str(folder) in str(error)


@pytest.mark.parametrize("resealed", [True, False])
def test_a_newer_format_says_who_wrote_it(folder: Path, resealed: bool):
    edit_manifest(folder, lambda raw: raw.update(format_version=9, versions={"dsllm": "7.1"}), resealed=resealed)
    message = r"has format version 9; this dsllm reads versions 1 to 3: .*or use the one that wrote it \(dsllm 7\.1\)"
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_manifest(folder)
    assert isinstance(refusal.value, UnavailableCheckpointError) == resealed


def test_a_newer_checkpoint_is_not_skipped_as_damaged(tmp_path: Path):
    """Its steps would be lost, and it would be removed after the next save."""
    save(tmp_path, 4)
    for change in (lambda raw: raw.update(format_version=4), lambda raw: raw.update(a_new_field={})):
        edit_manifest(save(tmp_path, 8), change)
        with pytest.raises(UnavailableCheckpointError, match="update dsllm"):
            newest_sound(list_checkpoints(tmp_path), print, damage_in)
        assert len(list_checkpoints(tmp_path)) == 2


def test_a_checksum_cannot_be_left_out(folder: Path):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["sha256"]
    path.write_text(json.dumps(raw))
    assert "the checksum at its end is missing" in (damage_in(folder) or "")


@pytest.mark.parametrize(
    ("folder", "tokenizer"), [(FORMAT_2, None), (FORMAT_3, "1" * 64)], ids=["format 2", "format 3"]
)
def test_stored_checkpoints_of_later_formats_open(folder: Path, tokenizer: str | None):
    """They have the same tensors as that of format 1, which has tests of its own."""
    assert damage_in(folder) is None and damage_in(folder, what="weights") is None
    reader, other = CheckpointReader(folder), CheckpointReader(FORMAT_1)
    assert reader.manifest.tokenizer_sha256 == tokenizer and reader.step == 3
    assert reader.names() == other.names()
    for name in reader.names():
        assert reader.keys(name) == other.keys(name) and reader.scalars(name) == other.scalars(name)
        for key in reader.keys(name):
            size = reader.read_whole(name).numel()
            region = Region(whole(reader.shape(name)), 0, size)
            assert torch.equal(reader.read(name, key, region), other.read(name, key, region))
    assert reader.run() == other.run() and reader.model_config == other.model_config


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw["parameters"].pop("norm.weight"), "is not a part of any of its parameters"),
        (lambda raw: raw["parts"].pop(), "its parameters take .* bytes"),
        (lambda raw: raw["parts"][1]["slices"].pop(), "of its .* elements are there"),
        (lambda raw: raw["parts"][1].update(optimizer=None), "part 1 has slices without their files"),
        (lambda raw: raw["parts"][1]["weights"].update(name="weights-00000.safetensors"), "two records of weights-0"),
        (lambda raw: raw["parameters"]["norm.weight"]["scalars"].update(step=8.0), "differ in their optimizer state"),
        (lambda raw: raw["model"]["config"].update(num_layers=3), "parameters are not those of its config"),
        (lambda raw: raw["model"]["config"].update(num_layers=10**8), "num_layers: must be at most"),
        (lambda raw: raw["model"]["config"].update(hidden_size=2**20), "hidden_size: must be at most"),
        (lambda raw: raw["model"]["config"].update(vocab_size=10**12), "vocab_size: must be at most"),
        (lambda raw: raw.update(config_version=[9, 0]), "update dsllm"),
    ],
)
def test_damage_to_an_old_format_is_found(format_2: Path, change: Change, problem: str):
    raw = json.loads((format_2 / "manifest.json").read_text())
    change(raw)
    (format_2 / "manifest.json").write_text(json.dumps(raw))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=problem):
        read_manifest(format_2)
    assert time.monotonic() - began < 1


def test_parameters_that_are_not_those_of_a_config():
    config = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, mlp_size=16, vocab_size=100)
    found = {row.name: row.shape for row in parameter_table(config, 16)}
    assert not not_the_parameters_of(config, 16, found)
    assert "the first, layers.0.mlp.up.weight, is absent there" in not_the_parameters_of(
        config, 16, {name: shape for name, shape in found.items() if name != "layers.0.mlp.up.weight"}
    )
    assert "the first, more, is (2,) there and absent" in not_the_parameters_of(config, 16, found | {"more": (2,)})


def test_the_newest_format_has_a_stored_checkpoint():
    """After a change of the manifest's fields: raise FORMAT_VERSION, read the old format too, and store one of the new."""
    stored = {
        int(folder.name.removeprefix("format_")) for folder in Path(__file__).parent.glob("format_*") if folder.is_dir()
    }
    assert stored == set(range(1, FORMAT_VERSION + 1))
    raw = json.loads((FORMAT_3 / "manifest.json").read_text())
    assert set(raw) - {"sha256"} == {field.name for field in dataclasses.fields(CheckpointManifest)}
