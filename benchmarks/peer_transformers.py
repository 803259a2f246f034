"""transformers on PyTorch, as a contender of ``benchmarks/sampler.py``, which starts this.

It has two ways to generate, and each workload gets the one that is faster there: rollouts of one length
go through ``generate`` as one batch, rollouts of different lengths through its continuous batching.
"""

import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
)

from sampler import MODEL, Report, Workload, make_workload, serve, versions

DISTRIBUTION = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


PAGE_SIZE, BATCH_TOKENS = 32, 256
"""Of continuous batching: the best of a few, half the CPU seconds of what it chooses by itself here."""


class TokenLogprobs(LogitsProcessor):
    """Keeps the log-probability of each token drawn.

    ``output_scores`` would keep the logits of all tokens of the vocabulary for every token drawn, gigabytes here.
    """

    def __init__(self):
        self._law: torch.Tensor | None = None
        self._drawn: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Changes nothing; called before each draw."""
        self._score(input_ids)
        self._law = scores.log_softmax(-1)
        return scores

    def all(self, sequences: torch.Tensor) -> torch.Tensor:
        """Of all new tokens, ``[rows, tokens]``, once ``generate`` has returned the sequences."""
        self._score(sequences)
        return torch.stack(self._drawn, 1)

    def _score(self, sequences: torch.Tensor) -> None:
        if self._law is not None:
            self._drawn.append(self._law.gather(1, sequences[:, -1:])[:, 0])


def transformers(workload: Workload):
    """Returns the run that is timed."""
    model = make_model()
    is_uniform = workload.lengths.min() == workload.lengths.max()
    return one_batch(model, workload) if is_uniform else continuous_batching(model, workload)


def make_model():
    """Random weights."""
    config = Qwen3Config(**MODEL, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def one_batch(model, workload: Workload):
    """All rollouts in one batch, which runs to the longest; every copy of a prompt is prefilled."""
    prompts = torch.from_numpy(workload.prompts).long()
    num_prompts, group_size = workload.lengths.shape
    max_length = workload.max_length

    @torch.inference_mode()
    def run(seed: int) -> Report:
        torch.manual_seed(seed)
        logprobs = TokenLogprobs()
        sequences = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_return_sequences=group_size,
            max_new_tokens=max_length,
            **DISTRIBUTION,
            logits_processor=LogitsProcessorList([logprobs]),
        )
        drawn = logprobs.all(sequences)
        assert drawn.shape == (num_prompts * group_size, max_length)
        assert sequences.shape[1] == prompts.shape[1] + max_length
        assert drawn.isfinite().all()
        return {}

    return run


def continuous_batching(model, workload: Workload):
    """Each rollout is a request with a limit of its own; full pages of a prompt are shared."""
    pages = -(-(workload.prompts.shape[1] + workload.max_length) // PAGE_SIZE)
    distribution = GenerationConfig(**DISTRIBUTION, eos_token_id=-1, pad_token_id=0)

    def run(seed: int) -> Report:
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=workload.lengths.size * pages,
            max_batch_tokens=BATCH_TOKENS,
            return_logprobs=True,
            seed=seed,
        )
        # A manager of its own for each run: prompts are not in the cache from the run before.
        with model.continuous_batching_context_manager(distribution, continuous_batching_config=config) as manager:
            wanted = {}
            for prompt, lengths in zip(workload.prompts.tolist(), workload.lengths.tolist(), strict=True):
                for length in lengths:
                    wanted[manager.add_request(prompt, max_new_tokens=length)] = length
            while wanted:
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    length = wanted.pop(output.request_id)
                    assert len(output.generated_tokens) == len(output.logprobs) == length, output.error
        return {}

    return run


if __name__ == "__main__":
    serve(transformers, make_workload(sys.argv[1]), versions("torch", "transformers"))
