"""What a run would be refused for, as far as it can be known before anything starts; reads only, and loads no torch."""

import os
from collections.abc import Iterator
from glob import iglob
from pathlib import Path

from dsllm.checkpoint.find import list_checkpoints
from dsllm.config.check import kernels_problem
from dsllm.config.compare import belongs_to_another_run, differences, refusal
from dsllm.config.load import run_from_dict
from dsllm.config.run import RunConfig
from dsllm.config.yaml_file import read_yaml
from dsllm.data.manifest import Manifest, settings_of
from dsllm.data.tokenizer_files import load_tokenizer
from dsllm.errors import CheckpointError, ConfigError, RunError
from dsllm.prepare.workspace import check_replaceable, prepared_before
from dsllm.run_directory import CHECKPOINTS, RUN_FILE, read_status, refuse_live_run

_NO_PLACE_FOR_FILES = ("/proc", "/sys")
"""Trees that root may write into, and in which nobody can create a folder."""


def prepared_data_of(config: RunConfig) -> Manifest | None:
    """The manifest of the run's data; None: it is not prepared yet.

    Raises:
        DataError: it was prepared with other settings, or its manifest is damaged.
    """
    return prepared_before(Path(config.data.directory or ""), settings_of(config))


def vocabulary_of(config: RunConfig, manifest: Manifest | None) -> tuple[int, str]:
    """The size of the vocabulary that the run will have, and where it is known from.

    Args:
        manifest: of the run's data (`prepared_data_of`)

    Raises:
        ConfigError: the tokenizer has more ids than the model.
        DataError: the tokenizer is not there.
    """
    directory, tokenizer, given = config.data.directory, config.tokenizer, config.model.vocab_size
    if manifest is not None:
        needed, of = manifest.tokenizer.vocab_size, f"the tokenizer in {directory}"
        origin = f"vocabulary of {directory}"
    elif tokenizer.kind == "pretrained":
        needed = load_tokenizer(tokenizer.path or "", tokenizer.end_of_text).vocab_size
        of, origin = str(tokenizer.path), f"vocabulary of {tokenizer.path}"
    else:
        needed, of = tokenizer.vocab_size, "tokenizer.vocab_size"
        origin = "vocabulary as it will be trained; the data is not prepared yet"
    is_known = manifest is not None or tokenizer.kind == "pretrained"
    if given is not None and given < needed and (is_known or config.model.init_from is None):
        raise ConfigError(
            f"model.vocab_size {given} is smaller than the {needed} ids of {of}: "
            "leave it out, or make it at least as large"
        )
    if given is not None:
        return given, "vocabulary as given"
    return needed, origin


def saved_run_in(directory: Path) -> RunConfig | None:
    """The run that has trained in a directory; None: there is none, or its record cannot be read here.

    Its precision is the one that was used.
    """
    if not (directory / RUN_FILE).is_file():
        return None
    try:
        return run_from_dict(read_yaml(directory / RUN_FILE)[0], str(directory / RUN_FILE))
    except ConfigError:  # damaged, or of another version: the checkpoints decide, when the run starts
        return None


def check_before_start(config: RunConfig, saved: RunConfig | None, manifest: Manifest | None, device: str) -> None:
    """Refuse what the run would be refused for.

    Args:
        config: precision and vocabulary resolved
        saved: the run that has trained in its directory
        manifest: of the run's data (`prepared_data_of`)
        device: "cpu" or "cuda"

    Raises:
        DsllmError: as the run would raise it.
    """
    if problem := kernels_problem(config.train.kernels, device):
        raise ConfigError(problem)
    if manifest is None:
        check_replaceable(Path(config.data.directory or ""))
        _check_place("data.directory", Path(config.data.directory or ""))
    directory = Path(config.run.directory)
    _check_place("run.directory", directory)
    if saved is not None:
        _check_saved(config, saved, directory)


def _check_place(field: str, directory: Path) -> None:
    """Refuse a folder that is no folder, or cannot be created."""
    try:
        os.lstat(directory)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, for example
        raise RunError(f"{field} {str(directory)[:200]}: cannot be used: {error.strerror}") from error
    place = next(p for p in (directory, *directory.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(place):
        raise RunError(f"{field} {directory}: {place} is not a folder: name another one")
    real = Path(os.path.realpath(place))
    if not os.access(place, os.W_OK | os.X_OK) or any(real.is_relative_to(p) for p in _NO_PLACE_FOR_FILES):
        raise RunError(f"{field} {directory}: cannot be written: nothing can be created in {place}")


def _check_saved(config: RunConfig, saved: RunConfig, directory: Path) -> None:
    found = list_checkpoints(directory / CHECKPOINTS)
    if not found:
        if saved.run.name != config.run.name:
            raise RunError(belongs_to_another_run(directory, saved.run.name, config.run.name))
        return
    refused = [difference for difference in differences(saved, config) if not difference.changeable]
    if refused:
        raise CheckpointError(refusal(refused, found[0]))


def notes_before_start(config: RunConfig, manifest: Manifest | None) -> Iterator[str]:
    """What may have changed by the time the run starts, or be different where it starts.

    Args:
        manifest: of the run's data (`prepared_data_of`)
    """
    directory = Path(config.run.directory)
    try:
        refuse_live_run(directory)
        status = read_status(directory)
    except RunError as error:
        yield f"refused now: {error}"
        status = {}
    step = status.get("step")
    if status.get("state") == "finished" and isinstance(step, int) and step >= config.num_steps:
        yield f"{directory} has a finished run of {status.get('tokens', 0)} tokens: raise train.total_tokens to continue it"
    if manifest is not None:
        return
    size, trained = config.model.vocab_size, config.tokenizer.kind != "pretrained"
    if trained and size is not None and size < config.tokenizer.vocab_size:
        yield (
            f"tokenizer.vocab_size: {config.tokenizer.vocab_size} ids will be trained, and model.init_from has {size}: "
            "train with that model's tokenizer (tokenizer.kind: pretrained, and its tokenizer.path)"
        )
    for source in config.data.sources:
        for pattern in source.paths if source.kind == "files" else ():
            if not os.path.lexists(pattern) and next(iglob(pattern, recursive=True), None) is None:
                yield f"source '{source.name}': {pattern} is not here, so the data could not be prepared on this machine"
