"""The record of a run: a JSONL file, one object per step, readable after any crash and without this package."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ppo_runtime.common.files import free_place, sync, told_again, write_whole
from ppo_runtime.reporting.tables import Table

_BEGINS = b'{"step": '
_RESERVED = ("step", "tables", "nonfinite", "run")


class JsonlTracker:
    """One JSON object per line and step: ``{"step": 3, "ppo/loss/total": 0.1, ..., "tables": {...}}``.

    JSON has no NaN or infinity: such a value is written as null and its key listed under ``"nonfinite"``. An existing
    file is continued, after the half-written last line that a crash may have left is cut off. The first line that a run
    with a name writes says it, and so whose the lines behind it are.
    """

    def __init__(self, path: str | os.PathLike[str], run: str | None = None) -> None:
        self.run = run
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+", buffering=0)
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)
        self._named = _run_at(content, math.inf)

    def log(self, step: int, scalars: Mapping[str, float], tables: Mapping[str, Table]) -> None:
        """Append one line.

        Raises:
            OSError: the system lets none be written; the file ends with the line before.
        """
        if taken := [key for key in _RESERVED if key in scalars]:
            raise ValueError(f"scalars has the key {taken[0]!r}, which the file uses itself; rename that metric")
        nonfinite: list[str] = []
        line: dict[str, object] = {"step": step}
        if self.run not in (None, self._named):
            line["run"] = self.run
        line |= {key: _finite(value, key, nonfinite) for key, value in scalars.items()}
        if tables:
            line["tables"] = {
                name: [{key: _finite(cell, f"{name}/{key}", nonfinite) for key, cell in row.items()} for row in table]
                for name, table in tables.items()
            }
        if nonfinite:
            line["nonfinite"] = sorted(set(nonfinite))
        self._append(
            json.dumps(line, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n", step
        )
        self._named = self.run

    def _append(self, line: bytes, step: int) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            said = f"{self.path} has no line of step {step}: {error}; make room, and log the next step: it comes first"
            raise told_again(error, said) from error

    def sync(self) -> None:
        """Wait until the lines have reached the disk."""
        os.fsync(self._file.fileno())
        sync(self.path.parent)

    def close(self, *, failed: bool = False) -> None:
        """Close the file, whose last line says how far the run came."""
        self._file.close()


def set_aside(path: str | os.PathLike[str]) -> Path | None:
    """Move an earlier run's lines to ``metrics-1.jsonl``, or the next number; returns that path, None without lines."""
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    if b"\n" not in content and content[: len(_BEGINS)] == _BEGINS[: len(content)]:  # a crash has left nothing whole
        return None
    aside = _beside(path)
    if not path.is_symlink():
        return path.rename(aside)
    write_whole(aside, content)  # beside the link, which stays for the lines to come
    write_whole(path, b"")
    return aside


def set_aside_after(path: str | os.PathLike[str], step: float) -> Path | None:
    """Move the lines of later steps, which a run that goes on from ``step`` makes again, as :func:`set_aside` does.

    They are kept, since they may be of another branch of the run, which went on from a copy of the checkpoint.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    later = [line for line in lines if _later(line, step)]
    if not later:
        return None
    write_whole(aside := _beside(path), b"".join(later))
    write_whole(path, b"".join(line for line in lines if not _later(line, step)))
    return aside


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a :class:`JsonlTracker`; a half-written last one is dropped.

    Raises:
        ValueError: another line is not JSON; the message names it.
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:  # noqa: PERF203  # the line number belongs into the message
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}), expected one object per line; repair or delete the line"
            ) from error
    return records


def run_at(path: str | os.PathLike[str], step: float) -> str | None:
    """The name of the run whose line the one of this step is, or the last one before it; None without a name."""
    return _run_at(Path(path).read_bytes() if Path(path).is_file() else b"", step)


def _beside(path: Path) -> Path:
    """A name that is free: ``metrics-1.jsonl``, or the next number."""
    free = free_place(path.with_name(path.stem), endings=[path.suffix], first=1)
    return free.with_name(f"{free.name}{path.suffix}")


def _run_at(content: bytes, step: float) -> str | None:
    records = [record for record in map(_record, content.split(b"\n")) if record]
    name = records[0].get("run") if records else None
    for record in records:
        if isinstance(number := record.get("step"), int) and number <= step:
            name = record.get("run", name)
    return name


def _later(line: bytes, step: float) -> bool:
    return isinstance(number := _record(line).get("step"), int) and number > step


def _record(line: bytes) -> dict[str, Any]:
    """What a line holds; nothing if it is no record, which read_jsonl names."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _finite(value: Any, key: str, nonfinite: list[str]) -> Any:
    """The value as JSON can hold it; ``key`` joins ``nonfinite`` if it can't."""
    if isinstance(value, str | bool | int | None):
        return value
    if hasattr(value, "__float__"):
        number = float(value)
        if math.isfinite(number):
            return number
        nonfinite.append(key)
        return None
    return str(value)
