"""FLOPs of the model's mathematics: nothing computed twice, attention to visible tokens only."""

from oapl_jax.model import qwen


def forward_flops(model: qwen.QwenConfig, tokens: float, pairs: float, scored: float) -> tuple[float, float]:
    """FLOPs of a forward pass, and of its attention alone; additions and multiplications count.

    ``pairs`` are (token, token that it sees), over all sequences; ``scored`` are tokens whose logits are computed. Of a
    mixture's experts those count that a token goes to.
    """
    embedding = model.vocab_size * model.hidden_size
    num_matrix_weights = model.num_params - embedding * (1 if model.tie_word_embeddings else 2)
    if model.num_experts:
        expert = 3 * model.hidden_size * model.moe_intermediate_size
        num_matrix_weights -= model.num_hidden_layers * (model.num_experts - model.num_experts_per_tok) * expert
    attention = 4.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * pairs
    return 2.0 * num_matrix_weights * tokens + 2.0 * embedding * scored + attention, attention


def update_flops(
    model: qwen.QwenConfig, tokens: float, pairs: float, scored: float, *, has_frozen_weights: bool
) -> float:
    """FLOPs of a forward and a backward pass; the counts as in ``forward_flops``.

    The backward pass has two products for each one of the forward pass, one where the weights are frozen (adapters).
    """
    forward, attention = forward_flops(model, tokens, pairs, scored)
    return (2 if has_frozen_weights else 3) * (forward - attention) + 3 * attention
