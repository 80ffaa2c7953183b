"""The command table. `dsllm COMMAND ...` imports that command alone, and --help needs neither torch nor DeepSpeed."""

import atexit
import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dsllm.errors import EXIT_FORCED, EXIT_USAGE, DsllmError
from dsllm.version import __version__

COMMANDS = {
    "prepare": "sources -> documents -> tokenizer -> token shards, with a data card",
    "train": "pretrain a model; started by python, deepspeed, torchrun, srun or mpirun",
    "launch": "start a run on a cluster: deepspeed, SLURM, MPI, torchrun, or this machine",
    "evaluate": "loss, perplexity and bits per byte on held-out text",
    "generate": "continue a prompt",
    "export": "write a Hugging Face folder",
    "doctor": "check machines, network and installation on every rank",
    "parity": "compare this installation's numbers with plain PyTorch",
}

HELP = f"""dsllm {__version__}: pretrain decoder-only language models with DeepSpeed

usage: dsllm COMMAND ...

{chr(10).join(f"  {name:10} {text}" for name, text in COMMANDS.items())}

`dsllm COMMAND --help` explains a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        with contextlib.suppress(BrokenPipeError):  # `dsllm --help | head`
            print(HELP, flush=True)
        return 0 if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        print(f"dsllm: unknown command '{words[0]}'; there are: {', '.join(COMMANDS)}.{guess}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(words[0], words[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code. An error that the user can solve, or Ctrl-C, is one message on standard error."""
    try:
        return _command(name)(list(arguments))
    except DsllmError as error:
        print(f"dsllm {name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_FORCED


def _command(name: str) -> Callable[[list[str]], int]:
    """The function that runs a command; imports the file of that command alone."""
    match name:
        case "prepare":
            from dsllm.cli import prepare

            return prepare.main
        case "train":
            from dsllm.cli import train

            return train.main
        case "launch":
            from dsllm.cli import launch

            return launch.main
        case "evaluate":
            from dsllm.cli import evaluate

            return evaluate.main
        case "generate":
            from dsllm.cli import generate

            return generate.main
        case "export":
            from dsllm.cli import export

            return export.main
        case "doctor":
            from dsllm.cli import doctor

            return doctor.main
        case "parity":
            from dsllm.cli import parity

            return parity.main
    raise AssertionError(f"COMMANDS and this function have the same names, but '{name}' is only in one of them")


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    Once torch is loaded, the interpreter's own end is skipped: gloo's threads may outlive their process group and then
    free tensors, and about one rank in fifty crashes there after a run that went well ("terminate called without an
    active exception").
    """
    if "torch" in sys.modules:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the command is over: a late signal must not change its exit code
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the reader of the pipe has gone
                stream.flush()
        os._exit(code)
    sys.exit(code)


def entry() -> NoReturn:
    """The `dsllm` command."""
    leave(main())
