"""Layer by layer: activations, gradient norms, weights and updates equal those of plain PyTorch on one process."""

import math
from functools import cache
from typing import Any

import pytest
import torch

from dsllm.config.train import LossScaleConfig
from dsllm.engine.instruments.layer_statistics import LayerStatistics
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.step import Instruments
from dsllm.model.initial import fill_initial
from dsllm.model.transformer import Transformer
from tests.engine.test_step import BF16_NORM_TOLERANCE, NORM_TOLERANCE
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import MODEL, SEQUENCE_LENGTH, TABLE, micro_batches, tiny_engine, tiny_run, tiny_step

LEARNING_RATE = 1e-3
LAYERS = ["embed", "layers.0", "layers.1", "layers.2", "norm", "head"]
Rows = list[dict[str, Any]]


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, float]]:
    """The statistics of the first step of the tiny run, in plain PyTorch and fp32."""
    torch.manual_seed(0)
    model = Transformer(MODEL, SEQUENCE_LENGTH, torch.float32)
    fill_initial(model, TABLE, tiny_run().run.seed)
    outputs: dict[str, torch.Tensor] = {}
    parts = {"embed": model.embed, "norm": model.norm} | {f"layers.{i}": block for i, block in enumerate(model.layers)}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output.detach()))
    (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), 0, 0, 1)
    model(batch.inputs, batch.targets).losses.mean().backward()
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    decayed = [name for name, p in parameters.items() if p.ndim == 2]
    free = [name for name, p in parameters.items() if p.ndim == 1]
    groups = [
        {"params": [parameters[n] for n in decayed], "weight_decay": 0.1},
        {"params": [parameters[n] for n in free], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95)).step()

    def norm(tensors: dict[str, torch.Tensor], layer: str) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for n, t in tensors.items() if layer_of(n) == layer))

    after = {name: p.detach() for name, p in parameters.items()}
    update = {name: after[name] - before[name] for name in after}
    statistics = {}
    for layer in LAYERS:
        statistics[layer] = {
            "gradient_norm": norm(gradients, layer),
            "weight_norm": norm(after, layer),
            "update_ratio": norm(update, layer) / norm(before, layer),
        }
        if layer in outputs:
            wide = outputs[layer].double()
            statistics[layer] |= {
                "activation_rms": float(wide.square().mean().sqrt()),
                "activation_mean": float(wide.mean()),
                "activation_max": float(wide.abs().max()),
            }
    return statistics


def looked_into(world: World, precision: str) -> dict[int, tuple[Rows, float, float]]:
    """Rows of the first step, its gradient norm, and the second step's loss, by ZeRO stage."""
    found = {}
    for stage in range(1 if precision == "fp16" else 0, 4):  # fp16 is refused at stage 0
        config = tiny_run(precision=precision, loss_scale=LossScaleConfig(static=1024))
        engine = tiny_engine(world, config, stage, device="cuda" if precision == "fp16" else "cpu")
        set_learning_rate(engine.optimizer, LEARNING_RATE)
        layers = LayerStatistics(engine)
        first = tiny_step(engine, config, 0, instruments=Instruments(layers=layers))
        rows = layers.rows()
        second = tiny_step(engine, config, 1)
        found[stage] = (rows, first.gradient_norm, second.loss)
    return found


@cache
def seen(world_size: int, precision: str) -> list[dict[int, tuple[Rows, float, float]]]:
    """What each rank found."""
    return run_ranks(world_size, looked_into, precision)


EVERYDAY = ((2, "fp32"), (2, "bf16"))
CASES = [
    pytest.param(world_size, precision, marks=[] if (world_size, precision) in EVERYDAY else pytest.mark.slow)
    for world_size in (1, 2)
    for precision in ("fp32", "bf16", "fp32_compute_bf16", "fp16")
]


@pytest.mark.parametrize(("world_size", "precision"), CASES)
def test_the_layers_gradients_make_up_the_steps_gradient(world_size, precision):
    for stage, (rows, gradient_norm, _) in seen(world_size, precision)[0].items():
        # the same numbers, summed in another order, in fp32 at the most: 10^5 squares, 6e-7 observed
        assert math.hypot(*(row["gradient_norm"] for row in rows)) == pytest.approx(gradient_norm, rel=2e-6), stage


@pytest.mark.parametrize(("world_size", "precision"), CASES)
def test_every_layer_equals_plain_pytorch(plain, world_size, precision):
    """Bounds as in test_step.py: of a norm, in fp32 and with 8 bits. A mean over both signs nearly cancels, so it is held
    against the size of what it averages; the largest of all is rounded like one number. Adam's first step divides
    gradients by their own size: every element moves by the learning rate, whatever its gradient was."""
    tolerance = NORM_TOLERANCE if precision == "fp32" else 2 * BF16_NORM_TOLERANCE
    for stage, (rows, _, _) in seen(world_size, precision)[0].items():
        assert [row["layer"] for row in rows] == LAYERS
        for row in rows:
            expected = plain[row["layer"]]
            for key in ("gradient_norm", "weight_norm", "update_ratio", "activation_rms", "activation_max"):
                if key in expected:
                    assert row[key] == pytest.approx(expected[key], rel=tolerance), (stage, row["layer"], key)
            if "activation_mean" in expected:
                size = tolerance * expected["activation_rms"]
                assert row["activation_mean"] == pytest.approx(expected["activation_mean"], abs=size), (stage, row)
        assert rows[-1]["activation_rms"] is None  # the head returns losses


def test_all_ranks_have_the_same_rows():
    first, second = seen(2, "fp32")
    assert first == second


def unwatched(world: World) -> list[float]:
    losses = []
    for stage in range(4):
        engine = tiny_engine(world, config := tiny_run(), stage)
        set_learning_rate(engine.optimizer, LEARNING_RATE)
        tiny_step(engine, config, 0)
        losses.append(tiny_step(engine, config, 1).loss)
    return losses


@pytest.mark.slow
def test_looking_changes_nothing():
    assert [loss for _, _, loss in seen(2, "fp32")[0].values()] == run_ranks(2, unwatched)[0]


def poisoned(world: World) -> Rows:
    engine = tiny_engine(world, config := tiny_run(), 2)
    with torch.no_grad():
        engine.module.layers[1].mlp.down.weight[3, 5] = math.nan
    layers = LayerStatistics(engine)
    tiny_step(engine, config, 0, instruments=Instruments(layers=layers))
    return layers.rows()


@pytest.mark.slow
def test_a_nan_shows_in_the_layer_where_it_begins():
    rows = run_ranks(2, poisoned)[0]
    finite = {row["layer"]: math.isfinite(row["activation_max"]) for row in rows if row["activation_max"] is not None}
    assert finite == {"embed": True, "layers.0": True, "layers.1": False, "layers.2": False, "norm": False}
