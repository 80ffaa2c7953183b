"""An installed wheel is complete: package, command, recipes, DeepSpeed JSONs; and it works away from the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from dsllm import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

USE_THE_PRESETS = """
from pathlib import Path
import dsllm
from dsllm.config.load import load_run
from dsllm.config.paths import presets_directory
from dsllm.engine.settings.json_file import read_deepspeed_json
assert Path("site").resolve() in Path(dsllm.__file__).parents, dsllm.__file__
assert presets_directory() == Path(dsllm.__file__).parent / "presets"
config = load_run(None)
print(config.run.name, load_run("launch/recipes/pydocs.yaml") == config, read_deepspeed_json(config.deepspeed))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build/ is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("dsllm", "ds_configs", "launch"):
        shutil.copytree(ROOT / name, source / name)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip_wheel, str(source)], check=True, capture_output=True, text=True)
    (built,) = folder.glob("dsllm-*.whl")
    return built


def test_wheel_holds_package_and_presets(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("dsllm", "ds_configs", "launch"):
        inside = "" if folder == "dsllm" else "dsllm/presets/"
        files = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        missing = [str(f) for f in files if inside + str(f) not in names]
        assert not missing, f"not in the wheel: {missing}"
    strangers = ("tests", "bench", "docs", "launch", "ds_configs")
    assert not [name for name in names if name.startswith(strangers) or "__pycache__" in name]
    assert "dsllm/py.typed" in names, "type checkers read our annotations only where this file is installed"


def test_wheel_says_what_pyproject_says(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(file).decode())
    assert (metadata["Name"], metadata["Version"]) == ("dsllm", __version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert set(metadata.get_all("Classifier", [])) == set(project["classifiers"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert str(metadata.get_payload()).startswith("# dsllm\n")


def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    assert output(sys.executable, "-c", USE_THE_PRESETS).startswith("pydocs True {'zero_optimization'")
    assert "usage: dsllm COMMAND" in output(str(site / "bin" / "dsllm"), "--help")
