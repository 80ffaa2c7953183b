"""Loads a cluster: its YAML file and the hostfile that it names; every problem is reported at once."""

import dataclasses
import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dsllm.config.check_cluster import missing_hosts, problems_in_cluster
from dsllm.config.cluster import ClusterConfig, Launcher
from dsllm.config.explain import Origin, explain
from dsllm.config.hostfile import read_hostfile
from dsllm.config.paths import unset_variables
from dsllm.config.yaml_file import read_yaml, write_yaml
from dsllm.errors import ConfigError

_ADAPTER = TypeAdapter(ClusterConfig)
_PATHS = ("hostfile", "shared_directory", "virtual_environment")


def load_cluster(path: str | None, hostfile: str | None = None, launcher: Launcher | None = None) -> ClusterConfig:
    """Load a cluster, and check all of it.

    Args:
        path: the YAML file. None: this machine.
        hostfile: its hosts replace those of the YAML file.
        launcher: replaces that of the YAML file.
    Raises:
        ConfigError: a file is missing or unreadable, or something in it cannot work; lists every problem.
    """
    file = Path(path or "no cluster file")
    tree, lines = read_yaml(file) if path else ({}, {})
    origin = Origin(file, lines, {})
    tree = {
        key: value for key, value in tree.items() if value is not None
    }  # a section whose lines are commented out has its defaults
    if launcher:
        tree["launcher"] = launcher
    if hostfile:
        tree.pop("hosts", None)
        tree["hostfile"] = str(Path(hostfile).absolute())
    try:
        cluster = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, origin, ClusterConfig)) from None
    problems: list[str] = []
    cluster = _with_paths(cluster, file.parent, origin, problems)
    cluster = _with_hosts(cluster, origin, problems)
    cluster_problems = problems_in_cluster(cluster)
    if path and not problems:  # without a file, it is this machine
        cluster_problems += missing_hosts(cluster)
    problems += [f"{origin.of(tuple(name.split('.')))}: {name}: {text}" for name, text in cluster_problems]
    if problems:
        raise ConfigError(problems)
    return cluster


def _with_paths(cluster: ClusterConfig, folder: Path, origin: Origin, problems: list[str]) -> ClusterConfig:
    """Replace variables and ~ in paths by their values here; a hostfile's path counts from `folder`."""
    changed = {}
    for name in _PATHS:
        text = getattr(cluster, name)
        if text is None:
            continue
        for variable in unset_variables(text):
            problems.append(f"{origin.of((name,))}: {name}: ${{{variable}}} is not set here")
        changed[name] = os.path.expanduser(os.path.expandvars(text))
        if not changed[name].strip():
            problems.append(f"{origin.of((name,))}: {name}: is empty")
    if "hostfile" in changed:
        changed["hostfile"] = os.path.abspath(folder / changed["hostfile"])
    for name in ("shared_directory", "virtual_environment"):
        if name in changed and not os.path.isabs(changed[name]):
            problems.append(
                f"{origin.of((name,))}: {name}: {changed[name]!r} must be absolute: the hosts have no common working directory"
            )
    return dataclasses.replace(cluster, **changed)


def _with_hosts(cluster: ClusterConfig, origin: Origin, problems: list[str]) -> ClusterConfig:
    """Read the hosts of the hostfile, if the cluster names one."""
    if cluster.hostfile is None or any(": hostfile: " in problem for problem in problems):
        return cluster
    if cluster.hosts:
        problems.append(f"{origin.of(('hostfile',))}: hostfile: hosts are set too; set one of the two")
        return cluster
    try:
        return dataclasses.replace(cluster, hosts=read_hostfile(Path(cluster.hostfile)))
    except ConfigError as error:
        problems += error.problems
        return cluster


def cluster_text(cluster: ClusterConfig) -> str:
    """The cluster as a YAML file that `load_cluster` reads."""
    return write_yaml(_ADAPTER.dump_python(cluster, mode="json", exclude_defaults=True))
