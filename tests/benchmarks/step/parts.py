"""Where a step of ours goes: timers around the library's own seams, put there from outside and taken away again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ppo_runtime.learning.forward
import ppo_runtime.learning.update
import ppo_runtime.trainer
from ppo_runtime.models.inner import transformers_model

SCORING = "scoring"
"""All that is computed without gradients before the first update, whatever it passes through."""
HEAD, FORWARD, BACKWARD = "head", "trunk forward", "trunk backward"
"""The head forward and backward, the losses' backward included; the trunk in each direction."""
OPTIMISER, CLIPPING, OTHER = "optimiser", "clipping", "other"
PARTS = (SCORING, FORWARD, HEAD, BACKWARD, CLIPPING, OPTIMISER, OTHER)


class Stopwatch:
    """Books every moment to one part, the innermost that has begun."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._clock, self._since, self._within = clock, clock(), [OTHER]

    def begin(self, part: str) -> None:
        """Enter a part, or a part within one; within scoring all is scoring."""
        self._book()
        self._within.append(SCORING if SCORING in self._within else part)

    def go_on_with(self, part: str) -> None:
        """Leave the innermost part for another one."""
        self._book()
        self._within[-1] = part

    def end(self) -> None:
        """Leave the innermost part, for the one around it."""
        self._book()
        self._within.pop()

    def stop(self) -> None:
        """Book what has passed since the last change."""
        self._book()

    def _book(self) -> None:
        now = self._clock()
        self.seconds[self._within[-1]] += now - self._since
        self._since = now

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, booked to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return timed


@contextmanager
def watched(trainer: Any) -> Iterator[Stopwatch]:
    """Time the parts of whatever steps the block makes.

    A backward pass begins in the head. Once the gradient of what the trunk has put out is there, the rest is the
    trunk's.
    """
    watch = Stopwatch()
    forward, update = ppo_runtime.learning.forward, ppo_runtime.learning.update
    seams = (
        (ppo_runtime.trainer, "score_rollout", SCORING),
        (forward, "read_off", HEAD),
        (torch.autograd, "backward", HEAD),
        (update, "clip_gradients", CLIPPING),
    )
    with ExitStack() as stack:
        for owner, name, part in seams:
            stack.enter_context(mock.patch.object(owner, name, watch.around(part, getattr(owner, name))))
        handles = [
            trainer.optimizer.register_step_pre_hook(lambda *_: watch.begin(OPTIMISER)),
            trainer.optimizer.register_step_post_hook(lambda *_: watch.end()),
        ]
        for module in _trunk(transformers_model(trainer.model)):
            handles.append(module.register_forward_pre_hook(lambda *_: watch.begin(FORWARD)))
            handles.append(module.register_forward_hook(lambda _, __, out: _leave_trunk(watch, out), always_call=True))
        for handle in handles:
            stack.callback(handle.remove)
        yield watch
        watch.stop()


def _trunk(model: Any) -> list[nn.Module]:
    """The trunk and each of its layers, which may be called one by one."""
    stacks = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    return [model.base_model, *(layer for stack in stacks for layer in stack)]


def _leave_trunk(watch: Stopwatch, output: Any) -> None:
    watch.end()
    hidden = output if isinstance(output, Tensor) else None if output is None else output[0]
    if hidden is not None and hidden.requires_grad:
        hidden.register_hook(lambda _: watch.go_on_with(BACKWARD))
