"""Properties of whitening."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppo_core.moments import Moments
from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, POSITIVE, cases, gradient, kept_values, put_back, rows_of
from tests.core.subject import subject

CORRECTION = st.integers(0, 1)
EPS = st.sampled_from((0.0, 1e-8, 1e-5, 0.5, 2.0))


def whiten(x, mask, *, shift_mean=True, correction=1, eps=0.0):
    """Whiten by x's own moments."""
    moments = subject.moments.masked_moments(x, mask)
    return subject.whitening.whiten(x, mask, moments, shift_mean=shift_mean, correction=correction, eps=eps)


def spread(case):
    """Standard deviation of what is kept."""
    return statistics.pstdev(kept_values(case.x, case.mask))


@given(case=cases("x", kept=2, correction=CORRECTION))
def test_mean_0_and_variance_1(case):
    """With eps 0 the kept entries come out with mean 0 and variance 1, under the same correction."""
    assume(spread(case) > 0)
    got = kept_values(whiten(case.x, case.mask, correction=case.correction), case.mask)
    assert_close(statistics.fmean(got), 0.0)
    assert_close((statistics.variance if case.correction else statistics.pvariance)(got), 1.0)


@given(case=cases("x", kept=2, correction=CORRECTION, factor=NUMBERS.filter(bool), offset=NUMBERS))
def test_affine_invariance(case):
    """With eps 0, whitening a x + b is whitening x, up to the sign of a."""
    assume(spread(case) > 0)
    image = whiten(case.factor * case.x + case.offset, case.mask, correction=case.correction)
    assert_close(image, math.copysign(1, case.factor) * whiten(case.x, case.mask, correction=case.correction))


@given(case=cases("x", kept=2, correction=CORRECTION, eps=EPS))
def test_mean_is_kept_without_shift(case):
    """shift_mean=False only rescales around the mean: the mean of the kept entries stays, the rest is the same."""
    options = {"correction": case.correction, "eps": case.eps}
    centred = whiten(case.x, case.mask, shift_mean=True, **options)
    around = whiten(case.x, case.mask, shift_mean=False, **options)
    mean = statistics.fmean(kept_values(case.x, case.mask))
    assert_close(statistics.fmean(kept_values(around, case.mask)), mean)
    assert_close(around, torch.where(case.mask, centred + mean, 0.0))


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, [0.0, 0.0]), (False, [0.5, 0.5])])
def test_a_population_without_spread_has_nothing_to_scale_by(shift_mean, expected):
    """By the statistics of constants and with eps 0, whatever is whitened comes out as 0, or as their mean."""
    constant = Moments(*map(torch.tensor, (2.0, 0.5, 0.0)))
    x, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, True])
    got = subject.whitening.whiten(x, mask, constant, shift_mean=shift_mean, correction=1, eps=0.0)
    assert_close(got, torch.tensor(expected))


@given(case=cases("x", kept=1, value=NUMBERS, correction=CORRECTION, eps=EPS, shift_mean=st.booleans()))
def test_constants_give_finite_values(case):
    """A constant, or a single entry, whitens to exactly 0 (to the constant without shift), with a finite gradient."""
    x = torch.full_like(case.x, case.value)
    options = {"correction": case.correction, "eps": case.eps, "shift_mean": case.shift_mean}
    expected = put_back(
        case.mask,
        [[0.0 if case.shift_mean else case.value] * len(places) for places, _ in rows_of(case.mask)],
    )
    assert_close(whiten(x, case.mask, **options), expected)
    assert gradient(lambda x: whiten(x, case.mask, **options).square().sum(), x).isfinite().all()


@given(case=cases("x other", correction=CORRECTION, eps=EPS.filter(bool), shift_mean=st.booleans()))
def test_statistics_are_an_argument(case):
    """Each entry is (x - mean) / sqrt(var + eps), with the given moments, whatever x's own are."""
    whole = torch.ones_like(case.mask)
    moments = subject.moments.masked_moments(case.other, whole)
    others = kept_values(case.other, whole)
    mean, degrees = statistics.fmean(others), len(others) - case.correction
    deviation = sum((x - mean) ** 2 for x in others) / degrees if degrees else 0.0
    expected = [
        [(x - mean) / math.sqrt(deviation + case.eps) + (0.0 if case.shift_mean else mean) for x in values]
        for _, (values,) in rows_of(case.mask, case.x)
    ]
    got = subject.whitening.whiten(
        case.x, case.mask, moments, shift_mean=case.shift_mean, correction=case.correction, eps=case.eps
    )
    assert_close(got, put_back(case.mask, expected), scale=1 / math.sqrt(deviation + case.eps))


