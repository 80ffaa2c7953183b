"""Configs of every version are read: older ones by migration, newer minor ones where nothing unknown is in use."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dsllm.config import migrate
from dsllm.config.data import SourceConfig
from dsllm.config.load import run_to_dict
from dsllm.config.migrate import CONFIG_VERSION, ConfigVersion, SavedConfig, changed_fields, read_model, read_run
from dsllm.config.model import ModelConfig, RopeScaling
from dsllm.config.run import RunConfig, RunSection
from dsllm.errors import CheckpointError

SAVED = {tuple(map(int, p.stem.split("."))): p for p in (Path(__file__).parent / "saved").glob("*.json")}
MAJOR, MINOR = CONFIG_VERSION
RUN = RunConfig(
    run=RunSection(name="a", directory="runs/a"),
    model=ModelConfig(vocab_size=300, rope_scaling=RopeScaling(factor=2.0)),
)


def saved(tree: dict, version: ConfigVersion = CONFIG_VERSION, changed: tuple[str, ...] = ()) -> SavedConfig:
    return SavedConfig(tree=tree, version=version, changed=changed, origin="runs/a/checkpoints/step-4")


def leaves(tree: Any, path: str = "") -> set[str]:
    """The dotted names of all fields; items of lists count as one."""
    if isinstance(tree, dict):
        return {name for key, value in tree.items() for name in leaves(value, f"{path}.{key}")}
    if isinstance(tree, list):
        return {name for value in tree for name in leaves(value, f"{path}.*")} or {path}
    return {path}


@pytest.mark.parametrize("version", SAVED, ids=str)
def test_configs_of_every_version_are_read(version: ConfigVersion):
    tree = json.loads(SAVED[version].read_text())
    run = read_run(saved(tree, version))
    assert run.run.name == "old" and run.model.vocab_size == 300 and run.model.rope_scaling is not None
    assert read_model(saved({"model": tree["model"]}, version)) == run.model


def test_the_version_is_raised_whenever_the_fields_change():
    """See tests/config/saved/README for what to do where this fails."""
    assert max(SAVED) == CONFIG_VERSION
    newest = json.loads(SAVED[CONFIG_VERSION].read_text())
    assert leaves(newest) == leaves(run_to_dict(read_run(saved(newest))))


def test_a_saved_run_comes_back():
    filled = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, directory="data/a"))
    assert read_run(saved(run_to_dict(RUN))) == filled
    assert read_model(saved({"model": run_to_dict(RUN)["model"]})) == RUN.model


def test_older_configs_are_migrated_step_by_step(monkeypatch: pytest.MonkeyPatch):
    """A field that was called `depth` and counted in halves, over two versions."""

    def rename(tree: dict) -> dict:
        model = {key: value for key, value in tree["model"].items() if key != "depth"}
        return tree | {"model": model | {"halves": tree["model"]["depth"]}}

    def double(tree: dict) -> dict:
        model = {key: value for key, value in tree["model"].items() if key != "halves"}
        return tree | {"model": model | {"num_layers": tree["model"]["halves"] // 2}}

    monkeypatch.setattr(migrate, "MIGRATIONS", (((2, 0), rename), ((3, 0), double)))
    monkeypatch.setattr(migrate, "CONFIG_VERSION", (3, 0))
    tree = run_to_dict(RUN)
    del tree["model"]["num_layers"]
    for version, field in (((1, 4), {"depth": 6}), ((2, 1), {"halves": 6}), ((3, 0), {"num_layers": 3})):
        old = tree | {"model": tree["model"] | field}
        before = copy.deepcopy(old)
        assert read_run(saved(old, version)).model.num_layers == 3
        assert read_model(saved({"model": old["model"]}, version)).num_layers == 3
        assert old == before


NEWER = (MAJOR, MINOR + 1)


def newer_tree() -> dict:
    """A run as a later minor version might save it: a new section, new fields, also in an optional section and a list."""
    tree = run_to_dict(RUN)
    tree["swarm"] = {"drones": 0, "queen": {"name": None}}
    tree["model"] |= {"ears": 2, "rope_scaling": tree["model"]["rope_scaling"] | {"knots": 0}}
    tree["data"]["sources"][0]["flavour"] = "none"
    return tree


def test_unknown_fields_of_a_newer_minor_version_are_left_out_at_their_defaults():
    tree = newer_tree()
    assert read_run(saved(tree, NEWER, changed_fields(RUN))) == read_run(saved(run_to_dict(RUN)))
    assert read_model(saved({"model": tree["model"]}, NEWER, changed_fields(RUN))) == RUN.model
    assert "swarm" in tree  # what was saved is not touched


@pytest.mark.parametrize(
    "changed", ["swarm.queen.name", "model.ears", "model.rope_scaling.knots", "data.sources.0.flavour"]
)
def test_unknown_fields_that_are_in_use_are_refused_by_name(changed: str):
    name = "swarm" if changed.startswith("swarm") else changed
    with pytest.raises(CheckpointError, match=rf"{MAJOR}\.{MINOR + 1}.*does not know {name}: update dsllm"):
        read_run(saved(newer_tree(), NEWER, (changed,)))


def test_the_model_opens_where_only_the_run_uses_what_is_unknown():
    tree = newer_tree()
    assert read_model(saved({"model": tree["model"]}, NEWER, ("swarm.drones",))) == RUN.model
    with pytest.raises(CheckpointError, match=r"does not know model\.ears"):
        read_model(saved({"model": tree["model"]}, NEWER, ("model.ears",)))


def test_a_newer_major_version_is_refused():
    for read in (read_run, read_model):
        with pytest.raises(
            CheckpointError, match=rf"version {MAJOR + 1}\.0, this dsllm reads up to {MAJOR}\.x: update dsllm"
        ):
            read(saved(run_to_dict(RUN), (MAJOR + 1, 0)))


def test_unknown_fields_of_this_version_are_damage():
    with pytest.raises(
        CheckpointError, match=r"(?s)step-4: the config of its run cannot be read.*model\.ears: unknown key"
    ):
        read_run(saved(newer_tree()))
    with pytest.raises(CheckpointError, match=r"(?s)step-4: the config of its model cannot be read.*ears"):
        read_model(saved({"model": newer_tree()["model"]}))


def test_fields_that_are_not_at_their_default():
    assert changed_fields(RunConfig(run=RunSection(name="a"))) == ("run.name",)
    assert changed_fields(RUN) == (
        *("run.name", "run.directory", "model.vocab_size", "model.rope_scaling", "model.rope_scaling.factor"),
    )
    sources = (SourceConfig(name="x", paths=("p",)), SourceConfig(name="y"))
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, sources=sources), model=ModelConfig())
    assert changed_fields(run) == (
        *("run.name", "run.directory", "data.sources"),
        *("data.sources.0.name", "data.sources.0.paths", "data.sources.1.name"),
    )
