"""TRL's ``trainer``, its submodules included: the trainer, its settings and its controllers."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ppo_core.scores import ScoreState
from ppo_runtime.compat.accelerator import Accelerator, RunningMoments
from ppo_runtime.compat.elsewhere import attributes_of
from ppo_runtime.compat.piecewise import Piecewise
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.loop import TrainResult, train
from ppo_runtime.models.wrapper import PreTrainedModelWrapper

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer"]


_NO_PART_OF_A_STEP = {
    "compute_rewards": "give step other scores",
    "compute_advantages": "set advantage_estimator",
    "loss": "set policy_objective",
}


class PPOTrainer(Piecewise):
    """The trainer by TRL's names and signature, with the parts of a step as methods; see :class:`Trainer`."""

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: Any | None = None,
        tokenizer: Any | None = None,
        dataset: Any | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any | None = None,
    ) -> None:
        super().__init__(
            config,
            model,
            tokenizer,
            ref_model=ref_model,
            dataset=dataset,
            optimizer=optimizer,
            data_collator=data_collator,
            num_shared_layers=num_shared_layers,
            lr_scheduler=lr_scheduler,
        )

    def __init_subclass__(cls, **options: Any) -> None:
        """Point out methods that scripts override to change a step, which here is made of functions."""
        super().__init_subclass__(**options)
        if cls.step is PPOTrainer.step:
            for name, instead in _NO_PART_OF_A_STEP.items():
                if name in vars(cls):
                    warnings.warn(
                        f"{cls.__name__}.{name} is not called by step; {instead}, or override step as well",
                        UserWarning,
                        stacklevel=2,
                    )

    def train(self, score_fn: Callable[[list[str], list[str]], Sequence[float]], **options: Any) -> TrainResult:
        """Prompts -> responses -> scores -> step over ``dataloader``; see :func:`ppo_runtime.loop.train`."""
        return train(self, score_fn, **options)

    @property
    def accelerator(self) -> Accelerator:
        """Device and ranks, as scripts ask for them."""
        return Accelerator(self.model.device, self.world)

    @property
    def current_device(self) -> torch.device:
        """Where the policy lives."""
        return self.model.device

    @property
    def is_distributed(self) -> bool:
        """Whether several processes train together."""
        return self.world.size > 1

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the policy has an encoder of its own."""
        return bool(self.config.is_encoder_decoder)

    @property
    def is_peft_model(self) -> bool:
        """Whether the policy is an adapter on a frozen model."""
        return bool(self.config.is_peft_model)

    @property
    def running(self) -> RunningMoments:
        """Running moments of the raw scores; of none without ``use_score_scaling``."""
        state: ScoreState = self.scores.state
        return RunningMoments(state.mean, state.std, state.std**2, state.count)


__getattr__ = attributes_of(__name__)
for _name in ("ppo_config", "ppo_trainer", "utils"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = sys.modules[__name__]
