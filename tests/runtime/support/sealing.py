"""Checkpoints that somebody has changed, sealed again as if save_checkpoint had written them so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_runtime.resuming import files
from ppo_runtime.resuming.sealing import Manifest, Seal, write_manifest


def seal_again(path: Path) -> None:
    """Make the manifest of a checkpoint anew, of the files that are there."""
    score = json.loads((path / files.MANIFEST).read_text())["content"]["score"]
    names = [file.name for file in sorted(path.iterdir()) if file.name != files.MANIFEST]
    write_manifest(path, Manifest({name: Seal.of(path / name) for name in names}, score))


def change(path: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Change what a file of JSON in a checkpoint holds, and seal it again."""
    held = json.loads((path / name).read_text())
    held = edited if (edited := edit(held)) is not None else held
    (path / name).write_text(json.dumps(held))
    seal_again(path)


def make_old(path: Path) -> None:
    """Turn a checkpoint into one of format 1: without a manifest, and with the place in the data in batches."""
    (path / files.MANIFEST).unlink()
    state = json.loads((path / files.STATE).read_text())
    (path / files.STATE).write_text(json.dumps(state | {"format": 1}))
    for file in path.glob("rank-*.json"):
        fields = dict(json.loads(file.read_text())["dict"])
        if fields["data"] is not None:
            place = dict(fields["data"]["dict"])
            consumed = place["seen"] // (place["batch_size"] * place["ranks"])
            old = {"epoch": place["epoch"], "consumed": consumed}
            old |= {name: place[name] for name in ("rows", "batch_size")}
            fields["data"] = {"dict": list(old.items())}
        file.write_text(json.dumps({"dict": list(fields.items())}))
