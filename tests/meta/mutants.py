"""Named wrong implementations, each with the property that has to notice. ``python -m tests.meta.mutants`` prints them.

A mutant stands for a mistake that somebody made, or could make, in the arithmetic: the defects of earlier trainers, the
known bugs and conventions of other systems, and slips of sign, axis, order or dtype. If one survives, a property is
missing. They are run inside one process, against ``subject`` with one function replaced.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from ppo_core import advantages as advantages_
from ppo_core import fused_head as fused_head_
from ppo_core import kl as kl_
from ppo_core import logprobs as logprobs_
from ppo_core import losses as losses_
from ppo_core import masking as masking_
from ppo_core import moments as moments_
from ppo_core import rewards as rewards_
from ppo_core import whitening as whitening_
from ppo_core.advantages import Advantages
from ppo_core.averages import Average
from ppo_core.controllers import KLControllerState
from ppo_core.moments import Moments
from ppo_core.rewards import Rewards
from tests.core.subject import subject


@dataclass(frozen=True)
class Mutant:
    """A wrong implementation."""

    name: str
    target: str
    """The function it replaces."""
    function: Callable[..., Any]
    killer: str
    """The property that fails: ``file::test`` or ``file::test[parameter]`` under tests/core."""
    origin: str
    """Whose mistake it is, or what is mistaken."""


MUTANTS: dict[str, Mutant] = {}


def mutant(target: str, killer: str, origin: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a wrong implementation of ``target`` into the catalogue."""

    def enter(function):
        name = function.__name__
        assert name not in MUTANTS, name
        MUTANTS[name] = Mutant(name, target, function, killer, origin)
        return function

    return enter


def contract(name: str, target: str) -> str:
    return f"test_contracts::{name}[{target}]"


# Masks


@mutant("masking.keep", "test_masking::test_keep_is_x_or_zero", "x * mask lets NaN and inf through")
def keep_by_product(x, mask):
    return x * mask


@mutant("masking.keep", "test_masking::test_keep_is_x_or_zero", "a mask that means padding")
def keep_inverted(x, mask):
    return torch.where(mask, 0.0, x)


@mutant("masking.keep", "test_masking::test_keep_passes_gradient_to_kept_entries_only", "selected after the arithmetic")
def keep_by_overwriting_nan(x, mask):
    return torch.where(mask, x * mask, torch.nan_to_num(x.square().sqrt()) * 0)


@mutant("masking.keep", contract("test_wrong_shape_is_refused", "masking.keep"), "silent broadcasting")
def keep_broadcasts(x, mask):
    return torch.where(mask, x, 0.0)


@mutant("masking.keep", contract("test_wrong_dtype_is_refused", "masking.keep"), "any mask will do")
def keep_takes_integer_masks(x, mask):
    return masking_.keep(x, mask.bool())


@mutant("masking.masked_sum", "test_masking::test_half_precision_adds_up_in_float32", "accumulates in half precision")
def sum_in_half_precision(x, mask, *, dim=None):
    kept = torch.where(mask, x, 0.0)
    if x.dtype == torch.float64:
        return masking_.masked_sum(x, mask, dim=dim)
    return kept.cumsum(-1)[..., -1]


@mutant("masking.masked_sum", "test_masking::test_masked_sum_adds_kept_entries", "defect 3: a mask that is ignored")
def sum_of_everything(x, mask, *, dim=None):
    return x.sum() if dim is None else x.sum(dim)


@mutant("masking.masked_mean", "test_masking::test_masked_mean_averages_kept_entries", "padding in the denominator")
def mean_over_padding(x, mask, *, dim=None):
    kept = masking_.keep(x, mask)
    return kept.mean() if dim is None else kept.mean(dim)


@mutant("masking.masked_mean", "test_masking::test_masked_mean_averages_kept_entries", "TRL, verl: 1e-8 below")
def mean_with_fudge(x, mask, *, dim=None):
    count = mask.sum() if dim is None else mask.sum(dim)
    return masking_.masked_sum(x, mask, dim=dim) / (count.double() + 1e-8)


@mutant("masking.masked_mean", "test_masking::test_masked_mean_averages_kept_entries", "0/0 for an empty mask")
def mean_of_nothing_is_nan(x, mask, *, dim=None):
    return masking_.masked_sum(x, mask, dim=dim) / (mask.sum() if dim is None else mask.sum(dim))


@mutant("masking.masked_mean", "test_masking::test_masked_mean_averages_kept_entries", "defect 5: a mean of means")
def mean_of_row_means(x, mask, *, dim=None):
    return masking_.masked_mean(x, mask, dim=-1).mean() if dim is None else masking_.masked_mean(x, mask, dim=dim)


@mutant("masking.masked_mean", "test_masking::test_masked_mean_shares_its_gradient", "a mean without a gradient")
def mean_is_detached(x, mask, *, dim=None):
    return masking_.masked_mean(x.detach(), mask, dim=dim)


@mutant("masking.last_kept", "test_masking::test_last_kept_marks_the_last_true", "the last slot, padded or not")
def last_slot(mask):
    out = torch.zeros_like(mask)
    out[..., -1] = True
    return out


@mutant("masking.last_kept", "test_masking::test_last_kept_marks_the_last_true", "one past the end: the first pad")
def first_pad(mask):
    return torch.cat((torch.zeros_like(mask[..., :1]), masking_.last_kept(mask)[..., :-1]), dim=-1)


@mutant("masking.last_kept", "test_masking::test_last_kept_marks_the_last_true", "count - 1: right padding is assumed")
def place_by_count(mask):
    return mask & (torch.arange(mask.shape[-1]) == mask.sum(-1, keepdim=True) - 1)


@mutant(
    "masking.last_kept", "test_masking::test_last_kept_marks_the_last_true", "index -1 of an empty row wraps around"
)
def empty_row_wraps(mask):
    steps = torch.arange(1, mask.shape[-1] + 1)
    last = (mask * steps).amax(-1, keepdim=True)
    return steps == torch.where(last == 0, mask.shape[-1], last)


# Averages


@mutant("averages.average", "test_averages::test_average_adds_and_counts_kept_entries", "padding counts as weight")
def weight_counts_padding(x, mask):
    return Average(masking_.masked_sum(x, mask), torch.tensor(float(mask.numel())).double())


