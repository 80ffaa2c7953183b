"""dsllm train, and launch/pretrain.py: checks the run and its data before anything is started, then trains."""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dsllm.cli.terminal import Terminal
from dsllm.config.load import load_run
from dsllm.config.run import RunConfig
from dsllm.data.manifest import (
    Manifest,
    check_tokenizer,
    hash_of,
    load_manifest,
    settings_of,
    wait_for_manifest,
)
from dsllm.engine.processes.ranks import Ranks, discover_ranks
from dsllm.engine.settings.final_config import gradient_accumulation, read_deepspeed_json
from dsllm.errors import ConfigError, DataError

PREPARE_SECONDS = 7 * 24 * 3600
"""How long the other ranks wait for rank 0 to prepare the data; a launcher ends them sooner if it fails."""


def main(arguments: Sequence[str]) -> int:
    """`dsllm train [CONFIG] [key=value ...] [--dry-run | --profile [FIRST:LAST]]`; exit code 0: trained, 75: interrupted."""
    options = _parse(arguments)
    config = load_run(options.config, options.overrides)
    given = read_deepspeed_json(config.deepspeed, beside=options.config and Path(options.config).parent)
    ranks = discover_ranks()
    if options.dry_run:
        # torch and DeepSpeed take seconds to import, and are not needed to look at a run
        return int(
            importlib.import_module("dsllm.cli.dry_run").show(config, given, options.world_size or ranks.world_size)
        )
    gradient_accumulation(config, ranks.world_size)
    manifest = prepared_data(config, ranks)
    config = with_vocabulary(config, manifest)
    return int(importlib.import_module("dsllm.cli.training").run(config, given, manifest, ranks, options.profile))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm train",
        description="Pretrain a model. Under a launcher: deepspeed launch/pretrain.py --config CONFIG ...",
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG | key=value", help="the run's YAML file, and fields to change in it"
    )
    parser.add_argument("--config", help="the run's YAML file; nothing: the embedded recipe")
    parser.add_argument("--dry-run", action="store_true", help="show the resolved run, memory and steps; start nothing")
    parser.add_argument("--world-size", type=int, help="with --dry-run: number of ranks to show it for")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FIRST:LAST",
        help="trace these steps of the run into RUN/profile/ and say what took longest; nothing: three after a warm-up",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it
    options = parser.parse_intermixed_args(list(arguments))
    if options.profile and options.profile.strip("0123456789:"):  # the word after a bare --profile is another argument
        options.words, options.profile = [options.profile, *options.words], ""
    options.overrides = [word for word in options.words if "=" in word]
    files = [word for word in options.words if "=" not in word] + ([options.config] if options.config else [])
    if len(files) > 1:
        raise ConfigError(f"one config file at a time, but there are {len(files)}: {', '.join(files)}")
    options.config = files[0] if files else None
    return options


def prepared_data(config: RunConfig, ranks: Ranks) -> Manifest:
    """The manifest of the run's token shards; data that is not prepared yet is prepared by rank 0, the others wait.

    Raises:
        DataError: prepared from other settings, or with another tokenizer.
    """
    directory, settings = Path(config.data.directory or ""), settings_of(config)
    if (directory / "manifest.json").is_file():
        manifest = load_manifest(directory)
        if manifest.settings_sha256 != hash_of(settings):
            raise DataError(
                f"data.directory {directory}: was prepared from other settings: {_difference(manifest.settings, settings)}; "
                "take the change back, set another data.directory, or run `dsllm prepare CONFIG --force`"
            )
    elif ranks.rank == 0:
        tell = Terminal()
        tell(f"{directory} is not prepared yet: preparing it now")
        prepare = importlib.import_module("dsllm.prepare.pipeline").prepare
        manifest = prepare(config, directory, tell)
    else:
        manifest = wait_for_manifest(directory, settings, PREPARE_SECONDS)
    check_tokenizer(directory, manifest)
    return manifest


def _difference(saved: dict, asked: dict) -> str:
    keys = [key for key in asked if saved.get(key) != asked[key]]
    return "; ".join(f"{key} was {saved.get(key)!r}, now {asked[key]!r}" for key in keys)


def with_vocabulary(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The run with model.vocab_size resolved.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
    """
    needed, asked = manifest.tokenizer.vocab_size, config.model.vocab_size
    if asked is not None and asked < needed:
        raise ConfigError(
            f"model.vocab_size {asked} is smaller than the {needed} ids of the tokenizer in {config.data.directory}: "
            "leave it out, or make it at least as large"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=asked or needed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
