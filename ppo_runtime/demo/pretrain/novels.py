"""Six novels as chapters of paragraphs, from the R package that carries them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HOLD_OUT_EVERY, HOLD_OUT_PHASE = 16, 8


class Chapter(NamedTuple):
    """One chapter of one novel: ``number`` counts through the whole novel, across its volumes."""

    novel: str
    number: int
    paragraphs: list[str]

    @property
    def held_out(self) -> bool:
        """Kept from the tokenizer and the weights."""
        return self.number % HOLD_OUT_EVERY == HOLD_OUT_PHASE


def read_lazyload(directory: Path) -> dict[str, list[str]]:
    """The character vectors in an R lazy-load database ``Rdata.rdb`` with its index ``Rdata.rdx``.

    The index is one compressed R object that maps each variable to (offset, length). Each chunk begins with the
    big-endian size of its content, perhaps a letter for the compressor, and then the compressed R object.
    """
    import rdata

    def load(serialised: bytes) -> dict | list:
        with warnings.catch_warnings():  # rdata guesses the type, since there is no file name to tell it
            warnings.simplefilter("ignore")
            return rdata.conversion.convert(rdata.parser.parse_data(serialised))

    def inflate(chunk: bytes) -> bytes:
        match chunk[4:5]:
            case b"2":
                return bz2.decompress(chunk[5:])
            case b"Z":
                filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
                return lzma.decompress(chunk[5:], lzma.FORMAT_RAW, filters=filters)
            case _:
                return zlib.decompress(chunk[4:])

    index: Any = load(gzip.decompress((directory / "Rdata.rdx").read_bytes()))
    chunks = (directory / "Rdata.rdb").read_bytes()
    return {
        str(name): [str(line) for line in load(inflate(chunks[offset : offset + length]))]
        for name, (offset, length) in index["variables"].items()
    }


def normalise(paragraph: str) -> str:
    """One line of plain text: single spaces, and no underscores for emphasis or stars for footnotes."""
    return " ".join(re.sub(r"[_*]", "", paragraph).split())


def chapters_of(novel: str, lines: list[str]) -> Iterator[Chapter]:
    """Cut a novel at its chapter headings; what stands before the first or after the end is dropped."""
    heading = re.compile(r"\s*chapter\s+([0-9]+|[ivxlc]+)\.?\s*", re.IGNORECASE)
    ending = re.compile(r"\s*(finis|the end|a note on the text)\.?\s*", re.IGNORECASE)
    apparatus = re.compile(r"\s*(volume\s+[ivx]+\s*$|\[.*(volume|press)|\*vide)", re.IGNORECASE | re.DOTALL)
    end = next((i for i, line in enumerate(lines) if ending.fullmatch(line)), len(lines))
    starts = [i for i, line in enumerate(lines[:end]) if heading.fullmatch(line)]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True), 1):
        blocks = re.split(r"\n\s*\n", "\n".join(lines[start + 1 : stop]))
        paragraphs = (normalise(block) for block in blocks if not apparatus.match(block))
        yield Chapter(novel, number, [text for text in paragraphs if re.search(r"\w", text)])


def read_chapters(texts: Path) -> list[Chapter]:
    """Every chapter of the six novels, from what ``dpkg -x`` made of the package."""
    found = sorted(texts.rglob("janeaustenr/data/Rdata.rdb"))
    if not found:
        raise SystemExit(f"{texts} holds no janeaustenr/data/Rdata.rdb: unpack the package there with dpkg -x")
    novels = read_lazyload(found[0].parent)
    return [chapter for novel in sorted(novels) for chapter in chapters_of(novel, novels[novel])]
