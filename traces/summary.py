"""Summary of a collection: shares, reward by rank, and the best of n beside a random one of them.

Letters: Q questions with at least one candidate that may be chosen.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from operator import itemgetter
from statistics import mean, stdev
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.table import Table

from runs.summary import memory_table
from traces.candidates import Row, by_question, is_usable

JUDGED = "judge_log_prob_mean"
"""Column of the solution's mean log-prob per token under `judge_model`."""
COMPARED = {
    "reward": "reward",
    "unprocessed_answer_log_prob_mean": "solution log-prob per token, student that ranks (nats)",
    JUDGED: "solution log-prob per token, judge_model (nats)",
    "num_tokens": "tokens per explanation",
}
"""Figures of which the best of n and a random one are compared -> what they are called."""


@dataclass(frozen=True)
class TracesReport:
    """Content of the tables at the end of a collection."""

    has_page: ClassVar[bool] = False

    def tables(self, summary: dict[str, Any]) -> list[RenderableType]:
        return [*self.of_traces(summary), memory_table(summary)]

    def of_traces(self, summary: dict[str, Any]) -> list[RenderableType]:
        return [_shares_table(summary), _rank_table(summary), _best_table(summary)]


TRACES_REPORT = TracesReport()


def summarise_traces(table: Sequence[Row], *, max_tokens: int | None, malformed: bool) -> dict[str, Any]:
    """Figures of every candidate of a collection; the rows of a question follow each other."""
    questions = by_question(table)
    usable = [[row for row in rows if is_usable(row, max_tokens=max_tokens, malformed=malformed)] for rows in questions]
    chosen = [row for row in table if row["chosen"]]
    num_samples = max(len(candidates) for candidates in questions)
    return {
        "questions": len(questions),
        "samples_per_question": num_samples,
        "traces": len(table),
        "chosen": len(chosen),
        "questions_without_a_trace": sum(not any(row["chosen"] for row in rows) for rows in questions),
        "usable": sum(map(len, usable)),
        "problems": dict(Counter(_kind_of_problem(row) for row in table if row["problem"] is not None).most_common()),
        "too_long": sum(max_tokens is not None and row["num_tokens"] > max_tokens for row in table),
        "kinds": _shares(table),
        "kinds_of_chosen": _shares(chosen),
        "reward_by_rank": [
            mean(row["reward"] for rows in questions for row in rows if row["rank"] == place)
            for place in range(num_samples)
        ],
        "best_of_n": _best_against_random([rows for rows in usable if rows]),
    }


_NAMED = ("never closed", "empty", "bytes that are no text")
"""Problems that go by their own name; the others name a tag or a special token."""


def label_of(figure: str) -> str:
    return COMPARED.get(figure, "share of honest explanations")


def _kind_of_problem(row: Row) -> str:
    return row["problem"] if row["problem"] in _NAMED else "tags or special tokens inside"


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    """Of each kind of explanation, where the task can tell."""
    counts = Counter(row["kind"] for row in rows if "kind" in row)
    return {kind: count / len(rows) for kind, count in sorted(counts.items())}


def _best_against_random(usable: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Means over questions: of the best usable one, and of all of them, which is what a random choice gives on average.

    The interval is that of the mean of the Q differences (95 %, normal).
    """
    if not usable:
        return {}
    figures: dict[str, Callable[[Row], float]] = {key: itemgetter(key) for key in COMPARED if key in usable[0][0]}
    if "kind" in usable[0][0]:
        figures["honest"] = lambda row: float(row["kind"] == "honest")
    found = {}
    for name, value in figures.items():
        best = [value(min(fit, key=lambda row: row["rank"])) for fit in usable]
        anyone = [mean(map(value, fit)) for fit in usable]
        differences = [b - a for b, a in zip(best, anyone, strict=True)]
        if len(differences) > 1:
            margin = 1.96 * stdev(differences) / sqrt(len(differences))
            found[name] = {
                "best": mean(best),
                "random": mean(anyone),
                "low": mean(differences) - margin,
                "high": mean(differences) + margin,
            }
    return found


def _shares_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['chosen']} traces of {summary['questions']} questions", title_justify="left")
    for column in ("explanations", "all", "chosen"):
        table.add_column(column, justify="left" if column == "explanations" else "right")
    num_traces = summary["traces"]
    table.add_row("written", f"{num_traces}", f"{summary['chosen']}")
    table.add_row("may be chosen", f"{summary['usable'] / num_traces:.1%}", "")
    for name, count in {**summary["problems"], "longer than max_trace_tokens": summary["too_long"]}.items():
        if count:
            table.add_row(name, f"{count / num_traces:.1%}", "")
    for kind, share in summary["kinds"].items():
        table.add_row(kind, f"{share:.1%}", f"{summary['kinds_of_chosen'].get(kind, 0.0):.1%}")
    return table


def _rank_table(summary: dict[str, Any]) -> Table:
    table = Table(title="mean reward by rank", title_justify="left")
    for place in range(len(summary["reward_by_rank"])):
        table.add_column(f"{place}", justify="right")
    table.add_row(*(f"{reward:.3f}" for reward in summary["reward_by_rank"]))
    return table


def _best_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"best of {summary['samples_per_question']} by reward", title_justify="left")
    for column in ("", "best", "random", "difference (95 %)"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in summary["best_of_n"].items():
        interval = f"{found['best'] - found['random']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        table.add_row(label_of(name), f"{found['best']:.3f}", f"{found['random']:.3f}", interval)
    return table
