"""One seed for every generator."""

import random

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  users' score functions and collators may use the legacy generator
    torch.manual_seed(seed)
