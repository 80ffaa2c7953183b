"""The manifest of a prepared directory: which token shards there are, and the settings and tokenizer that made them."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm import files
from dsllm.config.data import TokenizerConfig
from dsllm.config.fields import STRICT_FIELDS
from dsllm.config.run import RunConfig
from dsllm.data.shards import Shard
from dsllm.data.tokenizer_folder import hash_of_tokenizer
from dsllm.errors import DataError
from dsllm.untrusted_files import UntrustedFileError, inside, parse_json, read_bounded

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
CHECKSUM_FILE = "manifest.json.sha256"
"""SHA-256 of manifest.json, as sha256sum writes and checks it. Data that was prepared before it existed has none."""
POLL_SECONDS = 0.25
_MOST_BYTES = 2**30  # a shard has about 400 bytes in it
MOST_VOCABULARY = 2**31
"""Token ids are at most int32."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard, or the part of it that belongs to one split."""

    __pydantic_config__ = STRICT_FIELDS

    prefix: str
    """Path without .bin and .idx: relative, inside the manifest's folder; absolute for shards that are used in place."""
    first_token: int = 0
    """Where the split's part begins in the .bin, in tokens from its start."""
    num_tokens: int
    """Length of the split's part."""
    num_documents: int
    """Documents in the split's part."""
    text_bytes: int | None
    """UTF-8 bytes of these documents. None: the text is not known, as the shard was not prepared here."""
    bin_bytes: int
    """Size of the whole .bin."""
    idx_bytes: int
    """Size of the whole .idx."""
    bin_sha256: str | None
    """SHA-256 of the whole .bin, to check a copy with sha256sum. None: not known."""


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The shards of one named source."""

    __pydantic_config__ = STRICT_FIELDS

    name: str
    train: tuple[ShardRecord, ...]
    validation: tuple[ShardRecord, ...]


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that made the ids."""

    __pydantic_config__ = STRICT_FIELDS

    directory: str
    """Its folder, relative to the manifest's folder and inside it."""
    sha256: str
    """Hash of that folder (`dsllm.files.sha256_of_folder`)."""
    vocab_size: int
    """Largest token id + 1."""
    end_of_text_id: int
    """The id that ends every document."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that training needs to know about a prepared directory."""

    __pydantic_config__ = STRICT_FIELDS

    format_version: int = FORMAT_VERSION
    settings: dict[str, Any]
    """The settings that decided the content (`settings_of`)."""
    settings_sha256: str
    """`hash_of(settings)`, which is quicker to compare."""
    tokenizer: TokenizerRecord
    sources: tuple[SourceRecord, ...]
    dtype: str
    """Type of the ids in the shards inside the folder: uint16 or int32."""

    def records(self) -> Iterator[ShardRecord]:
        """Every record of every split."""
        for source in self.sources:
            yield from source.train
            yield from source.validation


_ADAPTER = TypeAdapter(Manifest)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that decide the content of its token shards, as plain JSON values.

    The sources' weights and the sequence length are left out, because they apply when the shards are read.
    """
    sources = [dataclasses.asdict(source) for source in config.data.sources]
    for source in sources:
        del source["weight"]
        if source["encoding"] == "utf-8":  # so that data prepared by a version without this field stays valid
            del source["encoding"]
    settings = {
        "sources": sources,
        "tokenizer": tokenizer_settings(config.tokenizer),
        "validation_share": config.data.validation_share,
        "deduplicate": config.data.deduplicate,
        "shard_megabytes": config.data.shard_megabytes,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # turns tuples into lists, as reading the file back does
    return plain


def tokenizer_settings(config: TokenizerConfig) -> dict[str, Any]:
    """The tokenizer's settings; without begin_of_text where it is not used, as before it existed."""
    settings = dataclasses.asdict(config)
    if config.begin_of_text is None:
        del settings["begin_of_text"]
    return settings


def hash_of(settings: dict[str, Any]) -> str:
    """SHA-256 of settings; the order of their keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of a prepared directory.

    Raises:
        DataError: there is none, this version cannot read it, or it names files outside its folder.
    """
    path = directory / FILE_NAME
    try:
        content = read_bounded(path, _MOST_BYTES)
        tree = parse_json(content)
    except FileNotFoundError as error:
        raise DataError(f"{directory}: no prepared data (no {FILE_NAME}): run `dsllm prepare CONFIG`") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UntrustedFileError as error:
        raise DataError(f"{path}: not a manifest of token shards: {error}; prepare the data again") from error
    if not isinstance(tree, dict) or "format_version" not in tree:
        raise DataError(f"{path}: not a manifest of token shards: it has no 'format_version'; prepare the data again")
    version = tree["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version!r}; this dsllm reads {FORMAT_VERSION}: update dsllm, or prepare the data again"
        )
    _check_checksum(path, content)
    try:
        manifest = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(f"{path}: damaged: {reason}; prepare the data again, or update dsllm") from error
    _check_names(path, manifest)
    _check_numbers(path, manifest)
    return manifest


