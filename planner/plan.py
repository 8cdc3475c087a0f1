"""The memory plan of a run: bytes per phase and component, the phase that binds, the KV cache that is left.

What the plans of all methods share; each method's own is in the file of its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.types import Phase
from core.units import gb
from planner.constants import usable_bytes
from planner.host_memory import host_components
from planner.settings import PlanSettings
from schemas.any_run import AnyRunConfig
from schemas.methods import method_of


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted bytes of every component in every phase. Nothing here was measured."""

    settings: PlanSettings
    components: Mapping[Phase, Mapping[str, int]]
    """Phase -> component -> bytes on the GPU, allocator overhead included."""
    kv_cache_bytes: int
    """KV cache of vLLM: what the batch needs, capped by the GPU and by `vllm_gpu_memory_utilization`."""
    kv_needed_bytes: int
    """KV that keeps every completion of one generation call resident."""
    kv_minimum_bytes: int
    """KV that vLLM refuses to start without; 0: no vLLM."""
    host_components: Mapping[str, int]
    """What lies in pinned host memory -> bytes of the blocks that it takes there."""
    gpu_bytes: int | None
    """The GPU that the KV cache was capped by; None: no GPU, no cap."""

    def peak_bytes(self, phase: Phase) -> int:
        return sum(self.components[phase].values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host_components.values())

    @property
    def binding_phase(self) -> Phase:
        """The phase with the highest peak."""
        return max(Phase, key=self.peak_bytes)

    @property
    def max_bytes(self) -> int:
        return self.peak_bytes(self.binding_phase)

    def fits(self, gpu_bytes: int | None = None) -> bool:
        """Whether every phase stays within the usable share (97 %) of the GPU: the plan's own unless one is given."""
        card = gpu_bytes if gpu_bytes is not None else self.gpu_bytes
        if card is None:
            raise ValueError("fits() needs a GPU: this plan was made without one")
        return self.max_bytes <= usable_bytes(card) and not self.kv_is_too_small

    @property
    def kv_is_too_small(self) -> bool:
        """Whether one row of full length does not fit vLLM's cache: it then refuses to start."""
        return self.kv_cache_bytes < self.kv_minimum_bytes

    def to_dict(self) -> dict[str, Any]:
        """For json: decimal GB, every figure labelled as predicted."""
        return {
            "label": "predicted",
            "teacher": self.settings.teacher.name,
            "student": self.settings.described().student_name,
            "precision": self.settings.precision,
            "phases_gb": {
                phase.value: {name: round(gb(size), 3) for name, size in parts.items()}
                for phase, parts in self.components.items()
            },
            "peaks_gb": {phase.value: round(gb(self.peak_bytes(phase)), 3) for phase in Phase},
            "binding_phase": self.binding_phase.value,
            "kv_cache_gb": round(gb(self.kv_cache_bytes), 3),
            "kv_needed_gb": round(gb(self.kv_needed_bytes), 3),
            "host_ram_gb": round(gb(self.host_bytes), 3),
            "gpu_gb": None if self.gpu_bytes is None else round(gb(self.gpu_bytes), 3),
            "usable_gb": None if self.gpu_bytes is None else round(gb(usable_bytes(self.gpu_bytes)), 3),
            "fits": None if self.gpu_bytes is None else self.fits(),
        }


def settings_of(config: AnyRunConfig, *, allow_download: bool = False) -> PlanSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: a model's shape is not known here.
    """
    settings: PlanSettings = method_of(config).plan_settings(config, allow_download=allow_download)
    return settings


def plan_run(config: AnyRunConfig, gpu_bytes: int | None, *, allow_download: bool = False) -> MemoryPlan:
    """The plan of a run configuration for a GPU of `gpu_bytes` (as the driver reports them), or for no GPU.

    Raises:
        UserError: a model's shape is not known here.
    """
    return plan(settings_of(config, allow_download=allow_download), gpu_bytes)


def plan(settings: PlanSettings, gpu_bytes: int | None = None) -> MemoryPlan:
    """Bytes per phase and component; pure arithmetic."""
    return settings.plan(gpu_bytes)


def memory_plan(
    settings: PlanSettings,
    phases: Mapping[Phase, Mapping[str, float]],
    *,
    gpu_bytes: int | None,
    host: Mapping[str, float] | None = None,
    kv_cache_bytes: float = 0.0,
    kv_needed_bytes: float = 0.0,
    kv_minimum_bytes: int = 0,
) -> MemoryPlan:
    """What a method has in each phase as its plan; `host` is what lies in pinned memory beside offloaded layer inputs.

    A phase that is not named is one that the method does not have.
    """
    return MemoryPlan(
        settings=settings,
        components={
            phase: {name: round(size) for name, size in phases.get(phase, {}).items() if size} for phase in Phase
        },
        kv_cache_bytes=round(kv_cache_bytes),
        kv_needed_bytes=round(kv_needed_bytes),
        kv_minimum_bytes=kv_minimum_bytes,
        host_components={name: round(size) for name, size in {**(host or {}), **host_components(settings)}.items()},
        gpu_bytes=gpu_bytes,
    )
