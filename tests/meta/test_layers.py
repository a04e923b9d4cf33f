"""Imports point one way: from what stands higher to what stands lower, and nothing goes round in a circle.

``python -m tests.meta.test_layers`` prints the picture, and the files that are longer than they should be.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ppo_runtime"
# From bottom to top. A line holds rooms, and modules beside them, that know nothing of each other.
LAYERS = (
    ("common",),
    ("config",),
    ("ranks",),
    ("models",),
    ("accel",),
    ("rollout",),
    ("learning",),
    ("reporting",),
    ("assembly",),
    ("trainer",),
    ("resuming",),
    ("checkpoint",),
    ("arguments", "results"),
    ("loop",),
    ("recipe",),
    ("compat", "demo"),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
# The names one imports are loaded on first use, from wherever they are.
ROOT = "__init__"
LENGTH = 250
# Modules that are longer, and why they stay in one piece.
LONG = {
    "accel.backends": "choosing a backend, trying it out and saying what became of it: three turns of one decision",
    "compat.piecewise": "one class: TRL's methods with their arguments described; what they compute is elsewhere",
    "config": "one class: its settings, each with what it does",
    "doctor": "a list of checks that know nothing of each other, each a few lines",
    "learning.forward": "rows and the passes over them: the layout and what reads it change together",
    "learning.update": "one optimisation: its plan, its minibatches and what decides whether an update counts",
    "loop": "one loop and its clean end: whoever changes what a run leaves behind reads all of it",
    "models.gguf": "one file format: its names, its tensors and its tokenizer, with no other reader",
    "models.heads": "one split, and the probe that refuses what it would get wrong",
    "models.wrapper": "one class with the interface of a transformers model; loading and saving are elsewhere",
    "rollout.generating": "one owner of settings, warnings and the latest responses",
    "trainer": "one class: the order of the steps, and its arguments described; what the steps do is elsewhere",
}


def modules():
    """Every module by its dotted name below the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


NAMES = dict(modules())


def imported(path):
    """What a file imports of the package, anywhere in it, as names of :data:`NAMES`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top == PACKAGE.name:
                yield next((name for name in (rest, rest.rpartition(".")[0]) if name in NAMES), ROOT)


GRAPH = {name: set(imported(path)) - {name} for name, path in NAMES.items()}


def layer(name):
    """The number of the line that a module stands in; what ``python -m`` starts stands above everything."""
    if name.endswith("__main__"):
        return len(LAYERS)
    return next(number for number, rooms in enumerate(LAYERS) if name.split(".")[0] in rooms)


def test_every_module_has_its_layer():
    """And every layer a module."""
    present = {name.split(".")[0] for name in NAMES} - {ROOT}
    assert present == {room for rooms in LAYERS for room in rooms}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {ROOT}))
def test_no_import_points_up(name):
    """A module imports what is below it, or in its own room."""
    up = [
        other
        for other in GRAPH[name] - {ROOT}
        if other.split(".")[0] != name.split(".")[0] and layer(other) >= layer(name)
    ]
    assert not up


def test_there_is_no_circle():
    """Within a room either."""
    TopologicalSorter({name: others - {ROOT} for name, others in GRAPH.items()}).prepare()


def test_rooms_hold_no_code_of_their_own():
    """A room's ``__init__`` says what is in it. The two that users import from hold names as well."""
    for name, path in NAMES.items():
        if path.name == "__init__.py" and name not in (ROOT, "compat"):
            assert len(ast.parse(path.read_text()).body) == 1, name


def lengths():
    """The lines of every module."""
    return {name: len(path.read_text().splitlines()) for name, path in NAMES.items()}


def test_a_long_module_has_a_reason():
    """A module that grows beyond the limit is split, or listed with what keeps it in one piece."""
    assert {name for name, length in lengths().items() if length > LENGTH} - LONG.keys() == set()
    assert LONG.keys() - NAMES.keys() == set()


def picture():
    """The layers from top to bottom, with how many modules and lines each has."""
    lines = []
    for rooms in reversed(LAYERS):
        counted = []
        for room in rooms:
            files = [path for name, path in NAMES.items() if name.split(".")[0] == room]
            length = sum(len(path.read_text().splitlines()) for path in files)
            what = f"{len(files) - 1} modules, " if len(files) > 1 else ""
            counted.append(f"{room} ({what}{length} lines)")
        lines.append("  ".join(counted))
    return "\n".join(lines)


if __name__ == "__main__":
    print(picture())
    arrows = sum(map(len, GRAPH.values()))
    print(f"\n{len(NAMES)} modules, {arrows} imports between them, none upwards, no circle\n")
    print(f"Longer than {LENGTH} lines:")
    for name, length in sorted(lengths().items(), key=lambda pair: -pair[1]):
        if length > LENGTH:
            print(f"{length:5} {name:18} {LONG.get(name, '(no reason given)')}")
