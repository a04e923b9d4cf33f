"""The doctor finds what is wrong, says what to do, and its exit code is whether the demo can run."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ppo_runtime import doctor
from ppo_runtime.accel import backends as accel
from ppo_runtime.accel.backends import choose
from ppo_runtime.common import memory as common_memory
from ppo_runtime.common.memory import own_share
from ppo_runtime.doctor import Finding, memory, pins, report, versions
from tests.runtime.support.fake_extension import FITTING, pretend

ROOT = Path(__file__).resolve().parents[2]


def report_of(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "diagnose", lambda: iter(findings))
    shown = io.StringIO()
    return report(Console(width=200, file=shown)), shown.getvalue()


def test_a_missing_part_is_exit_code_1_with_its_remedy(tmp_path: Path) -> None:
    """The real command, without what the demo scores with and with a broken model of its own curves."""
    for name in ("vaderSentiment", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is [broken]')")
    path = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "ppo_runtime", "doctor"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stdout.split())
    assert "problem: demo: score: ImportError: the demo scores text with VADER: pip install 'ppo-core[demo]'" in said
    assert "problem: demo: curves: ImportError: matplotlib is [broken] pip install 'ppo-core[demo]'" in said
    assert "embedded model and 382 prompts, loaded and run" in said, "one problem doesn't hide the rest"
    assert "The demo can't run" in said
    for name in ("threads", "memory", "frozen models", "torch", "tested versions"):
        assert name in said


@pytest.mark.parametrize(
    ("finding", "code", "line"),
    [
        (Finding("a", "well"), 0, "The demo can run."),
        (Finding("a", "odd [ipex]", "do [this]"), 0, "note: a: odd [ipex]\n    do [this]\nThe demo can run."),
        (Finding("a", "bad", "do this", broken=True), 1, "problem: a: bad\n    do this\nThe demo can't run until"),
    ],
)
def test_notes_leave_the_exit_code_alone(
    finding: Finding, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, text = report_of(monkeypatch, Finding("b", "well"), finding)
    assert got == code
    assert line in text


def findings(tested: dict[str, str] | None) -> dict[str, Finding]:
    return {finding.name: finding for finding in versions(tested, "from the test")}


def test_found_tested_and_required_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.9.1+cpu", "transformers": "4.57.0", "numpy": "2.0.0", "fsspec": "1.0", "tqdm": "4.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    needs = ["torch>=2.8", "transformers>=5", "attrs>=24.2", "numpy>=1.26", "wandb>=0.19; extra == 'wandb'"]
    needs += ["vaderSentiment==3.3.2; extra == 'demo'", "tomli>=2; python_version < '3'"]
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor, "can_be_found", lambda name: False)
    found = findings({"torch": "2.9.1", "numpy": "2.1.0", "fsspec": "1.1", "tqdm": "4.0", "absent": "1"})
    assert found["torch"] == Finding("torch", "2.9.1+cpu"), "a build for the CPU is the version tested"
    assert found["numpy"] == Finding("numpy", "2.0.0 (tested 2.1.0)")
    assert found["transformers"].broken
    assert found["transformers"].value == "4.57.0, required >=5"
    assert found["transformers"].advice == "pip install 'transformers>=5'"
    assert found["attrs"].broken
    assert found["vaderSentiment"].broken
    assert found["vaderSentiment"].advice == doctor.INSTALL
    assert not found["peft"].broken, "not needed"
    assert found["other than tested"].value == (
        "2 of the versions: numpy 2.0.0 (tested 2.1.0), fsspec 1.0 (tested 1.1)"
    )
    assert "other than tested" not in findings(None)


def test_without_a_checkout_the_tested_versions_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CONSTRAINTS", tmp_path)
    assert doctor._tested() == (None, "not known: they are kept in a checkout, and this is none")
    for name in ("ipex", "newest"):
        (tmp_path / f"{name}.txt").write_text("torch is new")
    tested, why = doctor._tested()
    assert tested is None
    assert "can't be read (InvalidRequirement" in why


def test_pins_are_read_with_their_markers() -> None:
    text = (
        "# made by a command\nTorch==2.8.0 ; python_version >= '3'\ntorch==1.0 ; python_version < '3'\n\n"
        "typing_extensions==4.1  # why\n"
    )
    assert pins(text) == {"torch": "2.8.0", "typing-extensions": "4.1"}


@pytest.mark.parametrize("name", ["ipex", "newest"])
def test_the_files_of_this_repository_can_be_read(name: str) -> None:
    if not doctor.CONSTRAINTS.is_dir():
        pytest.skip("the tests of an installed package have no checkout")
    assert {"torch", "transformers"} <= set(pins((doctor.CONSTRAINTS / f"{name}.txt").read_text()))


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, None, (8000 * 1024, 5000 * 1024)),
        ("max", "100", (8000 * 1024, 5000 * 1024)),
        ("4096000", "1024000", (4096000, 3072000)),
        ("4096000", "9999999", (4096000, 0)),
        ("99999999999", "0", (8000 * 1024, 5000 * 1024)),
    ],
)
def test_memory_is_what_the_container_allows(
    limit: str | None, used: str | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:   5000 kB\n")
    if limit is not None and used is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")
    assert memory(tmp_path) == expected


GROUPS = {
    "cache counts as free": ("0::/", {"": (4000, 3000, "inactive_file 500\nactive_file 7\n")}, 1500),
    "group of a service": ("0::/a.slice/b.service", {"a.slice/b.service": (3000, 1000, "inactive_file 0\n")}, 2000),
    "group around it": (
        "0::/a.slice/b.service",
        {"a.slice": (3000, 2900, ""), "a.slice/b.service": (9000, 0, "")},
        100,
    ),
    "none of another": ("0::/a.slice", {"b.slice": (10, 5, "")}, None),
    "path of the host": ("0::/../../docker/1", {"": (4000, 1000, "")}, 3000),
    "version 1": (
        "4:memory:/job\n0::/",
        {"memory/job": (4000, 3000, "inactive_file 7\ntotal_inactive_file 500\n")},
        1500,
    ),
    "version 1, path of the host": ("4:cpu,memory:/docker/1\n", {"memory": (4000, 1000, "")}, 3000),
    "version 1 without limit": ("4:memory:/\n", {"memory": (9223372036854771712, 1000, "")}, None),
    "another controller": ("4:cpu:/job\n", {"memory/job": (10, 5, "")}, None),
    "a controller of a longer name": ("4:name=memory-ish:/job\n", {"memory/job": (10, 5, "")}, None),
    "a line that is none": ("\nodd\n1:odd\n0::/a\n", {"a": (3000, 1000, "")}, 2000),
    "a path with anything in it": ("0::/a:b\u2028\udcff\n", {"a:b\u2028\udcff": (3000, 1000, "")}, 2000),
    "more cache than use": ("0::/", {"": (3000, 100, "inactive_file 500\n")}, 3000),
    "as much left as there is in all": ("0::/a/b", {"a": (9000, 0, ""), "a/b": (3000, 0, "")}, 3000),
}


@pytest.mark.parametrize("case", GROUPS)
def test_memory_is_what_every_control_group_allows(case: str, tmp_path: Path) -> None:
    """Sizes are in KiB."""
    lines, groups, left = GROUPS[case]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(os.fsencode(lines))
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8000 kB\nMemAvailable:   5000 kB\n")
    for name, (limit, used, stat) in groups.items():
        place = tmp_path / "sys/fs/cgroup" / name
        place.mkdir(parents=True, exist_ok=True)
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if "memory" in name else ("memory.max", "memory.current")
        )
        for file, size in zip(names, (limit, used), strict=True):
            (place / file).write_text(f"{size if size > 2**60 else size * 1024}\n")
        if stat:
            (place / "memory.stat").write_text(re.sub(r"\d+", lambda size: str(int(size[0]) * 1024), stat))
    total, available = memory(tmp_path)
    assert available == (5000 if left is None else left) * 1024
    assert total == 8000 * 1024 if left is None else min(limit for limit, _, _ in groups.values()) * 1024


@pytest.mark.parametrize(("total", "available"), [(8000, 9000), (8000, 8000), (0, 5)])
def test_no_more_memory_is_available_than_there_is(total: int, available: int, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_bytes(
        f"MemTotal: {total} kB\nMemAvailable: {available} kB\n\xff\n".encode("latin")
    )
    assert memory(tmp_path) == (total * 1024, total * 1024)


def test_memory_without_proc_is_a_guess_at_most(tmp_path: Path) -> None:
    total, available = memory(tmp_path)
    assert total is None or total > 0
    assert available is None


@pytest.mark.parametrize(
    ("world", "here", "share"),
    [(None, None, 9000), ("3", None, 3000), ("6", "2", 4500), ("2", "4", 4500), (None, "4", 9000)],
)
def test_processes_on_a_machine_share_what_is_available(
    world: str | None, here: str | None, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.delenv(name, raising=False)
        if number is not None:
            monkeypatch.setenv(name, number)
    monkeypatch.setattr(common_memory, "memory", lambda: (10000, 9000))
    monkeypatch.setattr(common_memory, "kept", lambda: 70)
    assert own_share() == share + 70
    monkeypatch.setattr(common_memory, "memory", lambda: (10000, None))
    assert own_share() is None


@pytest.mark.parametrize("problem", [None, "NameError: name 'Moe' is not defined"])
def test_the_extension_is_tried_and_not_just_looked_up(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def import_problem(versions: dict[str, str], *, again: bool = False) -> str | None:
        assert versions == FITTING
        asked.append(again)
        return problem

    pretend(monkeypatch)
    monkeypatch.setattr(accel, "import_problem", import_problem)
    finding = doctor._backend()
    assert asked == [True], "what is remembered may be out of date"
    assert not finding.broken, "eager torch serves"
    if problem is None:
        assert "it imports, packs and agrees" in finding.value
        assert finding.advice is None
    else:
        assert f"takes eager torch: intel-extension-for-pytorch can't be used here ({problem})" in finding.value
        assert "pip install 'ppo-core[ipex]'" in str(finding.advice)


def test_what_compiles_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "c++-9")
    assert doctor._compiler() == "no c++-9 found, for accel=compile alone"
    (tmp_path / "c++-9").touch(0o755)
    assert doctor._compiler() == f"{tmp_path / 'c++-9'}, for accel=compile alone"


def test_findings_are_printed_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next may take a minute, and the one who waits wants to know for what."""
    shown = io.StringIO()

    def diagnose() -> Iterator[Finding]:
        yield Finding("first", "well")
        assert "first" in shown.getvalue()
        yield Finding("second", "odd [ipex]", "do this")
        assert "odd [ipex]" in shown.getvalue()

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert report(Console(width=200, file=shown)) == 0