@given(case=cases("x", cut=st.integers(0, 6), correction=CORRECTION, eps=EPS, shift_mean=st.booleans()))
def test_parts_whitened_by_merged_moments_are_the_whole(case):
    """Parts of a batch whitened by the moments merged over all parts are the whole batch, whitened."""
    parts = [(case.x[:, part], case.mask[:, part]) for part in (slice(case.cut), slice(case.cut, None))]
    merged = subject.moments.merge(*(subject.moments.masked_moments(*part) for part in parts))
    options = {"correction": case.correction, "eps": case.eps, "shift_mean": case.shift_mean}
    pieces = [subject.whitening.whiten(*part, merged, **options) for part in parts]
    values = kept_values(case.x, case.mask)
    assume(not values or case.eps or statistics.pstdev(values) > 0)  # eps 0 on a constant magnifies rounding
    assert_close(torch.cat(pieces, dim=-1), whiten(case.x, case.mask, **options), scale=1e4)


@given(case=cases("x", kept=2, correction=CORRECTION))
def test_idempotent(case):
    """With eps 0, whitening what is white changes nothing."""
    assume(spread(case) > 0)
    once = whiten(case.x, case.mask, correction=case.correction)
    assert_close(whiten(once, case.mask, correction=case.correction), once)


@given(case=cases("x", kept=2, garbage=st.sampled_from((0.0, 100.0, 1e30, math.nan)), eps=EPS))
def test_padding_is_not_in_the_statistics(case):
    """What is masked, however large, changes no whitened value and comes out as 0."""
    got = whiten(case.x.masked_fill(~case.mask, case.garbage), case.mask, eps=case.eps)
    values = torch.tensor([kept_values(case.x, case.mask)], dtype=torch.float64)
    alone = whiten(values, torch.ones_like(values, dtype=torch.bool), eps=case.eps)
    assert_close(got[case.mask], alone[0])
    assert not got[~case.mask].any()


@given(case=cases("x", kept=2, eps=POSITIVE))
def test_eps_damps(case):
    """eps is added inside the root, so a population of variance v comes out with variance v / (v + eps)."""
    variance = statistics.variance(kept_values(case.x, case.mask))
    got = statistics.variance(kept_values(whiten(case.x, case.mask, eps=case.eps), case.mask))
    assert_close(got, variance / (variance + case.eps))


def test_published_numbers():
    """1.2 ... 2.0 in a 3x3, mean kept: first row .0508 .4381 .8254 biased, .1394 .5046 .8697 with Bessel."""
    x = torch.arange(12, 21).reshape(3, 3).double() / 10
    mask = torch.ones(3, 3, dtype=torch.bool)
    for correction, row in ((0, [0.0508, 0.4381, 0.8254]), (1, [0.1394, 0.5046, 0.8697])):
        got = whiten(x, mask, shift_mean=False, correction=correction, eps=1e-8)[0]
        assert torch.allclose(got, torch.tensor(row).double(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 1, 3), (2,)])
def test_moments_that_do_not_fit_are_refused(shape):
    """Moments that do not broadcast against x, or would make the result larger, are refused by name."""
    moments = Moments(*(torch.ones(shape, dtype=torch.float64) for _ in range(3)))
    x, mask = torch.zeros(2, 3).double(), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"moments\.n .*broadcasts to \(2, 3\)"):
        subject.whitening.whiten(x, mask, moments, shift_mean=True, correction=1, eps=1e-8)


@given(case=cases("x", batch=3, eps=POSITIVE, shift_mean=st.booleans()))
def test_moments_may_be_those_of_rows(case):
    """Moments with one entry per row, or per column, whiten each row, or column, by its own."""
    options = {"shift_mean": case.shift_mean, "correction": 0, "eps": case.eps}
    for dim, rows in ((-1, zip(case.x, case.mask, strict=True)), (0, zip(case.x.T, case.mask.T, strict=True))):
        moments = Moments(*(m.unsqueeze(dim) for m in subject.moments.masked_moments(case.x, case.mask, dim=dim)))
        got = subject.whitening.whiten(case.x, case.mask, moments, **options)
        alone = [whiten(*row, **options) for row in rows]
        assert_close(got, torch.stack(alone, dim=0 if dim == -1 else 1))
