"""Mutated configurations: each setting of each method with values that do not belong there, and what becomes of them.

`mutations(seed)` yields them without end, `single_mutations()` is every setting with every value, once; `validate` says
whether a run with them would start. All in this process: no model is loaded, nothing is fetched from the hub.
"""

import random
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from core.errors import UserError
from core.hub import stay_offline
from planner.fit import with_overrides
from schemas.compose import compose_run_config
from schemas.methods import METHODS, Method
from schemas.ranges import RANGES
from schemas.run import ConfigError
from schemas.trl_fields import argument_fields
from tests.helpers.tiny_run import SMALL

Mutation = tuple[str, dict[str, Any]]
"""A method of the table, and settings (those of a section by their dotted names) with their mutated values."""

BASE_RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rlt": ("teacher_rlt_tiny", (*SMALL, "max_steps=2", "eval_strategy=no", "save_steps=1")),
    "masked_diffusion": (
        "llada_tiny",
        ("max_steps=2", "eval_strategy=no", "save_steps=1", "num_eval_prompts=4", "sampling_steps=4"),
    ),
    "teacher_sft": ("teacher_sft_tiny", ("max_steps=2", "eval_strategy=no", "save_steps=1", "num_eval_prompts=4")),
    "student_sft": ("student_sft_tiny", ("max_steps=2", "eval_strategy=no", "save_steps=1", "num_eval_prompts=4")),
    "collect_traces": ("collect_traces_tiny", ("num_questions=4", "num_samples=2")),
    "evaluate": ("evaluate_tiny", ("num_eval_prompts=4",)),
}
"""Method -> the run configuration that is mutated and what makes it small."""

