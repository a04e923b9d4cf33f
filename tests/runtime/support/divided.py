"""Whether torch is one with which models can be divided among ranks; the trainer refuses older ones."""

import pytest
from torch.distributed.fsdp import FSDPModule

DIVIDES_MODELS = hasattr(FSDPModule, "reset_iter_state")
_REASON = "this torch is refused"

divided = pytest.mark.skipif(not DIVIDES_MODELS, reason=_REASON)


def need_divided_models() -> None:
    """Skip the test, or what needs a fixture."""
    if not DIVIDES_MODELS:
        pytest.skip(_REASON)
