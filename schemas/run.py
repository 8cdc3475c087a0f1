"""RunConfig: the configuration of a run, our settings and TRL's (`RunConfig.grpo`), both flat for the user."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from schemas.any_run import AnyRunConfig, TrainingRunConfig
from schemas.leaves import not_finite, switches_for_numbers
from schemas.library_settings import GRPO_CONFIG, ONLY_WITH_VLLM_SERVER
from schemas.methods import DEFAULT_METHOD, METHODS, as_kind, method_of
from schemas.ranges import schedule_problems
from schemas.sampled_run import SampledRunConfig
from schemas.secrets import secret_problems
from schemas.trainer import TeacherStepConfig
from schemas.trl_fields import argument_fields, arguments_model


class ConfigError(ValueError):
    """The configuration cannot be used; the message lists every problem with its remedy."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(TeacherStepConfig, SampledRunConfig, TrainingRunConfig):
    """One run. Components take the base class that they need, e.g. `RLTReward(config: RewardConfig)`."""

    method: Literal["rlt"] = "rlt"
    """What the run trains: `rlt` (a teacher) or `masked_diffusion` (schemas/llada.py)."""
    grpo: Any
    """TRL's own settings (GRPOConfig field -> value), with TRL's defaults where the configuration says nothing."""

    def __post_init__(self) -> None:
        SampledRunConfig.__post_init__(self)
        _check_batch_arithmetic(self)
        _check_combinations(self)

    @property
    def arguments(self) -> Any:
        return self.grpo

    @property
    def learns_explanations(self) -> bool:
        return True

    @property
    def num_prompts_per_step(self) -> int:
        return self.train_batch_size // self.grpo.num_generations

    @classmethod
    def without_effect(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Settings of a generator that the run does not use."""
        yield from super().without_effect(values)
        if not values.get("use_vllm_server"):
            for key in sorted(ONLY_WITH_VLLM_SERVER & GRPO_CONFIG.changed(values)):
                yield f"`{key}` is for a vLLM server, and `use_vllm_server` is false. Remove it, or set that to true."


def _check_batch_arithmetic(config: RunConfig) -> None:
    batch, micro, group = (
        config.train_batch_size,
        config.grpo.per_device_train_batch_size,
        config.grpo.num_generations,
    )
    if group < 2:
        raise ValueError(f"`num_generations` is {group}; advantages compare completions of one prompt: use 2 or more.")
    if batch % group:
        raise ValueError(
            f"`train_batch_size` {batch} is not a multiple of `num_generations` {group}: a step holds whole prompt "
            f"groups. Use train_batch_size={max(group, batch // group * group)} or {(batch // group + 1) * group}."
        )
    if batch % micro:
        divisors = [d for d in range(1, batch + 1) if batch % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - micro))
        raise ValueError(
            f"`train_batch_size` {batch} is not a multiple of `per_device_train_batch_size` {micro}: gradient "
            f"accumulation must be whole. Use per_device_train_batch_size={nearest}."
        )
    row_len = config.max_prompt_length + config.grpo.max_completion_length
    if config.micro_batch_tokens != "auto" and config.micro_batch_tokens < row_len:
        raise ValueError(
            f"`micro_batch_tokens` {config.micro_batch_tokens} is less than one row of full length ({row_len} = "
            f"max_prompt_length + max_completion_length). Use micro_batch_tokens={row_len} or more, or auto."
        )


def _check_combinations(config: RunConfig) -> None:
    quantised = config.model_args.load_in_8bit or config.model_args.load_in_4bit
    if config.use_vllm_server and quantised:
        raise ValueError(
            "`use_vllm_server` is true with a quantised teacher; the server client pushes merged bf16 weights and "
            "merging into a quantised base re-rounds it. Set use_vllm_server=false (the generator then runs in this "
            "process on the same quantised values), or model_args.load_in_8bit=false and model_args.load_in_4bit=false."
        )
    if config.grpo.sync_ref_model and config.reference_model == "separate":
        raise ValueError(
            "`sync_ref_model` is true with `reference_model` separate; a separate quantised copy cannot follow the "
            "policy. Use reference_model=shared (a frozen second adapter follows it)."
        )
    if config.grpo.sync_ref_model and config.grpo.beta == 0:
        raise ValueError("`sync_ref_model` is true with `beta` 0: no reference is used. Set sync_ref_model=false.")
    weights, rewards = config.grpo.reward_weights, ["rlt", *config.extra_rewards]
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"`reward_weights` is {weights}, and the rewards are {', '.join(rewards)} (`extra_rewards`). Give one "
            "weight for each, or reward_weights=null (1 each)."
        )


def load_run_config(values: Mapping[str, Any]) -> AnyRunConfig:
    """Validate a composed, resolved configuration (plain containers, flat keys).

    Returns:
        What the key `method` says in the table of methods; without it a teacher's `RunConfig`.

    Raises:
        ConfigError: unknown key, wrong type, value out of range or impossible combination; every problem is listed.
    """
    name = values.get("method", DEFAULT_METHOD)
    if name not in tuple(METHODS):
        raise ConfigError(f"- `method` is {name!r}. Use {' or '.join(METHODS)}.")
    method = METHODS[name]
    config_class = method.config.object
    own, theirs = method.own_field_names(), set(argument_fields(method.library.arguments_class))
    problems = method.library.problems(values)
    if secrets := list(secret_problems({k: v for k, v in values.items() if k not in method.library.refused})):
        raise_problems(problems + secrets)  # alone: other messages show values
    for key in values:
        if key not in own and key not in theirs:
            problems.append(
                f"`{key}` is not a setting. {_hint(key, own | method.library.used, config_class.sections())}"
            )
    arguments = None
    try:
        arguments_model_class = arguments_model(method.library.arguments_class)
        taken = theirs - method.library.refused.keys()  # those that are refused keep their defaults
        arguments = arguments_model_class(**{key: value for key, value in values.items() if key in taken})
    except ValidationError as error:
        problems += describe_problems(error, values)
    own_values = {key: value for key, value in values.items() if key in own}
    if arguments is not None:
        if method.build_arguments is not None:
            problems += schedule_problems(arguments)
        try:
            config = TypeAdapter(config_class).validate_python(own_values | {method.arguments_field: arguments})
        except ValidationError as error:
            problems += describe_problems(error, values)
    problems += config_class.without_effect(values)
    problems += (line for line in not_finite(values) if line.partition(". ")[0] not in "\n".join(problems))
    if not problems:
        parsed = TypeAdapter(config_class).dump_python(config)
        problems += switches_for_numbers(values, parsed | parsed[method.arguments_field])
    raise_problems(problems)
    return config


def refuse_secret(word: str) -> None:
    """
    Raises:
        ConfigError: the word of a command line sets a secret; before anything shows it.
    """
    key, equals, value = word.lstrip("+~").partition("=")
    if equals and not word.startswith("-") and value not in ("null", "''"):
        raise_problems(list(secret_problems({key: value})))


def raise_problems(problems: list[str]) -> None:
    """
    Raises:
        ConfigError: there are some.
    """
    if problems:
        raise ConfigError("\n".join(f"- {problem}" for problem in problems))


def load_teacher_config(values: Mapping[str, Any]) -> RunConfig:
    """`load_run_config` for what serves a teacher's run alone.

    Raises:
        ConfigError: as there, or the values are those of another method.
    """
    config = as_kind(load_run_config(values), RunConfig)
    if config is None:
        raise ConfigError(f"- `method` is {values['method']}, and this is for {METHODS[DEFAULT_METHOD].title}.")
    return config


def _hint(key: str, names: set[str], sections: Mapping[str, type]) -> str:
    """What the user may have meant by `key`; a setting of a section may be written without its section."""
    inside = {field.name: f"{section}.{field.name}" for section, shape in sections.items() for field in fields(shape)}
    candidates = inside | {name: name for name in names}
    near = [key] if key in inside else difflib.get_close_matches(key, candidates, n=2)
    return f"Did you mean {' or '.join(f'`{candidates[name]}`' for name in near)}?" if near else "Remove it."


def describe_problems(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line per setting: where, what was given, what is expected.

    Of a setting that may have several types pydantic says why it is none of them: what is expected is then any of them,
    unless it is a list, whose element is named instead.
    """
    found: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_path(item["loc"], values), []).append(item)
    lines = []
    for path, items in found.items():
        if any(len(other) > len(path) > 0 and other[: len(path)] == path for other in found):
            continue
        where, item = ".".join(map(str, path)), items[0]
        if item["type"] == "value_error":
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"`{where}` is not a setting. Remove it or check its spelling.")
        elif item["type"] == "missing":
            lines.append(f"`{where}` is missing. Set it in the run configuration or as {where}=VALUE.")
        else:
            first, *others = (item["msg"].partition(", unable to")[0] for item in items)
            expected = ", or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
            lines.append(f"`{where}` is {item['input']!r}. {expected}.")
    return lines


def _path(loc: tuple[int | str, ...], values: Any) -> tuple[int | str, ...]:
    """A pydantic location without the names of the types that were tried: what leads to the value in `values`."""
    path: tuple[int | str, ...] = ()
    for part in loc:
        if isinstance(values, Mapping):
            path, values = (*path, part), values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            path, values = (*path, part), values[part]
    return path


def resolved_values(config: AnyRunConfig, composed: Mapping[str, Any]) -> dict[str, Any]:
    """Flat key -> value as composed, with the defaults of all other settings; `auto` stays what it is.

    It does not depend on the machine, so that a run may be continued on another GPU.
    """
    method = method_of(config)
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    arguments = values.pop(method.arguments_field)
    values |= {key: value for key, value in arguments.items() if key not in method.library.derived}
    for key, value in composed.items():
        is_section = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if is_section else value
    return values
