"""Properties of (total, weight) pairs."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_core.averages import Average
from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, cases, gradient, kept_values, tensors
from tests.core.subject import subject


def pairs():
    """Averages of up to 9 things, the neutral element among them."""

    def pair(total, weight):
        return Average(torch.tensor(total if weight else 0.0).double(), torch.tensor(weight).double())

    return st.builds(pair, NUMBERS, st.integers(0, 9).map(float))


NEUTRAL = Average(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


@given(case=cases("x", garbage=st.sampled_from((1e30, math.inf, math.nan))))
def test_average_adds_and_counts_kept_entries(case):
    """average is the sum of the kept entries and their number; padding is in neither."""
    values = kept_values(case.x, case.mask)
    got = subject.averages.average(case.x.masked_fill(~case.mask, case.garbage), case.mask)
    assert_close(got.total, math.fsum(values))
    assert_close(got.weight, float(len(values)))


@given(a=pairs(), b=pairs(), c=pairs())
def test_merge_is_a_commutative_monoid(a, b, c):
    """merge is associative and commutative, and (0, 0) changes nothing."""
    merge = subject.averages.merge
    assert_close(merge(a, merge(b, c)), merge(merge(a, b), c))
    assert_close(merge(a, b), merge(b, a))
    assert_close(merge(a, NEUTRAL), a)
    assert_close(merge(NEUTRAL, a), a)


@given(case=cases("x", cut=st.integers(0, 6)))
def test_parts_merge_to_the_whole(case):
    """However a batch is cut in two, merging the averages of the parts gives the average of the whole."""
    average = subject.averages.average
    parts = [average(case.x[:, part], case.mask[:, part]) for part in (slice(case.cut), slice(case.cut, None))]
    assert_close(subject.averages.merge(*parts), average(case.x, case.mask))


@given(case=cases("x", cut=st.integers(0, 6)))
def test_merged_mean_is_the_mean_of_everything(case):
    """The mean of merged parts is the mean of all kept entries, not the mean of the parts' means."""
    average = subject.averages.average
    parts = [average(case.x[:, part], case.mask[:, part]) for part in (slice(case.cut), slice(case.cut, None))]
    values = kept_values(case.x, case.mask)
    mean = math.fsum(values) / len(values) if values else 0.0
    assert_close(subject.averages.mean_of(subject.averages.merge(*parts)), mean)


@given(totals=tensors(4), weights=tensors(4, numbers=st.integers(0, 9).map(lambda n: n / 2)))
def test_mean_of_divides_elementwise(totals, weights):
    """mean_of is total / weight for every entry, and 0 where the weight is 0."""
    expected = [
        total / weight if weight else 0.0 for total, weight in zip(totals.tolist(), weights.tolist(), strict=True)
    ]
    assert_close(subject.averages.mean_of(Average(totals, weights)), expected)


@given(total=NUMBERS, weight=st.integers(0, 9).map(float))
def test_mean_of_has_a_finite_gradient(total, weight):
    """The gradient of mean_of by the total is 1 / weight, and 0 where the weight is 0."""
    slope = gradient(
        lambda total: subject.averages.mean_of(Average(total, torch.tensor(weight).double())),
        torch.tensor(total).double(),
    )
    assert_close(slope, 1.0 / weight if weight else 0.0)
