"""Directories that are whole: of one time, whatever ends the writing of another."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppo_runtime.common import files
from ppo_runtime.common.files import alone_in, filled_whole, free_place, write_whole


def _all(_: Path) -> bool:
    return True


def _fill(directory: Path, replaces: Callable[[Path], bool] = _all, **content: str) -> None:
    with filled_whole(directory, replaces=replaces) as draft:
        for name, text in content.items():
            (draft / name).write_text(text)


def _content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with files of one time and some of a user's."""
    _fill(tmp_path / "model", weights="1", config="1", card="ours")
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "mine").write_text("mine")
    (tmp_path / "model" / "card").write_text("mine")
    (tmp_path / "model" / "link").symlink_to("weights")
    return tmp_path / "model"


USERS = {"notes/mine": "mine", "card": "mine"}


def _renewed(model: Path) -> None:
    _fill(model, lambda file: file.name != "card", weights="2", card="ours", more="2")


def test_new_files_come_and_others_stay(model: Path) -> None:
    inode = model.joinpath("notes", "mine").stat().st_ino
    _renewed(model)
    assert _content(model) == USERS | {"weights": "2", "config": "1", "more": "2", "link": "2"}
    assert (model / "link").is_symlink()
    assert (model / "notes" / "mine").stat().st_ino == inode, "large files are not copied"
    assert os.listdir(model.parent) == ["model"]


@pytest.mark.parametrize("mounted", [False, True])
def test_what_is_dropped_goes_and_what_lies_deeper_stays(
    mounted: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "notes" / "weights-1").write_text("mine")
    (model / "weights-1").write_text("1")
    monkeypatch.setattr(os.path, "ismount", lambda path: mounted and Path(path) == model)
    with filled_whole(model, replaces=_all, drops=lambda file: file.name.startswith("weights")) as draft:
        (draft / "weights").write_text("2")
    kept = {"notes/mine": "mine", "notes/weights-1": "mine", "card": "mine", "config": "1"}
    assert _content(model) == kept | {"weights": "2", "link": "2"}


def test_a_directory_keeps_its_mode(model: Path) -> None:
    model.chmod(0o750)
    _renewed(model)
    assert model.stat().st_mode & 0o777 == 0o750


def test_a_file_keeps_its_mode_and_a_link_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("1")
    (tmp_path / "far" / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("far/file")
    write_whole(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "2"
    assert (tmp_path / "far" / "file").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "file", "link"]


def test_a_free_place_is_one_with_nothing_in_it(tmp_path: Path) -> None:
    assert free_place(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").symlink_to("nowhere")
    (tmp_path / "a-2.json").touch()
    assert free_place(tmp_path / "a") == tmp_path / "a-2"
    assert free_place(tmp_path / "a", first=1) == tmp_path / "a-1"
    assert free_place(tmp_path / "a", endings=[".json"]) == tmp_path / "a"
    assert free_place(tmp_path / "a", endings=["", ".json"]) == tmp_path / "a-3"


def test_where_there_are_no_links_files_are_copied(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    _renewed(model)
    assert _content(model) == USERS | {"weights": "2", "config": "1", "more": "2", "link": "2"}


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError("not here")


@pytest.mark.parametrize("kind", ["mounted", "cannot be renamed"])
def test_a_directory_that_cannot_be_renamed_gets_its_files_one_by_one(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode, rename = model.stat().st_ino, os.rename
    monkeypatch.setattr(os.path, "ismount", lambda path: kind == "mounted" and Path(path) == model)

    def fixed(one: Any, other: Any) -> None:
        _refuse() if Path(one) == model else rename(one, other)

    monkeypatch.setattr(os, "rename", fixed)
    _renewed(model)
    assert _content(model) == USERS | {"weights": "2", "config": "1", "more": "2", "link": "2"}
    assert model.stat().st_ino == inode
    assert os.listdir(model.parent) == ["model"]


@pytest.mark.parametrize("stopped_at", [1, 2])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_error_leaves_the_files_of_before(
    stopped_at: int, error: BaseException, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the writing of a draft, and between the two renames."""
    before, rename = _content(model), os.rename
    if stopped_at == 1:

        def stopped(*_: Any) -> None:
            raise error

        monkeypatch.setattr(files, "_sync_all", stopped)
    else:

        def in_between(one: Any, other: Any) -> None:
            if Path(other) == model and Path(one).name == "model":
                raise error
            rename(one, other)

        monkeypatch.setattr(os, "rename", in_between)
    with pytest.raises(type(error)):
        _renewed(model)
    assert _content(model) == before
    assert os.listdir(model.parent) == ["model"]


@pytest.mark.parametrize("killed", ["before the renames", "between them", "behind them"])
def test_what_a_kill_has_left_is_cleared_away(killed: str, model: Path) -> None:
    parent = model.parent
    (parent / ".model.draft" / "model").mkdir(parents=True)
    (parent / ".model.draft" / "model" / "weights").write_text("torn")
    if killed == "between them":
        model.rename(parent / ".model.previous")
    elif killed == "behind them":
        (parent / ".model.previous").mkdir()
        (parent / ".model.previous" / "card").write_text("of long ago")
    _renewed(model)
    assert _content(model) == USERS | {"weights": "2", "config": "1", "more": "2", "link": "2"}
    assert os.listdir(parent) == ["model"]


def test_a_directory_that_was_not_there_is_not_there_after_an_error(tmp_path: Path) -> None:
    def fill() -> None:
        with filled_whole(tmp_path / "model", replaces=_all) as draft:
            (draft / "weights").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert os.listdir(tmp_path) == []


def test_a_child_that_outlives_a_killed_process_holds_no_directory(tmp_path: Path) -> None:
    """A worker that a score function has started, say."""
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from ppo_runtime.common.files import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    if child := os.fork():\n"
        "        print(child, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    os.close(1)\n"
        "    time.sleep(120)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, check=False)
    child = int(done.stdout)
    try:
        assert done.returncode == -signal.SIGKILL
        with alone_in(tmp_path):
            os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_leaves_a_directory_held(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from ppo_runtime.common.files import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    if child := os.fork():\n"
        "        os.waitpid(child, 0)\n"
        "        with alone_in(Path(sys.argv[1])):\n"
        "            pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], stderr=subprocess.PIPE, text=True, check=False)
    assert "BlockingIOError" in done.stderr
