"""The rows of the parity table: what they cover, and that the config accepts exactly them."""

import itertools

import pytest
from dsllm.parity.cover import FACTORS, MODE, allowed, allowed_pairs, as_combination, pairwise_cover

from dsllm.config.train import PRECISIONS
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.errors import ConfigError
from dsllm.mesh import Mesh
from dsllm.parity.combinations import ACCUMULATIONS, STAGES, WORLD_SIZES, Combination, full_product
from dsllm.parity.tiny_run import run_of

COVER = pairwise_cover()


def accepted(row: Combination) -> bool:
    layout = Layout(mesh=Mesh(data=row.world_size), device="cuda", precision=row.precision)
    try:
        final_config(run_of(row, 0), row.deepspeed_json(), layout)
    except ConfigError:
        return False
    return True


def test_the_product_is_full_but_for_what_is_refused():
    every = itertools.product(STAGES, PRECISIONS, ACCUMULATIONS, (True, False), WORLD_SIZES)
    wanted = {
        (s, p, a, c, w)
        for s, p, a, c, w in every
        if accepted(Combination(stage=s, precision=p, accumulation=a, clipping=c, world_size=w))
    }
    got = {(c.stage, c.precision, c.accumulation, c.clipping, c.world_size) for c in full_product()}
    assert got == wanted and len(got) == 180


def settings_of(row: Combination) -> dict[str, object]:
    return {name: (row.stage, row.precision) if name == MODE else getattr(row, name) for name in FACTORS}


def test_every_allowed_pair_meets_in_a_row():
    met = {pair for row in COVER for pair in itertools.combinations(settings_of(row).items(), 2)}
    pairs = set(allowed_pairs())
    assert len(pairs) > 2000 and pairs <= met


def test_each_value_meets_every_stage_and_precision_that_allow_it():
    rows = [settings_of(row) for row in COVER]
    for mode in FACTORS[MODE]:
        for name, values in list(FACTORS.items())[1:]:
            met = {row[name] for row in rows if row[MODE] == mode}
            assert met == {v for v in values if allowed({MODE: mode, name: v})}, (mode, name)


def test_the_cover_is_always_the_same_and_small():
    assert pairwise_cover() == COVER and len(COVER) == len(set(COVER)) < 100


@pytest.mark.parametrize("row", [*full_product(), *COVER], ids=lambda row: row.place)
def test_the_config_accepts_every_row(row: Combination):
    assert accepted(row)


@pytest.mark.parametrize(
    "name", ["grad_accum_dtype", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"]
)
def test_the_config_refuses_what_the_table_leaves_out(name: str):
    """A value that stands in no row of a stage and precision is one that a run cannot have there."""
    for mode in FACTORS[MODE]:
        for value in FACTORS[name]:
            if value is None or allowed({MODE: mode, name: value}):
                continue
            row = next(r for r in COVER if (r.stage, r.precision) == mode)
            row = as_combination(settings_of(row) | {name: value})
            assert not accepted(row), (mode, name, value)
