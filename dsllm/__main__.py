"""Runs the command line: python -m dsllm COMMAND."""

from dsllm.cli import entry

entry()
