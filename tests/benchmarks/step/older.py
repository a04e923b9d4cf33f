"""A model directory of transformers 5 as transformers 4 reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def view(source: Path, target: Path) -> None:
    """Fill an empty directory with links to the files of another, and with the two files that have to differ."""
    rewritten = {"config.json": _config, "tokenizer_config.json": _tokenizer}
    for file in source.iterdir():
        if file.name in rewritten:
            fields = json.loads(file.read_text(encoding="utf-8"))
            (target / file.name).write_text(json.dumps(rewritten[file.name](fields)), encoding="utf-8")
        else:
            (target / file.name).symlink_to(file.resolve())


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotary positions and the dtype by their former names."""
    rope = fields.pop("rope_parameters", None)
    if rope is not None:
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters is {rope}, expected the default type: pass --peer-model")
        fields["rope_theta"] = rope["rope_theta"]
    return fields | {"torch_dtype": fields.pop("dtype", "float32")}


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """The fast tokenizer's class by its former name."""
    return fields | {"tokenizer_class": "PreTrainedTokenizerFast"}
