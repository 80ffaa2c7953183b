"""Fixtures: the folders in which tests start whole jobs of training."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.tiny_job import prepare_folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run's YAML and its prepared data."""
    folder = prepare_folder(tmp_path_factory.mktemp("prepared"))
    shutil.rmtree(folder / "runs")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A fresh folder with that YAML and that data."""
    shutil.copytree(prepared, tmp_path / "job")
    return tmp_path / "job"
