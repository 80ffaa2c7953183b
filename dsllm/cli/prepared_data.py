"""The prepared data of a run: checked, or prepared by rank 0 while the other ranks wait."""

import dataclasses
from pathlib import Path

from dsllm.cli.terminal import Terminal
from dsllm.config.run import RunConfig
from dsllm.data.manifest import (
    FILE_NAME,
    Manifest,
    check_tokenizer,
    hash_of,
    load_manifest,
    settings_of,
    wait_for_manifest,
)
from dsllm.engine.processes.ranks import Ranks
from dsllm.errors import ConfigError, DataError
from dsllm.prepare.document import shown
from dsllm.prepare.settings import EMBEDDED_CORPUS, other_settings, reads_default_corpus

PREPARE_SECONDS = 7 * 24 * 3600
"""How long the other ranks wait for rank 0 to prepare the data; a launcher ends them sooner if it fails."""


def is_prepared(config: RunConfig) -> bool:
    """Whether there is prepared data; it may turn out to be the wrong one.

    Raises:
        DataError: the folder cannot be searched.
    """
    path = Path(config.data.directory or "") / FILE_NAME
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.directory {shown(config.data.directory)}: cannot be looked into: {reason}") from error
    return True


def prepared_data(config: RunConfig, ranks: Ranks) -> Manifest:
    """The manifest of the run's token shards. Rank 0 prepares data that is not prepared yet, the others wait.

    Raises:
        DataError: prepared from other settings, or with another tokenizer.
    """
    directory, settings = Path(config.data.directory or ""), settings_of(config)
    report = Terminal(speaks=ranks.rank == 0)
    if is_prepared(config):
        manifest = load_manifest(directory)
        if manifest.settings_sha256 != hash_of(settings):
            raise other_settings(directory, manifest, settings)
        if reads_default_corpus(config.data):
            report(EMBEDDED_CORPUS)
    elif ranks.rank == 0:
        from dsllm.prepare.pipeline import prepare

        report(f"{directory} is not prepared yet: preparing it now")
        manifest = prepare(config, directory, report)
    else:
        manifest = wait_for_manifest(directory, settings, PREPARE_SECONDS)
    check_tokenizer(directory, manifest)
    return manifest


def with_vocabulary(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The run with model.vocab_size resolved.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
    """
    needed, size = manifest.tokenizer.vocab_size, config.model.vocab_size
    if size is not None and size < needed:
        source = config.model.init_from
        advice = (
            "leave it out, or make it at least as large"
            if source is None
            else f"train with the tokenizer that {source} was trained with (tokenizer.kind: pretrained, and its tokenizer.path)"
        )
        raise ConfigError(
            f"model.vocab_size {size} is smaller than the {needed} ids of the tokenizer in {config.data.directory}: {advice}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size or needed))
