"""TRL's ``core``: array helpers, samplers and the seed."""

from ppo_runtime import compat
from ppo_runtime.compat import *  # noqa: F403  its list is the only one
from ppo_runtime.compat.elsewhere import attributes_of
from ppo_runtime.ranks.seeding import set_seed

__all__ = ["set_seed"]
__all__ += compat.__all__

__getattr__ = attributes_of(__name__)
