"""Candidates: the explanations of one question, ranked by their reward, and which of them are chosen.

Candidates are rows of a table (dictionaries); these functions fill in `rank`, `problem` and `chosen`.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

Row = dict[str, Any]
Choice = Literal["best", "random", "first", "all"]


def by_question(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of a table, question by question, as they follow each other."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row["row"])]


def is_usable(row: Row, *, max_tokens: int | None, malformed: bool) -> bool:
    """Whether a candidate may be chosen: it keeps to the limits of length and, unless `malformed`, of form."""
    is_short = max_tokens is None or row["num_tokens"] <= max_tokens
    return is_short and (malformed or row["problem"] is None)


def rank(candidates: Sequence[Row]) -> None:
    """Number the candidates of one question by their reward, 0 the highest; equal ones in the order of sampling."""
    ordered = sorted(candidates, key=lambda row: (-row["reward"], row["sample"]))
    for place, row in enumerate(ordered):
        row["rank"] = place


def choose(candidates: Sequence[Row], choice: Choice, *, usable: Sequence[bool], seed: int) -> None:
    """Mark which of the ranked candidates of one question become training data: none, where none is usable."""
    fit = [row for row, is_fit in zip(candidates, usable, strict=True) if is_fit]
    chosen: list[Row] = fit
    if fit and choice == "best":
        chosen = [min(fit, key=lambda row: row["rank"])]
    elif fit and choice == "first":
        chosen = [min(fit, key=lambda row: row["sample"])]
    elif fit and choice == "random":
        chosen = [random.Random(f"{seed} {fit[0]['row']}").choice(fit)]
    for row in candidates:
        row["chosen"] = any(row is one for one in chosen)
