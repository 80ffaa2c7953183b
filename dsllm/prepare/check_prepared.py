"""Checks data that is prepared already: every shard is read, and compared with what was written."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from dsllm.byte_units import MEGABYTE
from dsllm.data.manifest import Manifest, check_shards, check_tokenizer
from dsllm.data.shards import Shard
from dsllm.data.verify import check_content, hashed_shards
from dsllm.errors import DataError
from dsllm.prepare.reading import Progress


def check_prepared(directory: Path, manifest: Manifest, progress: Progress) -> None:
    """Check sizes, headers, content and documents of the shards, and the tokenizer.

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

    checks = [
        partial(check_tokenizer, directory, manifest),
        partial(check_shards, directory, manifest),
        partial(check_content, directory, shards, count),
        *(
            partial(_check_documents, directory / prefix)
            for prefix in {record.prefix: 0 for record in manifest.records()}
        ),
    ]
    problems = list(dict.fromkeys(_problems(checks)))
    if problems:
        raise DataError(
            f"{directory} was prepared with these settings, but is damaged:\n  " + "\n  ".join(problems) + "\n"
            "Put back copies of these files, or run `dsllm prepare CONFIG --force`: unchanged sources give the same files, and "
            "runs on them continue"
        )


def _check_documents(prefix: Path) -> None:
    """The .idx has no hash of its own, but every entry of it follows from the others."""
    Shard(prefix).check_index()


def _problems(checks: Iterable[partial[None]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except DataError as error:
            yield from str(error).splitlines()
