"""The loss of a run."""

from pydantic import ConfigDict

from oapl_jax.config.section import PositiveOrZero, Section


class ObjectiveConfig(Section):
    """The loss (paper section 3): its name, and beside it the options of that objective.

    The options are declared in ``objectives/``, a room above. ``build/checks.py`` checks them and fills in their defaults.
    """

    # Also validated where the section is not in the file, so that its options are filled in.
    model_config = ConfigDict(extra="allow", revalidate_instances="always")

    name: str = "oapl"
    """oapl: the paper's squared regression; a_star_po: with a fixed reference for the sampler; kimi: with the mean reward
    for V*; dro: of each token; grpo: the paper's baseline, with importance sampling; ppo: the clip on the ratio to the
    sampler; cispo: a limit on that ratio; icepop: grpo without the tokens at which learner and sampler disagree; gspo: a
    clipped ratio of whole sequences. These are REINFORCE on given responses: rloo: with the leave-one-out advantage;
    rloo_grpo: with GRPO's; rloo_exp: with the exponential of GRPO's; sft: imitates the correct responses. docs/objectives/
    has a page of each."""
    kl_weight: PositiveOrZero = 0.0
    """Weight of a penalty on the KL divergence from the model that the run starts from, in nats a token; 0: none. Without
    ``lora.rank`` a frozen copy of the weights is kept for it."""
    drop_equal_reward_groups: bool = False
    """Leave out groups whose rewards are all equal. Not a no-op in OAPL: they pull to the sampler."""
