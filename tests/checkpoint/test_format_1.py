"""A checkpoint that was saved in format 1 opens, exports and resumes under any layout with exactly its tensors."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.verify import damage_in
from dsllm.data.position import Position
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_state, owned_slices
from dsllm.evaluate.load import load_model, open_saved
from dsllm.session.progress import Progress
from dsllm.session.resume import progress_of
from dsllm.slices import WEIGHTS, Region, whole
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run

FOLDER = Path(__file__).parent / "format_1" / "step-00000003"
PROGRESS = Progress(
    step=3,
    position=Position(24),
    tokens=384,
    fingerprint=2**63 + 5,
    last_step_fingerprint=77,
    data_sha256="0" * 64,
)


def stored(name: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor put together from the files by hand, by the names of format 1: PARAMETER@START/KEY."""
    out = torch.full((math.prod(shape),), float("nan"))
    for file in sorted(FOLDER.glob("slices-*.safetensors")):
        for tensor_name, values in load_file(file).items():
            place, found_key = tensor_name.rsplit("/", 1)
            parameter, start = place.rsplit("@", 1)
            if (parameter, found_key) == (name, key):
                out[int(start) : int(start) + len(values)] = values
    assert not out.isnan().any()
    return out.view(shape)


def test_it_opens_as_it_was_saved():
    assert damage_in(FOLDER) is None and damage_in(FOLDER, what="weights") is None
    reader = CheckpointReader(FOLDER)
    assert len(reader.names()) == 11 and reader.shape("embed.weight") == (128, 4) and reader.step == 3
    for name in reader.names():
        shape = reader.shape(name)
        assert reader.keys(name) == (WEIGHTS, "exp_avg", "exp_avg_sq") and reader.scalars(name) == {"step": 3.0}
        assert torch.equal(reader.read_whole(name), stored(name, "master", shape))
        region = Region(whole(shape), 0, math.prod(shape))
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read(name, key, region).view(shape), stored(name, key, shape))
    assert reader.run().model == reader.model_config and reader.run().run.seed == 7


def test_it_is_a_model_that_computes_and_exports(tmp_path: Path):
    lines: list[str] = []
    saved = open_saved(FOLDER, lines.append)
    assert lines == [] and saved.run is not None
    assert (saved.context_length, saved.sequence_length, saved.precision, saved.step) == (16, 16, "fp32", 3)
    model = load_model(saved, "fp32", torch.device("cpu"))
    assert torch.equal(model.embed.weight, stored("embed.weight", "master", (128, 4)))
    export = Export(config=saved.config, context_length=16, end_of_text_id=0)
    export_hugging_face(saved.reader, export, tmp_path / "hf")
    back = HuggingFaceReader(tmp_path / "hf")
    assert torch.equal(back.read_whole("embed.weight")[:100], stored("embed.weight", "master", (128, 4))[:100])
    assert torch.equal(
        back.read_whole("layers.0.mlp.down.weight"), stored("layers.0.mlp.down.weight", "master", (4, 5))
    )


def resume(world: World, stages: list[int]) -> int:
    """Restore under some ZeRO stages; this rank's slices must be those in the files. Returns how many were compared."""
    reader = CheckpointReader(FOLDER)
    config = dataclasses.replace(tiny_run(), model=reader.model_config)
    num_compared = 0
    for stage in stages:
        engine = tiny_engine(world, config, stage)
        load_state(engine, reader)
        assert progress_of(reader, config) == PROGRESS
        for piece in owned_slices(engine):
            assert piece.scalars == {"step": 3.0} and len(piece.tensors) == 3
            for key, tensor in piece.tensors.items():
                wanted = stored(piece.name, {WEIGHTS: "master"}.get(key, key), piece.shape)
                assert torch.equal(tensor, piece.region.of(wanted)), (stage, piece.name, key)
                num_compared += tensor.numel()
    return num_compared


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_resumes_with_exactly_its_tensors(world_size: int):
    reader, stages = CheckpointReader(FOLDER), [1, 3]
    elements = sum(math.prod(reader.shape(name)) for name in reader.names())
    assert sum(run_ranks(world_size, resume, stages)) == 3 * elements * len(stages)
