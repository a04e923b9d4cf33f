"""What one process finds out the next need not try; and nothing that happens to the file of answers matters."""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ppo_runtime.accel import probing
from ppo_runtime.accel.probing import first_line, try_once

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

def vanishes():
    count()
    os._exit(0)

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

def interrupted():
    count()
    raise KeyboardInterrupt

def lacks_memory():
    count()
    raise MemoryError

def lacks_memory_of_torch():
    count()
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

def finds_the_disk_full():
    count()
    import errno
    raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

def has_no_file_left():
    count()
    import errno
    raise OSError(errno.EMFILE, "something")

def cannot_map():
    count()
    raise ImportError("libx.so: failed to map segment from shared object: Cannot allocate memory")

def wraps():
    count()
    try:
        raise MemoryError
    except MemoryError:
        raise ImportError("broken") from None

def cannot_allocate_in_native_code():
    count()
    print("terminate called after throwing\\n  what():  std::bad_alloc", file=sys.stderr, flush=True)
    os.abort()

def is_denied():
    count()
    import errno
    raise OSError(errno.EACCES, "Permission denied", "/tmp/x")

def leaves_a_process_behind():
    count()
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(__file__).with_name("child").write_text(str(child.pid))
    return "the numbers differ"

def leaves_a_process_behind_and_hangs():
    leaves_a_process_behind()
    hangs()
