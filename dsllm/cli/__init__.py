"""The command table: `dsllm COMMAND ...` loads that command alone, so that help needs neither torch nor DeepSpeed."""

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsllm import __version__
from dsllm.errors import EXIT_USAGE, DsllmError

COMMANDS = {
    "prepare": "sources -> documents -> tokenizer -> token shards, with a data card",
    "train": "pretrain a model; started by python, deepspeed, torchrun, srun or mpirun",
    "launch": "start a run on a cluster: deepspeed, SLURM, MPI, torchrun, or this machine",
    "evaluate": "loss, perplexity and bits per byte on held-out text",
    "generate": "continue a prompt",
    "export": "write a Hugging Face folder",
    "doctor": "check machines, network and installation on every rank; with --parity the numbers",
}

HELP = f"""dsllm {__version__}: pretrain decoder-only language models with DeepSpeed

usage: dsllm COMMAND ...

{chr(10).join(f"  {name:10} {text}" for name, text in COMMANDS.items())}

`dsllm COMMAND --help` tells more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        with contextlib.suppress(BrokenPipeError):  # `dsllm --help | head`
            print(HELP, flush=True)
        return 0 if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"dsllm: unknown command '{words[0]}'; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(words[0], words[1:])


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    Once torch is loaded, not by way of the interpreter's own end: threads of gloo's that outlive their group then drop
    tensors, and about one rank in fifty dies of it after a run that went well ("terminate called without an active
    exception").
    """
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(code)
    sys.exit(code)


def entry() -> NoReturn:
    """The `dsllm` command."""
    leave(main())


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Load a command and run it; what the user can mend is told in words, the rest keeps its traceback."""
    try:
        return int(importlib.import_module(f"dsllm.cli.{name}").main(list(arguments)))
    except DsllmError as error:
        print(f"dsllm {name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
