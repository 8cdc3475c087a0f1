"""What a run wrote, for the browser of a report: a bounded sample of completions, and held-out ones before and after.

Whole groups (all completions of one prompt) of evenly spread steps; what is left out is counted. Token values are in
hundredths of a nat, token lengths in UTF-16 units, as the page's language counts.
"""

import json
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from runs.report.read import RunData

MAX_TEXT_CHARS = 2_000
_MAX_STEPS, _MIN_STEPS = 120, 4
_TEXT_COLUMNS = ("question", "solution", "explanation", "kind")
_NOT_TERMS = {"step", "prompt", "completion", "num_tokens", "finish_reason", "sampler_log_prob", *_TEXT_COLUMNS}
_EVALUATION_SHARE = 0.25

Table = dict[str, list[Any]]


def samples_of(run: RunData, max_bytes: int) -> dict[str, Any]:
    """`completions` and `held_out` of a run, in at most about `max_bytes` of JSON."""
    held_out = _held_out(run, int(max_bytes * _EVALUATION_SHARE))
    return {"completions": _completions(run, max_bytes - _size(held_out)), "held_out": held_out}


def _completions(run: RunData, max_bytes: int) -> dict[str, Any]:
    steps = list(run.completions)
    shown = _evenly(steps, _num_steps(run, max_bytes))
    result: dict[str, Any] = {"terms": [], "steps": [], "num_steps": len(steps), "num_shown": 0, "num_rows": 0}
    for i, step in enumerate(shown):
        table = run.table(run.completions[step])
        if not table or not {"question", "explanation"} <= table.keys():
            continue
        result["terms"] = result["terms"] or _terms(table)
        result["num_rows"] += len(table["question"])
        budget = max_bytes // (len(shown) - i)
        groups = list(_that_fit(_groups(run, run.completions[step], table, result["terms"]), budget))
        max_bytes -= sum(map(_size, groups))
        result["num_shown"] += sum(len(group["rows"]) for group in groups)
        result["steps"].append({"step": step, "groups": groups})
    return result


