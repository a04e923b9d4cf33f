"""Properties of the linear recurrence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, Case, tensors
from tests.core.subject import only_ours, subject
from tests.operations import Operations

SIGNED = st.integers(-10, 10).map(lambda n: n / 8)


@st.composite
def sequences(draw, longest=6):
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    return Case(
        x=draw(tensors(batch, time)),
        coef=draw(tensors(batch, time, numbers=SIGNED)),
        after=draw(tensors(batch)),
    )


def scan(case, **changes):
    case = case.but(**changes)
    return subject.scan.linear_recurrence(case.x, case.coef, case.after)


def loop(x, coef, after):
    """The recurrence, backwards, one step at a time."""
    out, y = [], after
    for t in reversed(range(x.shape[-1])):
        y = x[..., t] + coef[..., t] * y
        out.append(y)
    return torch.stack(out[::-1], dim=-1)


@given(case=sequences())
def test_scan_is_the_sum_over_all_later_inputs(case):
    """y_t is the sum of x_j over j >= t, each times the coefficients from t to j - 1; ``after`` is one more input."""
    expected = [
        [math.fsum(v * math.prod(c[t:j]) for j, v in enumerate([*x, end]) if j >= t) for t in range(len(x))]
        for x, c, end in zip(case.x.tolist(), case.coef.tolist(), case.after.tolist(), strict=True)
    ]
    assert_close(scan(case), expected, scale=10)


@given(case=sequences(40))
def test_scan_equals_the_loop(case):
    """The scan gives what a backward loop gives, for lengths that are and are not powers of two."""
    expected = loop(case.x, case.coef, case.after)
    assert_close(scan(case), expected, scale=1e3 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("time", [1, 2, 3, 255, 256, 257, 1000, 4095, 4096])
def test_scan_equals_the_loop_in_float32(time):
    """Up to 4096 steps the float32 scan is within 1e-5 of a float64 loop, relative to the largest result."""
    generator = torch.Generator().manual_seed(time)
    x = torch.randn(4, time, generator=generator)
    coef = torch.where(torch.rand(4, time, generator=generator) < 0.7, 0.95, 1.0)
    after = torch.randn(4, generator=generator)
    expected = loop(x.double(), coef.double(), after.double())
    actual = subject.scan.linear_recurrence(x, coef, after)
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-5


@given(case=sequences(), other=tensors(3, 6), factor=NUMBERS)
def test_scan_is_linear(case, other, factor):
    """The result is linear in (x, after)."""
    batch, time = case.x.shape
    second = case.but(x=other[:batch, :time], after=other[:batch, -1])
    mixed = case.but(x=case.x + factor * second.x, after=case.after + factor * second.after)
    assert_close(scan(mixed), scan(case) + factor * scan(second), scale=1e3)


@given(case=sequences())
def test_zero_coefficient_cuts(case):
    """A coefficient of 0 hides all that follows, even what overflows in float32."""
    cut = case.x.shape[-1] // 2
    coef = case.coef.clone()
    coef[:, cut] = 0.0
    huge = case.x.clone()
    huge[:, cut + 1 :] *= 1e30
    assert_close(scan(case, x=huge, coef=coef)[:, : cut + 1], scan(case, coef=coef)[:, : cut + 1])


@given(case=sequences())
def test_scan_composes(case):
    """A sequence cut in two is the second part, and the first with the second's first result as what follows."""
    cut = case.x.shape[-1] // 2
    later = scan(case, x=case.x[:, cut:], coef=case.coef[:, cut:])
    earlier = scan(case, x=case.x[:, :cut], coef=case.coef[:, :cut], after=later[:, 0])
    assert_close(torch.cat((earlier, later), dim=-1), scan(case), scale=1e2)


@given(case=sequences())
def test_no_after_is_zero(case):
    """Without ``after`` nothing follows."""
    assert_close(scan(case, after=None), scan(case, after=torch.zeros_like(case.after)))


@given(case=sequences())
def test_gradcheck(case):
    """Numerical and analytical derivatives by all three arguments agree, the second ones too."""
    inputs = [x.clone().requires_grad_(True) for x in (case.x, case.coef, case.after)]
    assert gradcheck(subject.scan.linear_recurrence, inputs)
    first = torch.autograd.grad(scan(Case(x=inputs[0], coef=inputs[1], after=inputs[2])).square().sum(), inputs)
    assert all(x.isfinite().all() for x in first)


@given(case=sequences())
def test_directional_derivative(case):
    """Derivatives along a direction, forward in the graph, are those of the gradient."""
    inputs = [x.clone().requires_grad_(True) for x in (case.x, case.coef, case.after)]
    assert gradcheck(subject.scan.linear_recurrence, inputs, check_forward_ad=True, check_backward_ad=False)


@only_ours
def test_the_depth_grows_with_the_logarithm():
    """Sixteen times the steps take about as many operations more as four times did: there is no loop over time."""

    def needed(time):
        with Operations() as operations:
            subject.scan.linear_recurrence(torch.ones(1, time), torch.ones(1, time))
        return len(operations.ran)

    short, longer, longest = map(needed, (256, 1024, 4096))
    assert short < 150
    assert longest - longer == longer - short < 50


@only_ours
def test_little_is_kept_for_the_gradient():
    """Between forward and backward no more is held than the arguments and what lies ahead of each step."""
    kept = 0

    def pack(x):
        nonlocal kept
        kept += x.numel()
        return x

    x, coef = torch.randn(2, 2, 1000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        subject.scan.linear_recurrence(x, coef)
    assert kept <= 4 * x.numel()


@given(case=sequences(longest=20))
def test_what_a_compiler_sees_is_the_same(case):
    """The form that is compiled, run without a compiler, equals the other."""
    expected = scan(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert_close(scan(case), expected, scale=1e2)
        first = case.but(x=case.x[0], coef=case.coef[0], after=case.after[0])
        assert_close(scan(first), expected[0], scale=1e2)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 1, None), (None, None, 0)])
def test_mapping_over_one_argument_shares_the_others(mapped):
    """vmap over x, coef or after alone answers like a loop, wherever the mapped axis is."""
    args = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3), (2, 3), (2,))]
    which = next(i for i, axis in enumerate(mapped) if axis is not None)
    many = torch.randn(4, *args[which].shape, dtype=torch.float64)
    expected = [subject.scan.linear_recurrence(*args[:which], one, *args[which + 1 :]) for one in many]
    given = [*args[:which], many.movedim(0, mapped[which]), *args[which + 1 :]]
    assert_close(torch.func.vmap(subject.scan.linear_recurrence, in_dims=mapped)(*given), torch.stack(expected))


def test_empty_time():
    """No steps give no results."""
    empty = torch.zeros(2, 0)
    assert subject.scan.linear_recurrence(empty, empty, torch.zeros(2)).shape == (2, 0)
    assert subject.scan.linear_recurrence(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compilation_serves_an_octave():
    """With dynamic shapes, all lengths of an octave share a graph: at most two per octave are compiled."""
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(subject.scan.linear_recurrence, fullgraph=True, dynamic=True, backend=count)
    for time in range(17, 65):
        x, coef = torch.randn(2, time), torch.rand(2, time)
        assert_close(compiled(x, coef), loop(x, coef, torch.zeros(2)))
    assert graphs <= 4
