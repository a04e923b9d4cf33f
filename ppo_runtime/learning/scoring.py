"""From the scores a user gives to those that are rewarded."""

import attrs
import torch
from torch import Tensor

from ppo_core.scores import ScoreState, scale_scores, update_score_state
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.gather import global_moments
from ppo_runtime.ranks.world import World


class ScoreProcessor:
    """Running scaling, normalisation and clipping of scores, as the configuration asks for.

    The running moments are those of all ranks' raw scores, the present batch included.
    """

    def __init__(self) -> None:
        self.state = ScoreState(0.0, 0.0, 0.0)

    def __call__(self, raw: Tensor, *, config: PPOConfig, world: World) -> Tensor:
        """Scores [B] as they are rewarded; the running moments have then seen the batch."""
        if config.use_score_scaling:
            moments = global_moments(raw.double(), torch.ones_like(raw, dtype=torch.bool), world)
            self.state = update_score_state(self.state, moments)
        return scale_scores(
            raw,
            self.state,
            use_scaling=config.use_score_scaling,
            use_norm=config.use_score_norm,
            clip=config.score_clip,
        )

    def state_dict(self) -> dict[str, float]:
        """The running moments."""
        return attrs.asdict(self.state)


class RecentScores:
    """This rank's raw scores since the last checkpoint, as their sum and number, which tell good checkpoints apart."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0
        self._kept = False

    def add(self, raw: Tensor) -> None:
        """Take in the scores [B] of a whole step; behind a checkpoint they are the first."""
        if self._kept:
            self.sum, self.count, self._kept = 0.0, 0, False
        self.sum += float(raw.double().sum())
        self.count += raw.numel()

    def resumed(self, mean: float | None) -> None:
        """Stand where a checkpoint was made that has this mean."""
        self.sum, self.count, self._kept = mean or 0.0, int(mean is not None), True

    def kept(self) -> None:
        """A checkpoint has been made. Until the next step another one would be of the same scores."""
        self._kept = True
