"""Paths in a run: ~ and variables in them, and where files are looked for."""

import os
import re
from pathlib import Path

DEFAULT_RECIPE = "launch/recipes/pydocs.yaml"


def presets_directory() -> Path:
    """Folder that holds ds_configs/ and launch/: the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    return checkout if (checkout / "setup.py").is_file() and (checkout / "ds_configs").is_dir() else package / "presets"


def find_file(name: str, yaml_folder: Path | None = None) -> Path | None:
    """The first file of that name in the working directory, the folder of the run's YAML file, and the presets; else None."""
    places = [Path.cwd(), *([yaml_folder] if yaml_folder else []), presets_directory()]
    # not Path.is_file(): it raises where the name is too long, and an override may be a long word
    return next((place / name for place in places if os.path.isfile(place / name)), None)


def searched(name: str, yaml_folder: Path | None = None) -> str:
    """A phrase for error messages: where `find_file` looked."""
    if Path(name).is_absolute():
        return name
    places = [Path.cwd(), *([yaml_folder] if yaml_folder else []), presets_directory()]
    names = {place.absolute(): str(place) for place in reversed(places)} | {Path.cwd(): "the working directory"}
    looked = dict.fromkeys(names[place.absolute()] for place in places)
    return f"{name} (looked in {', '.join(looked)})"


def unset_variables(text: str) -> list[str]:
    """Names of the variables in a path, written $NAME or ${NAME}, that are not set here."""
    named = re.findall(r"\$(?:\{([^}]*)\}|(\w+))", text)
    return [name for name in (braced or plain for braced, plain in named) if name not in os.environ]


def expanded(text: str) -> tuple[str, str]:
    """A path with ~ and variables replaced by their values here.

    Returns:
        the path, and why it cannot be used; "": it can
    """
    if "\0" in text:
        return text, f"{text!r}: a path contains no NUL"
    path = os.path.expanduser(os.path.expandvars(text))
    if unset := unset_variables(text):
        return text, f"{text}: {' and '.join(f'${{{name}}}' for name in unset)} is not set here"
    if path.startswith("~"):
        return text, f"{text}: there is no user {path[1:].split('/')[0]!r} here; write ./{path} for a file of that name"
    if text.strip() and not path.strip():
        return text, f"{text}: is empty, because its variables are"
    if len(os.fsencode(path)) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        return text, f"{text[:100]}...: is too long for the name of a file"
    return path, ""
