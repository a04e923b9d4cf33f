"""Properties of count, mean and centred sum of squares."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_core.moments import Moments
from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, cases, kept_values, rows_of
from tests.core.subject import subject


def of(values):
    """(n, mean, m2) of a list of numbers, in exact fractions until the end."""
    if not values:
        return 0.0, 0.0, 0.0
    return float(len(values)), float(statistics.mean(values)), float(statistics.pvariance(values)) * len(values)


def bundle(values):
    return Moments(*(torch.tensor(x, dtype=torch.float64) for x in of(values)))


def populations():
    """Moments of up to 5 numbers, the neutral element among them."""
    return st.lists(NUMBERS, max_size=5).map(bundle)


@given(case=cases("x", garbage=st.sampled_from((1e30, math.inf, math.nan))))
def test_moments_describe_kept_entries(case):
    """masked_moments are count, mean and sum of squared deviations of the kept entries; zeros where none is kept."""
    x = case.x.masked_fill(~case.mask, case.garbage)
    assert_close(tuple(subject.moments.masked_moments(x, case.mask)), of(kept_values(x, case.mask)))


@given(case=cases("x", garbage=st.sampled_from((1e30, math.inf, math.nan))))
def test_moments_over_an_axis(case):
    """Over one axis, or several, masked_moments are those of each remaining entry's kept values."""
    x = case.x.masked_fill(~case.mask, case.garbage)
    rows = [of(values) for _, (values,) in rows_of(case.mask, x)]
    columns = [of(values) for _, (values,) in rows_of(case.mask.T, x.T)]
    for dim, expected in ((-1, rows), (1, rows), (0, columns), (-2, columns)):
        got = subject.moments.masked_moments(x, case.mask, dim=dim)
        assert_close(tuple(got), tuple(list(field) for field in zip(*expected, strict=True)))
    for dim in ((0, 1), (-1, 0)):
        got = subject.moments.masked_moments(x, case.mask, dim=dim)
        assert_close(tuple(got), of(kept_values(x, case.mask)))


@pytest.mark.parametrize(("n", "correction"), [(0.0, 0), (1.0, 1), (2.0, 2), (1.0, 2)])
def test_variance_without_degrees_of_freedom_is_zero(n, correction):
    """Where n <= correction the variance is 0, whatever the sum of squares."""
    assert_close(subject.moments.variance(Moments(*map(torch.tensor, (n, 3.0, 5.0))), correction=correction), 0.0)


@given(a=populations(), b=populations(), c=populations())
def test_merge_is_a_commutative_monoid(a, b, c):
    """merge is associative and commutative, and (0, 0, 0) changes nothing."""
    merge = subject.moments.merge
    assert_close(merge(a, merge(b, c)), merge(merge(a, b), c))
    assert_close(merge(a, b), merge(b, a))
    assert_close(merge(a, bundle([])), a)
    assert_close(merge(bundle([]), a), a)


@given(case=cases("x", cut=st.integers(0, 6)))
def test_parts_merge_to_the_whole(case):
    """However a batch is cut in two, merging the moments of the parts gives the moments of the whole."""
    moments = subject.moments.masked_moments
    parts = [moments(case.x[:, part], case.mask[:, part]) for part in (slice(case.cut), slice(case.cut, None))]
    assert_close(subject.moments.merge(*parts), moments(case.x, case.mask))


@given(a=st.lists(NUMBERS, max_size=5), b=st.lists(NUMBERS, max_size=5))
def test_merge_pools_two_populations(a, b):
    """merge gives the moments of both populations together."""
    assert_close(subject.moments.merge(bundle(a), bundle(b)), bundle(a + b))


@given(values=st.lists(NUMBERS, max_size=6), correction=st.integers(0, 2))
def test_variance_divides_by_degrees_of_freedom(values, correction):
    """variance is m2 / (n - correction), and 0 where n <= correction."""
    degrees = len(values) - correction
    expected = of(values)[2] / degrees if degrees > 0 else 0.0
    assert_close(subject.moments.variance(bundle(values), correction=correction), expected)


@given(values=st.lists(NUMBERS, min_size=2, max_size=6))
def test_variance_is_the_textbooks(values):
    """correction 1 is the sample variance (Bessel), correction 0 the population variance."""
    assert_close(subject.moments.variance(bundle(values), correction=1), float(statistics.variance(values)))
    assert_close(subject.moments.variance(bundle(values), correction=0), float(statistics.pvariance(values)))


@given(case=cases("x", offset=st.integers(-1_000_000, 1_000_000).map(float)))
def test_an_offset_does_not_cancel_in_float32(case):
    """In float32 an offset up to 1e6 leaves the sum of squared deviations as it was (rewards 10000, 10001)."""
    coarse = case.x.round()  # whole numbers: the offset itself is then exact in float32
    got = subject.moments.masked_moments((coarse + case.offset).float(), case.mask)
    spread = of(kept_values(coarse, case.mask))[2]
    # The mean of numbers near 1e6 is rounded to 1/16, which adds n/256 at the very most.
    assert abs(got.m2.item() - spread) <= 1e-5 * spread + len(kept_values(coarse, case.mask)) / 256
    assert got.mean.dtype == torch.float32


@given(case=cases("x", offset=NUMBERS, factor=NUMBERS))
def test_moments_of_an_affine_image(case):
    """mean(a x + b) = a mean(x) + b, and m2(a x + b) = a^2 m2(x)."""
    before = subject.moments.masked_moments(case.x, case.mask)
    after = subject.moments.masked_moments(case.factor * case.x + case.offset, case.mask)
    assert_close(after.mean, case.factor * before.mean + (case.offset if before.n else 0.0))
    assert_close(after.m2, case.factor**2 * before.m2, scale=100.0)