def _num_steps(run: RunData, max_bytes: int) -> int:
    """As many steps as a whole group of each fits in, by the size of the last step's first one."""
    for file in reversed(run.completions.values()):
        table = run.table(file)
        if table and {"question", "explanation"} <= table.keys():
            group = next(_groups(run, file, table, _terms(table)), None)
            if group is not None:
                return max(_MIN_STEPS, min(_MAX_STEPS, max_bytes // _size(group)))
    return _MIN_STEPS


def _groups(run: RunData, file: Path, table: Table, terms: list[str]) -> Iterator[dict[str, Any]]:
    """The groups of a table, their completions in its order."""
    rows_of: dict[tuple[Any, Any], list[int]] = {}
    solutions = table.get("solution") or [None] * len(table["question"])
    for i, group in enumerate(zip(table["question"], solutions, strict=True)):
        rows_of.setdefault(group, []).append(i)
    tokens = run.token_scores(file)
    for (question, solution), rows in rows_of.items():
        solution = _cut(solution)
        found = [_row(table, i, terms, tokens.get(i), solution) for i in rows]
        yield {"q": _cut(question), "s": solution, "rows": found}


def _row(table: Table, i: int, terms: list[str], tokens: dict[str, Any] | None, solution: str) -> dict[str, Any]:
    """One completion: explanation, kind, advantage, terms, and its tokens' scores where they are kept."""
    text = _text(table["explanation"][i])
    row: dict[str, Any] = {
        "e": _cut(text),
        "r": rounded(_reward(table, i), 5),
        "v": [rounded(table[name][i], 4) if name in table else None for name in terms],
    }
    if len(text) > MAX_TEXT_CHARS:
        row["cut"] = len(text) - MAX_TEXT_CHARS
    if "kind" in table:
        row["k"] = _text(table["kind"][i])
    if "advantage" in table:
        row["a"] = rounded(table["advantage"][i], 4)
    if tokens is not None:
        row["st"] = _solution_tokens(tokens, solution)
        row["et"] = _token_values(tokens["explanation_tokens"], tokens["explanation_kl"], len(row["e"]))
    return row


def _reward(table: Table, i: int) -> Any:
    """The RLT reward: under this name in an evaluation, under the function's among the completions."""
    return table["reward"][i] if "reward" in table else table["rlt"][i] if "rlt" in table else None


def _terms(table: Table) -> list[str]:
    """Names of the reward's terms; those without the teacher's log-prob stand beside the others and are left out."""
    return [
        name
        for name, values in table.items()
        if name not in _NOT_TERMS and "no_entropy" not in name and name not in ("advantage", "rlt", "reward")
        and any(isinstance(value, int | float) for value in values)
    ]  # fmt: skip


def _solution_tokens(tokens: dict[str, Any], solution: str) -> dict[str, Any]:
    """With `o`, where the tokens begin in the solution, or with their own text where they are not a part of it."""
    values = _token_values(tokens["solution_tokens"], tokens["solution_log_prob"], MAX_TEXT_CHARS)
    text = "".join(tokens["solution_tokens"])[:MAX_TEXT_CHARS]
    start = solution.find(text)
    return values | ({"o": _utf16_len(solution[:start])} if start >= 0 else {"t": text})


def _token_values(texts: list[str], values: list[float], max_chars: int) -> dict[str, Any]:
    lengths: list[int] = []
    num_chars = 0
    for text in texts:
        num_chars += len(text)
        if num_chars > max_chars:
            break
        lengths.append(_utf16_len(text))
    return {"l": lengths, "v": [round(100 * value) if isfinite(value) else None for value in values[: len(lengths)]]}


def _held_out(run: RunData, max_bytes: int) -> dict[str, Any]:
    """The same held-out questions at the first and the last evaluation, as many as fit."""
    steps = list(run.evaluations)
    shown = [steps[0], steps[-1]] if len(steps) > 1 else steps
    result: dict[str, Any] = {"steps": shown, "terms": [], "num_questions": 0, "pairs": []}
    read = ((step, run.table(run.evaluations[step])) for step in shown)
    tables = {step: table for step, table in read if table and {"question", "explanation"} <= table.keys()}
    if not tables:
        return result | {"steps": []}
    result |= {"steps": list(tables), "terms": _terms(next(iter(tables.values())))}
    groups = [list(_groups(run, run.evaluations[step], table, result["terms"])) for step, table in tables.items()]
    result["num_questions"] = len(groups[0])
    last = {(group["q"], group["s"]): group for group in groups[-1]}
    pairs = (
        {"q": first["q"], "s": first["s"], "rows": [first["rows"][0], *_after(first, last, len(groups))]}
        for first in groups[0]
    )
    return result | {"pairs": list(_that_fit(pairs, max_bytes))}


def _after(first: dict[str, Any], last: dict[tuple[str, str], Any], num_tables: int) -> list[Any]:
    group = last.get((first["q"], first["s"])) if num_tables > 1 else None
    return [group["rows"][0]] if group is not None else []


def _that_fit(things: Iterable[Any], max_bytes: int) -> Iterator[Any]:
    """The first one in any case, then as long as they fit."""
    for i, thing in enumerate(things):
        max_bytes -= _size(thing)
        if max_bytes < 0 and i:
            return
        yield thing


def _evenly(things: list[Any], number: int) -> list[Any]:
    """At most `number` (>= 2) of them, the first and the last among them."""
    if len(things) <= number:
        return things
    return [things[round(i * (len(things) - 1) / (number - 1))] for i in range(number)]


def rounded(value: Any, num_digits: int) -> float | None:
    """To significant digits; None for what is no finite number."""
    if not isinstance(value, int | float) or not isfinite(value):
        return None
    short = float(f"{value:.{num_digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _cut(value: Any) -> str:
    return _text(value)[:MAX_TEXT_CHARS]


def _utf16_len(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def _size(thing: Any) -> int:
    """Bytes as JSON, in UTF-8."""
    text = json.dumps(thing, ensure_ascii=False, separators=(",", ":"))
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
