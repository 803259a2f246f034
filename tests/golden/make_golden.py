"""Writes qwen_logits.npz: what transformers (torch, float32) computes for the tiny models of tests/model/tiny.py.

    PYTHONPATH=.:tests/model python tests/golden/make_golden.py

Only token ids and logits are stored; the tests make the same weights again from their seeds.
"""

import numpy as np
import torch
import transformers

import tiny


def expected_logits(name: str) -> np.ndarray:
    """Logits ``[B, T, V]`` of the tiny model of that name."""
    values = dict(tiny.HF_CONFIGS[name])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    assert config.rope_parameters["rope_theta"] == values["rope_theta"]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, tiny.weights(name))
    with torch.no_grad():
        return model(torch.from_numpy(tiny.tokens(name)).long()).logits.numpy()


def fill(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Copies the weights in; transformers keeps all experts of a layer in two tensors."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name in weights:
            tensor.copy_(torch.from_numpy(weights[name]))
        elif name == "lm_head.weight":  # tied
            tensor.copy_(torch.from_numpy(weights["model.embed_tokens.weight"]))
        else:
            tensor.copy_(torch.from_numpy(_experts(name, weights, tensor.shape[0])))


def _experts(name: str, weights: dict[str, np.ndarray], num_experts: int) -> np.ndarray:
    prefix, kind = name.rsplit(".", 1)

    def each(projection: str) -> np.ndarray:
        return np.stack([weights[f"{prefix}.{i}.{projection}.weight"] for i in range(num_experts)])

    if kind == "gate_up_proj":
        return np.concatenate([each("gate_proj"), each("up_proj")], axis=1)
    return each(kind)


if __name__ == "__main__":
    arrays = {}
    for case in tiny.HF_CONFIGS:
        arrays[f"{case}/tokens"] = tiny.tokens(case)
        arrays[f"{case}/logits"] = expected_logits(case)
    np.savez_compressed(tiny.GOLDEN, **arrays)
    print(f"{tiny.GOLDEN}: {tiny.GOLDEN.stat().st_size / 1024:.0f} KB, transformers {transformers.__version__}")
