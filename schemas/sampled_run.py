"""SampledRunConfig: the base class of runs in which a teacher writes explanations that a student scores."""

from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.any_run import AnyRunConfig
from schemas.generation import GenerationConfig, generator_base_of
from schemas.model import ModelArgs, ModelConfig
from schemas.optimization import OptimizationConfig
from schemas.reward import RewardConfig


@dataclass(frozen=True, kw_only=True)
class SampledRunConfig(ModelConfig, GenerationConfig, RewardConfig, AnyRunConfig, ABC):
    """One run with a teacher, a student, a generator and the RLT reward; its `arguments` hold the sampling."""

    def __post_init__(self) -> None:
        ModelArgs.__post_init__(self.model_args)
        RewardConfig.__post_init__(self)
        OptimizationConfig.__post_init__(self)
        _check_combinations(self)

    @property
    def model_names(self) -> tuple[str | None, ...]:
        return self.model_name_or_path, self.student_model

    @property
    def no_vllm(self) -> str | None:
        samples_elsewhere = self.generator == "transformers" or self.use_vllm_server
        return "vLLM is not needed in this process" if samples_elsewhere else None

    @property
    def requires_vllm(self) -> bool:
        return self.generator == "vllm"

    @property
    def has_own_frozen_model(self) -> bool:
        return self.student_model is not None or self.reference_model == "separate"

    @property
    def frozen_find_outliers(self) -> bool:
        args = self.model_args
        looks = args.load_in_8bit and args.int8_matmul == "llm_int8" and args.llm_int8_threshold > 0
        return looks and self.scoring_weights == "auto"

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        return self.arguments.chat_template_kwargs or {}

    @classmethod
    def without_effect(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Settings of a generator or of a student that the run does not use."""
        yield from super().without_effect(values)
        if values.get("student_parking") == "host" and values.get("student_model") is None:
            yield (
                "`student_parking` is host, and the student is the teacher's own base. Set student_parking=auto, or "
                "name a student_model."
            )
        if values.get("generator") == "transformers":
            for key in ("generator_weights", "generator_base", "kv_cache_gb", "kv_cache_dtype"):
                if values.get(key, "auto") != "auto":
                    yield (
                        f"`{key}` is {values[key]!r} with `generator` transformers, which samples with the trainer's "
                        f"own model. Set {key}=auto, or generator=vllm."
                    )


def _check_combinations(config: SampledRunConfig) -> None:
    if config.use_ray:
        raise ValueError(
            "`use_ray` is true; this framework runs teacher, student, reference and generator in one process on one "
            "GPU and starts no Ray cluster. Set use_ray=false."
        )
    generator_base_of(config, "cuda", config.model_args.quantisation)  # whatever the device: can it be had at all
    sampling = config.arguments
    sampler_is_plain = sampling.top_p == 1 and sampling.top_k == 0 and not sampling.min_p
    if config.teacher_logprobs == "sampler" and not (sampler_is_plain and sampling.repetition_penalty == 1):
        raise ValueError(
            "`teacher_logprobs` is sampler, but top_p, top_k, min_p or repetition_penalty reshape the sampler's "
            "distribution. Use teacher_logprobs=forward, or top_p=1 top_k=0 min_p=null repetition_penalty=1."
        )
