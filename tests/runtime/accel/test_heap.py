"""Freed memory is kept inside, handed back afterwards, and left alone where somebody has chosen."""

from __future__ import annotations

import pytest
import torch

from ppo_runtime.accel import heap
from ppo_runtime.common import memory

MMAP, TRIM = heap._M_MMAP_THRESHOLD, heap._M_TRIM_THRESHOLD


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the C library is told, with an environment that says nothing."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_mallopt", lambda: lambda name, value: told.append((name, value)))
    for name in heap._CHOICES:
        monkeypatch.delenv(name, raising=False)
    return told


def test_the_process_is_as_usual_afterwards_even_where_a_block_fails(calls: list[tuple[int, int]]) -> None:
    def nested() -> None:
        with heap.freed_memory_kept(), heap.freed_memory_kept():
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


def test_the_c_library_takes_what_it_is_told() -> None:
    adjust = heap._mallopt()
    if adjust is None:
        pytest.skip("not glibc")
    assert all(adjust(name, heap._EVERYTHING) == 1 for name in (MMAP, TRIM))
    assert [adjust(MMAP, heap._USUAL_MMAP), adjust(TRIM, heap._USUAL_TRIM)] == [1, 1]


def test_what_is_kept_can_be_had_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if heap._mallopt() is None or memory._mallinfo() is None:
        pytest.skip("not glibc, or an old one")
    for name in heap._CHOICES:
        monkeypatch.delenv(name, raising=False)
    with heap.freed_memory_kept():
        size = 2**26
        large = torch.ones(size, dtype=torch.uint8)
        before = memory.kept()
        del large
        assert memory.kept() - before >= size


def test_what_was_trimmed_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_mallinfo", lambda: lambda: memory._MallInfo(fordblks=2**50, uordblks=2**20))
    monkeypatch.setattr(memory, "_resident", lambda: 2**22)
    assert memory.kept() == 2**22 - 2**20
    monkeypatch.setattr(memory, "_resident", lambda: 2**10)
    assert memory.kept() == 0


def test_nobody_counts_for_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory._mallinfo.__wrapped__() is None
    monkeypatch.setattr(memory, "_mallinfo", lambda: None)
    assert memory.kept() == 0
