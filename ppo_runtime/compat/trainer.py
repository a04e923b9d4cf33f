"""The reference's ``trainer``, its submodules included."""

import sys

from ppo_runtime.compat.elsewhere import attributes_of
from ppo_runtime.config import PPOConfig
from ppo_runtime.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.trainer import PPOTrainer

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer"]

__getattr__ = attributes_of(__name__)
for _name in ("ppo_config", "ppo_trainer", "utils"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = sys.modules[__name__]
