"""The reference's stateful KL controllers: an object around the core's state -> state functions."""

from ppo_core.controllers import KLControllerState, adaptive_kl_update, fixed_kl_update


class FixedKLController:
    """A KL coefficient that never changes."""

    def __init__(self, kl_coef: float) -> None:
        self.state = KLControllerState(coef=kl_coef)

    @property
    def value(self) -> float:
        """The present coefficient, score units per nat."""
        return self.state.coef

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing, as a fixed controller does."""
        self.state = fixed_kl_update(self.state, current, n_steps)


class AdaptiveKLController:
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

    @property
    def value(self) -> float:
        """The present coefficient, score units per nat."""
        return self.state.coef

    def update(self, current: float, n_steps: int) -> None:
        """Move the coefficient after ``n_steps`` sequences with a mean KL of ``current`` nats.

        Raises:
            ValueError: ``current`` is not finite or ``n_steps`` too large; the state is then kept.
        """
        self.state = adaptive_kl_update(self.state, current, n_steps, target=self.target, horizon=self.horizon)
