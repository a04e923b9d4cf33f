"""Signals that ask a process to stop: the first lets it finish what it is at, the second ends it as ever."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

logger = logging.getLogger(__name__)

# Ctrl-C, what schedulers and launchers send, and a terminal that is closed; the last one not on every system.
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@attrs.define
class Stop:
    """Whether a process has been asked to stop."""

    signal: int = 0
    """The number of the signal that asked first; 0 before there is one."""


@contextmanager
def stop_asked(finishing: str, *, says: bool) -> Iterator[Stop]:
    """Note the first signal that asks to stop; the second, of whatever kind, does what it would have done before.

    Nothing is noted in another thread than the main one, which alone may handle signals. A signal that is ignored, as
    Ctrl-C is by a job in the background and a closed terminal by ``nohup``, stays so.

    Args:
        finishing: what is finished first, for the message.
        says: whether to log it.
    """
    stop, process = Stop(), os.getpid()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _STOPPING if in_main_thread}
    # A handler that was not set from Python (None) could not be put back.
    ours = {number: before for number, before in handlers.items() if before not in (signal.SIG_IGN, None)}

    def put_back() -> None:
        for number, before in ours.items():
            signal.signal(number, before)

    def handle(number: int, _frame: Any) -> None:
        if os.getpid() != process:  # one that the score function has forked: it ends as whoever ends it expects
            put_back()
            signal.raise_signal(number)
            return
        stop.signal = number
        put_back()
        if says:
            again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
            name = signal.Signals(number).name
            logger.warning("%s: finishing %s, then stopping; %s to stop at once", name, finishing, again)

    for number in ours:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        put_back()
