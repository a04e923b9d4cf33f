"""This project's own functions."""

import ppo_core as implementation

__all__ = ["implementation"]
