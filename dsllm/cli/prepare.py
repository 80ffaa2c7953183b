"""dsllm prepare: text to tokenizer, token shards and data card."""

import argparse
import json
import sys
from pathlib import Path

from dsllm.cli.output import Report, add_json_option, json_report
from dsllm.cli.words import RunWords, add_run_words, parse_run_words
from dsllm.errors import EXIT_INTERRUPTED


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: the config, a source or the tokenizer cannot be used.
    """
    options = _parse(arguments)
    with json_report(options.json) as report:
        return _run(parse_run_words(options.words), options.force, report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm prepare",
        description="Turn a run's sources into a tokenizer, token shards and a data card, in data.directory.",
    )
    add_run_words(parser)
    parser.add_argument("--force", action="store_true", help="prepare again, replacing the content of data.directory")
    add_json_option(parser, "the data card")
    return parser.parse_intermixed_args(arguments)


def _run(words: RunWords, force: bool, report: Report) -> int:
    from rich.console import Console

    from dsllm.cli.prepare_report import drawing, printing, progress_bars, show_card
    from dsllm.config.load import load_run
    from dsllm.prepare.pipeline import prepare
    from dsllm.prepare.workspace import CARD_FILE

    config = load_run(words.file, words.overrides)
    directory = Path(config.data.directory or f"data/{config.run.name}")
    console = Console()
    try:
        with progress_bars(console) as bars:
            prepare(config, directory, printing(console), drawing(bars), force)
    except KeyboardInterrupt:
        print("interrupted: start the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    card = json.loads((directory / CARD_FILE).read_text(encoding="utf-8"))
    show_card(card, console)
    printing(console)(f"Prepared in {directory}; all figures in {directory / CARD_FILE}")
    report({**card, "directory": str(directory)})
    return 0
