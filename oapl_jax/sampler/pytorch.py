"""PyTorch's ``generate`` as the engine of a detached sampler, with the log-probabilities of what it samples from.

This is the shortest whole example of another engine for a JAX trainer. It is not fast: prompts of one length are
decoded together, and a batch lasts as long as its longest response. The draws come from PyTorch's global generator, so
a group that is sampled again is another one.
"""

import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (a test extra)
from transformers import AutoModelForCausalLM, GenerationConfig

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, Stats
from oapl_jax.rollouts.stops import Stops, stop_length
from oapl_jax.types import FinishReason, Rollout


def load_model(folder: pathlib.Path, dtype: str) -> Any:
    """A published policy, on the GPU where there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def make(config: TrainConfig, tokenizer: Tokenizer) -> tuple["TorchSampler", Any]:
    """The sampler of a process, and what loads a published policy for it."""
    sampler = TorchSampler(
        num_rows=config.sampler.groups_in_flight * config.sampler.group_size,
        max_response_tokens=config.sampler.max_response_tokens,
        vocab_size=tokenizer.vocab_size,
        stops=Stops(tokenizer, SamplingDistribution.of(config.sampler)),
        pad_id=tokenizer.pad_id,
    )
    return sampler, functools.partial(load_model, dtype=config.sampler.dtype)


class TorchSampler:
    """A ``Sampler`` that runs requests in batches; ids from ``vocab_size`` on are padding and never drawn."""

    def __init__(self, *, num_rows: int, max_response_tokens: int, vocab_size: int, stops: Stops, pad_id: int):
        self._num_rows, self._max_response_tokens, self._vocab_size = num_rows, max_response_tokens, vocab_size
        self._stops, self._pad_id = stops, pad_id
        self._waiting: list[Request] = []
        self._model: Any = None
        self.stats = Stats()
        torch.seed()

    def set_weights(self, weights: Any) -> None:
        """Uses this model, which ``load_model`` has made."""
        self._model = weights

    @property
    def is_idle(self) -> bool:
        """Whether no request waits; none is under way between two steps."""
        return not self._waiting

    @property
    def wants_more(self) -> bool:
        """Whether the next batch has room."""
        return self.num_live < self._num_rows

    @property
    def num_live(self) -> int:
        """Rollouts that are asked for."""
        return sum(request.num_rollouts for request in self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request; raises ValueError for one with a limit of its own."""
        if request.max_tokens is not None:
            raise ValueError(f"request {request.tag!r}: max_tokens needs --engine jax")
        self._waiting.append(request)

    def abort(self) -> None:
        """Drops all requests."""
        self._waiting.clear()

    def warm_up(self, prompt_lengths: Iterable[int], group_size: int) -> None:
        """Does nothing, since PyTorch compiles nothing."""

    def release(self) -> None:
        """Frees the model until weights are set again."""
        self._model = None

    def step(self) -> list[tuple[Any, list[Rollout]]]:
        """Generates all rollouts of the first requests that have prompts of one length and one distribution."""
        batch: list[Request] = []
        for request in [each for each in self._waiting if _kind(each) == _kind(self._waiting[0])]:
            if batch and sum(each.num_rollouts for each in (*batch, request)) > self._num_rows:
                break
            batch.append(request)
        self._waiting = [request for request in self._waiting if all(request is not each for each in batch)]
        prompts = np.concatenate([np.tile(item.prompt_token_ids, (item.num_rollouts, 1)) for item in batch])
        rollouts = iter(self._generate(prompts, batch[0].distribution))
        return [(request.tag, [next(rollouts) for _ in range(request.num_rollouts)]) for request in batch]

    def _generate(self, prompts: np.ndarray, distribution: SamplingDistribution) -> list[Rollout]:
        inputs = torch.as_tensor(prompts, dtype=torch.long, device=self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=self._generation_config(distribution),
                stopping_criteria=[lambda ids, _: self._have_stopped(ids[:, inputs.shape[1] :])],
            )
            tokens = output.sequences[:, inputs.shape[1] :]
            # The scores are the logits after all processors: their softmax is the distribution that was drawn from.
            distributions = torch.stack(output.scores, dim=1).float().log_softmax(-1)
            logprobs = distributions.gather(-1, tokens[..., None])[..., 0]
        rows = zip(tokens.cpu().numpy(), logprobs.cpu().numpy(), strict=True)
        rollouts = [self._truncated(ids, scores) for ids, scores in rows]
        self.stats.tokens += sum(len(rollout.token_ids) for rollout in rollouts)
        self.stats.prefill_tokens += prompts.size
        self.stats.row_steps += tokens.numel()
        self.stats.live_row_steps += sum(len(rollout.token_ids) for rollout in rollouts)
        return rollouts

    def _truncated(self, ids: np.ndarray, logprobs: np.ndarray) -> Rollout:
        """A row up to its first stop token, or the one that completes its first stop string, which belongs to it."""
        length = self._stops.length(ids.tolist())
        reason = FinishReason.LENGTH if length is None else FinishReason.STOP
        return Rollout(ids[:length].astype(np.int32), logprobs[:length].astype(np.float32), reason)

    def _have_stopped(self, tokens: Any) -> Any:
        """Whether each row has a stop string; stop tokens are PyTorch's own concern."""
        strings, decode = self._stops.strings, self._stops.decode
        found = [stop_length(row, len(row) - 1, strings, decode) is not None for row in tokens.tolist()]
        return torch.tensor(found, device=tokens.device)

    def _generation_config(self, distribution: SamplingDistribution) -> GenerationConfig:
        """Nothing of the folder's own, which may truncate the distribution."""
        return GenerationConfig(
            do_sample=True,
            temperature=distribution.temperature,
            top_k=distribution.top_k,
            top_p=distribution.top_p,
            min_p=distribution.min_p or None,
            max_new_tokens=self._max_response_tokens,
            suppress_tokens=list(range(self._vocab_size, self._model.config.vocab_size)) or None,
            eos_token_id=list(self._stops.ids),
            pad_token_id=self._pad_id,
            output_scores=True,
            return_dict_in_generate=True,
        )


def _kind(request: Request) -> tuple[int, SamplingDistribution]:
    """What the requests of a batch have in common."""
    return len(request.prompt_token_ids), request.distribution
