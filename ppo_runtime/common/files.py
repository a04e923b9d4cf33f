"""Files that are whole: whoever reads one finds either the earlier content or the new one, kills included."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, which takes its place only once all of it is on disk."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def filled_whole(directory: Path, *, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """A directory of the same name to write into, whose files go to ``directory`` once all of them are written.

    An error in between leaves ``directory`` as it was. Other files in it stay, and so does one that ``replaces``, which
    is asked about each new file's place there, refuses.
    """
    # Within it, since beside it may be another disk, where it is a link or the root of one.
    made, drafts = not directory.exists(), directory / ".draft"
    draft = drafts / directory.name
    shutil.rmtree(drafts, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in sorted(path for path in draft.rglob("*") if path.is_file()):
            place = directory / file.relative_to(draft)
            if not place.exists() or replaces(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()
