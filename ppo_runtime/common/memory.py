"""How much memory there is, how much of it is left, and what of that is this process's, within a container's limits."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ppo_runtime.common.launcher import processes_here


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Bytes of memory in all and available, within the limits of a container; None where that can't be told."""
    known: dict[str, int] = {}
    try:
        for line in (root / "proc/meminfo").read_text(errors="replace").splitlines():
            if match := re.match(r"(MemTotal|MemAvailable): +(\d+) kB", line):
                known[match[1]] = int(match[2]) * 1024
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            known["MemTotal"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total, available = known.get("MemTotal"), known.get("MemAvailable")
    for limit, used in _groups(root):
        left = max(limit - used, 0)
        total = limit if total is None else min(total, limit)
        available = left if available is None else min(available, left)
    # Files read at different moments, or those of a tree that is not the kernel's own, need not fit together.
    return total, available if available is None or total is None else min(available, total)


def own_share() -> int | None:
    """Bytes that this process can take: what it has freed and kept, and its part of what is left; None if unknown.

    That is left to all processes that train on this machine.
    """
    available = memory()[1]
    return None if available is None else available // processes_here() + kept()


def kept() -> int:
    """Bytes that this process has freed and its C library has kept; 0 where that is not glibc.

    The library counts what was trimmed as well, which is the system's again: no more than is resident beside what is
    in use.
    """
    ask = _mallinfo()
    if ask is None:
        return 0
    found = ask()
    return min(found.fordblks, max(_resident() - found.uordblks - found.hblkhd, 0))


def _resident() -> int:
    """Bytes of this process that are in memory, on Linux."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


@cache
def _mallinfo() -> Any:
    found = getattr(ctypes.CDLL(None), "mallinfo2", None) if platform.libc_ver()[0] == "glibc" else None
    if found is not None:
        found.restype = _MallInfo
    return found


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every control group with a limit that this process is in, of both versions.

    Files that were read and can be dropped any time, which the kernel counts in, are not in use. A group whose path
    leads out of what this process sees of the tree is looked for at the root of that alone.
    """
    places = [("", "/")]
    with suppress(OSError):
        # A path may hold any byte but the line's end and NUL; what is no such line is passed over.
        text = os.fsdecode((root / "proc/self/cgroup").read_bytes())
        lines = (line.split(":", 2) for line in text.split("\n") if line.count(":") >= 2)
        found = [(names.split(","), path) for _, names, path in lines]
        places += [("memory" if names != [""] else "", path) for names, path in found if {"", "memory"} & {*names}]
    seen = set()
    for kind, path in places:
        top = root / "sys/fs/cgroup" / kind
        group = top / path.strip("/")
        if ".." in group.parts:
            group = top
        for level in (group, *group.parents):
            if level in seen or not level.is_relative_to(top):
                break
            seen.add(level)
            limit, used, cache = ("max", "current", "") if not kind else ("limit_in_bytes", "usage_in_bytes", "total_")
            with suppress(OSError, ValueError):  # no such group here, or one without a limit ("max")
                most, now = (int((level / f"memory.{name}").read_text()) for name in (limit, used))
                dropped = re.search(rf"^{cache}inactive_file (\d+)$", _read(level / "memory.stat"), re.MULTILINE)
                if most < 2**60:  # which is version 1's way to say that there is none
                    yield most, max(now - int(dropped[1] if dropped else 0), 0)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
