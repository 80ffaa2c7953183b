"""The estimate of activations; tests/model/test_recompute.py counts what is kept."""

from dsllm.config.train import TrainConfig
from dsllm.counts import activation_bytes
from tests.counts.test_parameters import sized


def test_the_estimate_of_activations_grows_with_the_tokens_but_not_with_logits_that_come_in_chunks():
    config = sized("llama-125m")
    one, two, four = (activation_bytes(config, 512, TrainConfig(micro_batch_sequences=n), "bf16") for n in (1, 2, 4))
    assert two == 2 * one and four < 2 * two
