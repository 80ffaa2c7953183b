"""dsllm train with the states on NVMe: refused where the machine cannot, the same losses where it can, nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsllm.train.picture import read_metrics
from tests.engine.test_nvme import async_io  # noqa: F401 - a fixture
from tests.helpers.jobs import train
from tests.helpers.tiny_job import CORPUS, RUN

NUM_STEPS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a model wide enough that DeepSpeed swaps it, and a JSON for each place of its states."""
    (tmp_path / "corpus").mkdir()
    text = CORPUS.read_text(encoding="utf-8")
    for i in range(30):
        (tmp_path / "corpus" / f"{i:02d}.txt").write_text(text[2000 * i : 2000 * (i + 1)], encoding="utf-8")
    model = {"num_layers": 2, "hidden_size": 256, "num_heads": 4, "mlp_size": 2100}
    run: dict[str, Any] = RUN | {"model": model, "train": RUN["train"] | {"total_tokens": NUM_STEPS * 8 * 32}}
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    where = {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}
    zero = {"stage": 3, "sub_group_size": 700_000}
    blocks = {"offload_optimizer": where, "offload_param": where | {"max_in_cpu": 0}}
    (tmp_path / "plain.json").write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "nvme.json").write_text(json.dumps({"zero_optimization": zero | blocks}))
    return tmp_path


@pytest.mark.slow
def test_a_machine_without_the_folder_is_refused_before_anything_starts(folder):
    codes, output = train(folder, 1, ["wide.yaml", "deepspeed=nvme.json"])
    assert codes == [2] and "no such folder" in output and not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_goes_to_nvme_and_back(folder, async_io):  # noqa: F811 - the fixture
    swap = folder / "nvme"
    swap.mkdir()
    half = f"train.total_tokens={NUM_STEPS // 2 * 8 * 32}"
    for directory, first, second in (("a", "plain", "plain"), ("b", "nvme", "plain"), ("c", "plain", "nvme")):
        common = ["wide.yaml", f"run.directory={directory}"]
        codes, output = train(folder, 2, [*common, f"deepspeed={first}.json", half])
        assert codes == [0, 0], output
        codes, output = train(folder, 2, [*common, f"deepspeed={second}.json"])
        assert codes == [0, 0], output
        assert not list(swap.iterdir()), "swap files are removed at the end"
    plain, *others = ([row["loss"] for row in read_metrics(folder / name)] for name in "abc")
    assert len(plain) == NUM_STEPS
    for losses in others:
        assert losses == pytest.approx(plain, rel=1e-5)  # see tests/engine/test_nvme.py
