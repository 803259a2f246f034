"""vLLM as an engine of ``runner.py``. Made for 0.32; steps its offline engine."""

import json
import os
import pathlib
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, and steps on demand
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]


class Engine:
    """One model in vLLM; see runner.py."""

    def start(self, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Options that the run's config decides, or that would change the sampled distribution, cannot be given."""
        self._settings, self._waiting, self._adapters = settings, set[str](), None
        own = {
            "model": folder,
            "dtype": settings["dtype"],
            "max_model_len": settings["max_tokens"],
            # Without this they are those of the raw logits, before temperature and truncation.
            "logprobs_mode": "processed_logprobs",
            # The folder's generation_config.json may truncate the distribution.
            "generation_config": "vllm",
            # Only stop strings need its tokenizer; ids go in and come out.
            "skip_tokenizer_init": not settings["stop_strings"],
            # vLLM's default is 0: two samplers, or two engines one after the other, would draw the same numbers.
            "seed": int.from_bytes(os.urandom(4), "little") >> 1,
        }
        if (adapter := pathlib.Path(folder) / "adapter_config.json").exists():
            found = json.loads(adapter.read_text())
            rank = next((rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= found["r"]), None)
            if rank is None:
                raise ValueError(f"vLLM takes adapters of rank 512 at most, and lora.rank={found['r']}")
            own |= {"model": found["base_model_name_or_path"], "enable_lora": True, "max_lora_rank": rank}
            self._adapters = LoRARequest("policy", 1, folder)
        if clash := sorted(own.keys() & settings["options"].keys()):
            raise ValueError(f"the run decides {', '.join(clash)}; remove it")
        used = {**own, **settings["options"]}
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**used))
        has_more_ids = self._engine.model_config.get_vocab_size() > settings["vocab_size"]
        self._allowed = list(range(settings["vocab_size"])) if has_more_ids else None
        shown = {name: value for name, value in used.items() if name != "model" or self._adapters is not None}
        return {"engine": "vllm", "version": vllm.__version__, "settings": shown}

    def reload(self, folder: str) -> None:
        """Loads the weights over the old ones, or adapters in place of the old ones."""
        if self._adapters is None:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            if current_platform.is_cpu():
                self._engine.apply_model(_pack_again)
        else:
            self._engine.remove_lora(self._adapters.lora_int_id)
            self._adapters = LoRARequest("policy", self._adapters.lora_int_id + 1, folder)
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use and was not reset")

    def probe(self, ids: list[int]) -> list[float]:
        """As those of a prompt."""
        params = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        self._engine.add_request("probe", {"prompt_token_ids": ids}, params, lora_request=self._adapters)
        outputs = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        return [found[token].logprob for token, found in zip(ids[1:], outputs[-1].prompt_logprobs[1:], strict=True)]

    def submit(self, number: int, prompt: list[int], num: int, max_tokens: int, distribution: dict[str, Any]) -> None:
        """Sampling by the request's distribution and by nothing else."""
        params = vllm.SamplingParams(
            n=num,
            **{name: distribution[name] for name in ("temperature", "top_k", "top_p", "min_p")},
            max_tokens=max_tokens,
            stop=self._settings["stop_strings"],
            stop_token_ids=self._settings["stop_token_ids"],
            ignore_eos=True,  # the stop tokens are all that end a response
            allowed_token_ids=self._allowed,
            logprobs=0,  # of the drawn token only
            detokenize=bool(self._settings["stop_strings"]),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._waiting.add(str(number))
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params, lora_request=self._adapters)

    def step(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """One step of the engine, for all requests."""
        finished = [output for output in self._engine.step() if output.finished]
        self._waiting.difference_update(output.request_id for output in finished)
        return [(int(output.request_id), list(map(_response, output.outputs))) for output in finished]

    def abort(self) -> None:
        """Frees their pages at once."""
        self._engine.abort_request(sorted(self._waiting))
        self._waiting.clear()


def _pack_again(model: Any) -> None:
    """Of a CPU, where vLLM 0.32 packs matrices and a reload forgets the output matrix that is the embedding."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def _response(one: Any) -> dict[str, Any]:
    ids = list(one.token_ids)
    logprobs = [by_token[token].logprob for by_token, token in zip(one.logprobs, ids, strict=True)]
    return {"ids": ids, "logprobs": logprobs, "is_stopped": one.finish_reason == "stop"}
