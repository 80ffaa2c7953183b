"""The entry point of `dsllm doctor` for launchers: deepspeed, torchrun, srun, mpirun or plain python."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without installation

from dsllm.cli import leave, run_command

if __name__ == "__main__":
    leave(run_command("doctor", sys.argv[1:]))
