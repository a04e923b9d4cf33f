"""Files that are whole: whoever reads one finds either the earlier content or the new one, kills included."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, which takes its place only once all of it is on disk, with the mode of what was there.

    A link stays one: what it leads to is written.
    """
    path = Path(os.path.realpath(path))
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def filled_whole(
    directory: Path, *, replaces: Callable[[Path], bool], drops: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """A directory of the same name to write into, which takes the place of ``directory`` once all of it is on disk.

    An error in between leaves ``directory`` as it was, and a kill leaves the files of one time, never of two. (One
    between the two renames leaves none, and those of before under a hidden name beside it: they are put back by the
    next use.) A mount point cannot be renamed: its files are replaced one by one.

    Args:
        directory: to be filled; it keeps its mode.
        replaces: asked about each file that has a new one, whether that replaces it.
        drops: asked about each other file that lies in it, whether it goes; one in a directory there always stays.
    """
    target = directory.resolve()  # where it is a link, what it leads to may lie on another disk
    _put_back(target)
    mounted = os.path.ismount(target)
    drafts = target / ".draft" if mounted else siblings(target)[0]
    draft = drafts / directory.name
    shutil.rmtree(drafts, ignore_errors=True)
    draft.mkdir(parents=True)
    stands_in_it = is_working_directory(target)
    try:
        yield draft
        _sync_all(draft)
        if mounted or not _renamed(draft, target, replaces, drops):
            _replace_each(draft, target, replaces, drops)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
    if stands_in_it:
        os.chdir(target)  # without this the process would stand in a removed one


_HELD: set[int] = set()
"""Descriptors of directories that this process holds."""


def _let_go() -> None:
    """Close what a forked child has of them, which would hold them for as long as it lives."""
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a directory against others that ask for it; the system lets go of it where this process dies.

    Where it knows no such locks, as on some network disks, nobody is kept out.

    Raises:
        BlockingIOError: another one holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on every system
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    _HELD.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        if descriptor in _HELD:  # not so in a child that was forked meanwhile
            _HELD.remove(descriptor)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also of a child's that no Python has forked
            os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_working_directory(target: Path) -> bool:
    """Whether a directory is the one that the process stands in."""
    try:
        return target.samefile(os.curdir)
    except OSError:  # one of them is not there
        return False


def working_directory() -> Path:
    """Where the process stands now, before which a relative path means the same later; nothing if that is gone."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path()


def siblings(target: Path) -> tuple[Path, Path]:
    """Where a directory is written, and where the one that it replaces waits meanwhile."""
    return target.with_name(f".{target.name}.draft"), target.with_name(f".{target.name}.previous")


def free_place(place: Path, *, endings: Sequence[str] = ("",), first: int = 2) -> Path:
    """The place itself, or with the next number from ``first`` on, under which nothing lies yet, with any ending."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in count(first))
    return next(
        free
        for free in chain([place], numbered)
        if not any(os.path.lexists(free.with_name(f"{free.name}{ending}")) for ending in endings)
    )


def told_again(error: Exception, said: str) -> OSError:
    """What the system refused, in other words and with its number, where it has one."""
    number = getattr(error, "errno", None)
    return OSError(said) if number is None else OSError(number, said)


def _put_back(target: Path) -> None:
    """Undo what a kill has left of a replacement."""
    _, previous = siblings(target)
    if previous.is_dir():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, target)


def _renamed(draft: Path, target: Path, replaces: Callable[[Path], bool], drops: Callable[[Path], bool]) -> bool:
    """Put a draft in the place of a directory; False where the system renames none such, as in an image's layers."""
    if not target.exists():
        os.rename(draft, target)
        sync(target.parent)
        return True
    _carry_over(target, draft, replaces, drops)
    _, previous = siblings(target)
    try:
        os.rename(target, previous)
    except OSError:
        return False
    try:
        os.rename(draft, target)
    except BaseException:
        os.rename(previous, target)
        raise
    shutil.copymode(previous, target)
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)
    return True


def _carry_over(old: Path, new: Path, replaces: Callable[[Path], bool], drops: Callable[[Path], bool]) -> None:
    """Give a draft the files that stay; links of the same disk, since they may be large."""
    for entry in os.scandir(old):
        source, place = Path(entry.path), new / entry.name
        if entry.is_dir(follow_symlinks=False):
            if place.is_file() and not replaces(source):
                place.unlink()
            if not place.is_file():
                place.mkdir(exist_ok=True)
                _carry_over(source, place, replaces, lambda _: False)
        elif not (replaces if os.path.lexists(place) else drops)(source):
            place.unlink(missing_ok=True)
            try:
                os.link(source, place, follow_symlinks=False)
            except OSError:  # not every file system has hard links
                shutil.copy2(source, place, follow_symlinks=False)


def _replace_each(draft: Path, target: Path, replaces: Callable[[Path], bool], drops: Callable[[Path], bool]) -> None:
    new = os.listdir(draft)
    for file in sorted(path for path in draft.rglob("*") if path.is_file()):
        place = target / file.relative_to(draft)
        if not place.exists() or replaces(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    for entry in list(os.scandir(target)):
        if entry.name not in new and not entry.is_dir(follow_symlinks=False) and drops(Path(entry.path)):
            os.unlink(entry)
    sync(target)


def _sync_all(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if not path.is_symlink():
            sync(path)
