"""PyTorch as a sampler: its log-probabilities are those of the distribution that it draws from, which is our own model's."""

import numpy as np
import pytest

from model import tiny
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.model import hf
from oapl_jax.rollouts.sampling import Request, Sampler, SamplingDistribution, run
from oapl_jax.rollouts.stops import Stops
from oapl_jax.types import FinishReason

VOCABULARY, STOP, LIMIT = 40, 3, 6
PROMPTS = [np.array([5, 6, 7], np.int32), np.array([8, 9, 10, 11], np.int32), np.array([12, 13, 14], np.int32)]


class Letters(CharacterTokenizer):
    """A token for each letter."""

    def __init__(self):
        super().__init__()
        self.vocab_size, self.stop_ids = VOCABULARY, (STOP,)

    def encode(self, text):
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours, and PyTorch's from the folder that we publish."""
    pytest.importorskip("torch")  # and imported here only: every worker collects this file
    from oapl_jax.sampler.pytorch import load_model

    config = tiny.config("qwen3_wide_heads")
    graphdef, params = tiny.split(config)
    folder = hf.save_folder(tmp_path_factory.mktemp("policy") / "model", config, params)
    return graphdef, params, load_model(folder, "float32")


def sample(model, distribution):
    from oapl_jax.sampler.pytorch import TorchSampler

    stops = Stops(Letters(), distribution)
    sampler = TorchSampler(num_rows=16, max_response_tokens=LIMIT, vocab_size=VOCABULARY, stops=stops, pad_id=0)
    assert isinstance(sampler, Sampler)
    sampler.set_weights(model)
    done = dict(run(sampler, [Request(i, prompt, 8, (0, 0, i), distribution) for i, prompt in enumerate(PROMPTS)]))
    assert sampler.stats.tokens == sum(len(r.token_ids) for rollouts in done.values() for r in rollouts)
    return [(PROMPTS[number], rollout) for number in range(len(PROMPTS)) for rollout in done[number]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "distribution",
    [
        SamplingDistribution(),
        SamplingDistribution(0.7),
        SamplingDistribution(1.0, 5),
        SamplingDistribution(1.3, 0, 0.8),
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_sampling_distribution(models, distribution):
    graphdef, params, model = models
    pairs = sample(model, distribution)
    assert len({rollout.token_ids.tobytes() for _, rollout in pairs}) > 8, "rollouts differ"
    for prompt, rollout in pairs:
        tokens = np.concatenate([prompt, rollout.token_ids])
        logits = np.asarray(tiny.logits(graphdef, params, tokens[None]))[0, len(prompt) - 1 : -1, :VOCABULARY]
        expected = distribution_of(logits, distribution)[np.arange(len(rollout.token_ids)), rollout.token_ids]
        np.testing.assert_allclose(rollout.logprobs, expected, atol=2e-5)


def distribution_of(logits, distribution):
    """Log-probabilities by NumPy: temperature, then top-k, then top-p of what is left."""
    scaled = logits.astype(np.float64) / distribution.temperature
    ordered = np.sort(scaled, axis=-1)[:, ::-1]
    if distribution.top_k:
        scaled = np.where(scaled < ordered[:, distribution.top_k - 1 : distribution.top_k], -np.inf, scaled)
    if distribution.top_p < 1:
        probabilities = np.exp(ordered - ordered.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        kept = (np.cumsum(probabilities, -1) - probabilities < distribution.top_p).sum(-1)
        scaled = np.where(scaled < np.take_along_axis(ordered, kept[:, None] - 1, -1), -np.inf, scaled)
    return (
        scaled
        - np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - scaled.max(-1, keepdims=True)
    )


@pytest.mark.slow
def test_responses_end_at_the_stop_token_and_ids_without_a_token_are_never_drawn(models):
    for _, rollout in sample(models[2], SamplingDistribution(2.0)):
        assert (rollout.token_ids < VOCABULARY).all()
        assert np.isfinite(rollout.logprobs).all()
        assert STOP not in rollout.token_ids[:-1]
        is_stop = rollout.token_ids[-1] == STOP
        assert rollout.finish_reason == (FinishReason.STOP if is_stop else FinishReason.LENGTH)
        assert is_stop or len(rollout.token_ids) == LIMIT


@pytest.mark.slow
def test_responses_end_at_the_token_that_completes_a_stop_string(models):
    strings, decode = ("E", "GH", "J"), Letters().decode
    rollouts = [rollout for _, rollout in sample(models[2], SamplingDistribution(2.0, stop_strings=strings))]
    texts = [decode(rollout.token_ids.tolist()) for rollout in rollouts]
    assert any(text.endswith(strings) for text in texts)
    for rollout, text in zip(rollouts, texts, strict=True):
        assert not any(string in text[:-1] for string in strings)
        is_stop = text.endswith(strings) or rollout.token_ids[-1] == STOP
        assert rollout.finish_reason == (FinishReason.STOP if is_stop else FinishReason.LENGTH)
        assert is_stop or len(rollout.token_ids) == LIMIT
