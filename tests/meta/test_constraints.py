"""The files of exact versions serve every Python and platform that we promise, and the README's commands use them."""

import re
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / ".ci" / "constraints"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# Which extras each file is for.
FILES = {"ipex": sorted(EXTRAS), "newest": sorted(EXTRAS.keys() - {"ipex"}), "lowest": ["test"]}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = {
    "linux x86-64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "linux arm": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macos arm": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
}
ENVIRONMENTS = {
    f"{python} {platform}": {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "nt" if platform == "windows" else "posix",
        **names,
    }
    for python, (platform, names) in product(PYTHONS, PLATFORMS.items())
}


def lines(name: str) -> list[str]:
    text = (FOLDER / f"{name}.txt").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def applies(requirement: Requirement, environment: dict[str, str], extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment | {"extra": extra})


def pins(name: str, environment: dict[str, str]) -> dict[str, list[Version]]:
    """The versions that a file asks for somewhere, by package."""
    found: dict[str, list[Version]] = {}
    for requirement in map(Requirement, lines(name)):
        if applies(requirement, environment):
            (specifier,) = requirement.specifier
            found.setdefault(canonicalize_name(requirement.name), []).append(Version(specifier.version))
    return found


def direct(extras: list[str], environment: dict[str, str]) -> dict[str, list[Requirement]]:
    """What pyproject.toml itself asks for somewhere; extras that name other extras of ours included."""
    asked = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, asked):
        if requirement.name == PROJECT["project"]["name"]:
            for name, requirements in direct(sorted(requirement.extras), environment).items():
                found.setdefault(name, []).extend(requirements)
        elif applies(requirement, environment):
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_one_exact_version(name: str) -> None:
    """No ranges, no indexes, no options; a local tag such as +cpu would refuse every other build of that version."""
    for line in lines(name):
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*( ; .+)?", line), line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_one_version_of_everything_we_ask_for(name: str, environment: dict[str, str]) -> None:
    """Everywhere, each direct requirement has one version that fits it, and nothing has two."""
    pinned = pins(name, environment)
    assert {package: versions for package, versions in pinned.items() if len(versions) > 1} == {}
    for package, requirements in direct(FILES[name], environment).items():
        assert package in pinned, f"{package} has no version"
        for requirement in requirements:
            assert requirement.specifier.contains(pinned[package][0], prereleases=True), str(requirement)


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_the_extension_meets_its_torch_or_is_left_out(environment: dict[str, str]) -> None:
    """Intel's wheels: Linux on x86-64, Python up to 3.13."""
    pinned, extension = pins("ipex", environment), "intel-extension-for-pytorch"
    has_wheel = environment["platform_machine"] == "x86_64" and environment["python_version"] != "3.14"
    assert (extension in pinned) == has_wheel
    assert (extension in direct(["ipex"], environment)) == has_wheel
    if has_wheel:
        assert pinned[extension][0].release[:2] == pinned["torch"][0].release[:2]
    else:
        assert pinned["torch"] == pins("newest", environment)["torch"]


def test_lower_bounds_are_what_the_lowest_lane_installs() -> None:
    """A bound that no lane installs is a guess. (Some packages have no release at the bound for the newest Pythons.)"""
    environment = ENVIRONMENTS["3.10 linux x86-64"]
    pinned = pins("lowest", environment)
    for package, requirements in direct(["test"], environment).items():
        bounds = [Version(s.version) for r in requirements for s in r.specifier if s.operator in (">=", "==")]
        assert pinned[package][0] == max(bounds), package


def test_the_readme_installs_tested_versions() -> None:
    """Every command that installs from the clone names a file of versions that exists."""
    commands = re.findall(r"pip install [^&\n]*-e[^&\n]*", (ROOT / "README.md").read_text())
    assert len(commands) >= 2
    for command in commands:
        named = re.search(r"-c (\S+)", command)
        assert named, command
        assert (ROOT / named[1]).is_file(), command


def test_the_build_backend_is_pinned() -> None:
    """Constraints do not reach the environment that pip builds in."""
    for line in PROJECT["build-system"]["requires"]:
        (specifier,) = Requirement(line).specifier
        assert specifier.operator == "==", line
