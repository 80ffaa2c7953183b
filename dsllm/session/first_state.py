"""What a new run starts from: the initial values, or the weights named by model.init_from."""

from collections.abc import Callable
from pathlib import Path

from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_files import is_hugging_face_folder
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.source import another_model, differences
from dsllm.config.run import RunConfig
from dsllm.engine.processes.process_group import World
from dsllm.errors import CheckpointError
from dsllm.model.initial_state import InitialValues, WeightsOnly
from dsllm.parameters import ParameterTable, parameter_table
from dsllm.session.resume import find_weights
from dsllm.session.source_tokenizer import other_tokenizer
from dsllm.slices import StateReader


def first_state(config: RunConfig, world: World, report: Callable[[str], None]) -> StateReader:
    """The state of a new run; a collective call. Verifies files, and reads names and shapes.

    Raises:
        CheckpointError: model.init_from is not a model, or one that computes another function.
    """
    table = parameter_table(config.model, config.context_length)
    if config.model.init_from is None:
        return InitialValues(table, config.run.seed)
    source = Path(config.model.init_from)
    if not source.is_dir():
        raise CheckpointError(f"model.init_from {source}: no such folder")
    reader: CheckpointReader | HuggingFaceReader
    if is_hugging_face_folder(source):
        reader = HuggingFaceReader(source)
    else:
        reader = find_weights(source, world, report)
    found = reader.model_config
    problems = [*differences(found, config.model, config.context_length), *_other_parameters(reader, table)]
    if problems:
        raise another_model(str(source), found, problems)
    report(f"starting from the weights of {source}")
    warning = other_tokenizer(source, Path(config.data.directory or "")) if world.rank == 0 else None
    if warning:
        report(f"warning: {warning}")
    return WeightsOnly(reader)


def _other_parameters(reader: CheckpointReader | HuggingFaceReader, table: ParameterTable) -> list[str]:
    found = {name: tuple(reader.shape(name)) for name in reader.names()}
    expected = {row.name: row.shape for row in table}
    return [
        f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} here"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
