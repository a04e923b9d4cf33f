"""The files of a checkpoint: a directory that is whole or not there, written as a draft and then renamed."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
POLICY, OPTIMIZER, STATE = "policy.safetensors", "optimizer.safetensors", "state.json"
# What file managers and network disks leave in any directory.
_LEFT_BY_SYSTEMS = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs.*")
_OURS = re.compile(rf"{re.escape(POLICY)}|{re.escape(OPTIMIZER)}|{re.escape(STATE)}|rank-\d+\.json")
_WHOLE = "what save_checkpoint wrote; copy the checkpoint again, or remove it and go on from another"
_ENTRIES = "world_size", "frozen", "config", "optimizer", "lr_scheduler", "trainer"


def check_replaceable(directory: str | Path) -> None:
    """Refuse to make a checkpoint where something else is, which would be lost.

    Raises:
        ValueError: ``directory`` is a file, a mount point, or holds anything but a checkpoint's files.
    """
    target = resolved(directory)
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, expected the directory of a checkpoint; take another name")
    names = {entry.name for entry in target.iterdir()}
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, expected a directory that a new checkpoint can replace; take one in it, such "
            f"as {target / 'checkpoint'}"
        )
    others = sorted(name for name in names if not _OURS.fullmatch(name) and not _LEFT_BY_SYSTEMS.fullmatch(name))
    if names and (others or STATE not in names):
        held = others[0] if others else f"no {STATE}"
        raise ValueError(
            f"{target} holds {held}, and so is not a checkpoint alone, which a new one could replace; give the "
            f"checkpoint a directory of its own, such as {target / 'checkpoint'}"
        )


def siblings(target: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the one that it replaces waits meanwhile."""
    return target.with_name(f".{target.name}.draft"), target.with_name(f".{target.name}.previous")


def put_in_place(draft: Path, target: Path, previous: Path) -> None:
    """Rename a whole draft; where that fails, what it should have replaced is there again and the draft is gone."""
    try:
        sync(draft)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        draft.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def told(target: Path) -> Iterator[None]:
    """Say of what the system refuses that no checkpoint was made, and what to do."""
    try:
        yield
    except OSError as error:
        said = (
            f"no checkpoint was made in {target}: {error}. What was there is kept; give the checkpoint a directory "
            f"that can be made and renamed where it lies, such as {target / 'checkpoint'}"
        )
        raise (OSError(said) if error.errno is None else OSError(error.errno, said)) from error


def is_working_directory(target: Path) -> bool:
    """Whether a directory is the one that the process stands in."""
    try:
        return target.samefile(os.curdir)
    except OSError:  # one of them is not there
        return False


def resolved(directory: str | Path) -> Path:
    """The directory itself, where it is named by a link or with dots."""
    return Path(directory).resolve()


def read_state(source: Path) -> dict[str, Any]:
    """What ``state.json`` holds, of this format and with all that it must have."""
    state = read_json(source / STATE)
    found = state.get("format") if isinstance(state, dict) else None
    if found is not None and found != FORMAT:
        raise ValueError(f"{source} has format {found}, expected {FORMAT}; use the version that wrote it")
    missing = [name for name in ("format", *_ENTRIES) if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"{source / STATE} has no {missing[0]!r}, expected {_WHOLE}")
    return state


def read_json(path: Path) -> Any:
    """What a file of JSON holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} cannot be read ({error}), expected {_WHOLE}") from error


@contextmanager
def named_if_damaged(source: Path) -> Iterator[None]:
    """Say of what does not hold what it should which checkpoint it is, and what to do."""
    try:
        yield
    except (SafetensorError, FileNotFoundError, AttributeError, LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"{source} cannot be read ({type(error).__name__}: {error}), expected {_WHOLE}") from error


def existing(target: Path) -> Path:
    """Where a checkpoint lies: in its place, or beside it where its replacement was broken off."""
    for candidate in (target, siblings(target)[1]):
        if (candidate / STATE).is_file():
            return candidate
    raise FileNotFoundError(f"{target} holds no {STATE}, expected a directory made by save_checkpoint")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and wait until they are on disk."""
    # Copies, since safetensors refuses tensors that share memory.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    sync(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, and wait until it is on disk."""
    path.write_text(json.dumps(content, default=str) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
