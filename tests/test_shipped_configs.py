"""Every recipe and every DeepSpeed JSON that ships is one that works."""

from pathlib import Path

import pytest

from dsllm.config.load import load_run, run_from_dict, run_to_dict
from dsllm.config.paths import DEFAULT_RECIPE, find_file, presets_directory
from dsllm.config.yaml_file import read_yaml
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.mesh import Mesh

RECIPES = sorted((presets_directory() / "launch" / "recipes").glob("*.yaml"))
JSONS = sorted((presets_directory() / "ds_configs").glob("*.json"))


def stem(path: Path) -> str:
    return path.stem


def test_there_is_something_to_ship() -> None:
    assert find_file(DEFAULT_RECIPE) in RECIPES
    assert {"zero0", "zero1", "zero2", "zero3"} <= {path.stem for path in JSONS}


@pytest.mark.parametrize("recipe", RECIPES, ids=stem)
def test_recipe_loads_and_survives_saving(recipe: Path) -> None:
    config = load_run(str(recipe))
    assert run_from_dict(run_to_dict(config), "saved") == config
    assert find_file(config.deepspeed, yaml_folder=recipe.parent), f"{config.deepspeed} is not shipped"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES, ids=stem)
def test_recipe_has_a_final_deepspeed_config(recipe: Path, world_size: int) -> None:
    config = load_run(str(recipe))
    layout = Layout(mesh=Mesh(data=world_size), device="cpu", precision="fp32_compute_bf16")
    final = final_config(config, read_deepspeed_json(config.deepspeed), layout)
    assert final["train_batch_size"] == config.train.global_batch_sequences


@pytest.mark.parametrize("device, precision", [("cpu", "fp32"), ("cpu", "fp32_compute_bf16"), ("cuda", "bf16")])
@pytest.mark.parametrize("path", JSONS, ids=stem)
def test_json_joins_the_default_run(path: Path, device: str, precision: str) -> None:
    layout = Layout(mesh=Mesh(data=2), device=device, precision=precision)
    final = final_config(load_run(None), read_deepspeed_json(str(path)), layout)
    assert "auto" not in str(final), "everything that the JSON leaves open is decided"
    assert final["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])


ANNOTATED = presets_directory() / "launch" / "recipes" / "annotated.yaml"
CHOSEN = (
    *("run.name", "run.directory", "data.directory", "data.sources", "model.size", "train.total_tokens"),
    *("train.global_batch_sequences", "train.micro_batch_sequences", "train.optimizer.learning_rate"),
    *("train.schedule.warmup_steps", "train.validate_every_steps"),
)
"""What the annotated recipe chooses; every other value in it must be the default, as its head says."""


def _flat(tree: object, path: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        key: value for name, inner in tree.items() for key, value in _flat(inner, f"{path}.{name}".lstrip(".")).items()
    }


def test_the_annotated_recipe_tells_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    given, defaults = _flat(read_yaml(ANNOTATED)[0]), _flat(run_to_dict(load_run(str(tmp_path / "empty.yaml"))))
    assert {key for key in given if key not in CHOSEN and given[key] != defaults[key]} == set()
    for line in ANNOTATED.read_text().splitlines():
        assert len(line) <= 128


def test_the_annotated_recipe_is_in_the_docs():
    page = (presets_directory() / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert ANNOTATED.read_text(encoding="utf-8") in page
