"""Rates of GPUs and of this CPU: what a plan of time divides work by (planner/time.py). No torch.

A GPU's rates are the maker's figures times a factor until somebody measures them (`make gpu`, part d, writes them to
docs/measurements.json). Those of a CPU are measured on the machine itself (optimization/rates.py), once, in seconds.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from core.cache import default_cache_dir
from schemas.compose import CONFIG_ROOT

MEASUREMENTS = CONFIG_ROOT.parent / "docs" / "measurements.json"
"""Figures of GPUs, written by `python -m benchmarks.gpu`."""
MATMUL_FACTOR, COPY_FACTOR = 0.5, 0.8
"""Share of the maker's figures that layers and copies reach (assumed)."""
GPU_OP_S = 8e-6
"""Seconds from one kernel launch to the next as Python issues them (assumed)."""
CPU_RATES_VERSION = 1
"""Changes with what optimization/rates.py measures."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one device copies, multiplies and is given work."""

    copy_bytes_per_s: float
    """Bytes read and written a second."""
    matmul_flop_per_s: float
    """Dense 16-bit products."""
    op_s: float = GPU_OP_S
    """Seconds of an operation that computes next to nothing."""
    by_width: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """A CPU's: `bf16 forward`, `fp32 training`, ... -> hidden size of a block -> operations a second of its products,
    with its norms and activations in their time; small blocks reach a fraction of what large ones do."""
    name: str = "?"
    label: Literal["measured", "the maker's figures times a factor", "floor"] = "measured"

    @property
    def launches_overlap(self) -> bool:
        """A GPU computes while it is given work; on a CPU the two add up."""
        return not self.by_width

    def flop_per_s(self, width: int, kind: str) -> float:
        """Of a block of that hidden size; between two measured sizes along a power law, beyond them the nearest."""
        points = sorted(self.by_width.get(kind, {}).items())
        if not points:
            return self.matmul_flop_per_s
        if width <= points[0][0] or width >= points[-1][0]:
            return points[0 if width <= points[0][0] else -1][1]
        (low, low_rate), (high, high_rate) = next(pair for pair in pairwise(points) if pair[1][0] >= width)
        share = math.log(width / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(low_rate) + share * math.log(high_rate))

    @property
    def words(self) -> str:
        return f"{self.name}, {self.label}"


@dataclass(frozen=True, kw_only=True)
class MakersFigures:
    """What the maker of a GPU states: dense bf16 products that are summed in float32, and memory bandwidth."""

    tflop_per_s: float
    tb_per_s: float
    memory_gb: float
    """As drivers report it, about."""


GPUS: dict[str, MakersFigures] = {
    "RTX 3060": MakersFigures(tflop_per_s=25.5, tb_per_s=0.360, memory_gb=12.9),
    "RTX 4060": MakersFigures(tflop_per_s=30.2, tb_per_s=0.272, memory_gb=8.6),
    "RTX 4080": MakersFigures(tflop_per_s=97.5, tb_per_s=0.717, memory_gb=17.2),
    "RTX 3090": MakersFigures(tflop_per_s=71.2, tb_per_s=0.936, memory_gb=25.8),
    "RTX 4090": MakersFigures(tflop_per_s=165.2, tb_per_s=1.008, memory_gb=25.3),
    "RTX 5090": MakersFigures(tflop_per_s=209.5, tb_per_s=1.792, memory_gb=34.2),
    "A10": MakersFigures(tflop_per_s=125.0, tb_per_s=0.600, memory_gb=24.1),
    "L4": MakersFigures(tflop_per_s=121.0, tb_per_s=0.300, memory_gb=24.1),
    "RTX A6000": MakersFigures(tflop_per_s=154.8, tb_per_s=0.768, memory_gb=51.5),
    "L40S": MakersFigures(tflop_per_s=362.0, tb_per_s=0.864, memory_gb=48.3),
    "A100 40GB": MakersFigures(tflop_per_s=312.0, tb_per_s=1.555, memory_gb=42.3),
    "A100 80GB": MakersFigures(tflop_per_s=312.0, tb_per_s=2.039, memory_gb=85.2),
    "H100 PCIe": MakersFigures(tflop_per_s=756.0, tb_per_s=2.0, memory_gb=85.2),
    "H100 NVL": MakersFigures(tflop_per_s=835.0, tb_per_s=3.9, memory_gb=100.5),
    "H100 80GB": MakersFigures(tflop_per_s=989.0, tb_per_s=3.35, memory_gb=85.2),
    "H200": MakersFigures(tflop_per_s=989.0, tb_per_s=4.8, memory_gb=150.0),
    "B200": MakersFigures(tflop_per_s=2250.0, tb_per_s=7.7, memory_gb=192.0),
}
"""By a part of the name that the driver reports; of several that match, the longest counts."""
_TYPICAL_GPUS = ("RTX 4060", "RTX 3060", "RTX 4080", "RTX 4090", "A100 40GB", "L40S", "H100 80GB", "H100 NVL", "H200")
"""By memory: whose rates a plan takes for "a GPU of so many GB"."""


