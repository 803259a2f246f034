"""Sizes in a config.json that no model has, and positions that a run needs."""

import pytest

from oapl_jax.model import qwen

RIGHT = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        *[({key: 10**12}, f"{key}=1000000000000") for key in ("vocab_size", "hidden_size", "num_hidden_layers")],
        *[({key: value}, f"{key}=") for key in ("hidden_size", "num_key_value_heads") for value in (0, -4, 16.0, "16")],
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"intermediate_size": [24]}, "intermediate_size="),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings=10"),
        ({"head_dim": 5}, "head_dim=5 is no positive even"),
        ({"hidden_size": 2}, "head_dim=0"),
        ({"rope_theta": -1.0}, "rope_theta=-1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"initializer_range": "wide"}, "initializer_range='wide'"),
        (
            {"vocab_size": 2**24, "hidden_size": 2**18, "num_hidden_layers": 4096},
            "parameters",
        ),
        ({**EXPERTS, "num_experts": 10**9}, "num_experts=1000000000"),
        ({**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is no number"),
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_by_name(changes, problem):
    assert qwen.QwenConfig.from_hf(RIGHT).max_position_embeddings == 32
    assert qwen.QwenConfig.from_hf({**RIGHT, **EXPERTS}).num_experts == 4
    with pytest.raises(ValueError, match=problem):
        qwen.QwenConfig.from_hf({**RIGHT, **changes})


def test_prompt_and_response_have_to_have_positions():
    config = qwen.QwenConfig.from_hf(RIGHT)
    config.check_positions(32)
    with pytest.raises(ValueError, match=r"33 tokens together.*positions for 32 \(max_position_embeddings\)"):
        config.check_positions(33)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for positions in (32, 128):
        qwen.QwenConfig.from_hf({**RIGHT, "max_position_embeddings": positions, "rope_scaling": yarn}).check_positions(
            128
        )
    with pytest.raises(ValueError, match="positions for 128"):
        qwen.QwenConfig.from_hf({**RIGHT, "rope_scaling": yarn}).check_positions(129)
