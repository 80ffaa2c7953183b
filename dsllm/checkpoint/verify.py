"""Verifies the files of a checkpoint by size and SHA-256."""

import hashlib
from pathlib import Path

from dsllm.checkpoint.manifest import FileRecord, What, read_manifest
from dsllm.errors import CheckpointError


def damage_in(folder: Path, rank: int = 0, num_ranks: int = 1, what: What = "all") -> str | None:
    """What is wrong with a checkpoint's files; None: nothing.

    Args:
        rank: the files are divided among `num_ranks` ranks: each reads its part, and the caller joins the answers
        what: "weights" reads 4 bytes per parameter, "all" the optimizer's state too
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    answers = (_damage_in_file(folder, file) for file in manifest.files(what)[rank::num_ranks])
    return next((answer for answer in answers if answer), None)


def _damage_in_file(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.num_bytes:
            return f"{path}: has {size} bytes, the manifest says {record.num_bytes}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    if digest == record.sha256:
        return None
    return f"{path}: its SHA-256 is not the one in the manifest: the file is damaged"
