"""GPU memory as its driver counts it, and its split into components.

torch's own counters go on counting what a sleeping vLLM has given back, so peaks are taken from the driver, by a thread
that asks it every few milliseconds; not while CUDA graphs are captured, which other threads' calls may break. The GPU
is taken to be this process's alone.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from core.types import Phase
from core.units import gb
from models.meter import PhaseMeter
from optimization.gpu import free_and_total_bytes, has_gpu
from planner.plan import MemoryPlan

OUTSIDE = "outside of the phases"
"""Between phases, e.g. while a trainer is put together."""
_INTERVAL_S = 0.005


class DriverWatch:
    """Peak of the bytes in use on the GPU for each phase of a host. Without CUDA it watches nothing."""

    def __init__(self) -> None:
        self.peak_bytes: dict[str, int] = {}
        self._open = [OUTSIDE]
        self._stop = threading.Event()
        self._may_ask = threading.Lock()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        if has_gpu():
            self._thread.start()
        try:
            yield
        finally:
            self._stop.set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the watch: the driver is not asked meanwhile."""
        with self._may_ask:
            yield

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            with self._may_ask:
                phase, used = self._open[-1], used_bytes()
            self.peak_bytes[phase] = max(self.peak_bytes.get(phase, 0), used)


def used_bytes() -> int:
    """Bytes in use on the GPU, by the driver's count."""
    free, total = free_and_total_bytes()
    return total - free


def outside_torch_bytes() -> int:
    """Bytes in use on the GPU beside torch's own: CUDA context, libraries' workspaces, vLLM outside its pools."""
    torch.cuda.synchronize()
    return used_bytes() - (torch.cuda.memory_reserved() - vllm_pool_bytes(asleep=True))


def vllm_pool_bytes(tag: str | None = None, *, asleep: bool | None = None) -> int:
    """Bytes of vLLM's sleeping pool: those of a tag (`weights`, `kv_cache`), those that are asleep, or all."""
    from vllm.device_allocator.cumem import CuMemAllocator, cumem_available

    if not cumem_available or CuMemAllocator.instance is None:
        return 0
    return sum(
        data.handle[1]
        for data in CuMemAllocator.instance.pointer_to_data.values()
        if (tag is None or data.tag == tag) and (asleep is None or data.is_asleep == asleep)
    )


def module_bytes(module: nn.Module, *, adapters: bool) -> int:
    """Bytes of a model's LoRA matrices, or of all its other tensors with the scales of quantised weights."""
    named = [*module.named_parameters(), *module.named_buffers()]
    chosen = [tensor for name, tensor in named if ("lora_" in name) == adapters]
    linears = [] if adapters else list(module.modules())
    scales = [tensor for linear in linears for tensor in _scales(linear)]
    return tensor_bytes([*chosen, *scales])


def _scales(linear: nn.Module) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside an int8 or 4-bit weight."""
    weight: Any = getattr(linear, "weight", None)
    for holder in (weight, getattr(linear, "state", None)):
        if isinstance(scales := getattr(holder, "SCB", None), torch.Tensor):
            yield scales
    quant_state = getattr(weight, "quant_state", None)
    while quant_state is not None:  # double quantisation: the scales have scales
        yield from (t for t in (quant_state.absmax, quant_state.code) if isinstance(t, torch.Tensor))
        quant_state = quant_state.state2


def tensor_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def optimizer_state_bytes(optimizer: Any) -> int:
    """States of a torch or bitsandbytes optimizer, those in paged memory included."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return tensor_bytes(v for state in states for v in state.values() if isinstance(v, torch.Tensor))


def touch_card() -> None:
    """Make the CUDA context and cuBLAS's workspace, so that they can be told apart from what comes later."""
    square = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    square @ square


class MemoryCap:
    """Memory limit that makes a GPU as small as another one, for torch, for vLLM and for the plan.

    torch counts a sleeping pool as in use, so its share is raised by as much while the engine sleeps.
    """

    def __init__(self, card_bytes: int, warm_up: Callable[[], None] = touch_card) -> None:
        """`card_bytes` as the driver of the smaller GPU would report them; call before anything is loaded."""
        self.card_bytes = card_bytes
        warm_up()
        _, self._total_bytes = free_and_total_bytes()
        self._outside_bytes = outside_torch_bytes()
        self.apply()

    def apply(self) -> None:
        allowed = self.card_bytes - self._outside_bytes + vllm_pool_bytes(asleep=True)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / self._total_bytes))

    def share(self, utilization_frac: float) -> float:
        """vLLM's share of the smaller GPU as a share of this one."""
        return utilization_frac * self.card_bytes / self._total_bytes


def phase_rows(plan: MemoryPlan, meter: PhaseMeter, watch: DriverWatch) -> dict[str, dict[str, float | None]]:
    """Phase -> planned and measured peaks in GB, and seconds. On a CPU only the seconds are measured."""
    on_card = meter.device.type == "cuda"
    rows: dict[str, dict[str, float | None]] = {}
    for phase, use in meter.checkpoint_use().items():
        if not use.seconds:
            continue
        planned = gb(plan.peak_bytes(phase))
        # The meter's own figure covers the start of the engine, during which the watch is paused.
        driver = gb(max(watch.peak_bytes.get(phase, 0), use.peak_driver_bytes)) if on_card else None
        rows[str(phase)] = {
            "planned_gb": planned,
            "driver_gb": driver,
            "reserved_gb": gb(use.peak_reserved_bytes) if on_card else None,
            "allocated_gb": gb(use.peak_allocated_bytes) if on_card else None,
            "seconds": use.seconds,
        }
    return rows


def planned_components(plan: MemoryPlan) -> dict[str, float]:
    """Component -> planned GB; of one that differs between phases, e.g. activations, one entry for each phase.

    vLLM's adapter slots count as its weights: both lie in one pool.
    """
    found: dict[str, dict[Phase, int]] = {}
    for phase, parts in plan.components.items():
        for name, size in parts.items():
            found.setdefault(name, {})[phase] = size
    planned: dict[str, float] = {}
    for name, sizes in found.items():
        if len(set(sizes.values())) == 1:
            planned[name] = gb(max(sizes.values()))
        else:
            planned |= {f"{name}, {phase}": gb(size) for phase, size in sizes.items()}
    if "vLLM weights" in planned:
        planned["vLLM weights"] += planned.pop("vLLM adapter")
    return planned


def difference(planned: float, measured: float | None) -> str:
    """Measured against planned in per cent, for a table."""
    if measured is None or not planned:
        return ""
    return f"{100 * (measured / planned - 1):+.1f} %"


def component_table(planned: Mapping[str, float], measured: Mapping[str, float]) -> list[list[str]]:
    """Rows: component, planned GB, measured GB, difference. What cannot be told apart has no measured figure."""
    names = [*planned, *(name for name in measured if name not in planned)]
    return [
        [
            name,
            f"{planned[name]:.3f}" if name in planned else "",
            f"{measured[name]:.3f}" if name in measured else "",
            difference(planned.get(name, 0.0), measured.get(name)),
        ]
        for name in names
    ]
