"""Properties of the controllers of the KL coefficient."""

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_core.controllers import KLControllerState
from tests.core.close import assert_close
from tests.core.strategies import Case
from tests.core.subject import subject

COEF = st.floats(1e-4, 10.0)
KL = st.floats(-100.0, 100.0)
TARGET = st.floats(0.1, 100.0)
HORIZON = st.integers(1, 100_000)
SETTINGS = {"coef": COEF, "kl": KL, "target": TARGET, "horizon": HORIZON}


@st.composite
def updates(draw, **more):
    """One legal update, with any further fields."""
    fields = {name: draw(strategy) for name, strategy in (SETTINGS | more).items()}
    fields["n_steps"] = draw(st.integers(0, min(5 * fields["horizon"] - 1, 10_000)))
    return Case(**fields)


def adapt(case, **changes):
    """The coefficient after one update."""
    case = case.but(**changes)
    state = KLControllerState(coef=case.coef)
    after = subject.controllers.adaptive_kl_update(
        state, case.kl, case.n_steps, target=case.target, horizon=case.horizon
    )
    assert state == KLControllerState(coef=case.coef)
    return after.coef


@given(case=updates())
def test_on_target_nothing_moves(case):
    """KL at its target is a fixed point."""
    assert_close(adapt(case, kl=case.target), case.coef)


@given(case=updates(relative=st.floats(-1.0, 1.0)))
def test_one_update_is_its_formula(case):
    """coef changes by the factor 1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon."""
    kl = case.target * (1 + case.relative)
    error = sorted((-0.2, case.relative, 0.2))[1]
    assert_close(adapt(case, kl=kl), case.coef * (1 + error * case.n_steps / case.horizon))


@given(case=updates(more=st.floats(0.0, 100.0)))
def test_monotone(case):
    """More KL never gives a smaller coefficient; above target it rises, below it falls."""
    assert adapt(case, kl=case.kl + case.more) >= adapt(case)
    if case.n_steps and case.kl > case.target * 1.001:
        assert adapt(case) > case.coef
    if case.n_steps and case.kl < case.target * 0.999:
        assert adapt(case) < case.coef


@given(case=updates())
def test_bounded_and_positive(case):
    """Whatever the KL, the coefficient stays positive and moves by at most 20 % per horizon of sequences."""
    after = adapt(case)
    assert after > 0
    assert abs(after / case.coef - 1) <= 0.2 * case.n_steps / case.horizon + 1e-12


@given(case=updates(factor=st.floats(0.1, 10.0), times=st.integers(1, 10)))
def test_scale_equivariance(case):
    """Only ratios matter: of the coefficient to itself, of KL to target and of sequences to the horizon."""
    after = adapt(case)
    assert_close(adapt(case, coef=case.factor * case.coef), case.factor * after)
    assert_close(adapt(case, kl=case.factor * case.kl, target=case.factor * case.target), after)
    assert_close(adapt(case, n_steps=case.times * case.n_steps, horizon=case.times * case.horizon), after)


@given(case=updates(bad=st.sampled_from((math.nan, math.inf, -math.inf))))
def test_kl_that_is_no_number_is_refused(case):
    """A KL that is not finite is refused by name, and the state is as it was."""
    with pytest.raises(ValueError, match="kl"):
        adapt(case, kl=case.bad)


@given(case=updates(excess=st.integers(0, 1000)))
def test_too_many_sequences_are_refused(case):
    """n_steps of 5 horizons or more, or below 0, is refused by name: the factor could reach 0."""
    advice = rf"^n_steps is .*= {5 * case.horizon}; raise the horizon or " if subject.is_ours else "n_steps"
    with pytest.raises(ValueError, match=advice):
        adapt(case, n_steps=5 * case.horizon + case.excess)
    with pytest.raises(ValueError, match="n_steps"):
        adapt(case, n_steps=-1 - case.excess)


@pytest.mark.parametrize("name", ["target", "horizon"])
@given(case=updates(bad=st.sampled_from((0.0, -1.0, math.nan, math.inf))))
def test_meaningless_settings_are_refused(name, case):
    """A target or horizon that is not positive and finite is refused by name."""
    with pytest.raises(ValueError, match=rf"^{name} is " if subject.is_ours else name):
        adapt(case, **{name: case.bad})


@given(case=updates())
def test_fixed_is_the_identity(case):
    """The fixed controller never moves."""
    state = KLControllerState(coef=case.coef)
    assert subject.controllers.fixed_kl_update(state, case.kl, case.n_steps) == state


@given(case=updates(kls=st.lists(KL, max_size=8), stop=st.integers(0, 8)))
def test_resuming_changes_nothing(case):
    """A run folded in one go ends in the state of one that was stored and resumed in the middle."""

    def fold(state, kls):
        for kl in kls:
            state = subject.controllers.adaptive_kl_update(
                state, kl, case.n_steps, target=case.target, horizon=case.horizon
            )
        return state

    begin = KLControllerState(coef=case.coef)
    stored = attrs.asdict(fold(begin, case.kls[: case.stop]))
    assert fold(KLControllerState(**stored), case.kls[case.stop :]) == fold(begin, case.kls)


@given(case=updates())
def test_the_state_is_frozen(case):
    """A state cannot be changed in place."""
    state = KLControllerState(coef=case.coef)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        state.coef = 1.0
