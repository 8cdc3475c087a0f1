"""Names, types and defaults of a trainer's own arguments, read from their source without importing it.

TRL and transformers declare their settings; we do not declare them again. Importing GRPOConfig takes seconds (torch,
transformers); composing a configuration or planning memory should take a fraction of one. So the dataclass bodies are
parsed instead. Fields of a type other than plain builtins accept anything here and are checked by the class itself when
it is built; schemas/ranges.py narrows those that it would not check.
"""

import ast
import functools
import importlib.util
import operator
import types
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, create_model

from schemas.ranges import RANGES
from schemas.values import AnyFloat, AnyInt

ArgumentsClass = Literal["TrainingArguments", "GRPOConfig", "SFTConfig", "SamplingArguments"]
SAMPLING_ARGUMENT_NAMES = frozenset(
    ("output_dir", "run_name", "seed", "chat_template_kwargs", "vllm_gpu_memory_utilization")
    + ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
)
"""Fields of GRPOConfig that serve where nothing is trained; `SamplingArguments` are these alone."""

# From the most basic class to the most derived one: a later declaration of the same name wins, as in Python.
_TRAINING_ARGUMENTS = ("transformers", "training_args.py", "TrainingArguments")
_SOURCES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "TrainingArguments": (_TRAINING_ARGUMENTS,),
    "GRPOConfig": (
        _TRAINING_ARGUMENTS,
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ),
    "SFTConfig": (
        _TRAINING_ARGUMENTS,
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
    ),
}
_PLAIN_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list, "None": None}


def _plain_type(node: ast.expr) -> Any:
    """The type that an annotation names, or Any where it names more than builtins."""
    match node:
        case ast.Name(id=name) if name in _PLAIN_TYPES:
            return _PLAIN_TYPES[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            sides = _plain_type(left), _plain_type(right)
            return Any if Any in sides else sides[0] | sides[1] if sides != (None, None) else None
        case ast.Subscript(value=ast.Name(id="list" | "dict" as name)):
            return _PLAIN_TYPES[name]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            return Literal[ast.literal_eval(options)]
        case _:
            return Any


def _default(value: ast.expr | None) -> Any:
    """The default of `name: type = field(default=...)` where it is a literal; None otherwise."""
    if isinstance(value, ast.Call):
        value = next((kw.value for kw in value.keywords if kw.arg == "default"), None)
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None


@functools.cache
def argument_fields(arguments_class: ArgumentsClass) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type, default) of the installed version of the class."""
    if arguments_class == "SamplingArguments":
        everything = argument_fields("GRPOConfig")
        return {name: everything[name] for name in everything if name in SAMPLING_ARGUMENT_NAMES}
    fields: dict[str, tuple[Any, Any]] = {}
    for package, path, class_name in _SOURCES[arguments_class]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed; run ./launch_mono.sh or `make install` once")
        tree = ast.parse((Path(spec.origin).parent / path).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = (_plain_type(node.annotation), _default(node.value))
    return {name: field for name, field in fields.items() if not name.startswith("_")}


def _bounded(kind: Any) -> Any:
    """The type with its whole numbers and floats bounded, also where it is a union."""
    if isinstance(kind, types.UnionType):
        return functools.reduce(operator.or_, map(_bounded, get_args(kind)))
    return AnyInt if kind is int else AnyFloat if kind is float else kind


@functools.cache
def arguments_model(arguments_class: ArgumentsClass) -> Any:
    """A pydantic model with the class's plain fields; unknown names, wrong types and impossible values are errors."""
    definitions: dict[str, Any] = {}
    for name, (kind, default) in argument_fields(arguments_class).items():
        parsed = kind if default is not None or kind is Any else kind | None
        definitions[name] = (RANGES.get(name, _bounded(parsed)), Field(default=default))
    config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    return create_model(arguments_class, __config__=config, **definitions)
