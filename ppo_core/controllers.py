"""Controllers of the KL coefficient: state in, state out, on the host.

``kl`` is, as in OpenAI's original and in TRL, the mean over sequences of the *sum* over response tokens, in nats per
sequence. verl and OpenRLHF steer by the mean per token: a target does not carry over between the two.
"""

import math

import attrs


@attrs.frozen
class KLControllerState:
    """A KL controller's state between two updates."""

    coef: float
    """Score units per nat."""


def adaptive_kl_update(
    state: KLControllerState, kl: float, n_steps: int, *, target: float, horizon: float
) -> KLControllerState:
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon.

    A proportional controller in log space: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019),
    section 2.2.

    Args:
        state: the present coefficient.
        kl: observed KL, nats per sequence.
        n_steps: sequences since the last update, over all ranks.
        target: the KL to hold, nats per sequence, > 0.
        horizon: sequences over which the coefficient can change by at most 20 %, > 0.

    Returns:
        A new state with a positive coefficient; the old one is untouched.

    Raises:
        ValueError: ``kl`` is not finite (one NaN would poison every later coefficient); ``n_steps`` is negative or
            not below ``5 * horizon`` (the factor could reach 0, or turn negative and reward divergence); ``target`` or
            ``horizon`` is not positive.
    """
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target is {target}, expected a finite KL above 0 in nats per sequence")
    if not (math.isfinite(horizon) and horizon > 0):
        raise ValueError(f"horizon is {horizon}, expected a finite number of sequences above 0")
    if not 0 <= n_steps < 5 * horizon:
        raise ValueError(
            f"n_steps is {n_steps}, expected 0 <= n_steps < 5 * horizon = {5 * horizon}; "
            "raise the horizon or update the controller more often"
        )
    if not math.isfinite(kl):
        raise ValueError(f"kl is {kl}, expected a finite number of nats; the controller's state was kept")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return KLControllerState(coef=state.coef * (1.0 + error * n_steps / horizon))


def fixed_kl_update(state: KLControllerState, kl: float, n_steps: int) -> KLControllerState:
    """The identity: the coefficient never moves. Same data arguments as :func:`adaptive_kl_update`."""
    return state
