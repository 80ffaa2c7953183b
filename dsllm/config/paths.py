"""Where files named in a run are looked for: the working directory, the YAML's folder, the shipped presets."""

import os
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
    places = ["the working directory", *([str(yaml_folder)] if yaml_folder else []), str(presets_directory())]
    return f"{name} (looked in {', '.join(places)})"
