"""Skips updates that would do harm, on all ranks together: weights and the optimiser's moments stay as they are."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ppo_core.averages import Average, mean_of
from ppo_runtime.common.inputs import NotFinite
from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.agreement import gathered
from ppo_runtime.ranks.presence import agreed
from ppo_runtime.ranks.shards import here
from ppo_runtime.ranks.world import World

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())


class Cause(IntEnum):
    """Why an update is left out, on all ranks alike."""

    NONE = 0
    """Nothing speaks against it."""
    FAR = 1
    LOSS = 2
    GRADIENT = 3
    OVERFLOW = 4
    EMPTY = 5


WHAT_TO_DO = {
    Cause.FAR: "its mean ratio of probabilities is above ratio_threshold: lower learning_rate or ppo_epochs",
    Cause.LOSS: "its loss is not finite: look at the scores, lower learning_rate, or set max_grad_norm",
    Cause.GRADIENT: "its gradient is not finite although its loss is: look for an operation of the model that "
    "overflows or has no derivative, half precision above all",
    Cause.OVERFLOW: "the squares of its gradient overflow: set max_grad_norm, lower learning_rate, or scale the scores",
    Cause.EMPTY: "response_masks keep none of its tokens: keep some, or drop such rows",
}


NOT_FINITE = frozenset({Cause.LOSS, Cause.GRADIENT, Cause.OVERFLOW})
"""Those that ``on_nonfinite`` is about."""
INSPECTED = NOT_FINITE | {Cause.EMPTY}
"""Those whose batch is kept for inspection."""
PATIENCE = 10
"""Steps in a row whose updates are all left out for such numbers; after them training stops, whatever is asked for: the
weights have stayed as they are, and nothing else would change."""


def stop_if_asked(cause: Cause, config: PPOConfig) -> None:
    """Raise before an update is left out, if the configuration would rather stop; on all ranks or on none."""
    if cause in NOT_FINITE and config.on_nonfinite == "stop":
        raise agreed(NotFinite(f"an update cannot be made, and on_nonfinite is 'stop': {WHAT_TO_DO[cause]}"))


SEEN = 4
"""How many numbers a rank has to tell of an update's losses."""


def seen_in_losses(averages: dict[str, Average]) -> Tensor:
    """What a rank tells of its part of an update [SEEN]: sums, so that those of all ranks add up; one transfer."""
    ratio = averages["ppo/policy/ratio"]
    losses = averages["ppo/loss/policy"].total + averages["ppo/loss/value"].total
    totals = [part.total for part in averages.values()]
    told = torch.stack((losses, ratio.total, ratio.weight, *totals)).cpu().double()
    return torch.cat((told[:3], told[3:].sum()[None]))