_NOTHING = (None, "", " ", [], {}, True, False)
_NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**32, 2**63, 10**30, -(2**63), 10**400),
    *(-1.0, -0.5, -1e-9, 0.0, 1e-300, 1e-9, 0.5, 1.0, 1.5, 1e6, 1e30, 1e39, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
_TEXTS = (
    *("foo", "auto", "none", "null", "all", "best", "1", "-1", "nan", "1e30", "yes", "foo=1", "a=b=c", "lr=1e30"),
    *(".", "..", "/", "~", "~nobody/x", "/dev/null", "/proc/x", "a/b/c", "../../x", "cuda:0", "cuda:-1", "x" * 300),
    *("ü名前\u202e", "a\nb", "a\0b", "\udc80", "%s", "{x}", "[x]", "[bold]", "C:\\x", "https://host/x", "-x", "--help"),
)
_CONTAINERS = (
    *(
        [1],
        [0.0],
        [1.0, 2.0],
        [-1, -1],
        [None],
        [float("nan")],
        [float("inf"), 1],
        [10**400],
        ["foo"],
        [""],
        [[]],
        [{}],
    ),
    *(["mean"], ["mean", "mean", "mean"], ["rlt"], ["format", "format"], [True], list(range(50))),
    *({"foo": 1}, {"": None}, {"a": {"b": []}}, {"num_cycles": -1}, {"power": float("nan")}, {"min_lr": 1e-6}),
    *({"question": ""}, {"question": None}, {"1": 1}),
)
NASTY_VALUES: tuple[Any, ...] = (*_NOTHING, *_NUMBERS, *_TEXTS, *_CONTAINERS)


@cache
def settings_of(method_name: str) -> tuple[str, ...]:
    """Every setting that a run of the method may be given, the refused ones among them; sections as dotted names."""
    method = METHODS[method_name]
    sections = method.config.object.sections()
    own = {*method.own_field_names(), *(f"{name}.{f.name}" for name, shape in sections.items() for f in fields(shape))}
    return tuple(sorted(own | argument_fields(method.library.arguments_class).keys()))


@cache
def base_values(method_name: str) -> Mapping[str, Any]:
    """The small run of a method before it is mutated."""
    name, words = BASE_RUNS[method_name]
    return compose_run_config(name, words)


def single_mutations() -> Iterator[Mutation]:
    """Every setting of every method with every nasty value and every name that it may have."""
    for method_name in METHODS.keys() & BASE_RUNS.keys():
        for key in settings_of(method_name):
            for value in (*NASTY_VALUES, *_known_names(METHODS[method_name], key)):
                yield method_name, {key: value}


def mutations(seed: int) -> Iterator[Mutation]:
    """Mutations without end, one or two settings each; values are mostly of the kind that the setting has."""
    chance = random.Random(seed)
    names = sorted(METHODS.keys() & BASE_RUNS.keys())
    while True:
        method_name = chance.choice(names)
        keys = chance.sample(settings_of(method_name), chance.choice((1, 2)))
        if any(other.startswith(f"{key}.") for key in keys for other in keys):
            continue  # a section and what is in it
        yield method_name, {key: chance.choice(_likely_values(method_name, key, chance)) for key in keys}


def _likely_values(method_name: str, key: str, chance: random.Random) -> tuple[Any, ...]:
    names = _known_names(METHODS[method_name], key)
    if names and chance.random() < 0.5:
        return names
    match _default(method_name, key):
        case bool():
            likely: tuple[Any, ...] = (True, False)
        case int() | float() as number:
            likely = (*_NUMBERS, number - 1, number + 1, number * 2, number / 2, number * 1000)
        case str():
            likely = _TEXTS
        case list() | dict():
            likely = _CONTAINERS
        case _:
            likely = NASTY_VALUES
    return likely if chance.random() < 0.8 else NASTY_VALUES


def _default(method_name: str, key: str) -> Any:
    """The value of the small run; of a setting that it does not name, the library's default."""
    values: Any = base_values(method_name)
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values if values is not None else _library_default(METHODS[method_name], key)


def _library_default(method: Method, key: str) -> Any:
    return argument_fields(method.library.arguments_class).get(key, (None, None))[1]


def _known_names(method: Method, key: str) -> tuple[Any, ...]:
    """Names that the declaration of a setting lists."""
    kinds = [
        RANGES.get(key),
        *(field.type for shape in _shapes(method) for field in fields(shape) if _is(key, field.name)),
    ]
    return tuple(dict.fromkeys(name for kind in kinds for name in _literals(kind)))


def _shapes(method: Method) -> tuple[type, ...]:
    config_class = method.config.object
    return (config_class, *config_class.sections().values())


def _is(key: str, name: str) -> bool:
    return key.rpartition(".")[2] == name


def _literals(kind: Any) -> Iterator[Any]:
    if getattr(kind, "__origin__", None) is Literal:
        yield from get_args(kind)
        return
    for part in get_args(kind):
        yield from _literals(part)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a mutation before anything is loaded: `valid`, `refused` (one message), or `crashed` (a bug)."""

    kind: Literal["valid", "refused", "crashed"]
    text: str = ""
    """The message, or the traceback."""


def mutated_values(mutation: Mutation, output_dir: Path) -> dict[str, Any]:
    """Composed values of the mutated run, which writes to `output_dir` unless that is what was mutated."""
    method_name, changes = mutation
    return with_overrides({**base_values(method_name), "output_dir": str(output_dir)}, changes)


def validate(mutation: Mutation, output_dir: Path) -> Outcome:
    """Everything that is checked before data and models are loaded, in the order of a run."""
    stay_offline()
    from optimization import optimized
    from preflight.hardware import check_hardware_and_plan, load_for_this_machine
    from preflight.inputs import check_inputs
    from schemas.methods import method_of

    try:
        values = mutated_values(mutation, output_dir)
        check_inputs(values)
        with optimized(load_for_this_machine(values)) as config:
            check_hardware_and_plan(config)
            build_arguments = method_of(config).build_arguments
            if build_arguments is not None:
                build_arguments(config, use_cpu=True)
    except (UserError, ConfigError) as error:
        return Outcome("refused", str(error))
    except Exception:
        return Outcome("crashed", traceback.format_exc())
    return Outcome("valid")
