"""The checkpoints of a run: which of them to go on from, and which are no longer wanted.

They lie in its directory as ``checkpoint-<step>``; one of an earlier version as ``checkpoint``.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ppo_runtime.common.files import free_place, siblings
from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.resuming import files
from ppo_runtime.resuming.reading import check_whole, run_of, steps_done
from ppo_runtime.resuming.sealing import Manifest, check_sealed, read_manifest

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())

NAME = "checkpoint"
_NUMBERED = re.compile(rf"{NAME}-(\d{{1,18}})")
# What is being written, or removed: nothing that a name without it stands for.
_DRAFT = re.compile(rf"\.{NAME}(-\d{{1,18}})?\.draft")
_PREVIOUS = re.compile(rf"\.({NAME}(-\d{{1,18}})?)\.previous")


def name_after(step: int) -> str:
    """The name of the checkpoint that is made after a step."""
    return f"{NAME}-{step}"


def newest_good(output_dir: str | Path, *, every_byte: bool = True) -> Path | None:
    """The checkpoint of a run to go on from: that of the latest step that is whole, every byte of it.

    Those that are not are named in a warning, with what is wrong.

    Args:
        output_dir: of the run.
        every_byte: False looks no further than the sizes of the files of tensors, which ``load_checkpoint`` reads in
            any case: it takes minutes where they are large.

    Returns:
        Its path; None where the directory holds none, damaged or not.

    Raises:
        ValueError: there are some, and all of them are damaged.
    """
    bad: list[str] = []
    good: list[tuple[int, Path]] = []
    for path in sorted(_there(Path(output_dir)), key=_number, reverse=True):
        if good and _number(path) >= 0:  # later ones have been looked at
            continue
        try:
            good.append((check_whole(files.existing(files.resolved(path)), every_byte=every_byte), path))
        except (OSError, ValueError) as error:
            bad.append(str(error))
    if not good and bad:
        raise ValueError(f"no checkpoint in {output_dir} is whole: {'; '.join(bad)}")
    for said in bad:
        logger.warning("a damaged checkpoint is left out: %s", said)
    return max(good, key=lambda pair: pair[0])[1] if good else None


def clean(output_dir: Path) -> None:
    """Remove what killed saves have left; a checkpoint whose replacement was broken off takes its place again."""
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else []:
        with _said(path):
            if found := _PREVIOUS.fullmatch(path.name):
                if not (place := output_dir / found[1]).exists():
                    path.rename(place)
                elif _manifest(place) is not None:
                    shutil.rmtree(path)
            elif _DRAFT.fullmatch(path.name):
                shutil.rmtree(path)


def set_aside(output_dir: Path, made: Path) -> None:
    """Rename checkpoints of later steps than ``made``, the one just made: no run goes on from a branch it has left."""
    for path in list(_there(output_dir)):
        if _step(path) > _number(made):
            _abandon(path, f"of a later step than {made.name}, where the run has gone back to")


def make_room(place: Path, run: str) -> None:
    """Rename a whole checkpoint where ``run`` is about to make one of its own: it is of a branch that it has left."""
    with suppress(ValueError):  # a damaged one is replaced
        if _manifest(place) is not None and run_of(place) != run:
            _abandon(place, "of a branch that the run has left")


def _abandon(path: Path, why: str) -> None:
    aside = free_place(path.with_name(f"{path.name}.abandoned"))
    with _said(path):
        path.rename(aside)
        logger.warning("%s is %s: it is %s now, and is neither gone on from nor removed", path, why, aside.name)


def _step(path: Path) -> int:
    """The step of a checkpoint by its name, or by what it holds; -1 for a damaged one that does not say."""
    try:
        return steps_done(path) or 0 if path.name == NAME else _number(path)
    except ValueError:
        return -1


def prune(output_dir: Path, made: Path, *, keep_last: int, keep_best: bool) -> None:
    """Remove the checkpoints that are neither among the latest nor the best; never ``made``, the one just made."""
    numbered = [path for path in _there(output_dir) if _number(path) >= 0]
    whole = {path: manifest for path in numbered if (manifest := _manifest(path)) is not None}
    latest = sorted((path for path in whole if path.name != made.name), key=_number, reverse=True)
    kept = {made.name, *(path.name for path in latest[: keep_last - 1])}
    if keep_best:
        scored = [
            (manifest.score, _number(path), path.name) for path, manifest in whole.items() if manifest.score is not None
        ]
        kept |= {max(scored)[2]} if scored else set()
    for path in whole:
        if path.name not in kept and not path.is_symlink():
            with _said(path):
                if others := files.strangers(os.listdir(path)):
                    _say_kept(path, others[0])
                    continue
                # Under its new name it is no checkpoint any more, also while half of it is gone.
                shutil.rmtree(path.rename(siblings(path)[0]))


@cache
def _say_kept(path: Path, held: str) -> None:
    logger.warning("%s is no longer wanted, but holds %s, which is not its own: it is kept", path, held)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Say what could not be removed: no run ends over it."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be cleared away: %s", path, error)


def _there(output_dir: Path) -> Iterator[Path]:
    """Where checkpoints lie, whole or not, by the names that they have or should have again."""
    names: set[str] = set()
    if output_dir.is_dir():
        for entry in os.scandir(output_dir):
            found = _PREVIOUS.fullmatch(entry.name)
            name = found[1] if found else entry.name
            if name == NAME or _NUMBERED.fullmatch(name):
                names.add(name)
    for name in names:
        try:
            files.existing(files.resolved(output_dir / name))
        except (OSError, RuntimeError):
            continue  # nothing of ours, such as an empty directory, or a link that leads nowhere
        yield output_dir / name


def _number(path: Path) -> int:
    """The step in a name; -1 for the one without."""
    found = _NUMBERED.fullmatch(path.name)
    return int(found[1]) if found else -1


def _manifest(path: Path) -> Manifest | None:
    """Of a checkpoint whose files are all there, in their sizes; None of any other."""
    try:
        if (manifest := read_manifest(path)) is not None:
            check_sealed(path, manifest, ())
        return manifest
    except (OSError, ValueError):
        return None