def cause_in_losses(seen: Tensor, config: PPOConfig) -> Cause:
    """What speaks against an update, of which every rank has told [ranks, SEEN]; not how its rows were split."""
    loss, ratios, weight, _ = seen.sum(0)
    ratio = float(mean_of(Average(ratios, weight)))
    if not math.isfinite(loss):
        return Cause.LOSS
    if ratio > config.ratio_threshold:  # an infinite one too, where clipping has kept the loss finite
        return Cause.FAR
    return Cause.NONE if math.isfinite(ratio) else Cause.LOSS


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter], max_norm: float | None, *, shards_of: World | None = None
) -> tuple[Tensor, Cause]:
    """Scale gradients down to ``max_norm``, or not at all without it.

    With ``shards_of`` each of those ranks holds a part of every gradient, and the norm is that of all parts.

    Returns:
        Their global norm before, on the CPU, and what speaks against a step on them; gradients are untouched then.
        Finite ones whose squares overflow can be clipped. Without a bound, or with one whose square overflows as well,
        they are no good to an optimiser, whose moments are squares.
    """
    gradients = [here(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if shards_of is not None:
        return _clip_shards(gradients, max_norm, shards_of)
    norm = torch.nn.utils.get_total_norm(gradients)
    found = norm.cpu()  # waits for the device
    if not math.isfinite(float(found)):
        return _clip_large(gradients, max_norm)
    if max_norm is not None and float(found) > max_norm:  # else they would be multiplied by 1
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return found, Cause.NONE


def _clip_large(gradients: Sequence[Tensor], max_norm: float | None) -> tuple[Tensor, Cause]:
    """The same where squares may overflow: in numbers as wide as the device has, made smaller beforehand.

    What is lost at the small end is below the rounding of the others.
    """
    largest = min((math.sqrt(torch.finfo(_wide(g)).max) for g in gradients), default=math.inf)
    parts = [float(torch.linalg.vector_norm(g.to(_wide(g)) * _shrinking(g))) / _shrinking(g) for g in gradients]
    norm = math.hypot(*parts)
    found = torch.tensor(norm, dtype=torch.float64)
    if not math.isfinite(norm):
        return found, Cause.GRADIENT
    if max_norm is None or max_norm > largest:
        return found, Cause.OVERFLOW
    if norm > max_norm:
        for g in gradients:
            # In two steps, since their product may be less than the numbers of the device go down to.
            g.copy_(g.to(_wide(g)) * _shrinking(g) * (max_norm / (norm * _shrinking(g))))
    return found, Cause.NONE


def _clip_shards(gradients: Sequence[Tensor], max_norm: float | None, world: World) -> tuple[Tensor, Cause]:
    """The same for this rank's parts; squares are summed in double precision, which has room for those of a float."""
    parts = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
    mine = torch.linalg.vector_norm(parts).cpu()
    everyone = gathered(mine[None], world, "the norm of gradients")
    norm = math.hypot(*everyone.flatten().tolist())  # in rank order: the same bits everywhere
    found = torch.tensor(norm, dtype=torch.float64)
    if not math.isfinite(norm):
        return found, Cause.GRADIENT
    largest = min(math.sqrt(torch.finfo(_wide(g)).max) for g in gradients)
    if norm > largest and (max_norm is None or max_norm > largest):
        return found, Cause.OVERFLOW
    if max_norm is not None and norm > max_norm:
        for g in gradients:
            g.mul_(max_norm / (norm + 1e-6))  # as torch does it for whole ones
    return found, Cause.NONE


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _shrinking(gradient: Tensor) -> float:
    """A power of two which leaves no number whose square overflows, however many are added."""
    return 2.0 ** -(3 * math.frexp(torch.finfo(_wide(gradient)).max)[1] // 4)


class SkipLog:
    """Says of each cause, the first time it is met, what was left out and what to do; ends what is pointless."""

    def __init__(self) -> None:
        self._said: set[Cause] = set()
        self._in_vain = 0

    def __call__(self, skipped: Counter[Cause], step: int, *, made: int | None = None) -> None:
        """Tell of the updates that were left out in a step.

        Args:
            skipped: how many, by cause.
            step: its number.
            made: how many others were made; None if that is not known yet.

        Raises:
            ValueError: too many steps in a row have made none for numbers that are not finite; on all ranks or none.
        """
        for cause in sorted(set(skipped) - self._said):
            logger.warning(
                "%d %s of step %d left out: %s. Said once; ppo/policy/skipped_updates counts them all",
                skipped[cause],
                "update" if skipped[cause] == 1 else "updates",
                step,
                WHAT_TO_DO[cause],
            )
        self._said.update(skipped)
        causes = NOT_FINITE & set(skipped)
        self._in_vain = self._in_vain + 1 if causes and made == 0 else 0
        if self._in_vain >= PATIENCE:
            self._in_vain = 0
            error = ValueError(
                f"{PATIENCE} steps in a row had to leave out all their updates, the last one since "
                f"{WHAT_TO_DO[max(causes)]}"
            )
            raise agreed(error)
