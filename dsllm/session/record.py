"""The record of a run that every checkpoint contains: its config, its DeepSpeed config, and versions of libraries."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dsllm.config.load import run_to_dict
from dsllm.config.run import RunConfig
from dsllm.version import __version__


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The run as it is saved."""

    config: RunConfig
    """The resolved run."""
    deepspeed: Mapping[str, Any]
    """The final DeepSpeed config."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer's folder; None (default): not known."""

    @property
    def config_as_dict(self) -> dict[str, Any]:
        """The run as plain values."""
        return run_to_dict(self.config)

    @property
    def versions(self) -> dict[str, str]:
        """The libraries in use."""
        return {"dsllm": __version__} | {name: version(name) for name in ("torch", "deepspeed", "safetensors")}
