"""Freed memory is kept inside, handed back afterwards, and left alone where somebody has chosen."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from ppo_runtime.accel import heap

MMAP, TRIM = heap._M_MMAP_THRESHOLD, heap._M_TRIM_THRESHOLD

FAULTS = """
import resource, torch
from contextlib import nullcontext
from ppo_runtime.accel.heap import freed_memory_kept, _mallopt

def faults(context):
    with context:
        for _ in range(2):  # the first touches the memory
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            kept = [torch.ones(2**20) for _ in range(48)]
            del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
print(faults(freed_memory_kept()), faults(nullcontext()), _mallopt() is not None)
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the C library is told, with an environment that says nothing."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_mallopt", lambda: lambda name, value: told.append((name, value)))
    for name in heap._CHOICES:
        monkeypatch.delenv(name, raising=False)
    return told


def test_the_process_is_as_usual_after_the_outermost_even_where_it_fails(calls: list[tuple[int, int]]) -> None:
    def nested() -> None:
        with heap.freed_memory_kept():
            with heap.freed_memory_kept():
                pass
            assert {value for _, value in calls} == {heap._EVERYTHING}
            assert {name for name, _ in calls} == {MMAP, TRIM}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nested()
    assert calls[-2:] == [(MMAP, heap._USUAL_MMAP), (TRIM, heap._USUAL_TRIM)]


@pytest.mark.parametrize("name", heap._CHOICES)
def test_a_choice_in_the_environment_counts(
    name: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with heap.freed_memory_kept():
        pass
    assert calls == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert heap._mallopt.__wrapped__() is None
    monkeypatch.setattr(heap, "_mallopt", lambda: None)
    with heap.freed_memory_kept():
        pass


def test_memory_is_used_again() -> None:
    """In a process of its own, whose heap nobody else has grown."""
    environment = {name: value for name, value in os.environ.items() if name not in heap._CHOICES}
    answer = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    kept, usual, is_glibc = answer.stdout.split()
    if is_glibc == "False" or "LD_PRELOAD" in os.environ or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc's allocator")
    assert int(kept) < 0.1 * int(usual)