@mutant("averages.merge", "test_averages::test_merged_mean_is_the_mean_of_everything", "defect 5: a mean of means")
def merge_by_averaging(a, b):
    means = (Average(x.total, x.weight.clamp(min=1)) for x in (a, b))
    return Average(sum(x.total / x.weight for x in means), torch.tensor(2.0).double())


@mutant("averages.merge", "test_averages::test_merge_is_a_commutative_monoid", "the later part wins")
def merge_keeps_the_last_weight(a, b):
    return Average(a.total + b.total, b.weight)


@mutant("averages.mean_of", "test_averages::test_mean_of_divides_elementwise", "0/0 where nothing was seen")
def mean_of_nothing(a):
    return a.total / a.weight


@mutant("averages.mean_of", "test_averages::test_mean_of_divides_elementwise", "weights below 1 are taken for 1")
def mean_of_light_things(a):
    return a.total / a.weight.clamp(min=1)


@mutant("averages.mean_of", "test_averages::test_mean_of_has_a_finite_gradient", "where() after the division")
def mean_with_a_poisoned_gradient(a):
    return torch.where(a.weight == 0, 0.0, a.total / a.weight)


# Moments


@mutant("moments.masked_moments", "test_moments::test_an_offset_does_not_cancel_in_float32", "verl: E[x^2] - E[x]^2")
def one_pass_variance(x, mask, *, dim=None):
    m = moments_.masked_moments(x, mask, dim=dim)
    squares = masking_.masked_sum(x.square(), mask, dim=tuple(range(x.ndim)) if dim is None else dim)
    return Moments(m.n, m.mean, squares - m.n * m.mean.square())


@mutant("moments.masked_moments", "test_moments::test_moments_describe_kept_entries", "trlx: padding in the statistics")
def moments_of_padding(x, mask, *, dim=None):
    return moments_.masked_moments(masking_.keep(x, mask), torch.ones_like(mask), dim=dim)


@mutant("moments.masked_moments", "test_moments::test_moments_over_an_axis", "all axes, whatever is asked")
def moments_over_everything(x, mask, *, dim=None):
    whole = moments_.masked_moments(x, mask)
    return Moments(*(field.expand(() if dim is None else mask.sum(dim).shape) for field in whole))


@mutant("moments.masked_moments", "test_moments::test_moments_describe_kept_entries", "variance for sum of squares")
def moments_hold_the_variance(x, mask, *, dim=None):
    m = moments_.masked_moments(x, mask, dim=dim)
    return Moments(m.n, m.mean, m.m2 / m.n.clamp(min=1))


@mutant("moments.merge", "test_moments::test_merge_pools_two_populations", "variance between the parts forgotten")
def merge_without_the_gap(a, b):
    return moments_.merge(a, b)._replace(m2=a.m2 + b.m2)


@mutant("moments.merge", "test_moments::test_merge_pools_two_populations", "each mean weighted by the other's count")
def merge_with_swapped_weights(a, b):
    n = torch.where(a.n + b.n == 0, 1.0, a.n + b.n)
    return moments_.merge(a, b)._replace(mean=(a.mean * b.n + b.mean * a.n) / n)


@mutant("moments.merge", "test_moments::test_merge_is_a_commutative_monoid", "0/0 when both parts are empty")
def merge_of_nothing(a, b):
    n = a.n + b.n
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * b.n / n, a.m2 + b.m2 + delta.square() * a.n * b.n / n)


@mutant("moments.merge", "test_moments::test_parts_merge_to_the_whole", "statistics of ranks are averaged")
def merge_by_averaging_statistics(a, b):
    return Moments(a.n + b.n, (a.mean + b.mean) / 2, a.m2 + b.m2)


@mutant("moments.variance", "test_moments::test_variance_is_the_textbooks", "biased and Bessel's exchanged")
def variance_swapped(m, *, correction):
    return moments_.variance(m, correction=1 - correction)


@mutant("moments.variance", "test_moments::test_variance_divides_by_degrees_of_freedom", "defect 6: 0/0 for one sample")
def variance_of_one_is_nan(m, *, correction):
    return m.m2 / (m.n - correction)


@mutant("moments.variance", "test_moments::test_variance_is_the_textbooks", "the standard deviation instead")
def variance_is_a_deviation(m, *, correction):
    return moments_.variance(m, correction=correction).sqrt()


# Whitening


@mutant("whitening.whiten", "test_whitening::test_mean_is_kept_without_shift", "torchtune: the flag is inverted")
def whiten_inverted_shift(x, mask, moments, *, shift_mean, **options):
    return whitening_.whiten(x, mask, moments, shift_mean=not shift_mean, **options)


@mutant("whitening.whiten", "test_whitening::test_mean_is_kept_without_shift", "the mean is never put back")
def whiten_always_centres(x, mask, moments, *, shift_mean, **options):
    return whitening_.whiten(x, mask, moments, shift_mean=True, **options)


@mutant("whitening.whiten", "test_whitening::test_padding_is_not_in_the_statistics", "OpenAI, trlx: padding included")
def whiten_with_padding(x, mask, moments, **options):
    everything = torch.ones_like(mask)
    return masking_.keep(whitening_.whiten(x, everything, moments_.masked_moments(x, everything), **options), mask)


@mutant("whitening.whiten", "test_whitening::test_statistics_are_an_argument", "whitens per minibatch, unasked")
def whiten_by_own_moments(x, mask, moments, **options):
    return whitening_.whiten(x, mask, moments_.masked_moments(x, mask), **options)


def _whiten(x, mask, moments, scale, shift_mean):
    whitened = (masking_.keep(x, mask) - moments.mean) * scale
    return torch.where(mask, whitened if shift_mean else whitened + moments.mean, 0.0)


@mutant("whitening.whiten", "test_whitening::test_eps_damps", "AReaL: eps outside the root")
def whiten_eps_outside(x, mask, moments, *, shift_mean, correction, eps):
    deviation = moments_.variance(moments, correction=correction).sqrt()
    return _whiten(x, mask, moments, torch.where(deviation + eps > 0, 1 / (deviation + eps), 0.0), shift_mean)


@mutant("whitening.whiten", "test_whitening::test_eps_damps", "OpenRLHF: eps is a floor")
def whiten_eps_floor(x, mask, moments, *, shift_mean, correction, eps):
    floored = moments_.variance(moments, correction=correction).clamp(min=eps)
    return _whiten(x, mask, moments, torch.where(floored > 0, floored.rsqrt(), 0.0), shift_mean)


