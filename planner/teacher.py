"""The plan of a teacher's run: teacher, student, reference, and the generator that samples for the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from core.types import Phase
from planner.activations import dynamic_components, score_activation_bytes, train_activation_bytes
from planner.changes import batch_changes, precision_changes, smaller_model
from planner.components import (
    adapter_checkpoint_bytes,
    kv_minimum_bytes,
    kv_needed_bytes,
    layer_bytes,
    num_lora_params,
    optimizer_bytes_per_param,
    vllm_own_bytes,
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
from planner.host_memory import parked_bytes, sleeping_vllm_bytes
from planner.plan import MemoryPlan, memory_plan
from planner.rates import Rates
from planner.settings import Change, Described, PlanSettings, Precision, common_settings
from planner.shapes import ModelShape, load_shape
from planner.teacher_time import teacher_work
from planner.time import Lengths
from planner.work import Work
from schemas.generation import generator_base_of
from schemas.run import RunConfig
from schemas.sampled_run import SampledRunConfig

_LEAST_ROW_LEN = 4096
"""Contexts are halved down to this before the student or the model changes, and further after that."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(PlanSettings):
    """One teacher's run; rows are completions."""

    student: ModelShape | None
    """None: the teacher's own base, adapter off."""
    reference: Literal["none", "shared", "separate"]
    """Separate: one more copy of the teacher's base."""
    scoring_precision: Precision | None = None
    """Of a student and a reference of their own; None: that of the teacher."""
    num_adapters: int = 1
    """2 where a frozen second adapter is the reference."""
    generator: Literal["vllm", "transformers", "server"] = "vllm"
    generator_precision: Precision = "int8"
    generator_base: Literal["shared", "export"] = "export"
    """Whether vLLM reads the trainer's own quantised base, or one of its own."""
    student_parking: Literal["auto", "none", "host"] = "none"
    """As set; `choose_parking` answers it."""
    enforce_eager: bool = False
    vllm_utilization_frac: float = 0.9
    """Cap of vLLM's weights, workspace and KV cache together, as a share of the GPU."""
    kv_cache_bytes: int | None = None
    """None: what the batch needs, within what the GPU leaves."""
    num_generations: int
    aggregation_steps: int
    """Prompt groups that are generated at once."""
    kv_bytes_per_value: int = 2
    """Of vLLM's cache: 16 bits, or 1 for fp8."""
    steps_per_rollout: int = 1
    """Optimizer steps that one rollout serves."""
    scores_policy: bool = False
    """The trained model scores its own completions in a forward of its own."""

    @property
    def scored_in(self) -> Precision:
        """Precision of a student and a reference of their own."""
        return self.scoring_precision or self.precision

    @property
    def shares_base(self) -> bool:
        return self.has_vllm and self.generator_base == "shared"

    @property
    def num_groups_at_once(self) -> int:
        return min(self.aggregation_steps, self.train_batch // self.num_generations)

    @property
    def has_vllm(self) -> bool:
        return self.generator == "vllm"

    def plan(self, gpu_bytes: int | None) -> MemoryPlan:
        return plan_teacher(self, gpu_bytes)

    def step_work(self, lengths: Lengths, rates: Rates) -> Mapping[Phase, Sequence[Work]]:
        return teacher_work(self, lengths, rates)

    def described(self) -> Described:
        student = self.student.name if self.student else "the teacher's base"
        return Described(
            models=f"teacher {self.teacher.name} ({self.precision}), student {student}",
            rows=f"{self.train_batch} completions, {self.num_generations} per prompt, {self.micro_batch} at once",
            student=self.student.short_name if self.student else "own base",
            reference={"none": "none", "shared": "own base", "separate": "second copy"}[self.reference],
            student_name=self.student.name if self.student else None,
            num_generations=self.num_generations,
        )

    def changes(self) -> Iterator[Change]:
        if self.trains:
            yield from batch_changes(self)
        if self.reference == "separate":
            yield "reference on the teacher's own base", {"reference_model": "shared"}
        if self.student is not None and self.student_parking == "none":
            yield "student in host memory outside scoring", {"student_parking": "auto"}
        yield from _generator_changes(self)
        yield from precision_changes(self)
        if self.row_len >= 2 * _LEAST_ROW_LEN:
            yield _shorter(self)
        if self.student is not None:
            yield "the teacher's own base as student", {"student_model": None}
        if (name := smaller_model(self.teacher)) is not None:
            student = {"student_model": name} if self.student else {}
            yield f"model {self.teacher.name} -> {name}", {"model_name_or_path": name, **student}
        if 512 <= self.row_len < 2 * _LEAST_ROW_LEN:
            yield _shorter(self)

    def written_bytes(self, num_checkpoints: int) -> float:
        needed = num_checkpoints * adapter_checkpoint_bytes(self, self.num_adapters)
        if self.has_vllm and not self.shares_base and self.generator_precision in ("int8", "int8_groups"):
            needed += weight_bytes(self.teacher, self.generator_precision)
        return needed

    def with_model(self, shape: ModelShape) -> Self:
        return replace(self, teacher=shape, student=shape if self.student else None)


def _generator_changes(settings: TeacherSettings) -> Iterator[Change]:
    if not settings.has_vllm:
        return
    if settings.num_groups_at_once > 1:
        yield "one prompt group generated at a time", {"generation_aggregation_steps": 1}
    if settings.generator_precision == "bf16" and settings.precision != "bf16":
        yield "generator on the trainer's own weights", {"generator_weights": "auto"}
    if settings.generator_base == "export" and settings.generator_precision in ("int8", "int8_groups"):
        yield "generator in the trainer's memory", {"generator_base": "auto"}
    if not settings.enforce_eager:
        yield "vLLM without CUDA graphs", {"vllm_enforce_eager": True}


def _shorter(settings: TeacherSettings) -> Change:
    prompt_len, completion_len = settings.max_prompt_len // 2, settings.max_completion_len // 2
    return (
        f"context {settings.row_len} -> {prompt_len + completion_len}",
        {"max_prompt_length": prompt_len, "max_completion_length": completion_len},
    )


def teacher_settings(config: RunConfig, *, allow_download: bool = False) -> TeacherSettings:
    """The plan's view of a run configuration.

    Raises:
        UserError: a model's shape is not known (`planner.shapes.load_shape`).
    """
    grpo, uses_reference = config.grpo, config.grpo.beta != 0
    frozen_adapter = (
        uses_reference
        and config.reference_model == "shared"
        and bool(grpo.sync_ref_model or config.model_args.adapter_path)
    )
    return TeacherSettings(
        **sampled_settings(config, allow_download=allow_download),
        reference=config.reference_model if uses_reference else "none",
        num_adapters=2 if frozen_adapter else 1,
        optimizer=str(grpo.optim),
        train_tokens=None if config.micro_batch_tokens == "auto" else config.micro_batch_tokens,
        num_generations=grpo.num_generations,
        steps_per_rollout=grpo.num_iterations,
        scores_policy=grpo.num_iterations > 1 or config.teacher_logprobs == "forward",
    )


def sampled_settings(config: SampledRunConfig, *, allow_download: bool = False) -> dict[str, Any]:
    """Settings of teacher, student and generator, of a run that has them whether it trains or not.

    Raises:
        UserError: a model's shape is not known (`planner.shapes.load_shape`).
    """
    args = config.model_args
    teacher = load_shape(config.model_name_or_path, allow_download=allow_download)
    student = load_shape(config.student_model, allow_download=allow_download) if config.student_model else None
    common = common_settings(config, teacher)
    precision: Precision = common["precision"]
    generator_precision: Precision = precision if config.generator_weights == "auto" else config.generator_weights
    device_kind: Literal["cuda", "cpu"] = "cpu" if args.device_map == "cpu" else "cuda"
    generator_base = generator_base_of(config, device_kind, args.quantisation)
    if generator_precision == "nf4" and generator_base == "export":
        # models/export.py writes NF4 values as int8 in groups of 64 or 32, and in 16 bits where these do not divide.
        uneven = any(n_in % 32 for n_in, _ in teacher.linears.values())
        generator_precision = "bf16" if uneven else "int8_groups"
    return common | {
        "student": student,
        "scoring_precision": "fp8" if config.scoring_weights == "fp8" else None,
        "generator": _generator(config),
        "generator_precision": generator_precision,
        "generator_base": generator_base,
        # On a CPU there is nothing to leave.
        "student_parking": "none"
        if (device_kind, config.student_parking) == ("cpu", "auto")
        else config.student_parking,
        "enforce_eager": config.vllm_enforce_eager,
        "vllm_utilization_frac": config.arguments.vllm_gpu_memory_utilization,
        "kv_cache_bytes": None if config.kv_cache_gb == "auto" else round(config.kv_cache_gb * 1e9),
        "aggregation_steps": config.generation_aggregation_steps,
        "max_prompt_len": config.max_prompt_length,
        "max_completion_len": config.arguments.max_completion_length,
        "attention": "eager" if args.attn_implementation == "eager" else "flash",
        "kv_bytes_per_value": 1 if config.kv_cache_dtype == "fp8" else 2,
    }


def _generator(config: SampledRunConfig) -> Literal["vllm", "transformers", "server"]:
    """`auto` plans for vLLM: it is the larger of the two, and what a GPU machine gets."""
    if config.use_vllm_server:
        return "server"
    return "transformers" if config.generator == "transformers" else "vllm"


StudentParking = Literal["none", "early", "scoring", "streamed"]
"""Where a student of its own is on the GPU: always; from the end of generation until it has scored; while it scores;
while it scores, its blocks two at a time. The rest of the run it lies in pinned host memory."""
_PARKINGS: dict[str, tuple[StudentParking, ...]] = {
    "none": ("none",),
    "host": ("early", "scoring", "streamed"),
    "auto": ("none", "early", "scoring", "streamed"),
}


def choose_parking(settings: TeacherSettings, gpu_bytes: int | None) -> StudentParking:
    """The answer to `student_parking` that plan and run ask for.

    The first that leaves the KV cache what the batch needs, in the order of what they cost: nothing, a copy of the
    student in each step beside the end of generation, before scoring, and in each of its forwards. Where none does, of
    those that fit the first with the largest cache; without a GPU, or where none fits, the mildest or the smallest.
    """
    if settings.student is None:
        return "none"
    options = _PARKINGS[settings.student_parking]
    if gpu_bytes is None:
        return options[0]
    plans = {option: _plan_parked(settings, gpu_bytes, option) for option in options}
    fitting = [option for option in options if plans[option].fits()]
    if not fitting:
        return min(options, key=lambda option: plans[option].max_bytes)
    return max(fitting, key=lambda option: plans[option].kv_cache_bytes)


def plan_teacher(settings: TeacherSettings, gpu_bytes: int | None) -> MemoryPlan:
    """Bytes per phase and component; pure arithmetic."""
    return _plan_parked(settings, gpu_bytes, choose_parking(settings, gpu_bytes))


def _plan_parked(settings: TeacherSettings, gpu_bytes: int | None, parking: StudentParking) -> MemoryPlan:
    adapter = _adapter_components(settings)
    loaded = _base_components(settings) | {"adapter": adapter["adapter"], "CUDA context": CUDA_CONTEXT_BYTES.value}
    student = _student_bytes(settings, parking)
    asleep = _vllm_asleep(settings)
    resident = loaded | {"optimizer states": adapter["optimizer states"]} | asleep
    awake = _vllm_awake(settings)
    canary = _canary_bytes(settings) if awake else 0.0
    kv = cache_bytes(
        settings,
        gpu_bytes,
        others=sum((resident | awake).values()) + max(canary + student[Phase.SYNC], student[Phase.GENERATE]),
        own=sum(awake.values()),
    )
    generating = awake | {"KV cache": kv}
    phases: dict[Phase, dict[str, float]] = {
        Phase.LOAD: loaded | asleep | generating,
        Phase.SYNC: resident | generating | {"canary": canary},
        Phase.GENERATE: resident | generating,
        Phase.SCORE: resident | dynamic_components(settings, score_activation_bytes(settings)),
    }
    if settings.trains:
        training = dynamic_components(settings, train_activation_bytes(settings))
        phases[Phase.TRAIN] = resident | {"gradients": adapter["gradients"]} | training
    host = {"sleeping vLLM weights": sleeping_vllm_bytes(settings)} if settings.has_vllm else {}
    if parking != "none":
        host[f"parked student ({parking})"] = parked_bytes(_whole_student_bytes(settings))
    return memory_plan(
        settings,
        {phase: parts | {"student": student[phase]} for phase, parts in phases.items()},
        gpu_bytes=gpu_bytes,
        host=host,
        kv_cache_bytes=kv,
        kv_needed_bytes=kv_needed_bytes(settings),
        kv_minimum_bytes=kv_minimum_bytes(settings) if settings.has_vllm else 0,
    )


def _whole_student_bytes(settings: TeacherSettings) -> float:
    if settings.student is None:
        return 0.0
    return weight_bytes(settings.student, settings.scored_in, double_quant=settings.double_quant)


def _student_bytes(settings: TeacherSettings, parking: StudentParking) -> dict[Phase, float]:
    """What of a student of its own is on the GPU in each phase. It is loaded, and parked, before anything else."""
    whole = _whole_student_bytes(settings)
    if parking == "none" or settings.student is None:
        return dict.fromkeys(Phase, whole)
    scoring = whole
    if parking == "streamed":
        layer = layer_bytes(settings.student, settings.scored_in, double_quant=settings.double_quant)
        scoring -= (settings.student.num_layers - 2) * layer
    early = {Phase.GENERATE: whole} if parking == "early" else {}
    return dict.fromkeys(Phase, 0.0) | {Phase.SCORE: scoring} | early


def cache_bytes(settings: TeacherSettings, gpu_bytes: int | None, *, others: float, own: float) -> int:
    """What is set, else what the batch needs, within what the GPU leaves beside `others` and vLLM's share of it.

    That share holds the `own` bytes of an awake vLLM as well.
    """
    if settings.generator == "server":
        return 0
    if settings.kv_cache_bytes is not None:
        return settings.kv_cache_bytes
    needed = kv_needed_bytes(settings)
    if gpu_bytes is None or settings.generator == "transformers":
        return needed
    left = usable_bytes(gpu_bytes) - others
    own_share = gpu_bytes * settings.vllm_utilization_frac - own
    return max(min(needed, int(left), int(own_share)), kv_minimum_bytes(settings))


def _canary_bytes(settings: TeacherSettings) -> float:
    """The trainer's forward over the canary's tokens and its float32 logits, while vLLM is awake."""
    shape = settings.teacher
    return CANARY_TOKENS.value * (9 * shape.hidden + 10 * shape.intermediate + 3 * 4 * shape.vocab)


def _base_components(settings: TeacherSettings) -> dict[str, float]:
    teacher = weight_bytes(settings.teacher, settings.precision, double_quant=settings.double_quant)
    bases = {"teacher": teacher}
    if settings.reference == "separate":
        bases["reference"] = weight_bytes(settings.teacher, settings.scored_in, double_quant=settings.double_quant)
    return bases


def _adapter_components(settings: TeacherSettings) -> dict[str, float]:
    num_params = num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets)
    width = settings.adapter_bytes_per_param
    if not settings.trains:
        return {"adapter": num_params * width, "gradients": 0, "optimizer states": 0}
    return {
        "adapter": settings.num_adapters * num_params * width,
        "gradients": num_params * width,
        "optimizer states": num_params * optimizer_bytes_per_param(settings.optimizer),
    }


def _vllm_asleep(settings: TeacherSettings) -> dict[str, float]:
    """What a vLLM in this process holds in every phase: beside a shared base also the little that is its own."""
    if settings.generator != "vllm":
        return {}
    graphs = 0.0 if settings.enforce_eager else CUDA_GRAPH_BYTES.value
    own = _vllm_weights(settings) if settings.shares_base else {}
    return own | {"vLLM residue": VLLM_ASLEEP_BYTES.value + graphs}


def _vllm_awake(settings: TeacherSettings) -> dict[str, float]:
    """Weights, 16-bit adapter slots and working memory, on the GPU while vLLM is awake."""
    if settings.generator != "vllm":
        return {}
    return _vllm_weights(settings) | {"vLLM activations": vllm_work_bytes(settings)}


def _vllm_weights(settings: TeacherSettings) -> dict[str, float]:
    return {
        "vLLM weights": vllm_own_bytes(settings),
        "vLLM adapter": 2 * num_lora_params(settings.teacher, settings.lora_r, settings.lora_targets),
    }
