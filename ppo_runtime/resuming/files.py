"""The files of a checkpoint: a directory that is whole or not there, written as a draft and then renamed."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_runtime.common.files import siblings, sync, told_again

FORMAT, IN_PARTS = 2, 3
"""Of a checkpoint whose tensors are whole, and of one in which they are in the parts of its ranks."""
POLICY, OPTIMIZER, STATE, MANIFEST = "policy.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
# What file managers and network disks leave in any directory.
_LEFT_BY_SYSTEMS = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs.*")
_RANK = re.compile(r"rank-(0|[1-9]\d{0,8})\.json")
_PART = re.compile(r"shard-\d{5,9}-model-\d{5,9}-of-\d{5,9}\.safetensors")
OURS = re.compile(rf"{'|'.join(map(re.escape, (POLICY, OPTIMIZER, STATE, MANIFEST)))}|{_RANK.pattern}|{_PART.pattern}")
"""The names of a checkpoint's files: no other is written, looked into or removed."""
LONGEST = 2**26
"""Bytes that a file of JSON has at most, some hundred times those of a large model's."""
_WHOLE = "what save_checkpoint wrote; copy the checkpoint again, or remove it and go on from another"


def rank_file(rank: int) -> str:
    """The name of what a process has for itself."""
    return f"rank-{rank}.json"


def own_files(rank: int, parts: int) -> list[str]:
    """The names of all that a process writes: what it has for itself, and its parts, as torch calls them."""
    named = (f"shard-{rank + 1:05}-model-{number:05}-of-{parts:05}.safetensors" for number in range(1, parts + 1))
    return [rank_file(rank), *named]


def is_part(name: str) -> bool:
    """Whether a file holds parts of tensors."""
    return bool(_PART.fullmatch(name))


def check_replaceable(directory: str | Path, *, advice: str | None = None) -> None:
    """Refuse to make a checkpoint where something else is, which would be lost.

    Raises:
        ValueError: ``directory`` is a file, a mount point, or holds anything but a checkpoint's files, or what cannot
            be looked at. ``advice`` says what to do about it.
    """
    target = resolved(directory)
    advice = advice or f"give the checkpoint a directory of its own, such as {target / 'checkpoint'}"
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, expected the directory of a checkpoint; take another name")
    try:
        names = set(os.listdir(target))
    except OSError as error:
        raise ValueError(
            f"{target} cannot be looked into ({error.strerror}), expected a directory that a new checkpoint can "
            f"replace; {advice}"
        ) from error
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, expected a directory that a new checkpoint can replace; take one in it, such "
            f"as {target / 'checkpoint'}"
        )
    others = strangers(names)
    # A damaged one may have lost any of them; a policy alone may be anybody's.
    known = {STATE, MANIFEST} & names or any(_RANK.fullmatch(name) for name in names)
    if names and (others or not known):
        held = others[0] if others else f"no {STATE}"
        raise ValueError(
            f"{target} holds {held}, and so is not a checkpoint alone, which a new one could replace; {advice}"
        )


def strangers(names: Iterable[str]) -> list[str]:
    """Those names in a checkpoint that are neither its own nor what systems leave anywhere."""
    return sorted(name for name in names if not OURS.fullmatch(name) and not _LEFT_BY_SYSTEMS.fullmatch(name))


def put_in_place(draft: Path, target: Path, previous: Path) -> None:
    """Rename a whole draft; where that fails, what it should have replaced is there again and the draft is gone."""
    try:
        sync(draft)
        if target.exists():
            shutil.copymode(target, draft)
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
    except (OSError, SafetensorError) as error:
        said = (
            f"no checkpoint was made in {target}: {error}. What was there is kept; give the checkpoint a directory "
            "that can be made and renamed where it lies, and has room"
        )
        raise told_again(error, said) from error


def resolved(directory: str | Path) -> Path:
    """The directory itself, where it is named by a link or with dots."""
    return Path(directory).resolve()


def existing(target: Path) -> Path:
    """Where a checkpoint lies: in its place, or beside it where its replacement was broken off."""
    for candidate in (target, siblings(target)[1]):
        # Any of them may be what is missing of a damaged one.
        whole = any(os.path.lexists(candidate / name) for name in (STATE, MANIFEST, POLICY, OPTIMIZER))
        if whole or any(is_part(path.name) for path in candidate.glob("shard-*")):
            return candidate
    raise FileNotFoundError(f"{target} holds no {STATE}, expected a directory made by save_checkpoint")


class Damaged(ValueError):
    """A checkpoint is not as it was written."""

    def __init__(self, source: Path, what: str) -> None:
        super().__init__(f"{source} cannot be read ({what}), expected {_WHOLE}")
        self.what = what


def damaged(source: Path, what: str) -> Damaged:
    """What is said of a checkpoint that is not as it was written."""
    return Damaged(source, what)


def opened(path: Path) -> BinaryIO:
    """A plain file, to be read.

    Raises:
        ValueError: there is none, or it is a link, a pipe, a device or a directory, of which none is followed or waited
            for.
    """
    # What not every system has is 0 there.
    flags = [getattr(os, name, 0) for name in ("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")]
    try:
        descriptor = os.open(path, sum(flags))
    except OSError as error:
        kinds = {errno.ELOOP: "is a link", errno.ENOENT: "is missing"}
        kind = kinds.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise damaged(path.parent, f"{path.name} {kind}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise damaged(path.parent, f"{path.name} is no plain file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> bytes:
    """What a file of JSON is made of.

    Raises:
        ValueError: it is longer than any of ours, or no plain file.
    """
    with opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LONGEST:
            raise damaged(path.parent, f"{path.name} has {size} bytes, more than {LONGEST}")
        return file.read(LONGEST + 1)


def read_json(path: Path) -> Any:
    """What a file of JSON holds; see :func:`read_text`."""
    text = read_text(path)
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deep
        raise damaged(path.parent, f"{path.name}: {error}") from error


def format_of(source: Path, state: Any) -> Any:
    """The format of a checkpoint, as what its ``state.json`` holds says.

    Raises:
        ValueError: it is a later one than ours, in which anything else may be another as well.
    """
    found = state.get("format") if isinstance(state, dict) else None
    if isinstance(found, int) and found > IN_PARTS:
        raise ValueError(
            f"{source} has format {found!r:.20}, expected at most {IN_PARTS}: a later version has made it; use that one"
        )
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in the memory of the CPU once they are looked at."""
    opened(path).close()  # a plain file
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, MemoryError, LookupError, TypeError, ValueError) as error:
        raise damaged(path.parent, f"{path.name}: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and wait until they are on disk."""
    # Copies, since safetensors refuses tensors that share memory.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    sync(path)


def as_json(content: Any) -> str:
    """Text of JSON as our files have it."""
    return json.dumps(content, default=str) + "\n"


def text_of(name: str, content: Mapping[str, Any]) -> bytes:
    """What a file of JSON of this name is made of.

    Raises:
        ValueError: it would be longer than what is read again.
    """
    text = as_json(content).encode()
    if len(text) > LONGEST:
        sizes = {part: len(as_json(held).encode()) for part, held in content.items()}
        largest = max(sizes, key=lambda part: sizes[part])
        raise ValueError(
            f"{name} would have {len(text)} bytes, {sizes[largest]} of them for {largest!r}, expected at most "
            f"{LONGEST}, with which it can be read again; keep what is long out of that"
        )
    return text


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, and wait until it is on disk; see :func:`text_of`."""
    path.write_bytes(text_of(path.name, content))
    sync(path)
