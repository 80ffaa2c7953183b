"""dsllm train, and launch/pretrain.py: checks the run and its data, opens the session, and hands it to the loop."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsllm.cli.output import add_json_option, json_report
from dsllm.cli.words import add_run_words, parse_run_words

if TYPE_CHECKING:
    from dsllm.config.run import RunConfig
    from dsllm.engine.build import Engine
    from dsllm.engine.processes.ranks import Ranks
    from dsllm.session.open import Session
    from dsllm.train.interrupt import Stop


def main(arguments: Sequence[str]) -> int:
    """`dsllm train [RUN.yaml] [key=value ...] [--dry-run | --profile [FIRST:LAST]]`; exit code 0: trained, 75: stopped.

    Raises:
        DsllmError: the run, its data, this machine or the ranks of the job do not fit together; or the run failed.
    """
    options = _parse(arguments)
    if options.dry_run:
        return _run(options, None)
    from dsllm.cli.terminal import Terminal
    from dsllm.train.interrupt import stop_signals

    # from here on: what is imported below takes seconds
    with stop_signals(Terminal(speaks=os.environ.get("RANK", "0") == "0")) as stop:
        return _run(options, stop)


def _run(options: argparse.Namespace, stop: "Stop | None") -> int:
    """The command proper.

    Args:
        stop: None: a dry run
    """
    from dsllm.cli.terminal import Terminal
    from dsllm.engine.processes.ranks import discover_ranks
    from dsllm.engine.settings.json_file import read_deepspeed_json
    from dsllm.session.run_file import load_run

    words = parse_run_words(options.words, *([options.config] if options.config else []))
    overrides = [*words.overrides, *([f"train.device={options.device}"] if options.device else [])]
    config, ranks = load_run(words.file, overrides), discover_ranks()
    if config.train.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch and DeepSpeed look for a GPU
    given = read_deepspeed_json(config.deepspeed, yaml_folder=Path(words.file).parent if words.file else None)
    with json_report(options.json, writes=ranks.rank == 0) as write_json:
        if stop is None:
            from dsllm.cli.dry_run import show

            write_json(show(config, given, options.world_size or ranks.world_size, options.brief))
            return 0
        stop.report = Terminal(speaks=ranks.rank == 0)
        code = _train_or_stop(config, given, ranks, stop, options.profile)
        if ranks.rank == 0:
            write_json(_result(config, code))
    return code


def _train_or_stop(
    config: "RunConfig", given: Mapping[str, Any], ranks: "Ranks", stop: "Stop", profile_steps: str | None
) -> int:
    """Train; the exit code, also of a run that was stopped before its first step."""
    from dsllm.errors import EXIT_INTERRUPTED, Interrupted

    try:
        return _train(config, given, ranks, stop, profile_steps)
    except Interrupted as error:
        stop.raise_at_once(False)
        from dsllm.cli.terminal import Terminal
        from dsllm.run_directory import state_interrupted

        if ranks.rank == 0:
            state_interrupted(Path(config.run.directory), str(error))
        Terminal(speaks=ranks.rank == 0)(
            f"{error}: stopped before the first step, nothing was saved; the same command starts again"
        )
        return EXIT_INTERRUPTED


def _train(
    config: "RunConfig", given: Mapping[str, Any], ranks: "Ranks", stop: "Stop", profile_steps: str | None
) -> int:
    """Prepare the data if need be, open the run's session, and train; the exit code."""
    alone = ranks.world_size == 1  # other ranks must be agreed with
    stop.raise_at_once(alone)
    from dsllm.cli.prepared_data import is_prepared, prepared_data, with_vocabulary
    from dsllm.cli.terminal import Terminal
    from dsllm.config.advice import advice_on
    from dsllm.engine.settings.final_config import gradient_accumulation
    from dsllm.mesh import make_mesh
    from dsllm.session.open import Caller, FinishedRun, open_session
    from dsllm.train.loop import train
    from dsllm.train.profile import check_profile_steps

    # before data is prepared, which may take hours
    gradient_accumulation(config, make_mesh(config.parallel, ranks.world_size).data)
    if not is_prepared(config):
        stop.raise_at_once(True)  # preparing may take hours, and the ranks have not met: there is nobody to agree with
    manifest = prepared_data(config, ranks)
    stop.raise_at_once(alone)
    config, report = with_vocabulary(config, manifest), Terminal(speaks=ranks.rank == 0)
    for advice in advice_on(config):
        report(f"warning: {advice}")
    check = check_profile_steps(profile_steps, config.num_steps)
    caller = Caller(report=report, preflight=check, why_stop=stop.why)
    with open_session(config, given, manifest, ranks, caller) as session:
        if isinstance(session, FinishedRun):
            report(
                f"{session.directory} is finished: {session.progress.tokens:,} tokens. Raise train.total_tokens to continue"
            )
            return 0
        return train(session, _validation(session), stop, profile_steps)


def _validation(session: "Session") -> Callable[["Engine"], Mapping[str, float]]:
    """The function with which the loop measures the held-out loss."""
    from dsllm.data.validation import ValidationBatches
    from dsllm.evaluate.perplexity import validation_loss

    config, world = session.config, session.world
    if not any(source.validation for source in session.manifest.sources):
        return lambda engine: {}
    held_out = ValidationBatches(
        Path(config.data.directory or ""),
        session.manifest,
        sequence_length=config.data.sequence_length,
        micro_batch_sequences=config.train.micro_batch_sequences,
        data_rank=world.data_rank,
        data_size=world.data_size,
        max_sequences=config.train.validation_sequences or None,
        document_mask=config.data.document_mask,
    )

    def validate(engine: "Engine") -> Mapping[str, float]:
        engine.deepspeed.eval()
        try:
            result = validation_loss(engine.deepspeed, held_out, world.device, world.sum)
        finally:
            engine.deepspeed.train()
        measured = {"validation_loss": result.loss}
        if result.bits_per_byte is not None:
            measured["validation_bits_per_byte"] = result.bits_per_byte
        return measured

    return validate


def _result(config: "RunConfig", code: int) -> dict[str, Any]:
    """What --json gets: the exit code, and what status.json says."""
    from dsllm.run_directory import status_or_nothing

    status = status_or_nothing(Path(config.run.directory), lambda text: None)
    kept = ("state", "step", "tokens", "attempt")
    return {"exit_code": code, "run_directory": config.run.directory} | {k: status[k] for k in kept if k in status}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm train",
        description="Pretrain a model. Under a launcher: deepspeed launch/pretrain.py --config CONFIG ...",
    )
    add_run_words(parser)
    parser.add_argument("--config", help="the run's YAML file; default: the embedded recipe")
    parser.add_argument("--dry-run", action="store_true", help="show the resolved run, memory and steps; start nothing")
    parser.add_argument("--brief", action="store_true", help="with --dry-run: only the summary")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="train.device; with --dry-run: the device to plan for"
    )
    parser.add_argument("--world-size", type=_positive, help="with --dry-run: number of ranks to show it for")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FIRST:LAST",
        help="trace these steps into RUN/profile/ and list what took longest; without a value: three after a warm-up",
    )
    add_json_option(parser, "the exit code, the run's state, its steps and tokens (with --dry-run: what is shown)")
    # deepspeed's launcher adds it
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(list(arguments))
    if options.profile and options.profile.strip("0123456789:"):  # the word after a bare --profile is another argument
        options.words, options.profile = [options.profile, *options.words], ""
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) == int(text):
        raise argparse.ArgumentTypeError(f"'{text[:50]}' is not a number of ranks")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