def _check_checksum(path: Path, content: bytes) -> None:
    """Compare a manifest with the checksum next to it, if there is one.

    Raises:
        DataError: they differ, or the checksum cannot be read.
    """
    checksum = path.with_name(CHECKSUM_FILE)
    try:
        recorded = read_bounded(checksum, 1000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{checksum}: cannot be read: {error.strerror}") from error
    except UntrustedFileError as error:
        raise DataError(f"{checksum}: {error}") from error
    if recorded != _checksum_line(content):
        raise DataError(
            f"{path}: damaged or altered: its SHA-256 is not the one in {CHECKSUM_FILE}. Copy both files again, or prepare the "
            f"data again; if you have changed the manifest on purpose, remove {CHECKSUM_FILE}"
        )


def _checksum_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {FILE_NAME}\n".encode()


def _check_names(path: Path, manifest: Manifest) -> None:
    """Refuse relative names that lead out of the manifest's folder, and a tokenizer outside it."""
    outside = []
    for name in [record.prefix for record in manifest.records()] + [manifest.tokenizer.directory]:
        # Shards that are used in place have absolute names.
        relative = name.lstrip("/") if name != manifest.tokenizer.directory else name
        try:
            inside(path.parent, relative)
        except UntrustedFileError:
            outside.append(name)
    if outside:
        names = ", ".join(repr(name) for name in outside[:8])
        raise DataError(f"{path}: names files outside its folder ({names}): damaged or altered, prepare the data again")


def _check_numbers(path: Path, manifest: Manifest) -> None:
    """Refuse counts that cannot be.

    Raises:
        DataError: names the first.
    """
    tokenizer = manifest.tokenizer
    wrong = []
    if not 0 <= tokenizer.end_of_text_id < tokenizer.vocab_size <= MOST_VOCABULARY:
        wrong.append(f"tokenizer: end_of_text_id {tokenizer.end_of_text_id} of vocab_size {tokenizer.vocab_size}")
    names = [source.name for source in manifest.sources]
    if len(set(names)) != len(names) or not names:
        wrong.append(f"sources: {names}")
    for record in manifest.records():
        counts = (record.first_token, record.num_tokens, record.num_documents, record.text_bytes or 0, record.bin_bytes)
        if min(counts) < 0 or record.first_token + record.num_tokens > record.bin_bytes:
            wrong.append(f"{record.prefix}: {record}")
    if wrong:
        raise DataError(f"{path}: damaged: {wrong[0]} cannot be: prepare the data again")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish a prepared directory. Write the manifest last, when everything it names is on the disk.

    Raises:
        DataError: it could not be written.
    """
    path, content = directory / FILE_NAME, _ADAPTER.dump_json(manifest, indent=1) + b"\n"
    try:
        files.write_atomically(directory / CHECKSUM_FILE, _checksum_line(content))
        files.write_atomically(path, content)
    except OSError as error:
        raise DataError(f"{path}: could not be written: {error.strerror}") from error


def wait_for_manifest(directory: Path, settings: dict[str, Any], seconds: float) -> Manifest:
    """Wait until another rank has prepared the directory with these settings.

    Raises:
        DataError: the time is over; says whether the directory has no manifest, or one of other settings.
    """
    deadline = time.monotonic() + seconds
    expected = hash_of(settings)
    while True:
        present = (directory / FILE_NAME).exists()
        if present and (manifest := load_manifest(directory)).settings_sha256 == expected:
            return manifest
        if time.monotonic() >= deadline:
            found = "was prepared with other settings" if present else "has no manifest.json"
            raise DataError(
                f"{directory}: after {seconds:.0f} s it still {found}. Rank 0 prepares the data while the others wait: "
                "see its log, check that all hosts share this directory, or run `dsllm prepare CONFIG` beforehand"
            )
        time.sleep(POLL_SECONDS)


def check_shards(directory: Path, manifest: Manifest, rank: int = 0, num_ranks: int = 1) -> None:
    """Compare this rank's share of the shards with the manifest: sizes and headers, 46 bytes each.

    The ranks' shares together are all shards, so a run on many ranks opens each file once, not once per rank. Only the rank
    that finds a problem raises: the caller must share the outcome with the other ranks.

    Raises:
        DataError: with one line for each shard that is missing, damaged or not the one in the manifest.
    """
    by_prefix: dict[str, list[ShardRecord]] = {}
    for record in manifest.records():
        by_prefix.setdefault(record.prefix, []).append(record)
    problems: list[str] = []
    for prefix in list(by_prefix)[rank::num_ranks]:
        # Shards outside the folder may have another type than those prepared here.
        dtype = None if Path(prefix).is_absolute() else manifest.dtype
        problems += _problems(directory / prefix, by_prefix[prefix], dtype)
    if problems:
        raise DataError("\n".join(problems))


def _problems(prefix: Path, records: list[ShardRecord], dtype: str | None) -> Iterator[str]:
    """Differences between a shard and its records. A shard has a record for each split that uses a part of it."""
    try:
        shard = Shard(prefix)
    except DataError as error:
        yield str(error)
        return
    found = (shard.bin_bytes, shard.index_bytes)
    expected = (records[0].bin_bytes, records[0].idx_bytes)
    if found != expected:
        yield f"{prefix}: .bin and .idx have {found} bytes, the manifest says {expected}: not the shard that was prepared"
    if dtype is not None and shard.dtype.name != dtype:
        yield f"{prefix}: ids of type {shard.dtype.name}, the manifest says {dtype}: not the shard that was prepared"
    end = max(record.first_token + record.num_tokens for record in records)
    if end > shard.num_tokens:
        yield f"{prefix}: {shard.num_tokens} tokens, but the manifest uses it up to token {end}"


def check_tokenizer(directory: Path, manifest: Manifest) -> None:
    """Check that the tokenizer is the one that made the shards.

    Raises:
        DataError: it is missing, or its files differ.
    """
    folder = directory / manifest.tokenizer.directory
    found = hash_of_tokenizer(folder)
    if found != manifest.tokenizer.sha256:
        raise DataError(
            f"{folder}: this tokenizer does not match the shards (its SHA-256 is {found[:12]}, that of the "
            f"tokenizer that made them {manifest.tokenizer.sha256[:12]}): put the tokenizer back, or prepare the data again"
        )
