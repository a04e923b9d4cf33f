"""TRL's ``trainer.accelerator`` and other attributes, without accelerate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_runtime.common.launcher import number_in_environment
from ppo_runtime.ranks.agreement import agree_any, all_or_none
from ppo_runtime.ranks.gather import gather_rows
from ppo_runtime.ranks.world import World


class Accelerator:
    """What scripts ask ``trainer.accelerator`` for. Nothing is wrapped: ``prepare`` and ``unwrap_model`` give back.

    Every gather is a collective, to be called by all ranks.
    """

    def __init__(self, device: torch.device, world: World) -> None:
        self.device = device
        self.num_processes = world.size
        self.process_index = world.rank
        self.is_main_process = world.rank == 0
        self.is_last_process = world.rank == world.size - 1
        self.state = SimpleNamespace(
            deepspeed_plugin=None,
            fsdp_plugin=None,
            device=device,
            num_processes=world.size,
            process_index=world.rank,
            local_process_index=self.local_process_index,
        )
        self._world = world

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer.accelerator has no {name!r}: there is no accelerate underneath. It knows the ranks "
            "(num_processes, process_index, is_main_process, gather, wait_for_everyone, print) and the device; for "
            "anything else use the trainer itself, or an accelerate.Accelerator of your own"
        )

    @property
    def local_process_index(self) -> int:
        """This process among those of its machine."""
        return number_in_environment(
            "LOCAL_RANK", "the number of this process on its machine", least=0, default=self.process_index
        )

    @property
    def is_local_main_process(self) -> bool:
        """Whether it is the first of its machine."""
        return self.local_process_index == 0

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True) -> Any:
        """The model itself."""
        return model

    def prepare(self, *objects: Any) -> Any:
        """The objects themselves: one alone, several as a tuple. Move models to ``device`` yourself."""
        return objects[0] if len(objects) == 1 else objects

    def gather(self, tensor: Any) -> Any:
        """Tensors of all ranks, joined along their first axis, in rank order; also inside lists, tuples, dicts.

        Raises:
            ValueError: (on all ranks) keys, numbers of entries, dtypes or shapes behind the first axis differ.
        """
        with all_or_none(self._world, phase="accelerator.gather") as ballot:
            found = dict(_kinds("tensor", tensor))
            ballot.facts = lambda: found
        return self._gathered(tensor)

    def _gathered(self, tensor: Any) -> Any:
        if isinstance(tensor, Tensor):
            rows = tensor if tensor.ndim else tensor[None]
            # The rows are counted by themselves: the entries of rows without entries can't tell how many there were.
            count = len(gather_rows(torch.zeros(len(rows)), self._world))
            return gather_rows(rows.flatten(), self._world).reshape(count, *rows.shape[1:])
        if isinstance(tensor, Mapping):
            found = {key: self._gathered(tensor[key]) for key in sorted(tensor, key=repr)}  # the same order everywhere
            return {key: found[key] for key in tensor}
        made: Any = type(tensor)
        values = [self._gathered(value) for value in tensor]
        return made(*values) if hasattr(tensor, "_fields") else made(values)

    gather_for_metrics = gather

    def wait_for_everyone(self) -> None:
        """Return when all ranks have come here."""
        agree_any(False, self._world, "wait_for_everyone")  # which knows, unlike a barrier, who is elsewhere

    def print(self, *values: Any, **options: Any) -> None:
        """Print on the first process alone."""
        if self.is_main_process:
            print(*values, **options)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process runs the block before the others do."""
        if not self.is_main_process:
            self.wait_for_everyone()
        yield
        if self.is_main_process:
            self.wait_for_everyone()


def _kinds(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """What must be the same on all ranks of what is gathered, by its place."""
    if isinstance(value, Tensor):
        yield f"the kind of {where}", f"{value.dtype}, rows of shape {tuple(value.shape[1:])}"
    elif isinstance(value, Mapping | list | tuple):
        yield f"the number of entries of {where}", str(len(value))
        for key in value if isinstance(value, Mapping) else range(len(value)):
            yield from _kinds(f"{where}[{key!r}]", value[key])
    else:
        raise TypeError(f"gather got a {type(value).__name__}, expected tensors, or lists and dictionaries of them")


class RunningMoments(NamedTuple):
    """What ``trainer.running`` tells about the scores seen so far."""

    mean: float
    std: float
    var: float
    count: float
