"""The plan of an evaluation: the largest of its models in vLLM or transformers, and the cache of a chunk's answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.errors import UserError
from core.types import Phase
from planner.activations import dynamic_components, forward_bytes
from planner.changes import smaller_model
from planner.components import kv_minimum_bytes, kv_needed_bytes, vllm_work_bytes, weight_bytes
from planner.constants import CUDA_CONTEXT_BYTES, CUDA_GRAPH_BYTES
from planner.plan import MemoryPlan, memory_plan
from planner.settings import ATTENTION, Change, Described, common_settings
from planner.shapes import ModelShape, load_shape
from planner.teacher import TeacherSettings, cache_bytes
from schemas.evaluate import EvaluateRunConfig

_LOGITS_COPIES = 6
"""[rows, vocabulary] float32 tensors that sampling with transformers has at once: logits, log-softmax, probabilities,
their doubles and the cumulative sum."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TeacherSettings):
    """One evaluation: what samples in a teacher's run, without adapter, student or reference; one model at a time."""

    num_models: int

    def plan(self, gpu_bytes: int | None) -> MemoryPlan:
        return memory_plan(
            self,
            dict.fromkeys((Phase.LOAD, Phase.GENERATE), _components(self, gpu_bytes)),
            gpu_bytes=gpu_bytes,
            kv_cache_bytes=_kv_bytes(self, gpu_bytes),
            kv_needed_bytes=kv_needed_bytes(self),
            kv_minimum_bytes=kv_minimum_bytes(self) if self.has_vllm else 0,
        )

    def described(self) -> Described:
        others = f" and {self.num_models - 1} more, one after another" if self.num_models > 1 else ""
        return Described(
            models=f"evaluation of {self.teacher.name} ({self.precision}){others}",
            rows=f"{self.train_batch} answers at once, {self.num_generations} per question",
            student="none (evaluation)",
            reference="none",
            student_name=None,
            num_generations=self.num_generations,
        )

    def changes(self) -> Iterator[Change]:
        if self.aggregation_steps > 1:
            fewer = self.aggregation_steps // 2
            yield f"{fewer} questions answered at once", {"generation_aggregation_steps": fewer}
        if self.has_vllm and not self.enforce_eager:
            yield "vLLM without CUDA graphs", {"vllm_enforce_eager": True}
        if self.max_completion_len >= 2048:
            shorter = self.max_completion_len // 2
            yield f"answers of {shorter} tokens", {"max_completion_length": shorter}
        if self.num_models == 1 and (name := smaller_model(self.teacher)) is not None:
            yield f"model {self.teacher.name} -> {name}", {"models": [name]}

    def written_bytes(self, num_checkpoints: int) -> float:
        """A merged copy of one model at a time."""
        return weight_bytes(self.teacher, "bf16")


def _components(settings: EvaluateSettings, gpu_bytes: int | None) -> dict[str, float]:
    return _without_cache(settings) | {"KV cache": _kv_bytes(settings, gpu_bytes)}


def _kv_bytes(settings: EvaluateSettings, gpu_bytes: int | None) -> int:
    others = _without_cache(settings)
    own = sum(size for name, size in others.items() if name != "CUDA context")
    return cache_bytes(settings, gpu_bytes, others=sum(others.values()), own=own)


def _without_cache(settings: EvaluateSettings) -> dict[str, float]:
    loaded = {
        "model": weight_bytes(settings.teacher, settings.precision, double_quant=settings.double_quant),
        "CUDA context": CUDA_CONTEXT_BYTES.value,
    }
    if settings.has_vllm:
        graphs = 0.0 if settings.enforce_eager else CUDA_GRAPH_BYTES.value
        return loaded | {"vLLM activations": vllm_work_bytes(settings), "CUDA graphs": graphs}
    prompt_tokens = settings.aggregation_steps * settings.max_prompt_len
    reading = forward_bytes(settings, settings.teacher, prompt_tokens, adapter=False)
    sampling = _LOGITS_COPIES * 4.0 * settings.train_batch * settings.teacher.vocab
    return loaded | dynamic_components(settings, max(reading, sampling))


def evaluate_settings(config: EvaluateRunConfig, *, allow_download: bool = False) -> EvaluateSettings:
    """The plan's view of a run configuration: of its models the largest whose shape is known here.

    Raises:
        UserError: none is.
    """
    shape = _largest(config.models, allow_download=allow_download)
    rows = config.generation_aggregation_steps * config.num_samples
    common: dict[str, Any] = common_settings(config, shape) | {"micro_batch": rows, "train_batch": rows}
    return EvaluateSettings(
        **common,
        student=None,
        reference="none",
        generator="transformers" if config.generator == "transformers" else "vllm",
        generator_precision=common["precision"],
        enforce_eager=config.vllm_enforce_eager,
        vllm_utilization_frac=config.sampling.vllm_gpu_memory_utilization,
        kv_cache_bytes=None if config.kv_cache_gb == "auto" else round(config.kv_cache_gb * 1e9),
        num_generations=config.num_samples,
        aggregation_steps=config.generation_aggregation_steps,
        max_prompt_len=config.max_prompt_length,
        max_completion_len=config.sampling.max_completion_length,
        attention=ATTENTION[config.model_args.attn_implementation],
        kv_bytes_per_value=1 if config.kv_cache_dtype == "fp8" else 2,
        num_models=len(config.models),
    )


def _largest(names: list[str], *, allow_download: bool) -> ModelShape:
    """A run's folder may not be there yet, where an earlier stage of a pipeline is to write it."""
    shapes, problem = [], None
    for name in names:
        try:
            shapes.append(load_shape(base_of(name), allow_download=allow_download))
        except UserError as error:
            problem = problem or error
    if not shapes:
        assert problem is not None
        raise problem
    return max(shapes, key=lambda shape: shape.num_params)


def base_of(name: str) -> str:
    """The name of a model's shape: for the folder of an adapter, or of a run that did not end, that of its base."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return name
    for place in (folder, folder.resolve().parent):
        if (place / "config.yaml").is_file():
            base = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")).get("model_name_or_path")
            return str(base or name)
    if (folder / "adapter_config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config.get("base_model_name_or_path") or name)
    return name
