"""Packages: each that the project brings is pinned, and a file that is not the one that was tried is refused."""

import json
import re
import subprocess
import sys

import pytest

from core.errors import UserError
from schemas.compose import CONFIG_ROOT
from scripts import newest, pins, setup_env

HASH = re.compile(r"[0-9a-f]{64}")


def test_every_installed_package_of_the_project_is_pinned_as_it_is_installed():
    installed = pins.brought_by(pins.asked_for())
    assert len(installed) > 100 and {"torch", "numpy", "huggingface-hub"} <= installed.keys()
    assert pins.problems(installed, pins.pinned(setup_env.CONSTRAINTS.read_text())) == []


def test_a_package_that_is_missing_or_differs_is_named():
    found = pins.problems({"torch": "2.0", "numpy": "1.0", "rich": "3"}, {"torch": "2.0", "rich": "2"})
    assert found == ["numpy: installed 1.0, not pinned", "rich: installed 3, pinned 2"]


def test_pins_of_what_is_not_installed_here_stay():
    text = pins.pins_text({"torch": "2.0", "zzz": "1"}, {"vllm": "0.3", "torch": "1.0"})
    assert pins.pinned(text) == {"torch": "2.0", "vllm": "0.3", "zzz": "1"}


def report(name: str, sha256: str, place: str = "https://host") -> str:
    info = {"url": f"{place}/{name.replace('+', '%2B')}", "archive_info": {"hashes": {"sha256": sha256}}}
    return json.dumps({"install": [{"download_info": info}, {"download_info": {"url": "file:///x", "dir_info": {}}}]})


def test_a_file_of_a_known_name_with_another_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, "HASHES", tmp_path / "hashes.txt")
    setup_env.HASHES.write_text(f"{'a' * 64}  torch-2+cpu.whl\n")
    found = {name: sha256 for name, sha256, _ in setup_env.downloaded(report("torch-2+cpu.whl", "b" * 64))}
    with pytest.raises(UserError, match=r"torch-2\+cpu.whl"):
        setup_env.check_hashes(found)
    setup_env.check_hashes({"torch-2+cpu.whl": "a" * 64, "another.whl": "b" * 64})


def test_files_of_this_machine_alone_are_not_entered():
    reports = [report("a.whl", "a" * 64), report("b.whl", "b" * 64, place="file:///wheels")]
    assert pins.with_hashes({"c.whl": "c" * 64}, reports) == f"{'a' * 64}  a.whl\n{'c' * 64}  c.whl\n"


def test_hashes_are_those_of_pinned_versions():
    versions = pins.pinned(setup_env.CONSTRAINTS.read_text())
    known = setup_env.known_hashes()
    assert len(known) > 100 and all(HASH.fullmatch(sha256) for sha256 in known.values())
    for file in known:
        name, version = file.replace(".tar.gz", "").split("-")[:2]
        assert pins.canonicalize_name(name) not in versions or version.partition("+")[0] == versions[
            pins.canonicalize_name(name)
        ].replace("-", "_"), file


def test_the_newest_are_compared_with_the_pins():
    text = setup_env.CONSTRAINTS.read_text()
    assert newest.pins(text) == pins.pinned(text)


def test_the_check_says_so_on_its_own():
    done = subprocess.run(
        [sys.executable, str(CONFIG_ROOT.parent / "scripts" / "pins.py")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "packages are pinned" in done.stderr
