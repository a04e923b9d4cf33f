"""TRL's stateful KL controllers: objects around the core's state -> state functions."""

import math
from typing import Any

from ppo_core.controllers import KLControllerState, adaptive_kl_update, fixed_kl_update


def _coefficient(name: str, value: Any) -> float:
    number = _number(value)
    if not math.isfinite(number) or number < 0.0:
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0, in score units per nat")
    return number


def _positive(name: str, value: Any, unit: str) -> float:
    number = _number(value)
    if not math.isfinite(number) or number <= 0.0:
        raise ValueError(f"{name} is {value!r}, expected a finite number above 0, {unit}")
    return number


def _number(value: Any) -> float:
    """As a float; NaN for what is no number."""
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


class _Controller:
    state: KLControllerState

    @property
    def value(self) -> float:
        """The present coefficient, score units per nat; it can be set."""
        return self.state.coef

    @value.setter
    def value(self, coef: Any) -> None:
        self.state = KLControllerState(coef=_coefficient("value", coef))


class FixedKLController(_Controller):
    """A KL coefficient that no KL changes."""

    def __init__(self, kl_coef: float) -> None:
        self.state = KLControllerState(coef=_coefficient("kl_coef", kl_coef))

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing, as a fixed controller does."""
        self.state = fixed_kl_update(self.state, current, n_steps)


class AdaptiveKLController(_Controller):
    """Steers the KL towards ``target``; see :func:`ppo_core.controllers.adaptive_kl_update`.

    Args:
        init_kl_coef: coefficient to start from, score units per nat.
        target: KL to hold, nats per sequence.
        horizon: sequences over which the coefficient changes by at most 20 %.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.state = KLControllerState(coef=_coefficient("init_kl_coef", init_kl_coef))
        self.target = target
        self.horizon = horizon

    @property
    def target(self) -> float:
        """The KL to hold, nats per sequence; it can be set."""
        return self._target

    @target.setter
    def target(self, kl: Any) -> None:
        self._target = _positive("target", kl, "in nats per sequence")

    @property
    def horizon(self) -> float:
        """Sequences over which the coefficient changes by at most 20 %; it can be set."""
        return self._horizon

    @horizon.setter
    def horizon(self, sequences: Any) -> None:
        self._horizon = _positive("horizon", sequences, "of sequences")

    def update(self, current: float, n_steps: int) -> None:
        """Move the coefficient after ``n_steps`` sequences with a mean KL of ``current`` nats.

        Raises:
            ValueError: ``current`` is not finite or ``n_steps`` too large; the state is then kept.
        """
        # A float, since a tensor would make the coefficient one, with its graph.
        self.state = adaptive_kl_update(self.state, float(current), n_steps, target=self.target, horizon=self.horizon)


def coefficient_of(controller: Any) -> float:
    """The present coefficient, which a user's own controller may give as anything that is a finite number."""
    if not math.isfinite(number := _number(controller.value)):
        raise ValueError(f"kl_ctl.value is {controller.value!r:.80}, expected a finite number, in score units per nat")
    return number


def check_controller(controller: Any) -> None:
    """Refuse what has no coefficient, or cannot be told the KL of a step; a user's own needs no more."""
    missing = [name for name in ("value", "update") if not hasattr(controller, name)]
    if missing:
        raise TypeError(
            f"kl_ctl is a {type(controller).__name__} without {' and '.join(missing)}, expected a controller with "
            "value, the coefficient, and update(kl, sequences)"
        )
