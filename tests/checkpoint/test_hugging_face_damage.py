"""Damaged and hostile Hugging Face folders: each is refused in words or read, soon, and nothing in it changes."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.checkpoint.hugging_face_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from dsllm.checkpoint.source import model_in
from dsllm.errors import CheckpointError
from dsllm.evaluate.load import load_model, open_saved
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, WeightsOf, random_model

SECONDS = 10
KINDS = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": NEOX}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of small folders: one of each kind in one file, and one in shards."""
    found = {}
    for kind, config in {**KINDS, "shards": LLAMA}.items():
        folder = tmp_path_factory.mktemp(kind) / "hf"
        size = 40_000 if kind == "shards" else 10**9
        settings = Export(config=config, context_length=CONTEXT, end_of_text_id=3, shard_bytes=size)
        export_hugging_face(WeightsOf(random_model(config)), settings, folder)
        found[kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """Fail where a reader takes too long, for example because it waits for a pipe."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.iterdir()}


def is_read(folder: Path) -> bool:
    """Whether a folder is read; if not, the error is one for the user, on one line, and names a path in the folder."""
    before = state_of(folder)
    try:
        with soon():
            config = model_in(folder)
            load_model(open_saved(folder, print), "fp32", torch.device("cpu"))
            assert config == HuggingFaceReader(folder).model_config
        return True
    except CheckpointError as error:
        text = str(error)
        assert str(folder) in text and "\n" not in text and len(text) < 1500 and text.isprintable(), text
        return False
    finally:
        assert state_of(folder) == before


def damaged(content: bytes, choice: random.Random) -> bytes:
    """A file's content, cut, flipped, repeated or filled with something else."""
    place = choice.randrange(len(content))
    match choice.randrange(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([content[place] ^ 1 << choice.randrange(8)]) + content[place + 1 :]
        case 2:
            return content[:place] + choice.randbytes(choice.randrange(1, 30)) + content[place:]
        case 3:
            return content[:place] + content[place + choice.randrange(1, 200) :]
        case 4:
            return content[:place] + bytes(choice.randrange(1, 3000))
        case _:
            return content[place:] + content[:place]


def try_damages(models: dict[str, dict[str, bytes]], folder: Path, seed: int, num_inputs: int) -> int:
    """How many of so many damaged folders are read."""
    choice = random.Random(seed)
    read = 0
    for i in range(num_inputs):
        files = dict(models[choice.choice(sorted(models))])
        name = choice.choice(sorted(files))
        front = choice.random() < 0.5  # headers and JSON are at the front
        content = files[name]
        files[name] = damaged(content[:600], choice) + content[600:] if front else damaged(content, choice)
        read += is_read(write(folder / str(i), files))
    return read


def test_damaged_files(models, tmp_path: Path):
    """100 inputs: a file of a folder is cut, flipped, padded or shifted. Flipped weights are read: they have no checksum."""
    assert try_damages(models, tmp_path, seed=1, num_inputs=100) < 70


@pytest.mark.long
def test_many_damaged_files(models, tmp_path: Path):
    """3,000 inputs."""
    try_damages(models, tmp_path, seed=2, num_inputs=3000)


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**63, 10**30, 10**400, 0.5, -2.5, 1e300, 5e-324, "", "x", "\x1b[31m\n", "4"),
    *(
        [],
        {},
        [[]],
        {"a": {}},
        [1, 2],
        {"rope_type": "yarn"},
        {"rope_type": ["llama3"]},
        {"rope_type": "llama3"},
        "x" * 5000,
    ),
]


def try_fields(models: dict[str, dict[str, bytes]], folder: Path, choice: random.Random, num_inputs: int) -> int:
    read = 0
    for i in range(num_inputs):
        files = dict(models[choice.choice(sorted(models))])
        fields = json.loads(files[CONFIG_FILE])
        for _ in range(choice.choice([1, 1, 1, 3])):
            name = choice.choice(
                [*fields, "rope_scaling", "head_dim", "sliding_window", "layer_types", "other\nname", "x" * 999]
            )
            if isinstance(fields.get(name), dict) and choice.random() < 0.7:
                inner = choice.choice([*fields[name], "type", "other"])
                fields[name] = fields[name] | {inner: choice.choice(ODD)}
            elif choice.random() < 0.1:
                fields.pop(name, None)
            else:
                fields[name] = choice.choice(ODD)
        files[CONFIG_FILE] = json.dumps(fields).encode()
        read += is_read(write(folder / str(i), files))
    return read


def test_odd_fields(models, tmp_path: Path):
    """150 inputs: up to three fields of config.json, or of an object in it, have another value."""
    assert 10 < try_fields(models, tmp_path, random.Random(3), 150) < 100


@pytest.mark.long
def test_many_odd_fields(models, tmp_path: Path):
    """5,000 inputs."""
    try_fields(models, tmp_path, random.Random(4), 5000)


