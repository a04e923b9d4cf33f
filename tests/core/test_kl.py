"""Properties of KL estimators. Expectations are enumerated over a vocabulary, not sampled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import cases, gradient, put_back, rows_of, tensors
from tests.core.subject import subject

FORMULAS = {
    "k1": lambda p, q: p - q,
    "kl_abs": lambda p, q: abs(p - q),
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: math.exp(q - p) - 1 - (q - p),
}
PAIRS = st.integers(1, 5).flatmap(lambda vocab: st.tuples(tensors(vocab), tensors(vocab)))
"""Two rows of logits over one vocabulary."""


def estimator(name):
    return getattr(subject.kl, name)


def divergence(p, q):
    """KL(p || q) of two lists of log-probabilities."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def expectation(name, p, q):
    """E over tokens from p of the estimator, with the probabilities held fixed."""
    return (p.detach().exp() * estimator(name)(p, q, torch.ones(p.shape, dtype=torch.bool))).sum()


@pytest.mark.parametrize("name", FORMULAS)
@given(case=cases("logprobs ref_logprobs", garbage=st.sampled_from((1e30, -math.inf, math.nan))))
def test_estimators_are_their_formulas(name, case):
    """Each estimator is its formula, in nats, on kept positions and 0 elsewhere, whatever stood there."""
    p, q = (x.masked_fill(~case.mask, case.garbage) for x in (case.logprobs, case.ref_logprobs))
    expected = [[FORMULAS[name](a, b) for a, b in zip(*pair, strict=True)] for _, pair in rows_of(case.mask, p, q)]
    assert_close(estimator(name)(p, q, case.mask), put_back(case.mask, expected))


@pytest.mark.parametrize("name", FORMULAS)
@given(case=cases("logprobs"))
def test_equal_policies_have_no_divergence(name, case):
    """Every estimator is exactly 0 where policy and reference agree."""
    assert not estimator(name)(case.logprobs, case.logprobs.clone(), case.mask).any()


@pytest.mark.parametrize("name", ["kl_abs", "k2", "k3"])
@given(case=cases("logprobs ref_logprobs"))
def test_never_negative(name, case):
    """abs, k2 and k3 are never negative, and positive where the policies differ."""
    got = estimator(name)(case.logprobs, case.ref_logprobs, case.mask)
    assert (got >= 0).all()
    assert torch.equal(got > 0, case.mask & (case.logprobs != case.ref_logprobs))


@given(case=cases("logprobs ref_logprobs"))
def test_k1_is_antisymmetric(case):
    """Exchanging policy and reference turns the sign of k1, and k1 is positive where the policy is likelier."""
    there = subject.kl.k1(case.logprobs, case.ref_logprobs, case.mask)
    assert torch.equal(there, -subject.kl.k1(case.ref_logprobs, case.logprobs, case.mask))
    assert torch.equal(there > 0, case.mask & (case.logprobs > case.ref_logprobs))


@given(case=cases("logprobs", difference=st.integers(-16, 16).map(lambda n: n * 2.0**-20)))
def test_k3_does_not_cancel_near_equality(case):
    """For nearly equal policies k3 agrees with k2 to first order: 0.5 d^2, not the rounding of exp(-d) - 1 + d."""
    close = case.logprobs.float().round() + case.difference  # exact in float32
    got = subject.kl.k3(close, case.logprobs.float().round(), case.mask)
    exact = math.expm1(-case.difference) + case.difference
    assert (got[case.mask] - exact).abs().le(2.0**-24 * abs(case.difference)).all()


@pytest.mark.parametrize("name", ["k1", "k3"])
@given(pair=PAIRS)
def test_unbiased(name, pair):
    """k1 and k3, averaged over tokens drawn from the policy, are KL(policy || reference)."""
    p, q = (x.log_softmax(-1) for x in pair)
    assert_close(expectation(name, p, q), divergence(p.tolist(), q.tolist()), scale=math.exp((p - q).abs().max()))


@given(case=cases(logits="policy reference"))
def test_full_is_the_divergence(case):
    """full is sum_v pi_v (log pi_v - log ref_v): exact, never negative, 0 at equality and on masked positions."""
    p, q = case.policy.log_softmax(-1), case.reference.log_softmax(-1)
    got = subject.kl.full(p, q, case.mask)
    for place in torch.cartesian_prod(*map(torch.arange, case.mask.shape)).tolist():
        kept = case.mask[tuple(place)].item()
        expected = divergence(p[tuple(place)].tolist(), q[tuple(place)].tolist()) if kept else 0.0
        assert_close(got[tuple(place)], expected)
    assert (got >= -1e-12).all()
    assert not subject.kl.full(p, p.clone(), case.mask).any()


@given(case=cases(logits="policy reference", garbage=st.sampled_from((1e30, -math.inf, math.nan))))
def test_full_ignores_masked_positions(case):
    """Whatever stands at a masked position, full is 0 there, and no gradient comes back from it."""
    p, q = (x.log_softmax(-1).masked_fill(~case.mask[..., None], case.garbage) for x in (case.policy, case.reference))
    assert not subject.kl.full(p, q, case.mask)[~case.mask].any()
    slope = gradient(lambda p: subject.kl.full(p, q, case.mask).sum(), p)
    assert not slope[~case.mask].any()


@given(vocab=st.integers(2, 5), chosen=st.integers(0, 4))
def test_full_expects_under_the_policy(vocab, chosen):
    """A certain policy against a uniform reference is log V from it; the other way round it is infinitely far."""
    certain = torch.full((1, vocab), -math.inf, dtype=torch.float64)
    certain[0, chosen % vocab] = 0.0
    uniform = torch.full((1, vocab), -math.log(vocab), dtype=torch.float64)
    mask = torch.ones(1, dtype=torch.bool)
    assert_close(subject.kl.full(certain, uniform, mask), [math.log(vocab)])
    assert subject.kl.full(uniform, certain, mask).item() == math.inf
    assert gradient(lambda p: subject.kl.full(p, uniform, mask).sum(), certain).isfinite().all()


@given(pair=PAIRS)
def test_gradient_of_k1_is_zero_on_average(pair):
    """E[grad k1] = 0: as a loss, k1 goes nowhere."""
    q = pair[1].log_softmax(-1)
    slope = gradient(lambda logits: expectation("k1", logits.log_softmax(-1), q), pair[0])
    assert_close(slope, torch.zeros_like(slope))


@given(pair=PAIRS)
def test_gradient_of_k2_is_that_of_the_divergence(pair):
    """E[grad k2] = grad KL(policy || reference)."""
    q = pair[1].log_softmax(-1)

    def exact(logits):
        return (logits.softmax(-1) * (logits.log_softmax(-1) - q)).sum()

    slope = gradient(lambda logits: expectation("k2", logits.log_softmax(-1), q), pair[0])
    assert_close(slope, gradient(exact, pair[0]))


@given(pair=PAIRS)
def test_gradient_of_k3_descends_the_other_direction(pair):
    """E[grad k3] = grad KL(reference || policy)."""
    q = pair[1].log_softmax(-1)

    def reverse(logits):
        return (q.exp() * (q - logits.log_softmax(-1))).sum()

    slope = gradient(lambda logits: expectation("k3", logits.log_softmax(-1), q), pair[0])
    assert_close(slope, gradient(reverse, pair[0]), scale=math.exp((pair[0].log_softmax(-1) - q).abs().max()))
