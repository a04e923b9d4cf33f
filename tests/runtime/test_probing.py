"""What one process finds out the next need not try; and nothing that happens to the file of answers matters."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ppo_runtime import probing
from ppo_runtime.probing import first_line, try_once

VERSIONS = {"python": "3.12", "torch": "2.8.0"}
TRIED = """
import os, sys
from pathlib import Path

def count():
    with open(Path(__file__).with_name("count"), "a") as file:
        file.write("x")

def fine():
    count()
    print("and prints a line")

def says():
    count()
    return "the numbers differ"

def raises():
    count()
    raise LookupError("first\\nsecond")

def leaves():
    count()
    sys.exit("no AVX2")

def dies():
    count()
    print("terminate called", file=sys.stderr, flush=True)
    os._exit(127)

def is_killed():
    count()
    os.kill(os.getpid(), 9)

def faults():
    count()
    os.kill(os.getpid(), 11)

def hangs():
    count()
    import time
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the module to try; answers go to its cache."""
    (tmp_path / "tried.py").write_text(TRIED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def tries(place: Path) -> int:
    return len((place / "count").read_text())


@pytest.mark.parametrize(
    ("function", "problem", "lasting"),
    [
        ("fine", None, True),
        ("says", "the numbers differ", True),
        ("raises", "LookupError: first", True),
        ("leaves", "SystemExit: no AVX2", True),
        ("dies", "it ends the process (exit code 127, saying: terminate called)", True),
        ("faults", "it ends the process (SIGSEGV)", True),
        ("is_killed", "it ends the process (SIGKILL)", False),  # memory ran out: another time it may not
        ("missing", "AttributeError: module 'tried' has no attribute 'missing'", True),
    ],
)
def test_an_answer_is_found_once(place: Path, function: str, problem: str | None, lasting: bool) -> None:
    for _ in range(2):
        assert try_once(f"tried:{function}", VERSIONS) == problem
    if function != "missing":
        assert tries(place) == (1 if lasting else 2)


def test_what_comes_to_no_end_is_no_lasting_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TIMEOUT", 0.5)
    assert "no end within 0.5 s" in str(try_once("tried:hangs", VERSIONS))
    assert not (place / "cache").exists()


def test_other_circumstances_are_another_question(place: Path) -> None:
    for circumstances in (VERSIONS, {**VERSIONS, "torch": "2.8.1"}, {**VERSIONS, "transformers": "5"}, VERSIONS):
        try_once("tried:fine", circumstances)
    assert tries(place) == 3


def test_trying_again_renews_the_answer(place: Path) -> None:
    assert try_once("tried:fine", VERSIONS) is None
    (place / "tried.py").write_text(TRIED.replace("def fine():", "def fine():\n    raise ValueError('broken since')"))
    assert try_once("tried:fine", VERSIONS) is None
    assert try_once("tried:fine", VERSIONS, again=True) == "ValueError: broken since"
    assert try_once("tried:fine", VERSIONS) == "ValueError: broken since"


@pytest.mark.parametrize(
    "damage",
    ["", "{", "null", "[1]", '"fine"', '{"problem": null}', '{"question": {}, "problem": null}', "\x00\xff", "number"],
)
def test_a_torn_file_is_no_answer(place: Path, damage: str) -> None:
    try_once("tried:fine", VERSIONS)
    (memory,) = (place / "cache" / "ppo-core").iterdir()
    kept = json.loads(memory.read_text())
    damage = json.dumps({**kept, "problem": 3}) if damage == "number" else damage
    memory.write_bytes(damage.encode("latin-1"))
    assert try_once("tried:fine", VERSIONS) is None
    assert tries(place) == 2
    assert json.loads(memory.read_text()) == kept


@pytest.mark.parametrize("cache", ["a file", "relative", "no home"])
def test_without_a_place_to_remember_it_tries_each_time(
    place: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (place / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "a file") if cache == "a file" else "relative")
    monkeypatch.setattr(Path, "home", homeless if cache == "no home" else lambda: place / "a file")
    for _ in range(2):
        assert try_once("tried:fine", VERSIONS) is None
    assert tries(place) == 2
    assert not Path("relative").exists()


def test_many_at_once_leave_one_whole_file(place: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: try_once("tried:fine", VERSIONS), range(4))) == [None] * 4
    (memory,) = (place / "cache" / "ppo-core").iterdir()
    assert json.loads(memory.read_text())["problem"] is None


@pytest.mark.parametrize("attribute", ["executable", "frozen"])
def test_a_program_that_is_no_python_is_not_started_twice(
    place: Path, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, attribute, "" if attribute == "executable" else True, raising=False)
    assert "can start no second one" in str(try_once("tried:fine", VERSIONS))
    assert not (place / "count").exists()


def test_a_python_that_cannot_be_started_is_an_answer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", os.fspath(place / "nowhere"))
    assert "no process could be started to try it in (FileNotFoundError" in str(try_once("tried:fine", VERSIONS))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first \nsecond"), "ValueError: first"),
        (KeyError(), "KeyError"),
        (SystemExit(3), "SystemExit: 3"),
        (RuntimeError("x" * 1000), "RuntimeError: " + "x" * 300),
    ],
)
def test_first_line(error: BaseException, line: str) -> None:
    assert first_line(error) == line
