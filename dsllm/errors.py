"""Errors that a user can solve, by name. Any other exception is a bug in dsllm and keeps its traceback."""

import importlib
from collections.abc import Sequence
from typing import Any

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_FORCED = 130  # Ctrl-C, in a run the second one: ended at once, nothing saved
EXIT_INTERRUPTED = 75  # "saved, start me again" (EX_TEMPFAIL of sysexits.h)


class DsllmError(Exception):
    """A problem that the user can solve: the message names the field or file, the value, why, and what to do."""

    exit_code = EXIT_FAILED


class ConfigError(DsllmError):
    """The run as written cannot work. Reports all problems at once."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Sequence[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems:\n"
        super().__init__(head + "\n".join(f"- {p}" if count > 1 else p for p in self.problems))


class DataError(DsllmError):
    """A source, a tokenizer or a token shard is missing, damaged or does not fit."""


class CheckpointError(DsllmError):
    """A checkpoint is missing, damaged, belongs to another run, or could not be written."""


class LaunchError(DsllmError):
    """The processes of a run do not match: ranks, hosts, devices, process groups."""


class RunError(DsllmError):
    """A run directory cannot be used: another process trains in it, not all hosts see it, or its format is another one."""


class OutputError(DsllmError):
    """A result that the user requested cannot be written."""


class MissingExtra(DsllmError):
    """An optional library is not installed."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop before the first step; the message is the reason. No error: nothing catches it."""


def require(module: str, extra: str | None = None) -> Any:
    """Import a library when it is first needed, or name the extra that installs it.

    Args:
        extra: None (default): the library is a dependency of dsllm itself, loaded late because that is slow.
    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = f"dsllm[{extra}]" if extra else "dsllm"
        raise MissingExtra(f"this needs '{module}' ({error}): pip install '{package}'") from error
