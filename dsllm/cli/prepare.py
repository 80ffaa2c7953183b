"""dsllm prepare: text to tokenizer, token shards and data card."""

import argparse
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
    from dsllm.prepare.interrupt import interrupted_by_signals

    try:
        with interrupted_by_signals():  # from here on: loading the libraries takes seconds on a busy machine
            _prepare(words, force, report)
    except KeyboardInterrupt:
        print("interrupted: start the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _prepare(words: RunWords, force: bool, report: Report) -> None:
    from dsllm.cli.prepare_report import PatientConsole, drawing, lines_of_card, printing, progress_bars
    from dsllm.config.load import load_run
    from dsllm.prepare.card import not_a_card, read_card
    from dsllm.prepare.pipeline import prepare
    from dsllm.prepare.workspace import CARD_FILE

    config = load_run(words.file, words.overrides)
    directory = Path(config.data.directory or f"data/{config.run.name}")
    console = PatientConsole()
    with progress_bars(console) as bars:
        prepare(config, directory, printing(console), drawing(bars), force)
    card = read_card(directory)
    try:
        parts = lines_of_card(card)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise not_a_card(directory, repr(error)) from error
    for part in parts:
        printing(console)(part)
    printing(console)(f"Prepared in {directory}; all figures in {directory / CARD_FILE}")
    report({**card, "directory": str(directory)})
