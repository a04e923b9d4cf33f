"""The README's tree names every file of the two packages, once, where it is."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("ppo_core", "ppo_runtime")


def tree():
    """The paths of the Python files in the block under "The tree", from the indentation of its lines."""
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
        elif name.endswith(".py"):
            assert len(line.split()) > 1, f"{path} has no description"
            found.append(path)
    return found


def test_the_tree_is_complete():
    """Every Python file of the packages stands in the README exactly once, and nothing stands there that is not."""
    files = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    listed = [path for path in tree() if path.split("/")[0] in PACKAGES]
    assert sorted(listed) == sorted(set(listed)), "named twice"
    assert files - set(listed) == set(), "missing from the README"
    assert set(listed) - files == set(), "in the README only"
