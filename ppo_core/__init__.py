"""The arithmetic of PPO on language models, as pure functions of tensors.

Nothing here draws a random number, touches a file, a process group or a model, or changes an argument. One convention
holds everywhere: tensors are [*batch, time], one boolean ``mask`` is True where a response token counts, and a masked
position is deleted. Needs torch, attrs and jaxtyping only.
"""

from ppo_core.advantages import Advantages, gae, grpo, rloo
from ppo_core.averages import Average, mean_of
from ppo_core.controllers import KLControllerState, adaptive_kl_update, fixed_kl_update
from ppo_core.fused_head import HeadOutput, fused_logprobs
from ppo_core.logprobs import restrict_to_support, token_entropy, token_logprobs
from ppo_core.losses import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss
from ppo_core.masking import keep, last_kept, masked_mean, masked_sum
from ppo_core.moments import Moments, masked_moments, variance
from ppo_core.off_policy import VTrace, vtrace
from ppo_core.returns import lambda_returns, n_step_returns, reward_to_go
from ppo_core.rewards import Rewards, compute_rewards
from ppo_core.scan import linear_recurrence
from ppo_core.scores import ScoreState, scale_scores, update_score_state
from ppo_core.surrogates import k2_surrogate, k3_surrogate, weighted_k1_surrogate
from ppo_core.whitening import whiten

__version__ = "0.1.0"

__all__ = [
    "Advantages",
    "Average",
    "HeadOutput",
    "KLControllerState",
    "Moments",
    "PolicyLoss",
    "Rewards",
    "ScoreState",
    "VTrace",
    "ValueLoss",
    "adaptive_kl_update",
    "clipped_policy_loss",
    "clipped_value_loss",
    "compute_rewards",
    "fixed_kl_update",
    "fused_logprobs",
    "gae",
    "grpo",
    "k2_surrogate",
    "k3_surrogate",
    "keep",
    "lambda_returns",
    "last_kept",
    "linear_recurrence",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "mean_of",
    "n_step_returns",
    "restrict_to_support",
    "reward_to_go",
    "rloo",
    "scale_scores",
    "token_entropy",
    "token_logprobs",
    "update_score_state",
    "variance",
    "vtrace",
    "weighted_k1_surrogate",
    "whiten",
]
