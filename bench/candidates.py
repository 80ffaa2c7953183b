"""What is measured: the command of each candidate, by group, and the ratios that dsllm must reach. Add new candidates here."""

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.turns import Candidate
from bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LITGPT_PYTHON = ROOT / ".venv-litgpt" / "bin" / "python"
"""litgpt and Lightning have an environment of their own."""
RECIPE = "bench/recipes/workload.yaml"

BASE = "plain PyTorch, autocast"
"""The first candidate of each group; the speed of the others is given as a ratio to its speed."""
OWN_MODEL = "plain PyTorch loop, dsllm's model"
DEEPSPEED_ZERO_3 = "DeepSpeed's own bf16, ZeRO-3"
ONE_PROCESS, TWO_RANKS = "a, one process x 2 threads", "a, 2 ranks x 1 thread"
ONE_PROCESS_B = "b, one process x 2 threads"


@dataclass(frozen=True)
class Bar:
    """A ratio of speeds that dsllm must reach in a group."""

    group: str
    candidate: str
    against: str
    at_least: float


BARS = [
    *(Bar(ONE_PROCESS, f"dsllm, ZeRO-{stage}", BASE, ratio) for stage, ratio in enumerate((1.4, 1.4, 1.4, 1.0))),
    Bar(ONE_PROCESS, "dsllm, ZeRO-3", DEEPSPEED_ZERO_3, 1.25),
    *(Bar(TWO_RANKS, f"dsllm, ZeRO-{stage}", BASE, ratio) for stage, ratio in enumerate((1.25, 1.1, 1.05, 0.9))),
    *(Bar(ONE_PROCESS_B, f"dsllm, ZeRO-{stage}", BASE, ratio) for stage, ratio in enumerate((1.4, 1.4, 1.4, 1.0))),
]


def module(name: str, *arguments: str, python: Path | str = sys.executable) -> tuple[str, ...]:
    """The command that runs a module in one process."""
    return (str(python), "-m", name, *arguments)


def torchrun(num_ranks: int, *words: str, python: Path | str = sys.executable) -> tuple[str, ...]:
    """The command that runs a program on several ranks under torchrun, which finds a free port itself."""
    return (str(python), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks), *words)


def deepspeed(num_ranks: int, *words: str) -> tuple[str, ...]:
    """The command that runs a program on several ranks under DeepSpeed's launcher, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return (str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(port), *words)


def dsllm(workload: str, folder: Path, stage: int, num_ranks: int) -> tuple[str, ...]:
    """The words that train a workload with dsllm; `folder` is new for each start, so that no run is resumed."""
    return (
        "launch/pretrain.py",
        "--config",
        RECIPE,
        f"deepspeed=ds_configs/zero{stage}.json",
        f"run.directory={folder}/{workload}-zero{stage}-{num_ranks}",
        *WORKLOADS[workload].dsllm_overrides(num_ranks),
    )


def one_process(folder: Path) -> list[Candidate]:
    """Workload (a): every training loop."""
    commands = {
        BASE: module("bench.peers.plain"),
        OWN_MODEL: module("bench.peers.plain", "--model", "dsllm"),
        "transformers.Trainer": module("bench.peers.trainer"),
        "transformers.Trainer, DeepSpeed ZeRO-1": deepspeed(1, "--module", "bench.peers.trainer", "--zero", "1"),
        "litgpt, compiled": module("bench.peers.litgpt_loop", python=LITGPT_PYTHON),
        "Lightning": module("bench.peers.lightning_loop", python=LITGPT_PYTHON),
        "DeepSpeed's own bf16, ZeRO-1": deepspeed(1, "--module", "bench.peers.deepspeed_loop", "--zero", "1"),
        DEEPSPEED_ZERO_3: deepspeed(1, "--module", "bench.peers.deepspeed_loop", "--zero", "3"),
        **{f"dsllm, ZeRO-{stage}": (sys.executable, *dsllm("a", folder, stage, 1)) for stage in range(4)},
    }
    return [Candidate(name=name, command=words) for name, words in commands.items()]


def compiled(folder: Path) -> list[Candidate]:
    """Workload (a): how much faster torch.compile makes a step, and how much longer the first step takes to come."""
    commands = {
        BASE: module("bench.peers.plain"),
        "plain PyTorch, autocast, compiled": module("bench.peers.plain", "--compile"),
        "litgpt, compiled": module("bench.peers.litgpt_loop", python=LITGPT_PYTHON),
        "dsllm, ZeRO-0": (sys.executable, *dsllm("a", folder, 0, 1)),
        "dsllm, ZeRO-0, compiled": (sys.executable, *dsllm("a", folder / "compiled", 0, 1), "train.compile=true"),
    }
    return [Candidate(name=name, command=words) for name, words in commands.items()]


def two_ranks(folder: Path) -> list[Candidate]:
    """Workload (a) on two ranks, compared with DDP and FSDP2."""
    commands = {
        BASE: torchrun(2, "-m", "bench.peers.plain"),
        OWN_MODEL: torchrun(2, "-m", "bench.peers.plain", "--model", "dsllm"),
        "transformers.Trainer": torchrun(2, "-m", "bench.peers.trainer"),
        "FSDP2": torchrun(2, "-m", "bench.peers.fsdp"),
        **{f"dsllm, ZeRO-{stage}": deepspeed(2, *dsllm("a", folder, stage, 2)) for stage in range(4)},
    }
    return on_two_ranks(commands)


def two_ranks_more(folder: Path) -> list[Candidate]:
    """Workload (a): the peers that do not fit into memory together with those of `two_ranks`."""
    commands = {
        BASE: torchrun(2, "-m", "bench.peers.plain"),
        "transformers.Trainer, DeepSpeed ZeRO-1": deepspeed(2, "--module", "bench.peers.trainer", "--zero", "1"),
        "Lightning": torchrun(2, "-m", "bench.peers.lightning_loop", python=LITGPT_PYTHON),
        "DeepSpeed's own bf16, ZeRO-1": deepspeed(2, "--module", "bench.peers.deepspeed_loop", "--zero", "1"),
        DEEPSPEED_ZERO_3: deepspeed(2, "--module", "bench.peers.deepspeed_loop", "--zero", "3"),
        **{f"dsllm, ZeRO-{stage}": deepspeed(2, *dsllm("a", folder, stage, 2)) for stage in (0, 3)},
    }
    return on_two_ranks(commands)


SETTINGS = {
    "every block recomputed": "train.activation_checkpointing=full",
    "every second block recomputed": "train.activation_checkpointing=2",
    "attention recomputed": "train.activation_checkpointing=attention",
    "MLP recomputed": "train.activation_checkpointing=mlp",
    "document mask": "data.document_mask=true",
    "without the breakdown": "log.breakdown=false",
}


def settings(folder: Path) -> list[Candidate]:
    """Workload (a): what dsllm's own settings cost per step."""
    commands = {BASE: module("bench.peers.plain"), "dsllm, ZeRO-1": (sys.executable, *dsllm("a", folder, 1, 1))}
    for number, (name, word) in enumerate(SETTINGS.items()):
        commands[f"dsllm, ZeRO-1, {name}"] = (sys.executable, *dsllm("a", folder / str(number), 1, 1), word)
    return [Candidate(name=name, command=words) for name, words in commands.items()]


