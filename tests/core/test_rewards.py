"""Properties of the reward of a token."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, cases, put_back, rows_of
from tests.core.subject import subject

COEF = st.integers(0, 20).map(lambda n: n / 10)


def rewards_of(case, **changes):
    case = case.but(**changes)
    return subject.rewards.compute_rewards(case.scores, case.kl, case.mask, kl_coef=case.kl_coef)


@given(case=cases("kl", per_row="scores", kl_coef=COEF))
def test_rows_sum_to_score_minus_penalty(case):
    """The rewards of a row add up to score - coef * KL; a row without any token gets none."""
    totals = rewards_of(case).rewards.sum(-1)
    expected = [
        score - case.kl_coef * math.fsum(kl) if kl else 0.0
        for score, (_, (kl,)) in zip(case.scores.tolist(), rows_of(case.mask, case.kl), strict=True)
    ]
    assert_close(totals, expected)


@given(case=cases(per_row="scores", kl_coef=COEF, garbage=st.sampled_from((0.0, 1e30, math.nan))))
def test_equal_policies_leave_the_score_alone(case):
    """Without divergence a row's only reward is its score, on the last kept token."""
    kl = torch.zeros(case.mask.shape).double().masked_fill(~case.mask, case.garbage)
    got = rewards_of(case, kl=kl)
    expected = torch.zeros(case.mask.shape).double()
    for row, (places, _) in enumerate(rows_of(case.mask)):
        if places:
            expected[row, places[-1]] = case.scores[row]
    assert_close(got.rewards, expected)
    assert not got.non_score_rewards.any()


@given(case=cases("kl", per_row="scores", kl_coef=COEF))
def test_the_penalty_is_paid_per_token(case):
    """non_score_rewards is -coef * kl on each kept token and 0 elsewhere; the score alone makes the difference."""
    got = rewards_of(case)
    penalty = put_back(
        case.mask, [[-case.kl_coef * kl for kl in values] for _, (values,) in rows_of(case.mask, case.kl)]
    )
    assert_close(got.non_score_rewards, penalty)
    assert_close(got.rewards - got.non_score_rewards, rewards_of(case, kl_coef=0.0).rewards)


@given(case=cases("kl", per_row="scores", kl_coef=COEF))
def test_affine_in_the_coefficient(case):
    """Rewards are affine in the coefficient: r(c) = r(0) + c (r(1) - r(0))."""
    zero, one = rewards_of(case, kl_coef=0.0).rewards, rewards_of(case, kl_coef=1.0).rewards
    assert_close(rewards_of(case).rewards, zero + case.kl_coef * (one - zero))


@given(case=cases("kl", per_row="scores", kl_coef=COEF, factor=NUMBERS))
def test_linear_in_score_and_penalty(case):
    """Scaling scores and KL scales the rewards."""
    scaled = rewards_of(case, scores=case.factor * case.scores, kl=case.factor * case.kl)
    assert_close(scaled.rewards, case.factor * rewards_of(case).rewards)


@given(case=cases("kl", per_row="scores", kl_coef=COEF))
def test_the_coefficient_may_be_a_tensor(case):
    """A coefficient given as a 0-d tensor means the same as the number."""
    tensor = rewards_of(case, kl_coef=torch.tensor(case.kl_coef, dtype=torch.float64))
    assert_close(tuple(tensor), tuple(rewards_of(case)))
