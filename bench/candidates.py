"""Who is measured, and how each is started: the one list to add to."""

import sys
from pathlib import Path

from turns import Candidate

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
BIN = Path(sys.executable).parent
LITGPT_PYTHON = ROOT / ".venv-litgpt" / "bin" / "python"
RECIPE = "bench/recipes/workload_a.yaml"

BASE = "plain PyTorch, autocast"
"""Each group's first; the others are given as a ratio to it."""
OWN_MODEL = "plain PyTorch loop, dsllm's model"
TRAINER, TRAINER_ZERO = "transformers.Trainer", "transformers.Trainer, DeepSpeed ZeRO-1"


def one_process(folder: Path) -> list[Candidate]:
    """One process with two threads."""
    python = sys.executable
    deepspeed = (str(BIN / "deepspeed"), "--num_gpus", "1", "--master_port", "29610")
    found = [
        Candidate(name=BASE, command=(python, str(PEERS / "plain.py"))),
        Candidate(name=OWN_MODEL, command=(python, str(PEERS / "plain.py"), "--model", "dsllm")),
        Candidate(name=TRAINER, command=(python, str(PEERS / "trainer.py"))),
        Candidate(name=TRAINER_ZERO, command=(*deepspeed, str(PEERS / "trainer.py"), "--zero", "1")),
        Candidate(name="litgpt, compiled", command=(str(LITGPT_PYTHON), str(PEERS / "litgpt_loop.py"))),
    ]
    for stage in range(4):
        program = (python, "launch/pretrain.py", *dsllm_arguments(folder, stage, 4))
        found.append(Candidate(name=f"dsllm, ZeRO-{stage}", command=program))
    return found


def two_ranks(folder: Path) -> list[Candidate]:
    """Two ranks with one thread each, over gloo."""
    torchrun = (str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port")
    deepspeed = (str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port")
    commands = {
        BASE: (*torchrun, "29620", str(PEERS / "plain.py")),
        OWN_MODEL: (*torchrun, "29621", str(PEERS / "plain.py"), "--model", "dsllm"),
        TRAINER: (*torchrun, "29622", str(PEERS / "trainer.py")),
        TRAINER_ZERO: (*deepspeed, "29623", str(PEERS / "trainer.py"), "--zero", "1"),
    }
    for stage in range(4):
        program = (*deepspeed, str(29630 + stage), "launch/pretrain.py", *dsllm_arguments(folder, stage, 2))
        commands[f"dsllm, ZeRO-{stage}"] = program
    return [Candidate(name=name, command=words, num_ranks=2, threads_per_rank=1) for name, words in commands.items()]


def dsllm_arguments(folder: Path, stage: int, micro_batch_sequences: int) -> tuple[str, ...]:
    """The run of workload (a); `folder` is new for each start, so that nothing is resumed."""
    return (
        "--config",
        RECIPE,
        f"deepspeed=ds_configs/zero{stage}.json",
        f"train.micro_batch_sequences={micro_batch_sequences}",
        f"run.directory={folder}/zero{stage}-{micro_batch_sequences}",
    )


GROUPS = {"one process x 2 threads": one_process, "2 ranks x 1 thread": two_ranks}