@mutant("whitening.whiten", "test_whitening::test_published_numbers", "biased and Bessel's exchanged")
def whiten_correction_swapped(x, mask, moments, *, correction, **options):
    return whitening_.whiten(x, mask, moments, correction=1 - correction, **options)


@mutant("whitening.whiten", "test_whitening::test_mean_0_and_variance_1", "divided by the variance")
def whiten_by_variance(x, mask, moments, *, shift_mean, correction, eps):
    spread = moments_.variance(moments, correction=correction) + eps
    return _whiten(x, mask, moments, torch.where(spread > 0, 1 / spread, 0.0), shift_mean)


@mutant("whitening.whiten", "test_whitening::test_constants_give_finite_values", "0 * inf for a constant")
def whiten_constants_to_nan(x, mask, moments, *, shift_mean, correction, eps):
    return _whiten(x, mask, moments, (moments_.variance(moments, correction=correction) + eps).rsqrt(), shift_mean)


@mutant("whitening.whiten", "test_whitening::test_padding_is_not_in_the_statistics", "padding becomes -mean / std")
def whiten_leaves_padding(x, mask, moments, **options):
    return whitening_.whiten(masking_.keep(x, mask), torch.ones_like(mask), moments, **options)


@mutant("whitening.whiten", contract("test_no_random_number_is_drawn", "whitening.whiten"), "jitter against ties")
def whiten_with_noise(x, mask, moments, **options):
    return whitening_.whiten(x, mask, moments, **options) + masking_.keep(1e-30 * torch.randn_like(x), mask)


# KL


@mutant("kl.k1", "test_kl::test_estimators_are_their_formulas[k1]", "the other direction")
def k1_reversed(logprobs, ref_logprobs, mask):
    return kl_.k1(ref_logprobs, logprobs, mask)


@mutant("kl.k1", "test_kl::test_estimators_are_their_formulas[k1]", "bits for nats")
def k1_in_bits(logprobs, ref_logprobs, mask):
    return kl_.k1(logprobs, ref_logprobs, mask) / math.log(2)


@mutant("kl.k1", "test_kl::test_estimators_are_their_formulas[k1]", "a per-token mean for per-token values")
def k1_averaged_over_tokens(logprobs, ref_logprobs, mask):
    return kl_.k1(logprobs, ref_logprobs, mask) / mask.sum(-1, keepdim=True).clamp(min=1)


@mutant("kl.k1", "test_kl::test_estimators_are_their_formulas[k1]", "-inf - -inf, then a product with the mask")
def k1_by_product(logprobs, ref_logprobs, mask):
    return (logprobs - ref_logprobs) * mask


@mutant("kl.kl_abs", "test_kl::test_never_negative[kl_abs]", "k1 under another name")
def abs_without_abs(logprobs, ref_logprobs, mask):
    return kl_.k1(logprobs, ref_logprobs, mask)


@mutant("kl.k2", "test_kl::test_estimators_are_their_formulas[k2]", "the half is missing")
def k2_without_half(logprobs, ref_logprobs, mask):
    return kl_.k1(logprobs, ref_logprobs, mask).square()


@mutant(
    "kl.k2", "test_kl::test_gradient_of_k2_is_that_of_the_divergence", "a gradient through the reference's side only"
)
def k2_without_gradient(logprobs, ref_logprobs, mask):
    return kl_.k2(logprobs.detach(), ref_logprobs, mask) + 0 * kl_.k1(logprobs, ref_logprobs, mask)


@mutant("kl.k3", "test_kl::test_unbiased[k3]", "exp(d) - 1 - d: unbiased for the other direction's samples")
def k3_sign(logprobs, ref_logprobs, mask):
    return kl_.k3(ref_logprobs, logprobs, mask)


@mutant("kl.k3", "test_kl::test_k3_does_not_cancel_near_equality", "exp(-d) - 1 + d cancels in float32")
def k3_cancelling(logprobs, ref_logprobs, mask):
    d = kl_.k1(logprobs, ref_logprobs, mask)
    return torch.where(mask, (-d).exp() - 1 + d, 0.0)


@mutant("kl.k3", "test_kl::test_gradient_of_k3_descends_the_other_direction", "k2's gradient promised for k3")
def k3_with_the_gradient_of_k2(logprobs, ref_logprobs, mask):
    surrogate = kl_.k2(logprobs, ref_logprobs, mask)
    return kl_.k3(logprobs, ref_logprobs, mask).detach() + surrogate - surrogate.detach()


@mutant("kl.full", "test_kl::test_full_expects_under_the_policy", "kl_div with its arguments exchanged")
def full_reversed(logprobs, ref_logprobs, mask):
    return kl_.full(ref_logprobs, logprobs, mask)


@mutant("kl.full", "test_kl::test_full_expects_under_the_policy", "0 * -inf for a token that is ruled out")
def full_of_impossible_tokens(logprobs, ref_logprobs, mask):
    return torch.where(mask, (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1), 0.0)


@mutant("kl.full", "test_kl::test_full_is_the_divergence", "a mean over the vocabulary")
def full_averaged(logprobs, ref_logprobs, mask):
    return kl_.full(logprobs, ref_logprobs, mask) / logprobs.shape[-1]


# Log-probabilities


@mutant(
    "logprobs.token_logprobs", "test_logprobs::test_logprob_is_log_softmax_at_the_token", "scored by the next logits"
)
def logprobs_off_by_one(logits, tokens):
    return logprobs_.token_logprobs(logits.roll(1, dims=-2), tokens)


@mutant("logprobs.token_logprobs", "test_logprobs::test_logprobs_normalise", "raw logits for log-probabilities")
def logprobs_not_normalised(logits, tokens):
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@mutant("logprobs.token_logprobs", "test_logprobs::test_extreme_logits_stay_finite", "log(softmax), overflowing")
def logprobs_by_naive_softmax(logits, tokens):
    exponentials = logits.exp()
    return (exponentials.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) / exponentials.sum(-1)).log()


@mutant("logprobs.token_logprobs", "test_logprobs::test_half_precision_logits_are_scored_in_float32", "stays in half")
def logprobs_in_half_precision(logits, tokens):
    return (
        logits.log_softmax(-1)
        .gather(-1, tokens.unsqueeze(-1))
        .squeeze(-1)
        .to(torch.promote_types(logits.dtype, torch.float32))
    )


