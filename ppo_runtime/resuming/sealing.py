"""The seal of a checkpoint: its manifest, with the size and the SHA-256 of every file, and with one of itself.

A file that has been cut, changed or taken from another save is found before anything of it is used. Whoever can write a
checkpoint can write its manifest: a seal tells damage, not malice, against which no file can make anything run.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.resuming import files
from ppo_runtime.resuming.fields import FINITE
from ppo_runtime.resuming.files import damaged

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())

_BLOCK = 2**20


@attrs.frozen
class Seal:
    """What a file must be."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Seal":
        """What a file is, read a block at a time."""
        digest, size = hashlib.sha256(), 0
        with files.opened(path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return cls(size, digest.hexdigest())


NUMBERS = 1 + hashlib.sha256().digest_size
"""How many numbers a seal is, where ranks tell each other."""


def as_numbers(seal: Seal) -> list[float]:
    """The size and the bytes of the digest, each exact in float64."""
    return [float(seal.size), *map(float, bytes.fromhex(seal.sha256))]


NOTHING = Seal(0, bytes(hashlib.sha256().digest_size).hex())
"""Said of a file that is not there; none of ours is empty."""


def from_numbers(numbers: Tensor) -> Seal:
    """What :func:`as_numbers` was given."""
    size, *digest = map(int, numbers.tolist())
    return Seal(size, bytes(digest).hex())


@attrs.frozen
class Manifest:
    """Every file of a checkpoint, and the mean raw score of the steps that led to it."""

    files: Mapping[str, Seal]
    score: float | None

    @property
    def ranks(self) -> int:
        """How many processes have written it."""
        return sum(name.startswith("rank-") for name in self.files)

    @property
    def parts(self) -> list[str]:
        """The files of tensors in parts."""
        return sorted(filter(files.is_part, self.files))

    @property
    def tensors(self) -> list[str]:
        """The files of tensors."""
        return self.parts or [files.POLICY, files.OPTIMIZER]

    @property
    def format(self) -> int:
        """Of the checkpoint."""
        return files.IN_PARTS if self.parts else files.FORMAT


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it, last of all files, and wait until it is on disk."""
    files.write_json(directory / files.MANIFEST, _sealed(attrs.asdict(manifest)))


def check_there(draft: Path, manifest: Manifest) -> None:
    """Look whether all files of a checkpoint lie in its draft: another rank's may be on a disk of its own.

    Raises:
        OSError: one does not, or has another size than it was written with.
    """
    for name, seal in manifest.files.items():
        if (size := (draft / name).stat().st_size) != seal.size:
            raise OSError(f"{name} has {size} bytes, expected {seal.size}")


def read_manifest(source: Path) -> Manifest | None:
    """The manifest of a checkpoint; None of one of format 1, which has none.

    Raises:
        ValueError: it is missing, or not what :func:`write_manifest` has written, to the letter; or a later version has
            written it.
    """
    if not os.path.lexists(source / files.MANIFEST):
        if files.format_of(source, files.read_json(source / files.STATE)) != 1:
            raise damaged(source, f"{files.MANIFEST} is missing")
        return None
    try:
        return _as_written(source)
    except ValueError:
        with suppress(files.Damaged):  # that of the manifest is told first
            files.format_of(source, files.read_json(source / files.STATE))
        raise


def _as_written(source: Path) -> Manifest:
    path = source / files.MANIFEST
    held = files.read_json(path)
    content = held.get("content") if isinstance(held, dict) else None
    if not isinstance(content, dict) or files.as_json(_sealed(content)).encode() != files.read_text(path):
        raise damaged(source, f"{files.MANIFEST} has changed since it was written")
    try:
        seals = {name: Seal(**seal) for name, seal in content["files"].items()}
        manifest = Manifest(seals, content["score"])
        if manifest.score is not None:
            FINITE(None, attrs.fields(Manifest).score, manifest.score)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise damaged(source, f"{files.MANIFEST}: {error!r:.200}") from error
    ours = {files.STATE, *manifest.tensors, *map(files.rank_file, range(manifest.ranks))}
    if odd := sorted(ours ^ seals.keys()):
        raise damaged(source, f"{files.MANIFEST} lists {', '.join(map(repr, odd[:3]))} or should")
    return manifest


def check_sealed(source: Path, manifest: Manifest | None, names: Iterable[str] | None = None) -> None:
    """Refuse a checkpoint of which a file is missing or of another size, or one of these is not as it was written.

    Args:
        source: the checkpoint.
        manifest: of it. None, of a checkpoint of before, has nothing to say: that is logged.
        names: the files to read; all of them if None.
    """
    if manifest is None:
        logger.warning("%s is of an earlier version and carries no checksums: damage to it may not be seen", source)
        return
    for name, seal in manifest.files.items():
        with files.opened(source / name) as file:
            size = os.fstat(file.fileno()).st_size
        if size != seal.size:
            raise damaged(source, f"{name} has {size} bytes, and had {seal.size}")
    for name in manifest.files if names is None else names:
        if Seal.of(source / name) != manifest.files[name]:
            raise damaged(source, f"{name} has changed since it was written, or is of another save")


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": content, "sha256": hashlib.sha256(files.as_json(content).encode()).hexdigest()}
