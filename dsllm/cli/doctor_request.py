"""What dsllm doctor checks beyond the machines: the folders of a run, and what the run needs."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from dsllm import counts
from dsllm.cli.dry_run import with_some_vocabulary
from dsllm.cli.words import RunWords
from dsllm.config.run import RunConfig
from dsllm.doctor.disks import Folder
from dsllm.doctor.local_checks import Request
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.parameters import parameter_table
from dsllm.session.run_file import load_run


def make_request(words: RunWords, timeout_minutes: float) -> Request:
    """The folders and needs of the run that the command line names; without a run, the working directory.

    Raises:
        ConfigError: the run as written cannot work.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if words == RunWords():
        return Request(folders=(Folder(role="run", path="."),), timeout=timeout)
    config = load_run(words.file, words.overrides)
    given = read_deepspeed_json(config.deepspeed, yaml_folder=Path(words.file).parent if words.file else None)
    nvme = _nvme_folders(given)
    return Request(
        folders=(*_folders_of(config), *nvme),
        operators=frozenset(("async_io", "pin_memory") if nvme else ()),
        timeout=timeout,
        bind_cores=config.train.bind_cores,
    )


def _folders_of(config: RunConfig) -> tuple[Folder, Folder]:
    counted, _ = with_some_vocabulary(config)
    run = Folder(
        role="run",
        path=config.run.directory,
        needed_bytes=counts.checkpoint_bytes(parameter_table(counted.model, counted.context_length)),
        num_kept=config.checkpoint.keep_last,
    )
    return run, Folder(role="data", path=config.data.directory or "")


def _nvme_folders(given: Mapping[str, Any]) -> tuple[Folder, ...]:
    """The folders that the DeepSpeed JSON offloads to."""
    zero = given.get("zero_optimization", {})
    blocks = [zero.get(key, {}) for key in ("offload_optimizer", "offload_param")]
    paths = {str(b["nvme_path"]) for b in blocks if b.get("device") == "nvme" and "nvme_path" in b}
    return tuple(Folder(role="nvme", path=path) for path in sorted(paths))
