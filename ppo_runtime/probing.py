"""Try something once in a process of its own, which it may end, and remember what became of it.

Python code can be caught when it fails, native code cannot: an import that meets an instruction which the processor
does not have takes the whole process along. The answer is kept in the user's cache directory, one small file for each
set of circumstances, because a try costs seconds. Nothing depends on that file: without it, or with one that is torn,
the next process tries again; of several processes that try at the same time each writes the whole file in one move.
"""

import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

logger = logging.getLogger(__name__)

TIMEOUT = 300.0
_LONGEST = 300
_CHILD = """
import json, sys
sys.path[:], target = json.loads(sys.argv[1])
from ppo_runtime.probing import _answer
_answer(target)
"""
# Ended by these a process says nothing about what it tried: memory ran out, or someone wanted it gone.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@attrs.frozen
class Answer:
    """What became of a try."""

    problem: str | None
    """One line, None if all went well."""
    lasting: bool = True
    """The same circumstances would give the same answer again."""


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
    answer = _try(target)
    if memory is not None and answer.lasting:
        _remember(memory, question, answer)
    return answer.problem


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a sentence in a log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__


def _try(target: str) -> Answer:
    if not sys.executable or getattr(sys, "frozen", False):
        return Answer("this Python is part of another program and can start no second one to try it in", lasting=False)
    command = [sys.executable, "-c", _CHILD, json.dumps([[str(path) for path in sys.path], target])]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Answer(f"it came to no end within {TIMEOUT:g} s in a process of its own", lasting=False)
    except OSError as error:
        return Answer(f"no process could be started to try it in ({first_line(error)})", lasting=False)
    logger.debug("%s in a process of its own: exit code %s\n%s", target, done.returncode, done.stderr)
    said = _parse(done.stdout.strip().rpartition("\n")[2])
    if said is not None and "problem" in said:
        return Answer(said["problem"])
    last = done.stderr.strip().rpartition("\n")[2].strip()[:_LONGEST]
    how = _ending(done.returncode) + (f", saying: {last}" if last else "")
    return Answer(f"it ends the process ({how})", lasting=-done.returncode not in _FROM_OUTSIDE)


def _answer(target: str) -> None:
    """In the other process: run the function, and print what became of it as the last line."""
    module, _, function = target.partition(":")
    try:
        problem = getattr(importlib.import_module(module), function)()
    except BaseException as error:  # SystemExit and the like are answers too
        problem = first_line(error)
    print("\n" + json.dumps({"problem": problem}), flush=True)


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
    return Answer(kept["problem"])


def _remember(memory: Path, question: Mapping[str, str], answer: Answer) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=memory.parent, prefix=memory.stem, suffix=".part", delete=False
        ) as part:
            json.dump({"question": question, "problem": answer.problem}, part)
        os.replace(part.name, memory)
    except OSError as error:
        logger.debug("the answer could not be kept in %s (%s): the next process tries again", memory, error)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