"""
PASSING = {
    "interrupted": "KeyboardInterrupt",
    "lacks_memory": "MemoryError",
    "lacks_memory_of_torch": "RuntimeError: [enforce fail] DefaultCPUAllocator: can't",
    "finds_the_disk_full": "OSError: [Errno 28] No space left",
    "has_no_file_left": "OSError: [Errno 24] something",
    "cannot_map": "ImportError: libx.so: failed to map",
    "wraps": "ImportError: broken",
    "cannot_allocate_in_native_code": "it ends the process (SIGABRT, saying: what():  std::bad_alloc)",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the module to try; answers go to its cache."""
    (tmp_path / "tried.py").write_text(TRIED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried, for tests of what is kept: nothing is run, and all is well."""
    tried: list[str] = []

    def try_it(target: str) -> probing.Answer:
        tried.append(target)
        return probing.Answer(None)

    monkeypatch.setattr(probing, "_try", try_it)
    return tried


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
        ("vanishes", "it ends the process (exit code 0)", True),
        ("faults", "it ends the process (SIGSEGV)", True),
        ("is_killed", "it ends the process (SIGKILL)", False),  # memory ran out: another time it may not
        ("is_denied", "PermissionError: [Errno 13] Permission denied: '/tmp/x'", True),
        ("missing", "AttributeError: module 'tried' has no attribute 'missing'", True),
    ],
)
def test_an_answer_is_found_once(place: Path, function: str, problem: str | None, lasting: bool) -> None:
    for _ in range(2):
        assert try_once(f"tried:{function}", VERSIONS) == problem
    if function != "missing":
        assert tries(place) == (1 if lasting else 2)


@pytest.mark.parametrize("function", PASSING)
def test_what_another_hour_may_change_is_no_lasting_answer(place: Path, function: str) -> None:
    assert str(try_once(f"tried:{function}", VERSIONS)).startswith(PASSING[function])
    assert not (place / "cache").exists()


@pytest.mark.parametrize("clock", ["the same day", "the next day", "put back"])
def test_what_comes_to_no_end_is_believed_for_a_day(place: Path, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TIMEOUT", 0.5)
    assert "no end within 0.5 s" in str(try_once("tried:hangs", VERSIONS))
    now = time.time()
    passed = {"the same day": 80000, "the next day": probing.DAY + 60, "put back": -1000}[clock]
    monkeypatch.setattr(time, "time", lambda: now + passed)
    (place / "tried.py").write_text(TRIED.replace("def hangs():", "def hangs():\n    return 'comes to an end'"))
    monkeypatch.setattr(probing, "TIMEOUT", 60.0)
    said = try_once("tried:hangs", VERSIONS)
    assert said == "comes to an end" if clock != "the same day" else "no end within" in str(said)


def test_a_try_is_announced_before_it_is_made(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ppo_runtime.accel.probing"):
        for _ in range(2):
            try_once("tried:fine", VERSIONS)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["trying tried:fine in a process of its own, which takes seconds, 90 at most"]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="without process groups only the process itself is ended")
@pytest.mark.parametrize("function", ["leaves_a_process_behind", "leaves_a_process_behind_and_hangs"])
def test_nothing_that_it_started_stays(place: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, child = subprocess.Popen.wait, place / "child"

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None or "hangs" not in function:
            return real(process, timeout)
        while not (child.exists() and child.read_text()):
            time.sleep(0.05)
        raise subprocess.TimeoutExpired("it", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    said = str(try_once(f"tried:{function}", VERSIONS))
    assert ("no end" if "hangs" in function else "the numbers differ") in said
    assert not runs(int(child.read_text()))


def runs(process: int) -> bool:
    """Gives it a while to vanish; a zombie, which only its new parent can bury, has."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            if " Z " in Path(f"/proc/{process}/stat").read_text():
                return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


def test_the_working_directory_is_the_users(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "here").mkdir()
    for name in ("json", "sys", "importlib", "ppo_runtime"):
        (place / "here" / f"{name}.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(place / "here")
    assert try_once("tried:says", VERSIONS) == "the numbers differ"


@pytest.mark.parametrize("failing", ["dump", "replace"])
def test_an_answer_that_could_not_be_kept_leaves_nothing(
    place: Path, asked: list[str], failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((json, "dump") if failing == "dump" else (os, "replace")), full)
    assert try_once("tried:fine", VERSIONS) is None
    assert asked
    assert list((place / "cache" / "ppo-core").iterdir()) == []


def test_it_needs_no_signal_that_only_some_systems_have() -> None:
    """Windows has neither SIGKILL nor SIGHUP, and nearly nothing of os that is for process groups."""
    code = (
        "import os, signal, errno\nkill = signal.SIGKILL\n"
        "del os.killpg, errno.EDQUOT, signal.SIGKILL, signal.SIGHUP\n"
        "from ppo_runtime.accel import probing\n"
        "signal.SIGKILL = kill  # which subprocess needs here, and not on Windows\n"
        "assert signal.SIGTERM in probing._FROM_OUTSIDE\n"
        "print(probing._try('platform:system').problem)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == (platform.system(), "")


def test_other_circumstances_are_another_question(place: Path, asked: list[str]) -> None:
    for circumstances in (VERSIONS, {**VERSIONS, "torch": "2.8.1"}, {**VERSIONS, "transformers": "5"}, VERSIONS):
        try_once("tried:fine", circumstances)
    assert len(asked) == 3


def test_trying_again_renews_the_answer(place: Path) -> None:
    assert try_once("tried:fine", VERSIONS) is None
    (place / "tried.py").write_text(TRIED.replace("def fine():", "def fine():\n    raise ValueError('broken since')"))
    assert try_once("tried:fine", VERSIONS) is None
    assert try_once("tried:fine", VERSIONS, again=True) == "ValueError: broken since"
    assert try_once("tried:fine", VERSIONS) == "ValueError: broken since"


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "null",
        "[1]",
        '"fine"',
        '{"problem": null}',
        '{"question": {}, "problem": null}',
        "\x00\xff",
        "number",
        "until",
    ],
)
def test_a_torn_file_is_no_answer(place: Path, asked: list[str], damage: str) -> None:
    try_once("tried:fine", VERSIONS)
    (memory,) = (place / "cache" / "ppo-core").iterdir()
    kept = json.loads(memory.read_text())
    damage = {"number": json.dumps({**kept, "problem": 3}), "until": json.dumps({**kept, "until": "soon"})}.get(
        damage, damage
    )
    memory.write_bytes(damage.encode("latin-1"))
    assert try_once("tried:fine", VERSIONS) is None
    assert len(asked) == 2
    assert json.loads(memory.read_text()) == kept


@pytest.mark.parametrize("cache", ["a file", "relative", "no home"])
def test_without_a_place_to_remember_it_tries_each_time(
    place: Path, asked: list[str], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (place / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "a file") if cache == "a file" else "relative")
    monkeypatch.setattr(Path, "home", homeless if cache == "no home" else lambda: place / "a file")
    for _ in range(2):
        assert try_once("tried:fine", VERSIONS) is None
    assert len(asked) == 2
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
