"""vLLM, as a contender of ``benchmarks/sampler.py``, which starts this. Random weights, all rollouts at once.

Prompts are shared by its prefix cache, which is emptied before each run.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}

import vllm

from sampler import MODEL, Report, Workload, make_workload, serve, versions


def sampler(workload: Workload):
    """Returns the run that is timed."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "dtype": "float32"}
    max_tokens = workload.prompts.shape[1] + workload.max_length
    with tempfile.TemporaryDirectory() as folder:
        content = {**MODEL, **config, "max_position_embeddings": max_tokens}
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(content))
        engine = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max_tokens,
            max_num_seqs=workload.lengths.size,
            max_num_batched_tokens=4096,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
        )
    prompts, params = [], []
    for prompt, lengths in zip(workload.prompts.tolist(), workload.lengths.tolist(), strict=True):
        for length in lengths:
            prompts.append({"prompt_token_ids": prompt})
            params.append(
                vllm.SamplingParams(
                    temperature=1.0, max_tokens=length, min_tokens=length, ignore_eos=True, logprobs=0, detokenize=False
                )
            )

    def run(seed: int) -> Report:
        del seed  # it draws other numbers in each run
        engine.reset_prefix_cache()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        assert [len(each.outputs[0].token_ids) for each in outputs] == workload.lengths.ravel().tolist()
        assert all(len(each.outputs[0].logprobs) == len(each.outputs[0].token_ids) for each in outputs)
        return {"cached_tokens": sum(each.num_cached_tokens or 0 for each in outputs)}

    return run


if __name__ == "__main__":
    serve(sampler, make_workload(sys.argv[1]), versions("vllm-cpu", "torch"))
