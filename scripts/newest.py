"""Try the newest packages that pyproject.toml allows: `make newest`, or

    python3 scripts/newest.py [--venv=FOLDER] [pytest's words, e.g. tests/test_configs.py]

Makes an environment of its own (a temporary one, unless it is named), says which packages differ from
constraints.txt, and runs the tests: by default all that need neither a GPU nor an hour. Exit status: pytest's. Standard
library only; not part of the tests that guard a change, since what it finds is in other people's packages.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALL_TESTS = ("-m", "not gpu and not long")
OPTION = "--venv="


def say(text: str) -> None:
    sys.stderr.write(f"[newest] {text}\n")


def pins(text: str) -> dict[str, str]:
    """Name -> version of each line `name==version`."""
    return dict(line.split("==", 1) for line in text.splitlines() if "==" in line and not line.startswith("#"))


def installed(venv: Path) -> dict[str, str]:
    """Name as in constraints.txt -> version without its build, of an environment's packages."""
    found = importlib.metadata.distributions(path=[str(path) for path in venv.glob("lib/python*/site-packages")])
    return {d.metadata["Name"].lower().replace("_", "-").replace(".", "-"): d.version.partition("+")[0] for d in found}


def try_newest(venv: Path, words: list[str]) -> int:
    """Install, compare, test; pytest's exit status."""
    setup = [sys.executable, str(ROOT / "scripts" / "setup_env.py"), "--dev", "--newest", f"{OPTION}{venv}"]
    subprocess.run(setup, check=True)
    tried = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    now = installed(venv)
    newer = {name: version for name, version in now.items() if name in tried and version != tried[name]}
    for name, version in sorted(newer.items()):
        say(f"{name}: {tried[name]} -> {version}")
    say(f"{len(newer)} of {len(now)} packages differ from constraints.txt; running the tests")
    words = words or list(ALL_TESTS)
    done = subprocess.run([str(venv / "bin" / "python"), "-m", "pytest", "-rfE", "--tb=line", *words], cwd=ROOT)
    say("every test passed" if done.returncode == 0 else "the tests that failed are listed above")
    return done.returncode


def main() -> int:
    named = [word.removeprefix(OPTION) for word in sys.argv[1:] if word.startswith(OPTION)]
    words = [word for word in sys.argv[1:] if not word.startswith(OPTION)]
    if named:
        return try_newest(Path(named[-1]).absolute(), words)
    with tempfile.TemporaryDirectory(prefix="newest-") as folder:
        return try_newest(Path(folder, "venv"), words)


if __name__ == "__main__":
    sys.exit(main())
