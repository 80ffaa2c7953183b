"""`make docs`: writes the pages that are generated from the code: maps of packages and files, and the list of all fields."""

import ast
import re
import sys
from pathlib import Path

from dsllm.launch.templates import slurm_templates

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("cli", "launch", "prepare", "session", "data", "model", "engine", "train"),
    *("checkpoint", "evaluate", "parity", "doctor", "config", "counts"),
)
"""In the order in which a run uses them."""

CONFIGURATION_RULES = (
    "In paths (`run.directory`, `data.directory`, `data.sources.*.paths` and `dataset`, `tokenizer.path`,",
    "`model.init_from`, `deepspeed`), `~` and `${VARIABLE}` are replaced by their values where the run starts; a variable",
    "that is not set is refused by name. `<<: *anchor` takes over the keys of another mapping. Every number must be finite.",
    "`run.directory` and `data.directory` are two folders, neither inside the other. A folder is no run file, and a word",
    "with `=` in it is a file if such a file exists.",
)
CONFIG_FILES = ("run", "data", "model", "train", "optimizer", "parallel")
BEGIN, END = "<!-- map: begin (written by `make docs`) -->", "<!-- map: end -->"


def first_line(file: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def python_files(package: str) -> list[Path]:
    """The files of a package, without its __init__.py."""
    return [f for f in sorted((ROOT / "dsllm" / package).rglob("*.py")) if f.name != "__init__.py"]


def words() -> list[Path]:
    """The files that are directly in dsllm/."""
    return [f for f in sorted((ROOT / "dsllm").glob("*.py")) if not f.name.startswith("__")]


def package_map() -> str:
    """One line per package, for the README."""
    rows = [f"| [`dsllm/{p}/`](dsllm/{p}) | {first_line(ROOT / 'dsllm' / p / '__init__.py')} |" for p in PACKAGES]
    rows += [f"| [`dsllm/{f.name}`](dsllm/{f.name}) | {first_line(f)} |" for f in words()]
    return "\n".join(["| where | what |", "|---|---|", *rows])


def file_map() -> str:
    """docs/map.md: one line per file."""
    about = "Every file of the package, in the order in which a run uses them. Written by `make docs`."
    parts = ["# Map", "", about]
    for package in PACKAGES:
        parts += ["", f"## dsllm/{package}", "", first_line(ROOT / "dsllm" / package / "__init__.py"), ""]
        parts += [f"- `{f.relative_to(ROOT / 'dsllm' / package)}`: {first_line(f)}" for f in python_files(package)]
    parts += ["", "## Files outside the packages", ""]
    return "\n".join([*parts, *(f"- `dsllm/{f.name}`: {first_line(f)}" for f in words()), ""])


def configuration() -> str:
    """docs/configuration.md: every field of a run with its type, default and unit, read from dsllm/config."""
    about = [
        "A run is one YAML file; `key.path=value` on the command line changes a field of it. Fields marked † may",
        "differ when a run is resumed; every other difference is refused. Written by `make docs` from `dsllm/config/`.",
    ]
    example = (ROOT / "launch" / "recipes" / "annotated.yaml").read_text(encoding="utf-8")
    return "\n".join(
        [
            *("# Configuration", "", *about, "", *CONFIGURATION_RULES, "", "## An example to copy", ""),
            *("`launch/recipes/annotated.yaml`:", "", "```yaml", example.rstrip("\n"), "```"),
            *(*_tree(CONFIG_FILES, "RunConfig", "the run"), ""),
        ]
    )


def cluster() -> str:
    """docs/cluster.md: every field of a cluster file."""
    about = [
        "A cluster is one YAML file, given to `dsllm launch --cluster`; [launch.md](launch.md) shows how to use it,",
        "`launch/cluster/` has examples. Written by `make docs` from `dsllm/config/cluster.py`.",
    ]
    return "\n".join(["# The cluster file", "", *about, *_tree(("cluster",), "ClusterConfig", "the cluster"), ""])


def _tree(files: tuple[str, ...], root: str, title: str) -> list[str]:
    """The sections of a tree of dataclasses in these files of dsllm/config."""
    nodes = [
        node
        for name in files
        for node in ast.parse((ROOT / "dsllm" / "config" / f"{name}.py").read_text(encoding="utf-8")).body
    ]
    branches = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    types = {ast.unparse(n.targets[0]): n.value for n in nodes if isinstance(n, ast.Assign)}
    for node in (node for branch in branches.values() for node in branch.body if isinstance(node, ast.AnnAssign)):
        for word, meaning in types.items():  # show what a named type stands for
            text = re.sub(rf"\b{re.escape(word)}\b", lambda _, m=meaning: ast.unparse(m), ast.unparse(node.annotation))
            node.annotation = ast.parse(text, mode="eval").body
    return _section(root, "", branches, title)


def _section(name: str, path: str, branches: dict[str, ast.ClassDef], title: str = "") -> list[str]:
    """A branch of the tree: its own fields, then a section for each branch below it."""
    lines = ["", f"## {path or title}", "", ast.get_docstring(branches[name]) or "", ""]
    below: list[str] = []
    body = branches[name].body
    for field, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        inner = next((b for b in branches if b in ast.unparse(field.annotation)), None)
        key = f"{path}.{field.target.id}".lstrip(".")
        if inner:
            below += _section(inner, key, branches)
        if not inner or isinstance(after, ast.Expr):
            lines.append(_knob(key, field, after))
    return [*lines, *below]


def _knob(key: str, field: ast.AnnAssign, after: ast.stmt | None) -> str:
    """One line: key, whether it may change, type, default, and the string under the field."""
    value = ast.unparse(field.value) if field.value else "required"
    changes = value.startswith("changeable(")
    default = value.removeprefix("changeable(").removesuffix(")") if changes else value
    shown = "" if "default_factory" in default or default == "required" else f", default `{default}`"
    about = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
    described = " ".join(str(about).split())
    return f"- **{key}**{' †' if changes else ''} (`{ast.unparse(field.annotation)}`{shown}) {described}".rstrip()


def pages() -> dict[Path, str]:
    """Every generated page, with the content that the code gives it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return {
        ROOT / "README.md": f"{before}{BEGIN}\n{package_map()}\n{END}{after}",
        ROOT / "docs" / "map.md": file_map(),
        ROOT / "docs" / "configuration.md": configuration(),
        ROOT / "docs" / "cluster.md": cluster(),
        **{ROOT / "launch" / "slurm" / name: text for name, text in slurm_templates().items()},
    }


def stale() -> list[str]:
    """Names of the pages that differ from what the code gives."""
    return [
        str(path.relative_to(ROOT))
        for path, text in pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
    sys.exit(0)
