"""Results of an evaluation: figures with intervals for each model, differences from the first, the table.

Letters: Q questions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from rich.console import RenderableType
from rich.table import Table

from evaluation.statistics import COVERAGE_FRAC, NUM_RESAMPLINGS, Interval, bootstrap, pass_at_k, which_k
from runs.summary import memory_table
from schemas.evaluate import EvaluateRunConfig

SAMPLED, GREEDY = "sampled", "greedy"
"""Values of the column `decoding`."""
_SOURCE = "pass@k: 1 - C(n - c, k) / C(n, k), arXiv 2107.03374; intervals: percentile bootstrap over questions"


def results_of(samples: pd.DataFrame, config: EvaluateRunConfig) -> dict[str, Any]:
    """What evaluation.json holds: figures by model name in the order of `models`, as `mean`, `low` and `high`.

    `pass@1`, `pass@2`, ... are of sampled answers, `greedy` of the greedy one; `minus_first` are differences from the
    first model over the same questions, with intervals of their own.
    """
    seed = config.sampling.seed
    values = {name: _by_question(samples[samples["model"] == name], config.num_samples) for name in config.models}
    first = values[config.models[0]]
    models: dict[str, dict[str, Any]] = {}
    for name, figures in values.items():
        answers = samples[samples["model"] == name]
        models[name] = {figure: bootstrap(values_Q, seed).to_dict() for figure, values_Q in figures.items()}
        models[name] |= {
            "no_answer_frac": float(answers["answer"].isna().mean()),
            "cut_off_frac": float((~answers["finished"]).mean()),
            "tokens_per_answer": float(answers["num_tokens"].mean()),
        }
        if name != config.models[0]:
            models[name]["minus_first"] = {
                figure: bootstrap(values_Q - first[figure], seed).to_dict() for figure, values_Q in figures.items()
            }
    return {
        "dataset": config.dataset_id_or_path,
        "num_questions": int(samples["question_number"].nunique()),
        "num_samples": config.num_samples,
        "temperature": config.sampling.temperature,
        "scoring": config.scoring,
        "seed": seed,
        "intervals": f"{COVERAGE_FRAC:.0%}, {NUM_RESAMPLINGS} resamplings",
        "method": _SOURCE,
        "models": models,
    }


def _by_question(answers: pd.DataFrame, num_samples: int) -> dict[str, Any]:
    """Figure -> [Q] its value for each question."""
    num_right_Q = answers[answers["decoding"] == SAMPLED].groupby("question_number")["right"].sum().sort_index()
    figures = {
        f"pass@{k}": num_right_Q.map(lambda c, k=k: pass_at_k(num_samples, int(c), k)).to_numpy(float)
        for k in which_k(num_samples)
    }
    greedy = answers[answers["decoding"] == GREEDY].set_index("question_number")["right"].sort_index()
    return figures | ({GREEDY: greedy.to_numpy(float)} if len(greedy) else {})


@dataclass(frozen=True)
class EvaluationReport:
    """Content of the tables at the end of an evaluation."""

    has_page: ClassVar[bool] = False

    def tables(self, summary: dict[str, Any]) -> list[RenderableType]:
        return [results_table(summary["evaluation"]), memory_table(summary)]


EVALUATION_REPORT = EvaluationReport()


def results_table(results: Mapping[str, Any]) -> Table:
    """One row for each model, and below each but the first how far it is from that."""
    models: Mapping[str, Mapping[str, Any]] = results["models"]
    shown = dict.fromkeys(("pass@1", f"pass@{results['num_samples']}", GREEDY))
    figures = [key for key in shown if key in next(iter(models.values()))]
    table = Table(
        title=f"{results['dataset']}: {results['num_questions']} questions, {results['num_samples']} samples each at "
        f"temperature {results['temperature']:g}",
        caption=f"share of right answers, with intervals ({results['intervals']} of the questions)",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("model", *(f"{key} sampled" if key != GREEDY else key for key in figures), "tokens"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column != "model")
    for name, found in models.items():
        table.add_row(name, *(str(Interval(**found[key])) for key in figures), f"{found['tokens_per_answer']:.0f}")
        if "minus_first" in found:
            table.add_row("  minus the first", *(_signed(found["minus_first"][key]) for key in figures), "")
    return table


def _signed(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
