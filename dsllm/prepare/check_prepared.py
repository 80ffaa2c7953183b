"""Checks data that is prepared already: every shard is read, and compared with what was written."""

from pathlib import Path

from dsllm.data.manifest import Manifest, check_shards, check_tokenizer
from dsllm.data.verify import MEGABYTE, check_content, hashed_shards
from dsllm.errors import DataError
from dsllm.prepare.reading import Progress


def check_prepared(directory: Path, manifest: Manifest, progress: Progress) -> None:
    """Check sizes, headers and content of the shards, and the tokenizer.

    Args:
        progress: called often with the activity and the megabytes read

    Raises:
        DataError: names each file that is missing or differs, and how to repair it.
    """
    shards = hashed_shards(manifest)
    total, read = sum(shard.num_bytes for shard in shards) / MEGABYTE, 0.0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes / MEGABYTE
        progress("verifying token shards", read, total)

    problems = []
    for check in (
        lambda: check_tokenizer(directory, manifest),
        lambda: check_shards(directory, manifest),
        lambda: check_content(directory, shards, count),
    ):
        try:
            check()
        except DataError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise DataError(
            f"{directory} was prepared with these settings, but is damaged:\n  " + "\n  ".join(problems) + "\n"
            "Put back copies of these files, or run `dsllm prepare CONFIG --force`: unchanged sources give the same files, and "
            "runs on them continue"
        )
