"""dsllm pretrains decoder-only language models with DeepSpeed. What a notebook needs is imported from here (docs/api.md)."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsllm.version import __version__

if TYPE_CHECKING:  # for editors and type checkers; when the program runs, __getattr__ finds each name
    from dsllm.api import (
        CheckpointReader,
        HeldOutLoss,
        Position,
        Sampling,
        Tokenizer,
        TrainingBatches,
        Transformer,
        ValidationBatches,
        build_model,
        generate,
        load_model,
        load_tokenizer,
        open_checkpoint,
        training_batches,
        validation_batches,
        validation_loss,
    )
    from dsllm.api_engine import Engine, StepResult, open_engine, set_learning_rate, take_step
    from dsllm.batches import MicroBatch
    from dsllm.config.run import RunConfig
    from dsllm.errors import DsllmError
    from dsllm.mesh import Mesh, make_mesh
    from dsllm.objectives import TokenLoss
    from dsllm.parameters import Parameter, parameter_table
    from dsllm.session.run_file import load_run

__all__ = [
    "CheckpointReader",
    "DsllmError",
    "Engine",
    "HeldOutLoss",
    "Mesh",
    "MicroBatch",
    "Parameter",
    "Position",
    "RunConfig",
    "Sampling",
    "StepResult",
    "TokenLoss",
    "Tokenizer",
    "TrainingBatches",
    "Transformer",
    "ValidationBatches",
    "__version__",
    "build_model",
    "generate",
    "load_model",
    "load_run",
    "load_tokenizer",
    "make_mesh",
    "open_checkpoint",
    "open_engine",
    "parameter_table",
    "set_learning_rate",
    "take_step",
    "training_batches",
    "validation_batches",
    "validation_loss",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import dsllm` loads neither torch nor DeepSpeed (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'dsllm' has no attribute '{name}'")
    value = globals()[name] = getattr(_home_of(name), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _home_of(name: str) -> ModuleType:
    """The module that defines a public name. Those without torch come first; the rest is in dsllm.api."""
    home: ModuleType
    match name:
        case "load_run":
            from dsllm.session import run_file as home
        case "RunConfig":
            from dsllm.config import run as home
        case "Parameter" | "parameter_table":
            from dsllm import parameters as home
        case "MicroBatch":
            from dsllm import batches as home
        case "Mesh" | "make_mesh":
            from dsllm import mesh as home
        case "DsllmError":
            from dsllm import errors as home
        case "TokenLoss":
            from dsllm import objectives as home
        case "Engine" | "StepResult" | "open_engine" | "set_learning_rate" | "take_step":
            from dsllm import api_engine as home
        case _:
            from dsllm import api as home
    return home