JSON_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "blank": lambda content: b" \n",
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[1]",
    "a number": lambda content: b"5",
    "null": lambda content: b"null",
    "text": lambda content: b'"config"',
    "no fields": lambda content: b"{}",
    "deep lists": lambda content: b"[" * 100_000,
    "deep objects": lambda content: b'{"a":' * 100_000,
    "not finite": lambda content: content.replace(b"1e-05", b"NaN").replace(b'": "', b'": Infinity, "a": "', 1),
    "a huge number": lambda content: content.replace(b": 48", b": " + b"4" * 10_000, 1).replace(
        b'": "', b'": 1e999, "a": "', 1
    ),
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "Latin-1": lambda content: content.replace(b'"', b'"\xe9', 1),
}


@pytest.mark.parametrize("name", [CONFIG_FILE, INDEX_FILE])
@pytest.mark.parametrize("case", JSON_FILES)
def test_what_is_not_the_expected_json_is_refused(case: str, name: str, models, tmp_path: Path):
    files = models["shards"]
    assert not is_read(write(tmp_path / "hf", {**files, name: JSON_FILES[case](files[name])}))


def test_a_byte_order_mark_and_windows_line_ends_are_read(models, tmp_path: Path):
    files = models["shards"]
    changed = {name: b"\xef\xbb\xbf" + files[name].replace(b"\n", b"\r\n") for name in (CONFIG_FILE, INDEX_FILE)}
    assert is_read(write(tmp_path / "hf", {**files, **changed}))


WEIGHT_MAPS: dict[str, Callable[[dict[str, str]], Any]] = {
    "absent": lambda weight_map: None,
    "a list": lambda weight_map: list(weight_map.items()),
    "text": lambda weight_map: "model.safetensors",
    "empty": lambda weight_map: {},
    "numbers": lambda weight_map: dict.fromkeys(weight_map, 1),
    "lists": lambda weight_map: {name: [file] for name, file in weight_map.items()},
    "no names": lambda weight_map: dict.fromkeys(weight_map, ""),
    "its folder": lambda weight_map: dict.fromkeys(weight_map, "."),
    "one up": lambda weight_map: {name: f"../other/{file}" for name, file in weight_map.items()},
    "up by a detour": lambda weight_map: {name: f"a/../../other/{file}" for name, file in weight_map.items()},
    "absolute": lambda weight_map: dict.fromkeys(weight_map, "/etc/passwd"),
    "a device": lambda weight_map: dict.fromkeys(weight_map, "/dev/zero"),
    "a name with a zero": lambda weight_map: dict.fromkeys(weight_map, "a\0b"),
    "a long name": lambda weight_map: dict.fromkeys(weight_map, "x" * 5000),
    "a file that is not there": lambda weight_map: {**weight_map, "lm_head.weight": "other.safetensors"},
    "the wrong file": lambda weight_map: {**weight_map, "lm_head.weight": weight_map["model.embed_tokens.weight"]},
    "another file of the folder": lambda weight_map: {**weight_map, "lm_head.weight": CONFIG_FILE},
    "too many": lambda weight_map: {
        **weight_map,
        **{f"{i:0200}": "model-00001-of-00010.safetensors" for i in range(80_000)},
    },
}


@pytest.mark.parametrize("case", WEIGHT_MAPS)
def test_an_odd_weight_map_is_refused(case: str, models, tmp_path: Path):
    files = models["shards"]
    write(tmp_path / "other", files)  # the same weights, outside of the folder
    weight_map = WEIGHT_MAPS[case](json.loads(files[INDEX_FILE])["weight_map"])
    index = json.dumps({} if weight_map is None else {"weight_map": weight_map}).encode()
    assert not is_read(write(tmp_path / "hf", {**files, INDEX_FILE: index}))


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_huge(path: Path) -> None:
    """A file of 1 TiB that takes no space."""
    with path.open("wb") as file:
        file.truncate(2**40)


def make_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_pipe, make_device, make_folder, make_huge, make_broken_link, make_loop])
@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, CONFIG_FILE, "model-00002-of-00010.safetensors"])
def test_what_is_not_a_file_is_refused_and_not_waited_for(
    name: str, make: Callable[[Path], None], models, tmp_path: Path
):
    files = models["llama" if name == SINGLE_FILE else "shards"]
    assert name in files
    folder = write(tmp_path / "hf", {other: content for other, content in files.items() if other != name})
    make(folder / name)
    if name == CONFIG_FILE and make in (make_pipe, make_device, make_folder, make_broken_link, make_loop):
        with soon(), pytest.raises(CheckpointError, match="neither a run directory"):
            open_saved(folder, print)
        return
    assert not is_read(folder)


def test_links_to_files_are_read_because_the_cache_of_the_hub_is_made_of_them(models, tmp_path: Path):
    write(tmp_path / "blobs", models["shards"])
    (tmp_path / "snapshot").mkdir()
    for name in models["shards"]:
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    assert is_read(tmp_path / "snapshot")
