"""Refuses a scored batch that cannot be trained on, by sequence and token, before anything has changed."""

import math

import torch
from torch import Tensor

from ppo_core.advantages import Advantages
from ppo_core.rewards import Rewards
from ppo_runtime.common.inputs import NotFinite
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.forward import Scored

LARGEST = torch.finfo(torch.float32).max
_REMEDY = {
    "the policy's log-probability": "its weights or logits are not finite (or it gives this token no probability at "
    "all): go back to the last checkpoint, lower learning_rate, and train in float32",
    "the reference's log-probability": "its weights or logits are not finite (or it gives this token no probability "
    "at all): load it in float32, or drop the row",
    "the value head's output": "look at the head's weights, and at the model's last hidden state, which it reads",
    "the KL estimate": "policy and reference are too far apart for kl_penalty: take another one, or drop the row",
}


def refuse_unusable(
    scored: Scored,
    estimate: Advantages,
    rewards: Rewards,
    scores: Tensor,
    mask: Tensor,
    config: PPOConfig,
    *,
    ranks: int,
) -> None:
    """Raise if any number that the update will see, or whose square it will sum, is not finite in float32.

    The largest sums of a step are those of squared advantages: whitening sums A^2 over the tokens of all ranks, and
    the statistics sum (V - R)^2, which usually is A^2 before the first update, over the tokens of all epochs. They fit
    if |A| <= sqrt(3.4e38 / (tokens * epochs * ranks)). Where scores alone matter, A is at most twice the largest one:
    half of this is how large scores may be, 1e17 and more in a usual batch. Log-probabilities are looked at one by one,
    since the KL of whole distributions ignores what both give no probability. One transfer from the device.

    Raises:
        ValueError: naming the first token whose log-probability, value or KL estimate is not finite, or else the
            largest score, KL penalty or value, or, where none of them is to blame, what ``advantages=`` has made of
            them.
    """
    errors = torch.where(mask, scored.values, 0.0) - estimate.returns
    largest = torch.maximum(estimate.advantages.abs(), errors.abs())
    squares = config.ppo_epochs * largest.square().sum() + rewards.rewards.square().sum()
    squares = squares + scores.square().sum()
    finite = scored.logprobs.isfinite() & scored.ref_logprobs.isfinite() & scored.values.isfinite()
    total, unusable = torch.stack((squares, (mask & ~finite).any().to(squares))).tolist()
    if not unusable and ranks * total <= LARGEST:  # NaN compares as False
        return
    kinds = (scored.logprobs, scored.ref_logprobs, scored.values, scored.kl)
    for (what, remedy), x in zip(_REMEDY.items(), kinds, strict=True):
        if len(found := (mask & ~x.isfinite()).nonzero()):
            row, token = found[0].tolist()
            raise NotFinite(
                f"responses[{row}], token {token}: {what} is {float(x[row, token])}, expected a finite number; {remedy}"
            )
    most = math.sqrt(LARGEST / (max(int(mask.sum()), 1) * config.ppo_epochs * ranks)) / 2
    row = int(scores.abs().argmax())
    place = divmod(int(torch.where(mask, scored.values, 0.0).abs().argmax()), mask.shape[1])
    score, value = float(scores[row]), float(scored.values[place])
    worst = divmod(int(rewards.non_score_rewards.abs().argmax()), mask.shape[1])
    penalty = float(rewards.non_score_rewards[worst])
    if max(abs(score), abs(value), abs(penalty)) <= most:
        row, token = divmod(int(largest.nan_to_num(nan=torch.inf).argmax()), mask.shape[1])
        raise NotFinite(
            f"responses[{row}], token {token}: advantages= gave an advantage of "
            f"{float(estimate.advantages[row, token]):.6g} and a return of {float(estimate.returns[row, token]):.6g}, "
            f"expected finite numbers below {2 * most:.1g}, so that their squares do not overflow float32; mend the "
            "estimator"
        )
    if abs(penalty) > max(abs(score), abs(value)):
        raise NotFinite(
            f"responses[{worst[0]}], token {worst[1]}: the reward for staying close to the reference is {penalty:.6g} "
            f"(a KL estimate of {float(scored.kl[worst]):.6g} times the coefficient): the squares of the advantages "
            f"overflow float32, expected below {most:.1g}; lower init_kl_coef, take another kl_penalty, or drop the row"
        )
    if abs(score) >= abs(value):
        what = f"scores[{row}] is {score:.6g} as it is rewarded"
        remedy = "scale the scores, or set score_clip or use_score_scaling"
    else:
        what = f"the value head's output for responses[{place[0]}], token {place[1]}, is {value:.6g}"
        remedy = "look at the model's weights, go back to a checkpoint, or begin with a new value head"
    raise NotFinite(f"{what}: the squares of the advantages overflow float32, expected below {most:.1g}; {remedy}")