def two_ranks_bound(folder: Path) -> list[Candidate]:
    """Workload (a): what binding each rank to its cores gains."""
    commands = {BASE: torchrun(2, "-m", "bench.peers.plain")}
    for stage in (0, 1):
        for name, word in (("", "train.bind_cores=false"), (", bound", "train.bind_cores=true")):
            commands[f"dsllm, ZeRO-{stage}{name}"] = deepspeed(2, *dsllm("a", folder / f"x{name[2:]}", stage, 2), word)
    return on_two_ranks(commands)


def on_two_ranks(commands: dict[str, tuple[str, ...]]) -> list[Candidate]:
    """Candidates of two ranks, each with one thread."""
    return [Candidate(name=name, command=words, num_ranks=2, threads_per_rank=1) for name, words in commands.items()]


def one_process_b(folder: Path) -> list[Candidate]:
    """Workload (b), GPT-2 124M: a process takes 3 to 4 GiB."""
    commands = {
        BASE: module("bench.peers.plain", "--workload", "b"),
        "transformers.Trainer": module("bench.peers.trainer", "--workload", "b"),
        **{f"dsllm, ZeRO-{stage}": (sys.executable, *dsllm("b", folder, stage, 1)) for stage in range(4)},
    }
    return [Candidate(name=name, command=words) for name, words in commands.items()]


def one_process_b_more(folder: Path) -> list[Candidate]:
    """Workload (b): the loops that do not fit into memory together with those of `one_process_b`."""
    own = deepspeed(1, "--module", "bench.peers.deepspeed_loop", "--workload", "b", "--zero", "1")
    commands = {
        BASE: module("bench.peers.plain", "--workload", "b"),
        OWN_MODEL: module("bench.peers.plain", "--workload", "b", "--model", "dsllm"),
        "Lightning": module("bench.peers.lightning_loop", "--workload", "b", python=LITGPT_PYTHON),
        "DeepSpeed's own bf16, ZeRO-1": own,
        "dsllm, ZeRO-0": (sys.executable, *dsllm("b", folder, 0, 1)),
    }
    return [Candidate(name=name, command=words) for name, words in commands.items()]


GROUPS: dict[str, tuple[str, Callable[[Path], list[Candidate]]]] = {
    ONE_PROCESS: ("a", one_process),
    f"{ONE_PROCESS}, compiled": ("a", compiled),
    TWO_RANKS: ("a", two_ranks),
    f"{TWO_RANKS}, more peers": ("a", two_ranks_more),
    f"{TWO_RANKS}, bound or not": ("a", two_ranks_bound),
    f"{ONE_PROCESS}, settings": ("a", settings),
    ONE_PROCESS_B: ("b", one_process_b),
    f"{ONE_PROCESS_B}, more loops": ("b", one_process_b_more),
}
"""Name -> workload and candidates of a group; the base is the first candidate."""
