"""TRL's ``extras``, of which nothing is here; a name says what to do instead."""

from ppo_runtime.compat.elsewhere import attributes_of

__getattr__ = attributes_of(__name__)