@pytest.mark.parametrize("name", doctor.DIRECT)
@pytest.mark.parametrize("spelled", [str.lower, str.upper, lambda name: name.replace("-", "_")])
def test_a_requirement_may_be_spelled_in_any_way(
    name: str, spelled: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "can_be_found", lambda name: False)
    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(metadata, "requires", lambda _: [f"{spelled(name)}>=3; extra == 'demo'"])
    assert [finding.name for finding in findings(None).values() if finding.broken] == [name]
    monkeypatch.setattr(metadata, "version", lambda _: "2")
    (old,) = [finding for finding in findings(None).values() if finding.broken]
    assert (old.name, old.advice) == (name, f"pip install '{name}>=3'")


@pytest.mark.parametrize("version", ["2.9.0-my-branch", "git", "", None, KeyError("Version")])
def test_odd_metadata_is_no_reason_to_fail(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str) -> Any:
        if isinstance(version, Exception):
            raise version
        return version

    monkeypatch.setattr(metadata, "version", of)
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.8", "attrs (what?", "numpy>=1.26; odd == 'x'"])
    found = findings({"torch": "2.9.1"})
    shown = version if isinstance(version, str) and version else "found, but not its version"
    assert found["torch"] == Finding("torch", f"{shown} (tested 2.9.1)"), "it is there to be tried"
    assert not any(finding.broken for finding in found.values())
    monkeypatch.setattr(doctor, "can_be_found", lambda name: False)
    assert findings(None)["torch"].broken == (shown != version), "what is half removed is not installed"
    assert choose("auto", strict=False).versions["torch"] == (version if shown == version else torch.__version__)


@pytest.mark.parametrize("part", ["choose", "_tested", "memory"])
def test_a_doctor_that_fails_is_not_a_demo_that_cannot_run(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("as never seen before")

    monkeypatch.setattr(accel if part == "choose" else doctor, part, fail)
    for name in ("_threads", "_modules", "_score", "_curves", "_model"):
        monkeypatch.setattr(doctor, name, lambda: "well")
    found = list(doctor.diagnose())
    assert [finding.name for finding in found if finding.broken] == []
    (failed,) = [finding for finding in found if "as never seen before" in finding.value]
    assert failed.advice is not None
    assert found[-1].name == "demo: model", "and the rest is looked at"


def test_whatever_a_check_raises_is_a_finding() -> None:
    def leaves() -> str:
        sys.exit("no AVX2")

    assert doctor._tried("a", leaves, "do this") == Finding("a", "SystemExit: no AVX2", "do this", broken=True)
