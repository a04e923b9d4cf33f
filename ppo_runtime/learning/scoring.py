"""From the scores a user gives to those that are rewarded."""

import attrs
import torch
from torch import Tensor

from ppo_core.scores import ScoreState, scale_scores, update_score_state
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.gather import World, global_moments


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
