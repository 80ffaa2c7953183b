"""Generation: greedy is the argmax of the full forward pass, sampling obeys its limits, and both end where they must."""

from collections import Counter

import pytest
import torch

from dsllm.cli import generate as generate_command
from dsllm.errors import CheckpointError
from dsllm.evaluate.generate import SEEDS, Sampling, choose_token, generate
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, random_model

PROMPT = [5, 17, 99]
GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("config", [LLAMA, GPT2, NEOX], ids=["llama", "gpt2", "neox"])
@torch.no_grad()
def test_greedy_is_the_likeliest_token_of_the_whole_text_so_far(config):
    model, text = random_model(config).eval(), list(PROMPT)
    for _ in range(20):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert list(generate(model, PROMPT, 20, GREEDY)) == text[len(PROMPT) :]


def test_it_ends_at_the_end_of_text_token_which_is_not_part_of_it():
    model = random_model(LLAMA).eval()
    tokens = list(generate(model, PROMPT, 20, GREEDY))
    end = tokens[5]
    assert list(generate(model, PROMPT, 20, GREEDY, end_of_text_id=end)) == tokens[: tokens.index(end)]


def test_with_a_document_mask_an_end_of_text_hides_what_came_before():
    model, end = random_model(LLAMA).eval(), 9
    alone = list(generate(model, PROMPT, 10, GREEDY, end, True))
    assert list(generate(model, [3, 4, end, *PROMPT], 10, GREEDY, end, True)) == alone
    assert list(generate(model, [3, 4, end, *PROMPT], 10, GREEDY, end)) != alone
    first, *rest = generate(model, [end], 10, GREEDY, end, True)  # the end alone is followed by a first token ...
    assert rest == list(generate(model, [first], 9, GREEDY, end, True))  # ... which does not see it


def test_it_ends_with_the_context():
    model = random_model(GPT2).eval()
    assert len(list(generate(model, PROMPT, 1000, GREEDY))) == CONTEXT - len(PROMPT)


def test_a_seed_repeats_and_another_does_not():
    model = random_model(LLAMA).eval()
    texts = [list(generate(model, PROMPT, 30, Sampling(temperature=5.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def draws(sampling: Sampling, num_draws: int = 4000) -> Counter[int]:
    """How often each token is chosen where the probabilities are 0.5, 0.3, 0.15 and 0.05."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(sampling.seed)
    return Counter(choose_token(logits, sampling, generator) for _ in range(num_draws))


def test_tokens_are_drawn_by_their_probabilities():
    found = draws(Sampling())
    for token, probability in {1: 0.5, 3: 0.3, 0: 0.15, 2: 0.05}.items():
        # four standard deviations of a share of 4000 draws are at most 0.032
        assert found[token] / 4000 == pytest.approx(probability, abs=0.032)


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        (Sampling(temperature=0.0), {1}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_p=0.01), {1}),
        (Sampling(top_p=0.6), {1, 3}),
        (Sampling(top_p=0.9), {0, 1, 3}),
        (Sampling(top_k=3, top_p=0.99), {0, 1, 3}),
    ],
)
def test_limits_keep_the_likeliest(sampling: Sampling, tokens: set[int]):
    assert set(draws(sampling, 500)) == tokens


def test_a_low_temperature_sharpens():
    # probabilities to the power of 2, renormalised: 0.25 : 0.09 : 0.0225 : 0.0025
    assert draws(Sampling(temperature=0.5))[1] / 4000 == pytest.approx(0.25 / 0.365, abs=0.032)


def test_a_temperature_too_small_for_fp32_is_greedy():
    logits = torch.tensor([50.0, 51.0, -3e4, 51.0 - 1e-3])
    generator = torch.Generator().manual_seed(0)
    for temperature in (1e-6, 1e-7, 1e-40, 5e-324):
        assert choose_token(logits, Sampling(temperature=temperature), generator) == 1


def test_more_tokens_than_there_are_may_be_kept():
    assert draws(Sampling(top_k=10**30), 500) == draws(Sampling(), 500)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float):
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(CheckpointError, match="logits are not finite"):
        choose_token(logits, Sampling(temperature=temperature), torch.Generator())
    assert choose_token(torch.tensor([0.0, -torch.inf, 1.0]), Sampling(temperature=0.0), torch.Generator()) == 2


def test_it_ends_at_any_of_several_ends():
    model = random_model(LLAMA).eval()
    tokens = list(generate(model, PROMPT, 20, GREEDY))
    first = min(tokens.index(tokens[4]), tokens.index(tokens[7]))
    assert list(generate(model, PROMPT, 20, GREEDY, [199, tokens[7], tokens[4]])) == tokens[:first]
    assert list(generate(model, PROMPT, 20, GREEDY, [])) == tokens


def test_the_command_takes_the_seeds_that_torch_takes():
    assert generate_command.SEEDS == SEEDS
    for seed in (SEEDS[0], SEEDS[-1]):
        torch.Generator().manual_seed(seed)
    for seed in (SEEDS[0] - 1, SEEDS[-1] + 1):
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(seed)