def rates_of_gpu(name: str, measurements: Path = MEASUREMENTS) -> Rates | None:
    """Rates of a GPU by the name that its driver reports; None for one that is not in the table.

    Measured ones, where docs/measurements.json has some of this GPU, go first.
    """
    if (measured := _measured_rates(name, measurements)) is not None:
        return measured
    words = name.lower().replace("-", " ").split()
    for known in sorted(GPUS, key=len, reverse=True):
        if all(word in words for word in known.lower().split()):
            return _makers_rates(known)
    return None


def rates_for_memory(gpu_bytes: int) -> Rates:
    """Rates of the GPU that people usually mean by so much memory."""
    return _makers_rates(min(_TYPICAL_GPUS, key=lambda name: abs(math.log(GPUS[name].memory_gb * 1e9 / gpu_bytes))))


def _makers_rates(name: str) -> Rates:
    figures = GPUS[name]
    return Rates(
        copy_bytes_per_s=figures.tb_per_s * 1e12 * COPY_FACTOR,
        matmul_flop_per_s=figures.tflop_per_s * 1e12 * MATMUL_FACTOR,
        name=name,
        label="the maker's figures times a factor",
    )


def _measured_rates(name: str, measurements: Path) -> Rates | None:
    entries: Sequence[Mapping[str, Any]] = json.loads(measurements.read_text(encoding="utf-8"))
    found = [entry for entry in entries if entry["machine"]["card"] == name and "rates" in entry]
    if not found:
        return None
    rates = max(found, key=lambda entry: entry["date"])["rates"]
    return Rates(
        copy_bytes_per_s=rates["copy_bytes_per_s"],
        matmul_flop_per_s=rates["matmul_flop_per_s"] * MATMUL_FACTOR,
        name=name,
        label="measured",
    )


def cpu_rates_file() -> Path:
    """Where the rates of this machine's CPU are kept; those of another number of threads are others."""
    return default_cache_dir() / f"cpu_rates_v{CPU_RATES_VERSION}_{num_threads()}.json"


def num_threads() -> int:
    """Threads that products run on, as OpenMP counts them."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def saved_cpu_rates(file: Path | None = None) -> Rates | None:
    """The rates of this CPU, where they were measured on it; None where they were not, or on another one."""
    file = file or cpu_rates_file()
    if not file.is_file():
        return None
    saved = json.loads(file.read_text(encoding="utf-8"))
    widths = {dtype: {int(w): rate for w, rate in points.items()} for dtype, points in saved.pop("by_width").items()}
    rates = Rates(**saved, by_width=widths)
    return rates if rates.name == f"{cpu_name()}, {num_threads()} threads" else None


def rates_as_json(rates: Rates) -> str:
    return json.dumps(asdict(rates), indent=2)
