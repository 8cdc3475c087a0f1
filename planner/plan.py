"""The memory plan of a run: bytes per phase and component, the phase that binds, the KV cache that is left."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.types import Phase
from core.units import gb
from planner.activations import dynamic_components, score_activation_bytes, train_activation_bytes
from planner.components import (
    kv_minimum_bytes,
    kv_needed_bytes,
    num_lora_params,
    optimizer_bytes_per_param,
    vllm_work_bytes,
    weight_bytes,
)
from planner.constants import (
    CANARY_TOKENS,
    CUDA_CONTEXT_BYTES,
    CUDA_GRAPH_BYTES,
    VLLM_ASLEEP_BYTES,
    usable_bytes,
)
from planner.host_memory import host_components
from planner.masked_diffusion import (
    MaskedDiffusionSettings,
    masked_diffusion_components,
    masked_diffusion_settings,
)
from planner.settings import PlanSettings, settings_from_config
from schemas.llada import MaskedDiffusionRunConfig
from schemas.run import AnyRunConfig


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted bytes of every component in every phase. Nothing here was measured."""

    settings: PlanSettings
    components: Mapping[Phase, Mapping[str, int]]
    """Phase -> component -> bytes on the card, allocator overhead included."""
    kv_cache_bytes: int
    """KV cache of vLLM: what the batch needs, capped by the card and by `vllm_gpu_memory_utilization`."""
    kv_needed_bytes: int
    """KV that keeps every completion of one generation call resident."""
    host_components: Mapping[str, int]
    """What lies in pinned host memory -> bytes of the blocks that it takes there."""
    gpu_bytes: int | None
    """The card that the KV cache was capped by; None: no card, no cap."""

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
        """Every phase stays within the usable share (97 %) of the card; the plan's own card unless one is given."""
        card = gpu_bytes if gpu_bytes is not None else self.gpu_bytes
        if card is None:
            raise ValueError("fits() needs a card: this plan was made without one")
        return self.max_bytes <= usable_bytes(card) and not self.kv_is_too_small

    @property
    def kv_is_too_small(self) -> bool:
        """vLLM refuses to start where one row of full length does not fit its cache."""
        return self.settings.generator == "vllm" and self.kv_cache_bytes < kv_minimum_bytes(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """For json: decimal GB, every figure labelled as predicted."""
        return {
            "label": "predicted",
            "teacher": self.settings.teacher.name,
            "student": self.settings.student.name if self.settings.student else None,
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


def plan_run(config: AnyRunConfig, gpu_bytes: int | None, *, allow_download: bool = False) -> MemoryPlan:
    """The plan of a run configuration for a card of `gpu_bytes` (as the driver reports them), or for no card.

    Raises:
        UserError: a model's shape is not known here.
    """
    if isinstance(config, MaskedDiffusionRunConfig):
        return plan(masked_diffusion_settings(config, allow_download=allow_download), gpu_bytes)
    return plan(settings_from_config(config, allow_download=allow_download), gpu_bytes)


def plan(settings: PlanSettings, gpu_bytes: int | None = None) -> MemoryPlan:
    """Bytes per phase and component; pure arithmetic."""
    if isinstance(settings, MaskedDiffusionSettings):
        return _memory_plan(settings, masked_diffusion_components(settings), gpu_bytes=gpu_bytes)
    adapter = _adapter_components(settings)
    loaded = _base_components(settings) | {"adapter": adapter["adapter"], "CUDA context": CUDA_CONTEXT_BYTES.value}
    asleep = _vllm_asleep(settings)
    resident = loaded | {"optimizer states": adapter["optimizer states"]} | asleep
    awake = _vllm_awake(settings)
    canary = _canary_bytes(settings) if awake else 0.0
    kv = _kv_cache_bytes(settings, gpu_bytes, resident=sum(resident.values()) + canary, awake=sum(awake.values()))
    generating = awake | {"KV cache": kv}
    phases: dict[Phase, dict[str, float]] = {
        Phase.LOAD: loaded | asleep | generating,
        Phase.SYNC: resident | generating | {"canary": canary},
        Phase.GENERATE: resident | generating,
        Phase.SCORE: resident | dynamic_components(settings, score_activation_bytes(settings)),
        Phase.TRAIN: resident
        | {"gradients": adapter["gradients"]}
        | dynamic_components(settings, train_activation_bytes(settings)),
    }
    return _memory_plan(
        settings,
        phases,
        gpu_bytes=gpu_bytes,
        kv_cache_bytes=kv,
        kv_needed_bytes=kv_needed_bytes(settings),
    )


def _memory_plan(
    settings: PlanSettings,
    phases: Mapping[Phase, Mapping[str, float]],
    *,
    gpu_bytes: int | None,
    kv_cache_bytes: float = 0.0,
    kv_needed_bytes: float = 0.0,
) -> MemoryPlan:
    return MemoryPlan(
        settings=settings,
        components={
            phase: {name: round(size) for name, size in parts.items() if size} for phase, parts in phases.items()
        },
        kv_cache_bytes=round(kv_cache_bytes),
        kv_needed_bytes=round(kv_needed_bytes),
        host_components={name: round(size) for name, size in host_components(settings).items()},
        gpu_bytes=gpu_bytes,
    )


def _kv_cache_bytes(settings: PlanSettings, gpu_bytes: int | None, *, resident: float, awake: float) -> int:
    """What is set, else what the batch needs, within what the card leaves and vLLM's own share of it."""
    if settings.generator == "server":
        return 0
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    needed = kv_needed_bytes(settings)
    if gpu_bytes is None or settings.generator == "transformers":
        return needed
    left = usable_bytes(gpu_bytes) - resident - awake
    own_share = gpu_bytes * settings.vllm_utilization_frac - awake
    return max(min(needed, int(left), int(own_share)), kv_minimum_bytes(settings))


def _canary_bytes(settings: PlanSettings) -> float:
    """The trainer's forward over the canary's tokens and its float32 logits, while vLLM is awake."""
    shape = settings.teacher
    return CANARY_TOKENS.value * (9 * shape.hidden + 10 * shape.intermediate + 3 * 4 * shape.vocab)


def _base_components(settings: PlanSettings) -> dict[str, float]:
    teacher = weight_bytes(settings.teacher, settings.precision, double_quant=settings.double_quant)
    bases = {"teacher": teacher}
    if settings.student is not None:
        bases["student"] = weight_bytes(settings.student, settings.scored_in, double_quant=settings.double_quant)
    if settings.reference == "separate":
        bases["reference"] = weight_bytes(settings.teacher, settings.scored_in, double_quant=settings.double_quant)
    return bases


def _adapter_components(settings: PlanSettings) -> dict[str, float]:
    num_params = num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets)
    width = settings.adapter_bytes_per_param
    return {
        "adapter": settings.num_adapters * num_params * width,
        "gradients": num_params * width,
        "optimizer states": num_params * optimizer_bytes_per_param(settings.optimizer),
    }


def _vllm_asleep(settings: PlanSettings) -> dict[str, float]:
    """What a vLLM in this process holds in every phase."""
    if settings.generator != "vllm":
        return {}
    graphs = 0.0 if settings.enforce_eager else CUDA_GRAPH_BYTES.value
    return {"vLLM residue": VLLM_ASLEEP_BYTES.value + graphs}


def _vllm_awake(settings: PlanSettings) -> dict[str, float]:
    """Weights, 16-bit adapter slots and working memory, on the card while vLLM is awake."""
    if settings.generator != "vllm":
        return {}
    return {
        "vLLM weights": weight_bytes(
            settings.teacher, settings.generator_precision, double_quant=settings.double_quant
        ),
        "vLLM adapter": 2 * num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets),
        "vLLM activations": vllm_work_bytes(settings),
    }
