"""Single values of nested settings, and what none of them may be, whatever it sets."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]


def leaves(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(keys and places that lead to it, value) of everything in mappings and lists."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    elif isinstance(values, list | tuple):
        for place, value in enumerate(values):
            yield from leaves(value, (*path, place))
    else:
        yield path, values


def not_finite(values: Mapping[str, Any]) -> Iterator[str]:
    """One line for each infinity or NaN, also in what a library declares as any list or mapping."""
    for path, value in leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"`{_dotted(path)}` is {value!r}. Input should be a finite number."


def switches_for_numbers(given: Mapping[str, Any], parsed: Mapping[str, Any]) -> Iterator[str]:
    """One line for each true or false that was taken for 1 or 0."""
    numbers = {path for path, value in leaves(parsed) if type(value) in (int, float)}
    for path, value in leaves(given):
        if isinstance(value, bool) and path in numbers:
            yield f"`{_dotted(path)}` is {value!r}. Input should be a number."


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
