"""Gradients of KL losses, each proved by enumerating a small categorical: no sampling, no tolerance for noise."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, Case, cases, gradient, tensors
from tests.core.subject import subject


@st.composite
def distributions(draw):
    """Logits of a policy, of the policy that sampled, and of a reference, over 1 to 5 tokens."""
    vocab = draw(st.integers(1, 5))
    small = NUMBERS.map(lambda x: x / 4)
    return Case(**{name: draw(tensors(vocab, numbers=small)) for name in ("policy", "behaviour", "reference")})


def expected_gradient(case, loss, sampler):
    """E_{y ~ sampler} of the gradient of loss(log pi(y)) by the logits: every y once, weighted from outside."""
    weights = sampler.softmax(-1)
    reference, behaviour = (x.log_softmax(-1)[None] for x in (case.reference, case.behaviour))
    everywhere = torch.ones_like(reference, dtype=torch.bool)

    def total(logits):
        terms = loss(logits.log_softmax(-1)[None], behaviour, reference, everywhere)
        return (weights * terms).sum()

    return gradient(total, case.policy)


def expected_loss(case, loss, sampler):
    """The same for a loss that is summed already: token by token under a mask of one."""

    def terms(logprobs, behaviour, reference, everywhere):
        each = [
            loss(logprobs, behaviour, reference, torch.eye(everywhere.shape[-1], dtype=torch.bool)[y][None]).total
            for y in range(everywhere.shape[-1])
        ]
        return torch.stack(each)[None]

    return expected_gradient(case, terms, sampler)


def kl_gradient(case, reverse=False):
    """The gradient of KL(policy || reference), or of KL(reference || policy), by definition."""

    def divergence(logits):
        policy, reference = logits.log_softmax(-1), case.reference.log_softmax(-1)
        first, second = (reference, policy) if reverse else (policy, reference)
        return (first.exp() * (first - second)).sum()

    return gradient(divergence, case.policy)


def k2(logprobs, behaviour, reference, mask):
    return subject.surrogates.k2_surrogate(logprobs, reference, mask)


def weighted_k1(logprobs, behaviour, reference, mask):
    return subject.surrogates.weighted_k1_surrogate(logprobs, behaviour, reference, mask)


def k3(logprobs, behaviour, reference, mask):
    return subject.surrogates.k3_surrogate(logprobs, reference, mask)


@given(case=distributions())
def test_k1_as_a_loss_does_nothing(case):
    """E[grad k1] = 0: the naive estimator has no gradient to give."""
    actual = expected_gradient(case, lambda new, _, ref, mask: subject.kl.k1(new, ref, mask), case.policy)
    assert_close(actual, torch.zeros_like(case.policy))


@given(case=distributions())
def test_k3_as_a_loss_descends_the_other_direction(case):
    """E[grad k3] = grad KL(reference || policy), not grad KL(policy || reference)."""
    actual = expected_gradient(case, lambda new, _, ref, mask: subject.kl.k3(new, ref, mask), case.policy)
    assert_close(actual, kl_gradient(case, reverse=True), scale=10)


@given(case=distributions())
def test_k2_surrogate_gradient(case):
    """E[grad k2] = grad KL(policy || reference) on the policy's own samples."""
    assert_close(expected_loss(case, k2, case.policy), kl_gradient(case), scale=10)


@given(case=distributions())
def test_k3_surrogate_gradient(case):
    """k3 with its gradient straight through to k2 has E[grad] = grad KL(policy || reference)."""
    assert_close(expected_loss(case, k3, case.policy), kl_gradient(case), scale=10)


@given(case=distributions())
def test_weighted_k1_gradient_off_policy(case):
    """Importance-weighted k1 has E[grad] = grad KL(policy || reference), whoever sampled."""
    assert_close(expected_loss(case, weighted_k1, case.behaviour), kl_gradient(case), scale=1e3)


@given(case=cases("logprobs old_logprobs ref_logprobs"))
def test_values(case):
    """The values are those of k2, of k3, and of k1 times the ratio; the weight counts the kept tokens."""
    new, old, ref, mask = case.logprobs, case.old_logprobs, case.ref_logprobs, case.mask
    ratio = torch.where(mask, new - old, 0.0).exp()
    for surrogate, terms in (
        (k2, subject.kl.k2(new, ref, mask)),
        (k3, subject.kl.k3(new, ref, mask)),
        (weighted_k1, ratio * subject.kl.k1(new, ref, mask)),
    ):
        total, weight = surrogate(new, old, ref, mask)
        assert_close(total, terms.sum(), scale=terms.abs().sum().item())
        assert weight == mask.sum()


@given(case=cases("logprobs old_logprobs ref_logprobs"))
def test_only_the_policy_is_moved(case):
    """Old and reference log-probabilities receive no gradient, and at equality k2 and k3 give none."""
    for surrogate in (k2, k3, weighted_k1):
        for position in (1, 2):

            def loss(x, surrogate=surrogate, position=position):
                arguments = [case.logprobs, case.old_logprobs, case.ref_logprobs]
                arguments[position] = x
                return surrogate(*arguments, case.mask).total

            assert (gradient(loss, case.ref_logprobs) == 0).all()
    for surrogate in (k2, k3):
        slope = gradient(lambda x, s=surrogate: s(x, x.detach(), case.logprobs, case.mask).total, case.logprobs)
        assert (slope == 0).all()


@given(case=cases("logprobs old_logprobs ref_logprobs"))
def test_k3_surrogate_reports_k3_exactly(case):
    """Going straight through leaves no rounding in the value, and k2's exact slope."""
    far = case.logprobs * 10
    value = k3(far, None, case.ref_logprobs, case.mask).total
    torch.testing.assert_close(value, subject.kl.k3(far, case.ref_logprobs, case.mask).sum(), rtol=0, atol=0)
    slope = gradient(lambda x: k3(x, None, case.ref_logprobs, case.mask).total, far)
    assert_close(slope, torch.where(case.mask, far - case.ref_logprobs, 0.0), scale=1e2)
