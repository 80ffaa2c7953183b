"""How far a combination may be from the reference: derived from the roundings in which the two differ.

Both do the same arithmetic on the same samples. They differ in the order of sums, and in how often a gradient is rounded
on its way to the optimizer. A number format with p bits of significand rounds with a relative error of at most
u = 2^-p, spread almost evenly: sqrt(1/3) u in the root mean square. Over the thousands of elements of a model such
errors are independent: the errors of r roundings add as squares, and the norm of their sum varies little. So

    error = sqrt(r / 3) u

summed over the formats that are used. SAFETY = 4 covers three things that enlarge it: a partial sum can be larger than
the final sum (the parts of a gradient partly cancel: about 2), the errors of six steps build on each other, and one seed
differs from the mean of all. In measured rows fp32 stays below a tenth of its bound, and 16 bits below a half. A fault
moves weights by percents or norms by tenths, as tests/parity/test_faults.py shows.

The three quantities
- weights: ||w - w_ref|| / ||w_ref - w_initial||, the share of all that training moved. The error of the gradients counts,
  and the error of adding many small steps to fp32 weights of the size ||w||, once in each of the two runs.
- gradient norms, each step, relative: training as a whole changes the norm by about its own size, so an error of the
  weights, as a share of all that training moved, changes the norm by no more than about that share. A gradient's own
  roundings average out in the norm.
- losses, each step, relative: a first-order step changes a loss by gradient x step, and roundings have any direction: with
  n parameters, 1 / sqrt(n) of their length is along the gradient. A tenth of the share is enough, because all of training
  changes the loss by about a tenth. In 16 bits the losses are made of rounded activations: u / sqrt(tokens) where an
  activation is rounded to its other neighbour.
"""

import math
from dataclasses import dataclass

from dsllm.parity.combinations import Combination
from dsllm.parity.reference import Reference
from dsllm.parity.tiny_run import MICRO_BATCH_SEQUENCES, NUM_STEPS, SEQUENCE_LENGTH

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""u of each format: half the distance from 1 to the next number."""

SAFETY = 4.0

FP32_ROUNDINGS = 6
"""Roundings of a gradient in fp32, without the sum over micro-batches: scaling the loss, undoing the scale, the mean over
ranks, the clipping factor, the two moments."""


@dataclass(frozen=True)
class Bounds:
    """Largest deviations that rounding explains, all relative."""

    loss: float
    norm: float
    weights: float


def bounds_for(combination: Combination, reference: Reference) -> Bounds:
    """The bounds of one combination."""
    u = UNIT_ROUNDOFF["fp32"]
    in_16_bits, formats = roundings(combination)
    gradient = math.sqrt((combination.num_micro_batches + FP32_ROUNDINGS) / 3) * u
    gradient += sum(math.sqrt(number / 3) * UNIT_ROUNDOFF[name] for name, number in formats.items())
    adding = math.sqrt(2 * NUM_STEPS / 3) * u * reference.weights_per_way
    share = SAFETY * (gradient + adding)
    tokens = combination.num_micro_batches * MICRO_BATCH_SEQUENCES * SEQUENCE_LENGTH
    activations = 0.0 if in_16_bits is None else UNIT_ROUNDOFF[in_16_bits] / math.sqrt(tokens)
    return Bounds(loss=share / 10 + activations + SAFETY * u, norm=share, weights=share)


def roundings(combination: Combination) -> tuple[str | None, dict[str, float]]:
    """The format of the matrix products (None: fp32), and how often a gradient is rounded to each 16-bit format.

    In 16 bits two roundings can differ even where all else is the same: a number falls to its other neighbour because
    something before it differs in fp32's last bit. This happens to one weight or product in some thousands, and it
    spreads to every element that depends on it.
    """
    compute = {"fp32_compute_bf16": "bf16", "fp32": None}.get(combination.precision, combination.precision)
    formats: dict[str, float] = {} if compute is None else {compute: 2.0}
    own = combination.precision if combination.precision in ("bf16", "fp16") else "fp32"
    default = own if combination.stage == 0 else "fp32"
    summed = combination.deepspeed.get("grad_accum_dtype", default)
    sent = combination.deepspeed.get("communication_data_type", default)
    if summed != "fp32":
        formats[summed] = formats.get(summed, 0.0) + combination.accumulation - 1
    if sent != "fp32":
        formats[sent] = formats.get(sent, 0.0) + combination.world_size  # for the sending, and at each addition
    return compute, formats
