"""One seed for every generator."""

import random

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  users' score functions and collators may use the legacy generator
    torch.manual_seed(seed)


def mixed(seed: int, number: int) -> int:
    """One seed of two numbers, so that seed 0's second epoch (or rank) is not seed 1's first."""
    return (seed * 1_000_003 + number) % 2**63
