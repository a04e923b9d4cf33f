"""The README's tree names the rooms of the two packages, and each room its modules, once."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("ppo_core", "ppo_runtime")


def tree():
    """The paths in the block under "The tree", from the indentation of its lines."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## The tree\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, 'README.md has no section "The tree"'
    block = re.search(r"^```\w*\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert block, 'the section "The tree" has no fenced block'
    found, folders = [], []
    for line in filter(str.strip, block[1].splitlines()):
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = "/".join([*(folder for _, folder in folders), name.rstrip("/")])
        if name.endswith("/"):
            folders.append((indent, name.rstrip("/")))
        assert len(line.split()) > 1 or path == "tests", f"{path} has no description"
        found.append(path)
    return found


def described(room):
    """The modules that a room's docstring has a line for, below its first paragraphs: a name and two spaces or more."""
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    return re.findall(r"^(\w+) {2,}\S", docstring, re.MULTILINE)


def test_the_tree_is_complete():
    """Every file of the core, every room of the runtime and every file beside them stands in the README, once."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in paths if len(path.relative_to(ROOT).parts) == 3}
    files = {path.relative_to(ROOT).as_posix() for path in paths if len(path.relative_to(ROOT).parts) == 2}
    listed = [path for path in tree() if path.split("/")[0] in PACKAGES and path not in PACKAGES]
    assert sorted(listed) == sorted(set(listed)), "named twice"
    assert (rooms | files) - set(listed) == set(), "missing from the README"
    assert set(listed) - (rooms | files) == set(), "in the README only"


def test_every_room_says_what_is_in_it():
    """One line per module, in the docstring of the room."""
    for room in {path.parent for path in (ROOT / "ppo_runtime").rglob("*.py")} - {ROOT / "ppo_runtime"}:
        within = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/*.py")}
        assert sorted(described(room)) == sorted(within - {"__init__", "__main__"}), room.name
