"""Running mean and deviation of all scores seen so far: state in, state out, on the host."""

import math

import attrs
from jaxtyping import Float
from torch import Tensor

from ppo_core._checks import check_floating, widen
from ppo_core.moments import Moments


@attrs.frozen
class ScoreState:
    """Moments of every score so far. ``ScoreState(0.0, 0.0, 0.0)`` has seen none."""

    count: float
    """How many scores."""
    mean: float
    """Their mean, in the unit of the scores."""
    m2: float
    """Sum of their squared deviations from the mean, in the squared unit of the scores."""

    @property
    def std(self) -> float:
        """sqrt(m2 / (count - 1)); 0 for fewer than two scores."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0


def update_score_state(state: ScoreState, moments: Moments) -> ScoreState:
    """The state with a batch added (Chan, Golub & LeVeque, 1979, eq. 2.1), in Python's float64.

    Args:
        state: all scores before this batch.
        moments: scalar moments of the batch's raw scores, merged over all ranks.

    Returns:
        A new state; any split into batches leads to the same one.

    Raises:
        ValueError: a moment is not finite (one NaN would poison every later score); ``state`` is kept.
    """
    count, mean, m2 = (float(x) for x in moments)
    if not all(map(math.isfinite, (count, mean, m2))):
        raise ValueError(f"moments are {(count, mean, m2)}, expected finite numbers; the state was kept")
    total = state.count + count
    if total == 0:
        return state
    delta = mean - state.mean
    return ScoreState(
        count=total,
        mean=state.mean + delta * count / total,
        m2=state.m2 + m2 + delta * delta * state.count * count / total,
    )


def scale_scores(
    scores: Float[Tensor, "*batch"], state: ScoreState, *, use_scaling: bool, use_norm: bool, clip: float | None
) -> Float[Tensor, "*batch"]:
    """clip((scores - mean) / std, -clip, clip), the mean being subtracted only with ``use_norm``.

    Args:
        scores: raw scores of one batch.
        state: running moments, this batch included.
        use_scaling: False: only clip.
        use_norm: subtract the running mean before dividing. Means nothing without ``use_scaling``.
        clip: bound of the result, > 0, in its unit; None: none.

    Returns:
        Same shape, float32 or wider; in units of the running deviation when scaled.

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: ``clip`` is not positive.

    As long as no spread has been seen (a first batch of one, equal scores) there is nothing to divide by, and the
    scores keep their size. The reference gives NaN for a first batch of one, and multiplies equal scores by 10^7.
    """
    check_floating(scores=scores)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, expected a bound above 0, or None for none")
    (scores,) = widen(scores)
    if use_scaling:
        shift = state.mean if use_norm else 0.0
        scores = (scores - shift) / (state.std or 1.0)
    return scores if clip is None else scores.clamp(-clip, clip)
