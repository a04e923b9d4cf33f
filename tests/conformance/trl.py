"""TRL 0.11.4's classic functions: ``trl.core`` and the methods of its ``PPOTrainer``, called unbound.

What differs only in convention is translated, and never held against it:

- masks are integers there;
- what it answers at masked positions is undefined there, and read as 0 (what it *reads* there is its own affair);
- ``compute_rewards`` takes both log-probabilities and not their KL: it gets (kl, 0) and the penalty ``kl``;
- ``compute_advantages`` whitens its advantages: they are read off its returns, which are advantages + values;
- there is no bootstrap: gamma * bootstrap is added to the last reward, which is what one would do there;
- losses are means: they are multiplied by the number of tokens that they are means of. The threshold above which a
  loss is multiplied by 0 is set to infinity;
- a response without any token does not exist there (rewards raise IndexError, advantages and losses ValueError). It
  does not count, or it would be the counterexample of every row; the functions of a mask alone are asked about it.

Whitening exists with its own statistics, Bessel's correction and eps 1e-8 only; other settings do not count.
There is no k3, no gamma or lambda per step, no selection (``keep``, ``last_kept``) and no merging of parts. Made for
the versions in ``tests/conformance/trl-0.11.4.md``.
"""

from types import SimpleNamespace

import torch
from trl import core
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.utils import AdaptiveKLController, FixedKLController

from ppo_core.advantages import Advantages
from ppo_core.averages import Average
from ppo_core.controllers import KLControllerState
from ppo_core.losses import PolicyLoss, ValueLoss
from ppo_core.moments import Moments
from ppo_core.rewards import Rewards
from tests.conformance import areas, not_offered


def trainer(kl_coef=0.0, **config):
    """The attributes of a trainer that the borrowed methods read."""
    config = {"kl_penalty": "kl", "whiten_rewards": False, "ratio_threshold": float("inf"), "vf_coef": 1.0} | config
    stand_in = SimpleNamespace(config=SimpleNamespace(**config), kl_ctl=FixedKLController(kl_coef))
    stand_in._kl_penalty = lambda *logprobs: PPOTrainer._kl_penalty(stand_in, *logprobs)
    return stand_in


def tokens_in(mask):
    """A mask of theirs: integers, and at least one token in every row."""
    if not mask.numel() or not mask.any(-1).all():
        not_offered()
    return mask.long()


def some_token(mask):
    """The same for what is reduced over rows: at least one token in all."""
    if not mask.any():
        not_offered()
    return mask.long()


def kept(x, mask):
    """What is answered at masked positions counts as 0."""
    return torch.where(mask, x, 0.0)


def masked_mean(x, mask, *, dim=None):
    return core.masked_mean(x, mask.long(), axis=dim)


def masked_moments(x, mask, *, dim=None):
    if dim is not None:
        not_offered()
    n = mask.sum().to(x.dtype)
    return Moments(n, core.masked_mean(x, mask.long()), n * core.masked_var(x, mask.long(), unbiased=False))


def whiten(x, mask, moments, *, shift_mean, correction, eps):
    own = masked_moments(x, mask)
    same = all(torch.allclose(x, y, equal_nan=True) for x, y in zip(moments, own, strict=True))
    if correction != 1 or eps != 1e-8 or not same:
        not_offered()
    return kept(core.masked_whiten(x, mask.long(), shift_mean=shift_mean), mask)


def kl_penalty(name):
    def estimate(logprobs, ref_logprobs, mask):
        return kept(PPOTrainer._kl_penalty(trainer(kl_penalty=name), logprobs, ref_logprobs), mask)

    return estimate


def token_logprobs(logits, tokens):
    vocab = logits.shape[-1]
    return core.logprobs_from_logits(logits.reshape(1, -1, vocab), tokens.reshape(1, -1)).reshape(tokens.shape)


def token_entropy(logits):
    return core.entropy_from_logits(logits)


def compute_rewards(scores, kl, mask, *, kl_coef):
    stand_in = trainer(kl_coef)
    rewards, penalties, _ = PPOTrainer.compute_rewards(stand_in, scores, kl, torch.zeros_like(kl), tokens_in(mask))
    return Rewards(kept(rewards, mask), kept(penalties, mask))


def gae(rewards, values, mask, bootstrap=None, *, gamma, lam):
    if isinstance(gamma, torch.Tensor) or isinstance(lam, torch.Tensor):
        not_offered()
    if bootstrap is not None:
        last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        rewards = torch.where(last, rewards + gamma * bootstrap[:, None], rewards)
    stand_in = trainer(gamma=gamma, lam=lam)
    seen, _, returns = PPOTrainer.compute_advantages(stand_in, values, rewards, tokens_in(mask))
    return Advantages(kept(returns - seen, mask), kept(returns, mask))


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, *, cliprange):
    nothing, logits = torch.zeros_like(advantages), torch.zeros(*mask.shape, 2)
    stand_in = trainer(cliprange=cliprange, cliprange_value=1.0)
    loss, _, stats = PPOTrainer.loss(
        stand_in, old_logprobs, nothing, logits, nothing, logprobs, some_token(mask), advantages, nothing
    )
    ratio = stats["policy/ratio"]
    return PolicyLoss(
        loss=summed(loss, mask),
        clip_fraction=summed(stats["policy/clipfrac"], mask),
        approx_kl=summed(stats["policy/approxkl"], mask),
        policy_kl=summed(stats["policy/policykl"], mask),
        ratio=summed(core.masked_mean(ratio, mask.long()), mask),
        ratio_deviation=kept(ratio - 1, mask).abs().max(),
    )


def clipped_value_loss(values, old_values, returns, mask, *, cliprange):
    nothing, logits = torch.zeros_like(returns), torch.zeros(*mask.shape, 2)
    stand_in = trainer(cliprange=0.2, cliprange_value=cliprange)
    _, loss, stats = PPOTrainer.loss(
        stand_in, nothing, old_values, logits, values, nothing, some_token(mask), nothing, returns
    )
    return ValueLoss(
        loss=summed(loss, mask),
        clip_fraction=summed(stats["val/clipfrac"], mask),
        error=summed(stats["val/error"], mask),
    )


def summed(mean, mask):
    """A mean over tokens, as the pair it would be."""
    weight = mask.sum().to(mean.dtype)
    return Average(mean * weight, weight)


def adaptive_kl_update(state, kl, n_steps, *, target, horizon):
    controller = AdaptiveKLController(state.coef, target, horizon)
    controller.update(kl, n_steps)
    return KLControllerState(coef=float(controller.value))


def fixed_kl_update(state, kl, n_steps):
    controller = FixedKLController(state.coef)
    controller.update(kl, n_steps)
    return KLControllerState(coef=controller.value)


implementation = areas(
    masking=[masked_mean],
    moments=[masked_moments],
    whitening=[whiten],
    logprobs=[token_logprobs, token_entropy],
    rewards=[compute_rewards],
    advantages=[gae],
    losses=[clipped_policy_loss, clipped_value_loss],
    controllers=[adaptive_kl_update, fixed_kl_update],
)
implementation.kl = SimpleNamespace(
    k1=kl_penalty("kl"), kl_abs=kl_penalty("abs"), k2=kl_penalty("mse"), full=kl_penalty("full")
)
