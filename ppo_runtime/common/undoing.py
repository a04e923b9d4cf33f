"""What a block has changed, put back however it ends: by an error, or by Ctrl-C in the middle of putting back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Undo = list[Callable[[], Any]]


@contextmanager
def undoing() -> Iterator[Undo]:
    """Gives a list for what undoes each change, and calls all of it at the end, the latest first.

    Append before the change is made. An interrupt may come between any two lines, so that whatever stands in the list
    has to bear being called twice, and where nothing has changed yet.
    """
    todo: Undo = []
    try:
        try:
            yield todo
        finally:
            _undo(todo)
    finally:
        _undo(todo)  # what an interrupt has left of it


def _undo(todo: Undo) -> None:
    while todo:
        todo[-1]()
        todo.pop()