@mutant("logprobs.token_logprobs", "test_logprobs::test_gradient_of_the_logprob", "a normaliser without a gradient")
def logprobs_with_detached_normaliser(logits, tokens):
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1).detach()


@mutant("logprobs.token_entropy", "test_logprobs::test_gradient_of_the_entropy", "TRL's fused path: gradient dropped")
def entropy_without_gradient(logits):
    return logprobs_.token_entropy(logits.detach()) + 0 * logits.sum(-1)


@mutant("logprobs.token_entropy", "test_logprobs::test_ruled_out_tokens_are_not_there", "0 * -inf for -inf logits")
def entropy_of_impossible_tokens(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@mutant("logprobs.token_entropy", "test_logprobs::test_entropy_of_the_uniform_distribution", "bits for nats")
def entropy_in_bits(logits):
    return logprobs_.token_entropy(logits) / math.log(2)


@mutant("logprobs.token_entropy", "test_logprobs::test_entropy_is_the_expected_surprise", "a sampled -log p for H")
def entropy_of_the_likeliest(logits):
    return -logprobs_.token_logprobs(logits, logits.argmax(-1))


# Rewards


def _placed(scores, kl, mask, kl_coef, place):
    penalty = -kl_coef * masking_.keep(kl, mask)
    return Rewards(penalty + torch.where(place, scores.unsqueeze(-1), 0.0), penalty)


@mutant("rewards.compute_rewards", "test_rewards::test_equal_policies_leave_the_score_alone", "score on the last slot")
def score_on_the_last_slot(scores, kl, mask, *, kl_coef):
    return _placed(scores, kl, mask, kl_coef, last_slot(mask))


@mutant("rewards.compute_rewards", "test_rewards::test_equal_policies_leave_the_score_alone", "score on every token")
def score_on_every_token(scores, kl, mask, *, kl_coef):
    return _placed(scores, kl, mask, kl_coef, mask)


@mutant("rewards.compute_rewards", "test_rewards::test_equal_policies_leave_the_score_alone", "score on the first pad")
def score_on_the_first_pad(scores, kl, mask, *, kl_coef):
    return _placed(scores, kl, mask, kl_coef, first_pad(mask))


@mutant("rewards.compute_rewards", "test_rewards::test_equal_policies_leave_the_score_alone", "score before a hole")
def score_by_count(scores, kl, mask, *, kl_coef):
    return _placed(scores, kl, mask, kl_coef, place_by_count(mask))


@mutant("rewards.compute_rewards", "test_rewards::test_the_penalty_is_paid_per_token", "divergence is rewarded")
def penalty_with_wrong_sign(scores, kl, mask, *, kl_coef):
    return rewards_.compute_rewards(scores, -kl, mask, kl_coef=kl_coef)


@mutant("rewards.compute_rewards", "test_rewards::test_rows_sum_to_score_minus_penalty", "KL of wrong unit: per token")
def penalty_averaged(scores, kl, mask, *, kl_coef):
    return rewards_.compute_rewards(scores, kl / mask.sum(-1, keepdim=True).clamp(min=1), mask, kl_coef=kl_coef)


@mutant("rewards.compute_rewards", contract("test_nothing_under_the_mask", "rewards.compute_rewards"), "padding pays")
def penalty_on_padding(scores, kl, mask, *, kl_coef):
    got = rewards_.compute_rewards(scores, kl, mask, kl_coef=kl_coef)
    return Rewards(got.rewards - torch.where(mask, 0.0, kl_coef * kl), -kl_coef * kl)


@mutant("rewards.compute_rewards", "test_rewards::test_rows_sum_to_score_minus_penalty", "the score is scaled too")
def coefficient_on_the_score(scores, kl, mask, *, kl_coef):
    return rewards_.compute_rewards(kl_coef * scores, kl, mask, kl_coef=kl_coef)


@mutant("rewards.compute_rewards", "test_rewards::test_rows_sum_to_score_minus_penalty", "the score replaces a penalty")
def score_instead_of_penalty(scores, kl, mask, *, kl_coef):
    got = rewards_.compute_rewards(scores, kl, mask, kl_coef=kl_coef)
    return Rewards(torch.where(masking_.last_kept(mask), scores.unsqueeze(-1), got.non_score_rewards), got[1])


# Advantages


def _backward(rewards, values, mask, bootstrap, gamma, lam, step):
    """The customary loop; ``step`` makes (delta, carried) of what it sees at t."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    carried = torch.zeros_like(rewards[..., 0])
    out = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[-1])):
        last = t == rewards.shape[-1] - 1
        following = (torch.zeros_like(carried) if bootstrap is None else bootstrap) if last else values[..., t + 1]
        carried = step(rewards[..., t], values[..., t], following, carried, gamma, lam)
        out[..., t] = torch.where(mask[..., t], carried, 0.0)
    return Advantages(out, torch.where(mask, out + values, 0.0))


@mutant("advantages.gae", "test_advantages::test_a_hole_is_no_step", "defect 10, TRL: holes filled with zeros")
def gae_zero_fills_holes(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return _backward(
        rewards, values, mask, bootstrap, gamma, lam, lambda r, v, after, a, g, k: r + g * after - v + g * k * a
    )


@mutant(
    "advantages.gae", "test_advantages::test_gae_is_the_papers_double_sum", "done mask one too late: padding's value"
)
def gae_sees_the_value_of_padding(rewards, values, mask, bootstrap=None, *, gamma, lam):
    got = advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    leaked = gamma * torch.cat((torch.where(mask, 0.0, values)[..., 1:], torch.zeros_like(values[..., :1])), dim=-1)
    return Advantages(got.advantages + torch.where(mask, leaked, 0.0), got.returns)


@mutant("advantages.gae", "test_advantages::test_truncation_bootstraps_and_termination_does_not", "always terminated")
def gae_without_bootstrap(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return advantages_.gae(rewards, values, mask, gamma=gamma, lam=lam)


@mutant("advantages.gae", "test_advantages::test_truncation_bootstraps_and_termination_does_not", "in front of padding")
def gae_bootstraps_full_rows_only(rewards, values, mask, bootstrap=None, *, gamma, lam):
    if bootstrap is not None:
        bootstrap = torch.where(mask[..., -1], bootstrap, 0.0)
    return advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)


@mutant(
    "advantages.gae",
    "test_advantages::test_truncation_bootstraps_and_termination_does_not",
    "the end bootstraps itself",
)
def gae_bootstraps_with_the_last_value(rewards, values, mask, bootstrap=None, *, gamma, lam):
    if bootstrap is None:
        bootstrap = (torch.where(mask, values, 0.0) * masking_.last_kept(mask)).sum(-1)
    return advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)


@mutant("advantages.gae", "test_advantages::test_gae_is_the_papers_double_sum", "lam without gamma in the trace")
def gae_forgets_gamma_in_the_trace(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return _kept_loop(rewards, values, mask, bootstrap, lambda r, v, after, a: r + gamma * after - v + lam * a)


@mutant("advantages.gae", "test_advantages::test_lambda_0_is_the_td_error", "the next value is not discounted")
def gae_forgets_gamma_in_the_error(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return _kept_loop(rewards, values, mask, bootstrap, lambda r, v, after, a: r + after - v + gamma * lam * a)


@mutant("advantages.gae", "test_advantages::test_gae_is_the_papers_double_sum", "lam squared")
def gae_decays_twice(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam**2)


@mutant("advantages.gae", "test_advantages::test_returns_are_advantages_plus_values", "returns without the values")
def gae_returns_are_advantages(rewards, values, mask, bootstrap=None, *, gamma, lam):
    got = advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    return Advantages(got.advantages, got.advantages)


@mutant("advantages.gae", "test_advantages::test_returns_are_advantages_plus_values", "whitened ahead of the returns")
def gae_returns_of_whitened_advantages(rewards, values, mask, bootstrap=None, *, gamma, lam):
    got = advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    moments = moments_.masked_moments(got.advantages, mask)
    white = whitening_.whiten(got.advantages, mask, moments, shift_mean=True, correction=1, eps=1e-8)
    return Advantages(got.advantages, torch.where(mask, white + values, 0.0))


@mutant("advantages.gae", "test_advantages::test_linear", "whitening fused in")
def gae_whitens(rewards, values, mask, bootstrap=None, *, gamma, lam):
    got = advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    moments = moments_.masked_moments(got.advantages, mask)
    white = whitening_.whiten(got.advantages, mask, moments, shift_mean=True, correction=1, eps=1e-8)
    return Advantages(white, got.returns)


@mutant("advantages.gae", "test_advantages::test_the_past_does_not_matter", "time runs forward")
def gae_runs_forward(rewards, values, mask, bootstrap=None, *, gamma, lam):
    got = advantages_.gae(rewards.flip(-1), values.flip(-1), mask.flip(-1), bootstrap, gamma=gamma, lam=lam)
    return Advantages(got.advantages.flip(-1), got.returns.flip(-1))


@mutant("advantages.gae", "test_advantages::test_gae_is_the_papers_double_sum", "a coefficient rounded to float32")
def gae_rounds_its_coefficient(rewards, values, mask, bootstrap=None, *, gamma, lam):
    lam = torch.tensor(lam, dtype=torch.float32).item()
    return advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)


@mutant(
    "advantages.gae", "test_advantages::test_long_sequences_agree_with_the_loop", "a division by powers of gamma lam"
)
def gae_by_cumulated_powers(rewards, values, mask, bootstrap=None, *, gamma, lam):
    deltas = advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=0.0).advantages
    powers = (gamma * lam) ** (mask.cumsum(-1) - mask.long()).to(deltas.dtype)
    out = torch.where(mask, (deltas * powers).flip(-1).cumsum(-1).flip(-1) / powers, 0.0)
    return Advantages(out, torch.where(mask, out + values, 0.0))


@mutant("advantages.gae", contract("test_narrow_inputs_are_computed_in_float32", "advantages.gae"), "stays in half")
def gae_in_half_precision(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return _kept_loop(
        rewards, values, mask, bootstrap, lambda r, v, after, a: (r + gamma * after - v + gamma * lam * a).to(r.dtype)
    )


@mutant("advantages.gae", contract("test_arguments_are_left_alone", "advantages.gae"), "zeroes the caller's rewards")
def gae_in_place(rewards, values, mask, bootstrap=None, *, gamma, lam):
    with torch.no_grad():
        rewards.masked_fill_(~mask, 0.0)
    return advantages_.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)


@mutant("advantages.gae", contract("test_wrong_shape_is_refused", "advantages.gae"), "silent broadcasting")
def gae_broadcasts(rewards, values, mask, bootstrap=None, *, gamma, lam):
    return advantages_.gae(*torch.broadcast_tensors(rewards, values, mask), bootstrap, gamma=gamma, lam=lam)


@mutant("advantages.gae", contract("test_deletion", "advantages.gae"), "a clock that ticks in holes")
def gae_discounts_holes(rewards, values, mask, bootstrap=None, *, gamma, lam):
    ticks = gamma ** (~mask).flip(-1).cumsum(-1).flip(-1).to(rewards.dtype)
    return advantages_.gae(rewards * ticks, values, mask, bootstrap, gamma=gamma, lam=lam)


def _kept_loop(rewards, values, mask, bootstrap, step):
    """A backward loop that skips holes; ``step`` makes an advantage of (r, V, next V, next A)."""
    carried = torch.zeros_like(rewards[..., 0])
    following = carried if bootstrap is None else bootstrap
    out = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[-1])):
        kept = mask[..., t]
        carried = torch.where(kept, step(rewards[..., t], values[..., t], following, carried), carried)
        following = torch.where(kept, values[..., t], following)
        out[..., t] = torch.where(kept, carried, 0.0)
    return Advantages(out, torch.where(mask, out + values, 0.0))


# The policy's loss


def _policy(logprobs, old_logprobs, advantages, mask, cliprange, loss, *, like=None):
    """Our diagnostics with another loss: a function of (ratio, clipped ratio, advantage) per token."""
    ours = like or losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    ratio = (masking_.keep(logprobs, mask) - masking_.keep(old_logprobs.detach(), mask)).exp()
    advantages = masking_.keep(advantages.detach(), mask)
    per_token = loss(ratio, ratio.clamp(1 - cliprange, 1 + cliprange), advantages)
    return ours._replace(loss=Average(masking_.masked_sum(per_token, mask), mask.sum().to(per_token.dtype)))


POLICY = "losses.clipped_policy_loss"


@mutant(POLICY, "test_losses::test_policy_loss_is_pessimistic", "min for max of negated surrogates")
def policy_takes_the_better(logprobs, old_logprobs, advantages, mask, *, cliprange):
    return _policy(logprobs, old_logprobs, advantages, mask, cliprange, lambda r, c, a: torch.minimum(-a * r, -a * c))


@mutant(
    POLICY, "test_losses::test_gradient_vanishes_past_the_clip_on_the_improving_side_only", "no pessimism: clip alone"
)
def policy_clips_both_sides(logprobs, old_logprobs, advantages, mask, *, cliprange):
    return _policy(logprobs, old_logprobs, advantages, mask, cliprange, lambda r, c, a: -a * c)


@mutant(POLICY, "test_losses::test_policy_loss_is_the_papers_formula", "only the upper side is clipped")
def policy_clips_above_only(logprobs, old_logprobs, advantages, mask, *, cliprange):
    return _policy(
        logprobs, old_logprobs, advantages, mask, cliprange,
        lambda r, c, a: torch.maximum(-a * r, -a * r.clamp(max=1 + cliprange)),
    )  # fmt: skip


@mutant(POLICY, "test_losses::test_policy_loss_is_the_papers_formula", "1 / (1 + eps) for 1 - eps")
def policy_clips_the_log_ratio(logprobs, old_logprobs, advantages, mask, *, cliprange):
    def loss(r, c, a):
        return torch.maximum(-a * r, -a * r.log().clamp(-cliprange, cliprange).exp())

    return _policy(logprobs, old_logprobs, advantages, mask, cliprange, loss)


@mutant(POLICY, "test_losses::test_gradient_at_ratio_1_is_minus_the_advantage", "gradient ascent on the loss")
def policy_sign(logprobs, old_logprobs, advantages, mask, *, cliprange):
    return losses_.clipped_policy_loss(logprobs, old_logprobs, -advantages, mask, cliprange=cliprange)


@mutant(POLICY, "test_losses::test_policy_loss_is_the_papers_formula", "old over new")
def policy_ratio_upside_down(logprobs, old_logprobs, advantages, mask, *, cliprange):
    return _policy(
        logprobs, old_logprobs, advantages, mask, cliprange,
        lambda r, c, a: torch.maximum(-a / r, -a * (1 / r).clamp(1 - cliprange, 1 + cliprange)),
    )  # fmt: skip


@mutant(POLICY, "test_losses::test_an_infinite_log_ratio_under_the_mask_is_invisible", "defect 2: loss * 0, inf * 0")
def policy_masked_by_product(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ratio = (logprobs - old_logprobs.detach()).exp()
    a = advantages.detach()
    per_token = torch.maximum(-a * ratio, -a * ratio.clamp(1 - cliprange, 1 + cliprange)) * mask
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    return ours._replace(loss=Average(per_token.sum(), ours.loss.weight))


@mutant(POLICY, contract("test_garbage_under_the_mask", POLICY), "where() after exp: NaN in the backward pass")
def policy_masked_too_late(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ratio = (logprobs - old_logprobs.detach()).exp()
    a = advantages.detach()
    per_token = torch.maximum(-a * ratio, -a * ratio.clamp(1 - cliprange, 1 + cliprange))
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    return ours._replace(loss=Average(torch.where(mask, per_token, 0.0).sum(), ours.loss.weight))


@mutant(POLICY, "test_losses::test_policy_loss_of_microbatches_adds_up", "token means, averaged over microbatches")
def policy_naive_token_mean(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    return ours._replace(
        loss=Average(ours.loss.total / ours.loss.weight.clamp(min=1), torch.ones_like(ours.loss.total))
    )


@mutant(POLICY, "test_losses::test_the_mean_is_over_kept_tokens", "sequence means instead of token means")
def policy_mean_of_sequences(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    rows = [
        losses_.clipped_policy_loss(*row, cliprange=cliprange).loss
        for row in zip(logprobs, old_logprobs, advantages, mask, strict=True)
    ]
    total = sum(row.total / row.weight.clamp(min=1) for row in rows)
    return ours._replace(loss=Average(total, torch.tensor(float(len(rows))).double()))


@mutant(POLICY, "test_losses::test_the_mean_is_over_kept_tokens", "padding in the denominator")
def policy_weight_counts_padding(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    return ours._replace(loss=Average(ours.loss.total, torch.tensor(float(mask.numel())).double()))


@mutant(POLICY, "test_losses::test_policy_targets_receive_no_gradient", "advantages of a live critic")
def policy_leaks_through_advantages(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    leak = masking_.masked_sum(advantages, mask)
    return ours._replace(loss=Average(ours.loss.total + leak - leak.detach(), ours.loss.weight))


@mutant(POLICY, "test_losses::test_policy_targets_receive_no_gradient", "old log-probabilities of a live policy")
def policy_leaks_through_old_logprobs(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    leak = masking_.masked_sum(old_logprobs, mask)
    return ours._replace(loss=Average(ours.loss.total + leak - leak.detach(), ours.loss.weight))


@mutant(POLICY, "test_losses::test_policy_diagnostics_are_their_formulas", "every token outside the range counts")
def policy_counts_harmless_clips(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    outside = ((masking_.keep(logprobs, mask) - masking_.keep(old_logprobs, mask)).exp() - 1).abs() > cliprange
    return ours._replace(clip_fraction=Average(masking_.masked_sum(outside.double(), mask), ours.loss.weight))


@mutant(POLICY, "test_losses::test_policy_diagnostics_are_their_formulas", "new - old for old - new")
def policy_kl_with_wrong_sign(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    return ours._replace(policy_kl=Average(-ours.policy_kl.total, ours.policy_kl.weight))


@mutant(POLICY, "test_losses::test_policy_diagnostics_are_their_formulas", "the largest ratio, small ones unseen")
def policy_deviation_is_signed(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    moved = masking_.keep(logprobs, mask).detach() - masking_.keep(old_logprobs, mask).detach()
    return ours._replace(ratio_deviation=moved.expm1().amax())


@mutant(POLICY, "test_losses::test_diagnostics_carry_no_gradient", "a metric that trains")
def policy_reports_with_gradient(logprobs, old_logprobs, advantages, mask, *, cliprange):
    ours = losses_.clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=cliprange)
    return ours._replace(approx_kl=Average(kl_.k2(logprobs, old_logprobs, mask).sum(), ours.approx_kl.weight))


@mutant(POLICY, "test_losses::test_without_a_clip_range_it_is_the_plain_surrogate", "CISPO's weight for PPO's ratio")
def policy_with_detached_weight(logprobs, old_logprobs, advantages, mask, *, cliprange):
    return _policy(
        logprobs, old_logprobs, advantages, mask, cliprange,
        lambda r, c, a: -a * c.detach() * masking_.keep(logprobs, mask),
    )  # fmt: skip


# The critic's loss

VALUE = "losses.clipped_value_loss"


def _value(values, old_values, returns, mask, cliprange, loss):
    """Our diagnostics with another loss: a function of (V, V_old, R) per token."""
    ours = losses_.clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    per_token = loss(*(masking_.keep(x, mask) for x in (values, old_values.detach(), returns.detach())))
    return ours._replace(loss=Average(masking_.masked_sum(per_token, mask), ours.loss.weight))


@mutant(VALUE, "test_losses::test_value_loss_is_anchored_at_the_old_values", "clipped around the returns")
def value_anchored_at_returns(values, old_values, returns, mask, *, cliprange):
    return losses_.clipped_value_loss(values, returns, old_values, mask, cliprange=cliprange)


@mutant(VALUE, "test_losses::test_value_loss_is_its_formula", "clipped around the right target's neighbour")
def value_clipped_around_returns(values, old_values, returns, mask, *, cliprange):
    def loss(v, old, r):
        return 0.5 * torch.maximum((v - r).square(), (v.clamp(r - cliprange, r + cliprange) - r).square())

    return _value(values, old_values, returns, mask, cliprange, loss)


@mutant(VALUE, "test_losses::test_value_loss_is_its_formula", "the half is missing")
def value_without_half(values, old_values, returns, mask, *, cliprange):
    ours = losses_.clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    return ours._replace(loss=Average(2 * ours.loss.total, ours.loss.weight))


@mutant(VALUE, "test_losses::test_value_loss_is_pessimistic", "min for max")
def value_takes_the_better(values, old_values, returns, mask, *, cliprange):
    def loss(v, old, r):
        clipped = v.clamp(old - cliprange, old + cliprange)
        return 0.5 * torch.minimum((v - r).square(), (clipped - r).square())

    return _value(values, old_values, returns, mask, cliprange, loss)


@mutant(VALUE, "test_losses::test_value_gradient_vanishes_only_where_the_clipped_error_counts", "never clipped")
def value_not_clipped(values, old_values, returns, mask, *, cliprange):
    return _value(values, old_values, returns, mask, cliprange, lambda v, old, r: 0.5 * (v - r).square())


@mutant(VALUE, "test_losses::test_value_loss_does_not_see_a_common_shift", "clipped by a factor, like a ratio")
def value_clipped_by_factor(values, old_values, returns, mask, *, cliprange):
    def loss(v, old, r):
        reach = cliprange * old.abs()
        return 0.5 * torch.maximum((v - r).square(), (v.clamp(old - reach, old + reach) - r).square())

    return _value(values, old_values, returns, mask, cliprange, loss)


@mutant(VALUE, "test_losses::test_value_targets_receive_no_gradient", "old values of a live critic")
def value_leaks_through_old_values(values, old_values, returns, mask, *, cliprange):
    ours = losses_.clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    leak = masking_.masked_sum(old_values, mask)
    return ours._replace(loss=Average(ours.loss.total + leak - leak.detach(), ours.loss.weight))


@mutant(VALUE, "test_losses::test_value_targets_receive_no_gradient", "returns = A + V with a live V")
def value_leaks_through_returns(values, old_values, returns, mask, *, cliprange):
    ours = losses_.clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    leak = masking_.masked_sum(returns, mask)
    return ours._replace(loss=Average(ours.loss.total + leak - leak.detach(), ours.loss.weight))


@mutant(VALUE, "test_losses::test_a_wild_value_under_the_mask_is_invisible", "an error times 0 under the mask")
def value_masked_by_product(values, old_values, returns, mask, *, cliprange):
    clipped = values.clamp(old_values.detach() - cliprange, old_values.detach() + cliprange)
    errors = torch.maximum((values - returns.detach()).square(), (clipped - returns.detach()).square())
    ours = losses_.clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    return ours._replace(loss=Average((0.5 * errors * mask).sum(), ours.loss.weight))


@mutant(VALUE, "test_losses::test_value_diagnostics_are_their_formulas", "half the error is reported")
def value_reports_half_the_error(values, old_values, returns, mask, *, cliprange):
    ours = losses_.clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    return ours._replace(error=Average(0.5 * ours.error.total, ours.error.weight))


# Controllers

ADAPTIVE = "controllers.adaptive_kl_update"


def _adaptive(error):
    """The update with another error; nothing is refused."""

    def update(state, kl, n_steps, *, target, horizon):
        return KLControllerState(coef=state.coef * (1 + error(kl, target) * n_steps / horizon))

    return update


def _clipped(x, low=-0.2, high=0.2):
    return min(max(x, low), high)


@mutant(ADAPTIVE, "test_controllers::test_monotone", "more KL, less penalty")
def controller_sign(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: -_clipped(kl / target - 1))(state, kl, n_steps, target=target, horizon=horizon)


@mutant(ADAPTIVE, "test_controllers::test_bounded_and_positive", "an error without bounds")
def controller_without_clip(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: kl / target - 1)(state, kl, n_steps, target=target, horizon=horizon)


@mutant(ADAPTIVE, "test_controllers::test_one_update_is_its_formula", "bounds of 0.02")
def controller_with_a_tight_clip(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: _clipped(kl / target - 1, -0.02, 0.02))(
        state, kl, n_steps, target=target, horizon=horizon
    )


@mutant(ADAPTIVE, "test_controllers::test_one_update_is_its_formula", "only excess is answered")
def controller_clips_below_at_zero(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: _clipped(kl / target - 1, 0.0))(
        state, kl, n_steps, target=target, horizon=horizon
    )


@mutant(ADAPTIVE, "test_controllers::test_scale_equivariance", "a difference for a ratio")
def controller_by_difference(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: _clipped(kl - target))(state, kl, n_steps, target=target, horizon=horizon)


@mutant(ADAPTIVE, "test_controllers::test_one_update_is_its_formula", "one step, however many sequences were seen")
def controller_forgets_n_steps(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: _clipped(kl / target - 1))(state, kl, 1, target=target, horizon=horizon)


@mutant(ADAPTIVE, "test_controllers::test_kl_that_is_no_number_is_refused", "defect 13: NaN poisons the coefficient")
def controller_takes_nan(state, kl, n_steps, *, target, horizon):
    return _adaptive(lambda kl, target: _clipped(kl / target - 1))(state, kl, n_steps, target=target, horizon=horizon)


@mutant(ADAPTIVE, "test_controllers::test_too_many_sequences_are_refused", "defect 13: a factor of 0 or below")
def controller_takes_any_n_steps(state, kl, n_steps, *, target, horizon):
    return controller_takes_nan(state, kl, n_steps, target=target, horizon=horizon)


@mutant(ADAPTIVE, "test_controllers::test_scale_equivariance", "a term instead of a factor")
def controller_adds(state, kl, n_steps, *, target, horizon):
    return KLControllerState(coef=state.coef + _clipped(kl / target - 1) * n_steps / horizon)


@mutant("controllers.fixed_kl_update", "test_controllers::test_fixed_is_the_identity", "a fixed coefficient that moves")
def fixed_controller_moves(state, kl, n_steps):
    return KLControllerState(coef=state.coef * (1 + 1e-6 * n_steps))


# The fused head

HEAD = "fused_head.fused_logprobs"
KEPT = "test_fused_head::test_kept_equals_recomputed"


def _head_that_keeps(put, get):
    """The head with ``put(logits, softcap / temperature)`` kept and ``get`` of it read back."""

    def head(hidden, weight, tokens, bias=None, *, keep_logits, **spec):
        cap = None if spec["softcap"] is None else spec["softcap"] / spec["temperature"]
        shape = (weight.shape[0], tokens.numel())

        def pack(x):
            return (True, put(x, cap)) if keep_logits and x.shape == shape else (False, x)

        def unpack(saved):
            return get(saved[1]) if saved[0] else saved[1]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return fused_head_.fused_logprobs(hidden, weight, tokens, bias, keep_logits=keep_logits, **spec)

    return head


@mutant(HEAD, KEPT, "the backward pass works in place on what is kept, and a second one finds it spent")
def head_spends_what_it_kept(hidden, weight, tokens, bias=None, **spec):
    def spend(kept):
        found = kept.clone()
        kept.zero_()
        return found

    return _head_that_keeps(lambda logits, cap: logits, spend)(hidden, weight, tokens, bias, **spec)


@mutant(HEAD, KEPT, "keeps the logits in half precision")
def head_keeps_rounded_logits(hidden, weight, tokens, bias=None, **spec):
    return _head_that_keeps(lambda logits, cap: logits.bfloat16(), lambda kept: kept.to(hidden.dtype))(
        hidden, weight, tokens, bias, **spec
    )


@mutant(HEAD, KEPT, "keeps the logits ahead of the softcap, and reads them as if behind it")
def head_keeps_uncapped_logits(hidden, weight, tokens, bias=None, **spec):
    def uncapped(logits, cap):
        return logits if cap is None else (logits / cap).clamp(-0.999, 0.999).atanh()

    return _head_that_keeps(uncapped, lambda kept: kept)(hidden, weight, tokens, bias, **spec)


@mutant(HEAD, KEPT, "keeps the logits less their maximum, and takes the logsumexp off once more")
def head_keeps_relative_logits(hidden, weight, tokens, bias=None, **spec):
    return _head_that_keeps(lambda logits, cap: logits - logits.max(), lambda kept: kept)(
        hidden, weight, tokens, bias, **spec
    )


@mutant(HEAD, "test_fused_head::test_kept_logits_save_a_product", "keeps the logits and computes them again")
def head_keeps_nothing(*tensors, keep_logits, **spec):
    return fused_head_.fused_logprobs(*tensors, keep_logits=False, **spec)


@mutant(HEAD, "test_fused_head::test_tiles_never_hold_the_whole_vocabulary", "keeps the logits unasked")
def head_keeps_unasked(*tensors, keep_logits, **spec):
    return fused_head_.fused_logprobs(*tensors, keep_logits=True, **spec)


@mutant(HEAD, "test_fused_head::test_products_are_made_by_what_is_given", "multiplies by torch.mm whatever is given")
def head_multiplies_as_ever(*tensors, product, **spec):
    return fused_head_.fused_logprobs(*tensors, product=torch.mm, **spec)


# Running them

_QUICK = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
FAILURES = (Exception, pytest.fail.Exception)


def run_property(place: str) -> None:
    """Run one property of tests/core in this process, with few examples and no search for the smallest."""
    file, _, name = place.partition("::")
    name, _, parameter = name.removesuffix("]").partition("[")
    test = getattr(importlib.import_module(f"tests.core.{file}"), name)
    with _settings(test, _QUICK):
        if parameter:
            (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
            assert parameter in mark.args[1], place
            test(**{mark.args[0]: parameter})
        else:
            test()


@contextmanager
def _settings(test, chosen):
    """hypothesis fixes a test's settings when it is defined; this is where it keeps them."""
    name = "_hypothesis_internal_use_settings"
    before = getattr(test, name, None)
    if before is not None:
        setattr(test, name, chosen)
    try:
        yield
    finally:
        if before is not None:
            setattr(test, name, before)


def killed(mutant: Mutant) -> bool:
    """Whether the property named for it fails on a mutant."""
    with subject.replaced(mutant.target, mutant.function):
        try:
            run_property(mutant.killer)
        except FAILURES:
            return True
    return False


def main() -> int:
    """Print the table; exit with 1 if a mutant survives."""
    argparse.ArgumentParser(
        prog="python -m tests.meta.mutants",
        description="Run every named wrong implementation against the property that should kill it; 1 if one survives.",
    ).parse_args()
    survivors = 0
    width = max(map(len, MUTANTS))
    for name, entry in MUTANTS.items():
        dead = killed(entry)
        survivors += not dead
        print(f"{name:{width}}  {'killed by' if dead else 'SURVIVES'} {entry.killer}  ({entry.origin})")
    print(f"{len(MUTANTS)} mutants, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    from tests.meta import mutants  # the catalogue under its own name, not a second one under __main__

    sys.exit(mutants.main())
