"""Properties of masked selection and reduction."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import cases, gradient, kept_values, masks, rows_of
from tests.core.subject import subject

GARBAGE = st.sampled_from((1e30, math.inf, -math.inf, math.nan))


@given(case=cases("x", garbage=GARBAGE))
def test_keep_is_x_or_zero(case):
    """keep is x where the mask holds and exactly 0 elsewhere, whatever stood there."""
    kept = subject.masking.keep(case.x.masked_fill(~case.mask, case.garbage), case.mask)
    for row, time in torch.cartesian_prod(*map(torch.arange, case.mask.shape)).tolist():
        assert kept[row, time].item() == (case.x[row, time].item() if case.mask[row, time] else 0.0)


@given(case=cases("x", garbage=GARBAGE))
def test_keep_passes_gradient_to_kept_entries_only(case):
    """The gradient through keep is 1 on kept entries and exactly 0 elsewhere, whatever stood there."""
    x = case.x.masked_fill(~case.mask, case.garbage)
    assert torch.equal(gradient(lambda x: subject.masking.keep(x, case.mask).sum(), x), case.mask.double())


@given(case=cases("x", garbage=GARBAGE))
def test_masked_sum_adds_kept_entries(case):
    """masked_sum adds up the kept entries, over all axes or over some."""
    x = case.x.masked_fill(~case.mask, case.garbage)
    assert_close(subject.masking.masked_sum(x, case.mask), math.fsum(kept_values(x, case.mask)))
    by_row = [math.fsum(values) for _, (values,) in rows_of(case.mask, x)]
    by_column = [math.fsum(values) for _, (values,) in rows_of(case.mask.T, x.T)]
    assert_close(subject.masking.masked_sum(x, case.mask, dim=-1), by_row)
    assert_close(subject.masking.masked_sum(x, case.mask, dim=0), by_column)
    assert_close(subject.masking.masked_sum(x, case.mask, dim=(0, 1)), math.fsum(by_row))


@given(case=cases("x", garbage=GARBAGE))
def test_masked_mean_averages_kept_entries(case):
    """masked_mean is the mean of the kept entries, over all axes or over some, and 0 where nothing is kept."""

    def mean(values):
        return math.fsum(values) / len(values) if values else 0.0

    x = case.x.masked_fill(~case.mask, case.garbage)
    everything = mean(kept_values(x, case.mask))
    assert_close(subject.masking.masked_mean(x, case.mask), everything)
    assert_close(subject.masking.masked_mean(x, case.mask, dim=(0, 1)), everything)
    assert_close(
        subject.masking.masked_mean(x, case.mask, dim=-1), [mean(values) for _, (values,) in rows_of(case.mask, x)]
    )
    assert_close(
        subject.masking.masked_mean(x, case.mask, dim=0), [mean(values) for _, (values,) in rows_of(case.mask.T, x.T)]
    )


@given(case=cases("x", kept=1))
def test_masked_mean_shares_its_gradient(case):
    """Each of n kept entries gets 1/n of the gradient of their mean."""
    slope = gradient(lambda x: subject.masking.masked_mean(x, case.mask), case.x)
    assert_close(slope, case.mask.double() / len(kept_values(case.x, case.mask)))


@given(dtype=st.sampled_from((torch.bfloat16, torch.float16)), count=st.integers(1, 6000))
def test_half_precision_adds_up_in_float32(dtype, count):
    """A sum or mean of thousands of ones in half precision is exact: it is accumulated in float32."""
    ones = torch.ones(count, dtype=dtype)
    mask = torch.ones(count, dtype=torch.bool)
    assert subject.masking.masked_sum(ones, mask).item() == count
    assert subject.masking.masked_mean(ones, mask).item() == 1.0


@given(mask=st.tuples(st.integers(1, 3), st.integers(1, 6)).flatmap(lambda shape: masks(*shape)))
def test_last_kept_marks_the_last_true(mask):
    """last_kept is True on the last kept position of each row and nowhere else, so nowhere in an empty row."""
    expected = torch.zeros_like(mask)
    for row, (places, _) in enumerate(rows_of(mask)):
        if places:
            expected[row, max(places)] = True
    assert torch.equal(subject.masking.last_kept(mask), expected)
