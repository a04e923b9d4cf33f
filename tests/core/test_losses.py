"""Properties of the clipped objectives."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import CLIP, NUMBERS, POSITIVE, cases, gradient, kept_values, rows_of
from tests.core.subject import subject

LOG_RATIOS = st.integers(-40, 40).map(lambda n: n / 32)
"""Log-probabilities apart by at most 2.5: ratios on both sides of every clip range, and 1 among them."""
POLICY = {"names": "logprobs old_logprobs advantages", "numbers": LOG_RATIOS, "cliprange": CLIP}
VALUE = {"names": "values old_values returns", "cliprange": POSITIVE}


def policy_loss(case, **changes):
    case = case.but(**changes)
    return subject.losses.clipped_policy_loss(
        case.logprobs, case.old_logprobs, case.advantages, case.mask, cliprange=case.cliprange
    )


def value_loss(case, **changes):
    case = case.but(**changes)
    return subject.losses.clipped_value_loss(
        case.values, case.old_values, case.returns, case.mask, cliprange=case.cliprange
    )


def tokens_of(case, *names):
    """The kept tokens one by one, as tuples of numbers."""
    rows = rows_of(case.mask, *(getattr(case, name) for name in names))
    return [token for _, columns in rows for token in zip(*columns, strict=True)]


def clip(x, low, high):
    return sorted((low, x, high))[1]


def policy_tokens(case):
    """(ratio, advantage, plain loss, clipped loss) of each kept token."""
    for new, old, advantage in tokens_of(case, "logprobs", "old_logprobs", "advantages"):
        ratio = math.exp(new - old)
        yield ratio, advantage, -advantage * ratio, -advantage * clip(ratio, 1 - case.cliprange, 1 + case.cliprange)


def value_tokens(case):
    """(value, plain error, clipped error) of each kept token, squared."""
    for value, old, target in tokens_of(case, "values", "old_values", "returns"):
        near = clip(value, old - case.cliprange, old + case.cliprange)
        yield value, (value - target) ** 2, (near - target) ** 2


# The policy's objective


@given(case=cases(**POLICY))
def test_policy_loss_is_the_papers_formula(case):
    """The loss adds max(-A ratio, -A clip(ratio)) over kept tokens, and its weight counts them."""
    got = policy_loss(case).loss
    assert_close(got.total, math.fsum(max(plain, clipped) for _, _, plain, clipped in policy_tokens(case)))
    assert_close(got.weight, float(case.mask.sum()))


@given(case=cases(**POLICY))
def test_gradient_at_ratio_1_is_minus_the_advantage(case):
    """Before the first update the gradient by each kept log-probability is -A, and the loss adds up to -sum A."""
    slope = gradient(lambda new: policy_loss(case, logprobs=new).loss.total, case.old_logprobs)
    assert_close(slope, torch.where(case.mask, -case.advantages, 0.0))
    total = policy_loss(case, logprobs=case.old_logprobs).loss.total
    assert_close(total, -math.fsum(kept_values(case.advantages, case.mask)))


@given(case=cases(**POLICY))
def test_policy_loss_is_pessimistic(case):
    """The loss is never below that of the plain surrogate -A ratio."""
    plain = math.fsum(plain for _, _, plain, _ in policy_tokens(case))
    assert policy_loss(case).loss.total >= plain - 1e-9 * max(1.0, abs(plain))


@given(case=cases(**POLICY))
def test_gradient_vanishes_past_the_clip_on_the_improving_side_only(case):
    """Past the clip a token that already improved gets exactly no gradient; one that got worse keeps all of it."""
    margin = [abs(abs(ratio - 1) - case.cliprange) for ratio, *_ in policy_tokens(case)]
    assume(min(margin, default=1.0) > 1e-9)
    slope = gradient(lambda new: policy_loss(case, logprobs=new).loss.total, case.logprobs)
    for got, (ratio, advantage, *_) in zip(slope[case.mask].tolist(), policy_tokens(case), strict=True):
        improved = (advantage > 0 and ratio > 1 + case.cliprange) or (advantage < 0 and ratio < 1 - case.cliprange)
        if improved:
            assert got == 0.0
        else:
            assert_close(got, -advantage * ratio)


@given(case=cases(**POLICY, factor=POSITIVE))
def test_policy_loss_is_positively_homogeneous(case):
    """Advantages scaled by a positive factor scale the loss by it."""
    scaled = policy_loss(case, advantages=case.factor * case.advantages).loss.total
    assert_close(scaled, case.factor * policy_loss(case).loss.total)


@given(case=cases(**POLICY))
def test_without_a_clip_range_it_is_the_plain_surrogate(case):
    """With a clip range beyond every ratio the loss is -sum A ratio, and no token is clipped."""
    got = policy_loss(case, cliprange=1e6)
    assert_close(got.loss.total, math.fsum(plain for _, _, plain, _ in policy_tokens(case)))
    assert_close(got.clip_fraction.total, 0.0)


@given(case=cases(**POLICY))
def test_policy_targets_receive_no_gradient(case):
    """Old log-probabilities and advantages are targets: nothing flows back into them."""
    for name in ("old_logprobs", "advantages"):
        slope = gradient(lambda x, name=name: policy_loss(case, **{name: x}).loss.total, getattr(case, name))
        assert not slope.any(), name


@given(case=cases(**POLICY, cut=st.integers(0, 6)))
def test_policy_loss_of_microbatches_adds_up(case):
    """However the tokens are cut into microbatches, totals, weights and gradients add up to those of the whole."""
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    parts = [
        case.but(**{name: getattr(case, name)[:, part] for name in names})
        for part in (slice(case.cut), slice(case.cut, None))
    ]
    whole, pieces = policy_loss(case), [policy_loss(part) for part in parts]
    for field in ("loss", "clip_fraction", "approx_kl", "policy_kl", "ratio"):
        assert_close(subject.averages.merge(*(getattr(piece, field) for piece in pieces)), getattr(whole, field))
    slope = gradient(lambda new: policy_loss(case, logprobs=new).loss.total, case.logprobs)
    slopes = [
        gradient(lambda new, part=part: policy_loss(part, logprobs=new).loss.total, part.logprobs) for part in parts
    ]
    assert_close(torch.cat(slopes, dim=-1), slope)


@given(case=cases(**POLICY, up=st.booleans(), name=st.sampled_from(("logprobs", "old_logprobs", "advantages"))))
def test_an_infinite_log_ratio_under_the_mask_is_invisible(case):
    """A masked token of infinite ratio or advantage changes neither the loss nor any gradient: no 0 * inf."""
    wild = getattr(case, case.name).masked_fill(~case.mask, math.inf if case.up else -math.inf)
    wilder = case.but(**{case.name: wild})
    assert_close(tuple(policy_loss(wilder)), tuple(policy_loss(case)))
    slope = gradient(lambda new: policy_loss(wilder, logprobs=new).loss.total, wilder.logprobs)
    assert_close(slope, gradient(lambda new: policy_loss(case, logprobs=new).loss.total, case.logprobs))
    assert not slope[~case.mask].any()


@given(case=cases(**POLICY))
def test_policy_diagnostics_are_their_formulas(case):
    """Clip fraction, both KLs, mean ratio and largest deviation are what they say, over kept tokens."""
    got = policy_loss(case)
    tokens = list(policy_tokens(case))
    assume(all(abs(clipped - plain) > 1e-9 or clipped == plain for *_, plain, clipped in tokens))
    moved = [new - old for new, old in tokens_of(case, "logprobs", "old_logprobs")]
    assert_close(got.clip_fraction.total, float(sum(clipped > plain for *_, plain, clipped in tokens)))
    assert_close(got.approx_kl.total, math.fsum(d * d / 2 for d in moved))
    assert_close(got.policy_kl.total, -math.fsum(moved))
    assert_close(got.ratio.total, math.fsum(ratio for ratio, *_ in tokens))
    assert_close(got.ratio_deviation, max((abs(ratio - 1) for ratio, *_ in tokens), default=0.0))
    for average in (got.clip_fraction, got.approx_kl, got.policy_kl, got.ratio):
        assert_close(average.weight, float(len(tokens)))


@given(case=cases(**POLICY))
def test_diagnostics_carry_no_gradient(case):
    """Only the loss can be differentiated; what is merely reported cannot leak into an update."""
    policy = policy_loss(case, logprobs=case.logprobs.clone().requires_grad_(True))
    value = value_loss(
        case,
        values=case.logprobs.clone().requires_grad_(True),
        old_values=case.old_logprobs,
        returns=case.advantages,
    )
    assert policy.loss.total.requires_grad
    assert value.loss.total.requires_grad
    reported = (
        policy.clip_fraction,
        policy.approx_kl,
        policy.policy_kl,
        policy.ratio,
        value.clip_fraction,
        value.error,
    )
    assert not any(average.total.requires_grad for average in reported)
    assert not policy.ratio_deviation.requires_grad


# The critic's objective


@given(case=cases(**VALUE))
def test_value_loss_is_its_formula(case):
    """The loss adds 0.5 max((V - R)^2, (clip(V) - R)^2) over kept tokens, and its weight counts them."""
    got = value_loss(case).loss
    assert_close(got.total, math.fsum(max(plain, clipped) / 2 for _, plain, clipped in value_tokens(case)))
    assert_close(got.weight, float(case.mask.sum()))


@given(case=cases(**VALUE))
def test_value_loss_is_anchored_at_the_old_values(case):
    """Where the value has not moved, the loss is 0.5 (V - R)^2 for every clip range, and the gradient V - R."""
    still = case.but(values=case.old_values)
    errors = [value - target for value, target in tokens_of(still, "values", "returns")]
    assert_close(value_loss(still).loss.total, math.fsum(e * e / 2 for e in errors))
    slope = gradient(lambda values: value_loss(still, values=values).loss.total, still.values)
    assert_close(slope, torch.where(case.mask, still.values - still.returns, 0.0))


@given(case=cases(**VALUE))
def test_value_loss_is_pessimistic(case):
    """The loss is never below half the squared error."""
    plain = math.fsum(plain / 2 for _, plain, _ in value_tokens(case))
    assert value_loss(case).loss.total >= plain - 1e-9 * max(1.0, plain)


@given(case=cases(**VALUE))
def test_value_gradient_vanishes_only_where_the_clipped_error_counts(case):
    """The gradient by V is V - R, and exactly 0 where the clipped error is the larger one."""
    assume(all(plain != clipped or value_moved_little for plain, clipped, value_moved_little in _ties(case)))
    slope = gradient(lambda values: value_loss(case, values=values).loss.total, case.values)
    expected = [
        0.0 if clipped > plain else value - target
        for (value, plain, clipped), (target,) in zip(value_tokens(case), tokens_of(case, "returns"), strict=True)
    ]
    assert_close(slope[case.mask], expected)


def _ties(case):
    """(plain, clipped, strictly inside the clip range) of each kept token: elsewhere a tie has no gradient."""
    for (value, plain, clipped), (old,) in zip(value_tokens(case), tokens_of(case, "old_values"), strict=True):
        yield plain, clipped, abs(value - old) < case.cliprange


@given(case=cases(**VALUE))
def test_without_a_clip_range_it_is_half_the_squared_error(case):
    """With a clip range beyond every move the loss is 0.5 sum (V - R)^2, and no token is clipped."""
    got = value_loss(case, cliprange=1e6)
    assert_close(got.loss.total, math.fsum(plain / 2 for _, plain, _ in value_tokens(case)))
    assert_close(got.clip_fraction.total, 0.0)


@given(case=cases(**VALUE, shift=NUMBERS))
def test_value_loss_does_not_see_a_common_shift(case):
    """Values, old values and returns shifted together leave loss and diagnostics as they were."""
    moved = {name: getattr(case, name) + case.shift for name in ("values", "old_values", "returns")}
    assert_close(tuple(value_loss(case, **moved)), tuple(value_loss(case)))


@given(case=cases(**VALUE))
def test_value_targets_receive_no_gradient(case):
    """Old values and returns are targets: nothing flows back into them."""
    for name in ("old_values", "returns"):
        slope = gradient(lambda x, name=name: value_loss(case, **{name: x}).loss.total, getattr(case, name))
        assert not slope.any(), name


@given(case=cases(**VALUE, cut=st.integers(0, 6)))
def test_value_loss_of_microbatches_adds_up(case):
    """However the tokens are cut into microbatches, totals, weights and gradients add up to those of the whole."""
    names = ("values", "old_values", "returns", "mask")
    parts = [
        case.but(**{name: getattr(case, name)[:, part] for name in names})
        for part in (slice(case.cut), slice(case.cut, None))
    ]
    whole, pieces = value_loss(case), [value_loss(part) for part in parts]
    for field in ("loss", "clip_fraction", "error"):
        assert_close(subject.averages.merge(*(getattr(piece, field) for piece in pieces)), getattr(whole, field))
    slope = gradient(lambda values: value_loss(case, values=values).loss.total, case.values)
    slopes = [
        gradient(lambda values, part=part: value_loss(part, values=values).loss.total, part.values) for part in parts
    ]
    assert_close(torch.cat(slopes, dim=-1), slope)


@given(
    case=cases(
        **VALUE, name=st.sampled_from(("values", "old_values", "returns")), wild=st.sampled_from((math.inf, math.nan))
    )
)
def test_a_wild_value_under_the_mask_is_invisible(case):
    """A masked token of infinite or undefined value changes neither the loss nor any gradient."""
    wilder = case.but(**{case.name: getattr(case, case.name).masked_fill(~case.mask, case.wild)})
    assert_close(tuple(value_loss(wilder)), tuple(value_loss(case)))
    slope = gradient(lambda values: value_loss(wilder, values=values).loss.total, wilder.values)
    assert_close(slope, gradient(lambda values: value_loss(case, values=values).loss.total, case.values))
    assert not slope[~case.mask].any()


@given(case=cases(**VALUE))
def test_value_diagnostics_are_their_formulas(case):
    """Clip fraction and error are what they say, over kept tokens."""
    got = value_loss(case)
    tokens = list(value_tokens(case))
    assert_close(got.clip_fraction.total, float(sum(clipped > plain for _, plain, clipped in tokens)))
    assert_close(got.error.total, math.fsum(plain for _, plain, _ in tokens))
    for average in (got.clip_fraction, got.error):
        assert_close(average.weight, float(len(tokens)))


# Both


@given(case=cases(**POLICY))
def test_the_mean_is_over_kept_tokens(case):
    """The mean of a loss is its total over the number of kept tokens, whatever rows they are in; 0 for none."""
    tokens = [max(plain, clipped) for _, _, plain, clipped in policy_tokens(case)]
    expected = math.fsum(tokens) / len(tokens) if tokens else 0.0
    assert_close(subject.averages.mean_of(policy_loss(case).loss), expected)
