"""The bar of a run."""

from contextlib import suppress
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Bar(Progress):
    """A bar that is shown as long as there is somewhere to: a terminal that has closed ends no run."""

    def start(self) -> None:
        # Where the reader of a pipe has gone away, rich would end the program, and silence its standard output before.
        vars(self.console)["on_broken_pipe"] = partial(setattr, self.console, "quiet", True)
        with suppress(OSError):
            super().start()

    def refresh(self) -> None:
        with suppress(OSError):
            super().refresh()

    def stop(self) -> None:
        with suppress(OSError):
            super().stop()
        vars(self.console).pop("on_broken_pipe", None)


def progress(console: Console, *, disable: bool) -> Progress:
    """Steps made of all, a status beside them, time gone and time left."""
    return _Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
