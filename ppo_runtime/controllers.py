"""The reference's stateful KL controllers: an object around the core's state -> state functions."""

import math
from typing import Any

import attrs

from ppo_core.controllers import KLControllerState, adaptive_kl_update, fixed_kl_update


class _Controller:
    state: KLControllerState

    @property
    def value(self) -> float:
        """The present coefficient, score units per nat; it can be set."""
        return self.state.coef

    @value.setter
    def value(self, coef: Any) -> None:
        number = float(coef)
        if not math.isfinite(number) or number < 0.0:
            raise ValueError(f"value is {coef!r}, expected a finite number of at least 0, in score units per nat")
        self.state = attrs.evolve(self.state, coef=number)


class FixedKLController(_Controller):
    """A KL coefficient that no KL changes."""

    def __init__(self, kl_coef: float) -> None:
        self.state = KLControllerState(coef=kl_coef)

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
        self.state = KLControllerState(coef=init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Move the coefficient after ``n_steps`` sequences with a mean KL of ``current`` nats.

        Raises:
            ValueError: ``current`` is not finite or ``n_steps`` too large; the state is then kept.
        """
        self.state = adaptive_kl_update(self.state, current, n_steps, target=self.target, horizon=self.horizon)
