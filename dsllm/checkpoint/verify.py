"""Verifies the files of a checkpoint by size and SHA-256."""

import hashlib
import re
from pathlib import Path

from dsllm.checkpoint.manifest import FileRecord, What
from dsllm.checkpoint.read_manifest import UnavailableCheckpointError, read_manifest, unreadable
from dsllm.errors import CheckpointError
from dsllm.untrusted_files import UntrustedFileError, check_regular


def damage_in(folder: Path, rank: int = 0, num_ranks: int = 1, what: What = "all") -> str | None:
    """What is wrong with a checkpoint's files; None: nothing.

    Args:
        rank: the files are divided among `num_ranks` ranks: each reads its part, and the caller joins the answers
        what: "weights" reads 4 bytes per parameter, "all" the optimizer's state too

    Raises:
        UnavailableCheckpointError: it may be sound, but a newer dsllm wrote it, or this user may not read it.
    """
    try:
        manifest = read_manifest(folder)
        _check_name(folder, manifest.progress["step"])
        for file in manifest.files(what)[rank::num_ranks]:
            _check_file(folder / file.name, file)
    except UnavailableCheckpointError:
        raise
    except CheckpointError as error:
        return str(error)
    return None


def _check_name(folder: Path, step: int) -> None:
    """Refuse a checkpoint under the name of another step: a run would continue from the wrong one of its checkpoints.

    Raises:
        CheckpointError: the name is that of another step.
    """
    named = re.fullmatch(r"step-(\d+)", folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{folder}: contains step {step:,}, its name is that of another step")


def _check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record.

    Raises:
        CheckpointError: it differs, or cannot be read.
    """
    try:
        size = check_regular(path)
        if size != record.num_bytes:
            raise CheckpointError(f"{path}: has {size} bytes, the manifest says {record.num_bytes}")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
    except UntrustedFileError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if digest != record.sha256:
        raise CheckpointError(f"{path}: its SHA-256 is not the one in the manifest: the file is damaged")
