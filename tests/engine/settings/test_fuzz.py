"""Damaged, random and hostile DeepSpeed JSONs: each is refused by name, or gives a final config that DeepSpeed could read.

Quick: 1,000 files and 2,000 objects; slow: 10,000 and 30,000.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dsllm.config.paths import presets_directory
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.table import TABLE
from dsllm.errors import DsllmError
from dsllm.mesh import Mesh
from tests.helpers.fuzz import changed, damaged, outcome, random_value
from tests.helpers.tiny import tiny_run

SHIPPED = sorted((presets_directory() / "ds_configs").glob("*.json"))
LAYOUTS = [
    Layout(mesh=Mesh(data=2), device="cpu", precision="fp32"),
    Layout(mesh=Mesh(data=2), device="cuda", precision="bf16"),
    Layout(mesh=Mesh(data=4), device="cuda", precision="fp16", ranks_by_node=(3, 1)),
    Layout(mesh=Mesh(data=4), device="cuda", precision="bf16", ranks_by_node=None),
]
ALL_KEYS = [path.split(".") for path in TABLE]


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_damaged_files(tmp_path: Path, count: int):
    rng, file, read = random.Random(4), tmp_path / "ds.json", 0
    for _ in range(count):
        content = rng.choice(SHIPPED).read_bytes()
        for _ in range(rng.choice((1, 1, 2, 5))):
            content = damaged(content, rng)
        file.write_bytes(content)
        found = outcome(lambda: read_deepspeed_json(str(file)))
        assert isinstance(found, dict) or (isinstance(found, DsllmError) and str(file) in str(found))
        read += isinstance(found, dict) and _check_final(found, rng.choice(LAYOUTS))
        assert file.read_bytes() == content
    assert 0 < read < count


@pytest.mark.parametrize("count", [2_000, pytest.param(30_000, marks=pytest.mark.long)])
def test_changed_objects(count: int):
    rng, accepted = random.Random(5), 0
    for _ in range(count):
        given: Any = json.loads(rng.choice(SHIPPED).read_text())
        for _ in range(rng.choice((0, 1, 3))):
            *outer, name = rng.choice(ALL_KEYS)
            inner = given
            for key in outer:
                inner = inner.setdefault(key, {}) if isinstance(inner, dict) else {}
            if isinstance(inner, dict):
                inner[name] = random_value(rng, 2)
        given = changed(given, rng) if rng.random() < 0.5 else given
        if isinstance(given, dict):
            accepted += _check_final(given, rng.choice(LAYOUTS))
    assert count / 50 < accepted < count


def _check_final(given: dict[str, Any], layout: Layout) -> bool:
    """Whether a JSON gives a final config: JSON itself, of known keys, with the ZeRO stage and the offload that were given."""
    before = json.dumps(given)
    final = outcome(lambda: final_config(tiny_run(), given, layout))
    assert json.dumps(given) == before
    if isinstance(final, DsllmError):
        assert all(text.startswith(("ds_configs/zero1.json: ", "train.")) for text in final.problems), final
        return False
    json.dumps(final, allow_nan=False)
    zero = given.get("zero_optimization")
    if isinstance(zero, dict):
        assert final["zero_optimization"]["stage"] == (
            zero.get("stage") if zero.get("stage") not in (None, "auto") else 0
        )
        for block in ("offload_optimizer", "offload_param"):
            device = zero[block].get("device") if isinstance(zero.get(block), dict) else None
            if device in ("cpu", "nvme"):
                assert final["zero_optimization"][block]["device"] == device
    return True
