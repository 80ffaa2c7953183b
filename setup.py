"""Builds dsllm; the wheel also contains the shipped recipes, templates and DeepSpeed JSONs, under dsllm/presets.

What dsllm is and needs (name, version, dependencies, extras) is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PRESETS = ("ds_configs", "launch")
"""Folders of the checkout that a wheel contains too; an editable install uses them in place."""


class BuildWithPresets(build_py):
    """Copies the presets into the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in PRESETS:
            target = Path(self.build_lib) / "dsllm" / "presets" / folder
            shutil.rmtree(target, ignore_errors=True)  # a reused build/ may contain files that no longer exist
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": BuildWithPresets})
