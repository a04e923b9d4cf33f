"""Try something once in a process of its own, which it may end, and remember what became of it.

Python code can be caught when it fails, native code cannot: an import that meets an instruction which the processor
does not have takes the whole process along. The answer is kept in the user's cache directory, one small file for each
set of circumstances, because a try costs seconds. Nothing depends on that file: without it, or with one that is torn,
the next process tries again; of several processes that try at the same time each writes the whole file in one move.
Nor is an answer kept that another hour may change, such as that of a full disk; see :func:`_passes`.
"""

import errno
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import attrs

from ppo_runtime.common.errors import chained

logger = logging.getLogger(__name__)

TIMEOUT = 90.0
"""Seconds. The import of Intel's extension takes up to 6 on an idle machine and 40 on a crowded one."""
ALWAYS, DAY, NEVER = float("inf"), 86400.0, 0.0
"""How long an answer is kept, in seconds. What hangs will probably hang again, but a crowded machine looks the same."""
_LONGEST = 300
# The working directory, which -c puts first, may hold anything, a json.py too.
_CHILD = """
import sys
sys.path[:] = filter(None, sys.path)
import json
sys.path[:], target = json.loads(sys.argv[1])
from ppo_runtime.accel.probing import _answer
_answer(target)
"""
# Ended by these a process says nothing about what it tried: memory ran out, or someone wanted it gone. Windows has two.
_FROM_OUTSIDE = frozenset(
    int(getattr(signal, name)) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
_SHORTAGES = frozenset(
    getattr(errno, name)
    for name in ("ENOMEM", "ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EAGAIN", "EINTR", "EIO", "ESTALE", "ETIMEDOUT")
    if hasattr(errno, name)
)
# Native code has no types: the dynamic loader, torch's allocator, C++ and OpenMP say it in a sentence.
_SHORTAGE_SAID = (
    *("MemoryError", "KeyboardInterrupt", "bad_alloc", "allocate memory", "not enough memory"),
    *map(os.strerror, sorted(_SHORTAGES)),
)


@attrs.frozen
class Answer:
    """What became of a try."""

    problem: str | None
    """One line, None if all went well."""
    kept: float = ALWAYS
    """For how many seconds the same circumstances are taken to give the same answer."""


def try_once(target: str, circumstances: Mapping[str, str], *, again: bool = False) -> str | None:
    """What a function says in a process of its own or, where it raises or ends that process, what happened instead.

    Args:
        target: the function's place, "package.module:function". It takes no arguments and gives None if all is well,
            else a line.
        circumstances: what the answer depends on, versions above all; other circumstances are another question.
        again: try even if the answer is known, and remember the new one.
    """
    question = {"target": target, **circumstances}
    memory = _memory(question)
    if memory is not None and not again and (known := _recall(memory, question)) is not None:
        return known.problem
    logger.info("trying %s in a process of its own, which takes seconds, %g at most", target, TIMEOUT)
    answer = _try(target)
    if memory is not None and answer.kept:
        _remember(memory, question, answer)
    return answer.problem


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a sentence in a log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__


def _try(target: str) -> Answer:
    if not sys.executable or getattr(sys, "frozen", False):
        return Answer("this Python is part of another program and can start no second one to try it in", NEVER)
    command = [sys.executable, "-c", _CHILD, json.dumps([[str(path) for path in sys.path], target])]
    try:
        # Files, not pipes: a process that outlives the one it was started by keeps a pipe open.
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            code = _run(command, stdout, stderr)
            out, err = (_text(stream) for stream in (stdout, stderr))
    except OSError as error:
        return Answer(f"no process could be started to try it in ({first_line(error)})", NEVER)
    if code is None:
        return Answer(f"it came to no end within {TIMEOUT:g} s in a process of its own", DAY)
    logger.debug("%s in a process of its own: exit code %s\n%s", target, code, err)
    said = _parse(out.strip().rpartition("\n")[2])
    if said is not None and "problem" in said:
        return Answer(said["problem"], NEVER if said.get("passes") else ALWAYS)
    last = err.strip().rpartition("\n")[2].strip()[:_LONGEST]
    passes = -code in _FROM_OUTSIDE or _tells_of_shortage(err)
    how = _ending(code) + (f", saying: {last}" if last else "")
    return Answer(f"it ends the process ({how})", NEVER if passes else ALWAYS)


def _run(command: list[str], stdout: IO[bytes], stderr: IO[bytes]) -> int | None:
    """The exit code, None after the timeout; whatever the process has started and left behind is ended with it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True)
    try:
        return process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if hasattr(os, "killpg"):
            with suppress(OSError):  # nobody is left in the group
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _answer(target: str) -> None:
    """In the other process: run the function, and print what became of it as the last line."""
    module, _, function = target.partition(":")
    try:
        problem, passes = getattr(importlib.import_module(module), function)(), False
    except BaseException as error:  # SystemExit and the like are answers too
        problem, passes = first_line(error), _passes(error)
    print("\n" + json.dumps({"problem": problem, "passes": passes}), flush=True)


def _passes(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, tells of this hour and not of what was tried."""
    return any(
        isinstance(found, MemoryError | KeyboardInterrupt)
        or _tells_of_shortage(str(found))
        or (isinstance(found, OSError) and found.errno in _SHORTAGES)
        for found in chained(error, contexts=True)
    )


def _tells_of_shortage(text: str) -> bool:
    return any(said.lower() in text.lower() for said in _SHORTAGE_SAID)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _memory(question: Mapping[str, str]) -> Path | None:
    """The file for a question; None where there is no place for it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        directory = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # no home directory
        return None
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
    return directory / "ppo-core" / f"tried-{digest[:16]}.json"


def _recall(memory: Path, question: Mapping[str, str]) -> Answer | None:
    try:
        kept = _parse(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if kept is None or kept.get("question") != question or not isinstance(kept.get("problem", 0), str | None):
        return None
    left = kept.get("until", ALWAYS) - time.time() if isinstance(kept.get("until", ALWAYS), float) else NEVER
    # Longer than anything is kept for but for ever: the clock was put back, by who knows how much.
    return Answer(kept["problem"], left) if 0 < left <= DAY or left == ALWAYS else None


def _remember(memory: Path, question: Mapping[str, str], answer: Answer) -> None:
    kept: dict[str, Any] = {"question": question, "problem": answer.problem}
    if answer.kept != ALWAYS:
        kept["until"] = time.time() + answer.kept
    part = None
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=memory.parent, prefix=memory.stem, suffix=".part", delete=False
        ) as part:
            json.dump(kept, part)
        os.replace(part.name, memory)
    except OSError as error:
        logger.debug("the answer could not be kept in %s (%s): the next process tries again", memory, error)
        if part is not None:
            with suppress(OSError):
                os.unlink(part.name)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
