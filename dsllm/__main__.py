"""Runs the command line: python -m dsllm COMMAND."""

import sys

from dsllm.cli import main

sys.exit(main())
