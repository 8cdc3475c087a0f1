"""Settings of an evaluation: which models answer which questions, how they are asked, and how answers are judged."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.any_run import AnyRunConfig
from schemas.generation import EngineConfig
from schemas.model import ModelArgs
from schemas.optimization import OptimizationConfig
from schemas.values import Name, NotEmpty

Prompt = Literal["student", "chat"]
Scoring = Literal["exact", "math", "letter"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EngineConfig):
    method: Literal["evaluate"]
    """What the run does: `evaluate` trains nothing; models answer questions, and answers are counted."""
    models: NotEmpty[Name]
    """Who is evaluated: hub ids, model folders, folders of runs or of their checkpoints (adapter or all weights). The
    others are compared with the first."""
    model_args: ModelArgs = field(default_factory=ModelArgs)
    """How models are loaded; an adapter's base is loaded and merged in the precision that its run trained with."""
    prompt: Prompt | NotEmpty[Prompt] = "student"
    """How models are asked: in the project's student format (`prompt_style`, `tag_format`), or by the chat template
    alone (`chat`), as models from elsewhere are; one word for all, or one for each."""
    question_prefix: str = ""
    """Text in front of every question, such as what form the answer is to have."""
    scoring: Scoring = "exact"
    """When an answer is right: the same text as the solution, the same value (`math`: math-verify), or the same choice
    (`letter`)."""
    wrong_answer_columns: list[Name] = field(default_factory=lambda: [])
    """`letter`: columns of wrong answers. The question then ends with all answers in an order that the seed draws, and
    the letter of the right one is the solution; without such columns the solution is a letter already."""
    num_samples: Annotated[int, Field(ge=1, le=4096)]
    """Answers that are sampled to each question; pass@k is given for k = 1, 2, 4, ... up to this many."""
    greedy: bool = True
    """One more answer to each question, of the likeliest tokens."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRunConfig(EvaluateConfig, AnyRunConfig):
    """One evaluation. The questions are those of `dataset_id_or_path`, at most `num_eval_prompts` drawn by the seed."""

    sampling: Any
    """TRL's settings of sampling (temperature, top_p, max_completion_length, ...), with its defaults."""

    def __post_init__(self) -> None:
        ModelArgs.__post_init__(self.model_args)
        OptimizationConfig.__post_init__(self)
        _check(self)

    @property
    def arguments(self) -> Any:
        return self.sampling

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        return self.sampling.chat_template_kwargs or {}

    @property
    def model_names(self) -> tuple[str | None, ...]:
        return tuple(self.models)

    @property
    def no_vllm(self) -> str | None:
        return "vLLM is not needed in this process" if self.generator == "transformers" else None

    @property
    def requires_vllm(self) -> bool:
        return self.generator == "vllm"

    def prompt_of(self, number: int) -> Prompt:
        """How the model at this place of `models` is asked."""
        return self.prompt[number] if isinstance(self.prompt, list) else self.prompt

    @classmethod
    def without_effect(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Settings of an engine that the run does not use, and of what an evaluation has not."""
        yield from super().without_effect(values)
        if values.get("generator") == "transformers":
            for key in ("kv_cache_gb", "kv_cache_dtype"):
                if values.get(key, "auto") != "auto":
                    yield f"`{key}` is {values[key]!r} with `generator` transformers. Set {key}=auto or generator=vllm."
        if values.get("eval_dataset_id_or_path") is not None:
            yield "`eval_dataset_id_or_path` is set; an evaluation's questions are those of `dataset_id_or_path`."
        args = values.get("model_args")
        if isinstance(args, Mapping) and args.get("adapter_path") is not None:
            yield "`model_args.adapter_path` is set; name the adapter's folder in `models` instead."


def _check(config: EvaluateRunConfig) -> None:
    if len(set(config.models)) < len(config.models):
        raise ValueError(f"`models` names one twice: {', '.join(config.models)}. Name each once.")
    if isinstance(config.prompt, list) and len(config.prompt) != len(config.models):
        raise ValueError(
            f"`prompt` has {len(config.prompt)} entries for {len(config.models)} models. Give one word for all, or one "
            "for each."
        )
    if config.num_eval_prompts == 0:
        raise ValueError("`num_eval_prompts` is 0: there is nothing to ask. Use 1 or more.")
    if config.wrong_answer_columns and config.scoring != "letter":
        raise ValueError(
            f"`wrong_answer_columns` is set with `scoring` {config.scoring}. Set scoring=letter, or remove the columns."
        )
    quantised = config.model_args.quantisation
    if quantised is not None and config.generator != "transformers":
        raise ValueError(
            f"`model_args` asks for {quantised} bases with `generator` {config.generator}; vLLM reads 16 bits here. "
            "Set generator=transformers, or model_args.load_in_8bit=false and model_args.load_in_4bit=false."
        )
