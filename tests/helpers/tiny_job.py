"""The run that tests of whole `dsllm train` jobs share: its YAML, its prepared data, and what its folders contain."""

from pathlib import Path
from typing import Any

import yaml

from tests.helpers.jobs import train

CORPUS = Path(__file__).parents[1] / "data" / "golden.txt"
NUM_STEPS = 20
TOKENS_PER_STEP = 8 * 32

RUN: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 11},
    "data": {
        "sources": [{"name": "golden", "kind": "files", "paths": ["corpus"]}],
        "sequence_length": 32,
        "validation_share": 0.2,
        "num_workers": 1,
    },
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 300},
    "model": {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 96, "dropout": 0.1},
    "train": {
        "total_tokens": NUM_STEPS * TOKENS_PER_STEP,
        "global_batch_sequences": 8,
        "micro_batch_sequences": 2,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 4},
        "validate_every_steps": 10,
        "validation_sequences": 8,
    },
    "checkpoint": {"every_steps": 4},
    "log": {"every_steps": 5, "tensorboard": False},
}


def budget(num_steps: int) -> str:
    """The override that makes the run so many steps long."""
    return f"train.total_tokens={num_steps * TOKENS_PER_STEP}"


def prepare_folder(folder: Path) -> Path:
    """Write the run's YAML and corpus; its data is prepared by the first rank of a run while the second one waits."""
    (folder / "corpus").mkdir()
    text = CORPUS.read_text(encoding="utf-8")
    parts = [text[i : i + 2000] for i in range(0, 60_000, 2000)]
    for i, part in enumerate(parts):
        (folder / "corpus" / f"{i:02d}.txt").write_text(part, encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RUN))
    codes, output = train(folder, 2, ["tiny.yaml", budget(2)])
    assert codes == [0, 0], output
    assert (folder / "data" / "tiny" / "manifest.json").is_file()
    return folder


def tree(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in some folders by path: time of the last change in ns, and content. A file that came and went shows in
    the time of its folder; a folder that is not there has no entry."""
    found: dict[str, tuple[int, bytes]] = {}
    for folder in folders:
        paths = [folder, *folder.rglob("*")] if folder.exists() else []
        found |= {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths}
    return found
