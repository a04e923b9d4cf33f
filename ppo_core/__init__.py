"""The arithmetic of PPO on language models, as pure functions of tensors.

Nothing here draws a random number, touches a file, a process group or a model, or changes an argument. One convention
holds everywhere: tensors are [*batch, time], one boolean ``mask`` is True where a response token counts, and a masked
position is deleted. Needs torch, attrs and jaxtyping only.
"""

from ppo_core.advantages import Advantages, gae
from ppo_core.averages import Average
from ppo_core.controllers import KLControllerState, adaptive_kl_update, fixed_kl_update
from ppo_core.fused_head import HeadOutput, fused_logprobs
from ppo_core.logprobs import restrict_to_support, token_entropy, token_logprobs
from ppo_core.losses import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss
from ppo_core.masking import keep, last_kept, masked_mean, masked_sum
from ppo_core.moments import Moments, masked_moments, variance
from ppo_core.rewards import Rewards, compute_rewards
from ppo_core.scan import linear_recurrence
from ppo_core.whitening import whiten

__all__ = [
    "Advantages",
    "Average",
    "HeadOutput",
    "KLControllerState",
    "Moments",
    "PolicyLoss",
    "Rewards",
    "ValueLoss",
    "adaptive_kl_update",
    "clipped_policy_loss",
    "clipped_value_loss",
    "compute_rewards",
    "fixed_kl_update",
    "fused_logprobs",
    "gae",
    "keep",
    "last_kept",
    "linear_recurrence",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "restrict_to_support",
    "token_entropy",
    "token_logprobs",
    "variance",
    "whiten",
]
