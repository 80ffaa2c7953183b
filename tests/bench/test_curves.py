"""Curves are held against each other at equal seeds, and against the spread of seeds."""

import pytest
import torch

from bench import curves
from bench.peers.models import PlainModel, copy_weights, dsllm_model
from bench.workloads import WORKLOADS


def test_paths_that_differ_less_than_seeds_are_within_the_spread() -> None:
    offsets = {"dsllm": 0.001, "autocast": 0.0, "fp32": -0.001}
    made = {(p, s): [3.0 + d + 0.05 * s, 2.0 + d + 0.05 * s] for p, d in offsets.items() for s in range(3)}
    compared = curves.compare(made)
    assert compared["dsllm - fp32, equal seeds"]["mean"] == pytest.approx(0.002)
    assert compared["dsllm, seeds among each other"] == pytest.approx(
        {"mean": 0.2 / 3, "largest": 0.1, "at_the_end": 0.2 / 3}
    )
    machine = {"date": "", "cpu": "", "cores": 2, "memory_gib": 8, "python": "", "versions": {}}
    assert "3% of what seeds differ by: within" in curves.table({"machine": machine, "compared": compared})
    far = curves.compare({key: [x + (key[0] == "fp32") for x in values] for key, values in made.items()})
    assert "**beyond**" in curves.table({"machine": machine, "compared": far})


def test_the_plain_model_is_the_same_function_as_dsllms() -> None:
    shape = WORKLOADS["tiny"]
    own = dsllm_model(shape)
    own.model.compute_dtype = None
    plain = PlainModel(shape)
    copy_weights(plain, own.model.state_dict())
    tokens = torch.randint(8192, (2, shape.sequence_length + 1), generator=torch.Generator().manual_seed(2))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    assert plain(inputs, targets).item() == pytest.approx(own(inputs, targets).item(), rel=1e-6)
