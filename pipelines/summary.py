"""The summary of a pipeline: what the models of all arms and seeds solve, and how traces and training went.

Letters: N seeds, Q questions, R resamplings.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines.jobs import Job
from runs.files import write_whole
from runs.metrics import METRICS_FILE, read_metrics
from runs.run_folder import SUMMARY_FILE
from schemas.pipeline import PipelineConfig

MARKDOWN_FILE = "summary.md"
SAMPLES_FILE = "samples.parquet"
_NUM_RESAMPLINGS = 4000
_COVERAGE_FRAC = 0.95
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FIGURES = {"pass@1": "sampled", "greedy": "greedy"}
"""Figure -> value of the column `decoding` that it is the mean of."""
_BEST_OF_N = {
    "reward": "reward",
    "unprocessed_answer_log_prob_mean": "student's solution log-prob",
    "honest": "honest",
}
"""Figures of a collection of traces -> how they are called."""


def summarise_pipeline(pipeline: PipelineConfig, jobs: Mapping[str, Job], folder: Path) -> list[Table]:
    """Write `summary.json` and `summary.md` into the pipeline's folder; the tables that they hold."""
    summary: dict[str, Any] = {"seeds": pipeline.seeds, "jobs": len(jobs)}
    summary["evaluations"] = {
        stage: evaluation_summary([job for job in jobs.values() if job.stage == stage], jobs)
        for stage in dict.fromkeys(job.stage for job in jobs.values() if job.config.method == "evaluate")
    }
    summary["held_out_log_prob"] = _by_stage_and_arm(jobs, "student_sft", _held_out_log_prob)
    summary["traces"] = _by_stage_and_arm(jobs, "collect_traces", _traces_of)
    write_whole(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    tables = list(_tables(summary))
    write_whole(folder / MARKDOWN_FILE, _markdown(pipeline, tables))
    return tables


# Evaluations


def evaluation_summary(evaluations: Sequence[Job], jobs: Mapping[str, Job]) -> dict[str, Any]:
    """Model -> figures over all seeds with intervals, and of each seed; models at checkpoints as curves.

    `minus`: sampled pass@1 minus that of the first arm, question by question.
    """
    answers = {job.seed: _answers(job, jobs) for job in evaluations}
    models = list(dict.fromkeys(model for found in answers.values() for model in found))
    finals = [model for model in models if model[1] is None]
    trained = {job.arm or job.stage for job in jobs.values()}
    first = next((model for model in finals if model[0] in trained), None)
    figures: dict[str, Any] = {}
    for model in finals:
        per_seed = {seed: found[model] for seed, found in answers.items() if model in found}
        figures[model[0]] = {
            figure: _with_interval(values)
            for figure in _FIGURES
            if (values := [found[figure] for found in per_seed.values() if figure in found])
        } | {"seeds": {str(seed): {f: float(v.mean()) for f, v in found.items()} for seed, found in per_seed.items()}}
        if first is not None and model != first:
            pairs = [(found[model], found[first]) for found in answers.values() if {model, first} <= found.keys()]
            differences = [own["pass@1"] - others["pass@1"] for own, others in pairs]
            figures[model[0]]["minus"] = {first[0]: _with_interval(differences)} if differences else {}
    return {"models": figures, "curves": _curves(models, answers)}


Model = tuple[str, int | None]
"""A model's name in the summary, and the step of a checkpoint; None: the finished one."""


def _answers(job: Job, jobs: Mapping[str, Job]) -> dict[Model, dict[str, np.ndarray]]:
    """Model -> figure -> [Q] share of right answers to each question."""
    import pandas as pd  # takes a second: not before there is something to read

    samples = pd.read_parquet(job.folder / SAMPLES_FILE)
    found: dict[Model, dict[str, np.ndarray]] = {}
    for name, rows in samples.groupby("model", sort=False):
        found[_model(str(name), jobs)] = {
            figure: right.groupby("question_number")["right"].mean().sort_index().to_numpy(float)
            for figure, decoding in _FIGURES.items()
            if len(right := rows[rows["decoding"] == decoding])
        }
    return found


def _model(name: str, jobs: Mapping[str, Job]) -> Model:
    """A model by the arm that it comes from, else by its own name, without the seed that it ends with."""
    for job in jobs.values():
        if name == str(job.folder) or name.startswith(f"{job.folder}/"):
            checkpoint = _CHECKPOINT.search(name.removeprefix(str(job.folder)))
            return job.arm or job.stage, int(checkpoint[1]) if checkpoint is not None else None
    return re.sub(r"_\d+$", "", name), None


def _curves(models: Sequence[Model], answers: Mapping[Any, Mapping[Model, Mapping[str, np.ndarray]]]) -> dict[str, Any]:
    """Model -> step -> sampled share of right answers, the mean over seeds."""
    curves: dict[str, dict[str, float]] = {}
    for name, step in sorted((model for model in models if model[1] is not None), key=lambda model: model[1] or 0):
        values = [found[name, step]["pass@1"].mean() for found in answers.values() if (name, step) in found]
        curves.setdefault(name, {})[str(step)] = float(np.mean(values))
    return curves


def _with_interval(values_NQ: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean, and the percentile bootstrap's interval of it: seeds are drawn with replacement, and in each of them
    questions, so that both kinds of chance are in it."""
    rng = np.random.default_rng(0)
    means_R = np.zeros(_NUM_RESAMPLINGS)
    for _ in values_NQ:
        # The mean of questions drawn anew, in each of the seeds [N, R], of which one is drawn.
        means_NR = np.stack([v[rng.integers(len(v), size=(_NUM_RESAMPLINGS, len(v)))].mean(1) for v in values_NQ])
        drawn_R = rng.integers(len(values_NQ), size=_NUM_RESAMPLINGS)
        means_R += means_NR[drawn_R, np.arange(_NUM_RESAMPLINGS)] / len(values_NQ)
    tail = (1 - _COVERAGE_FRAC) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return {"mean": float(np.mean([v.mean() for v in values_NQ])), "low": float(low), "high": float(high)}


# Traces and training


def _by_stage_and_arm(jobs: Mapping[str, Job], method: str, figures: Any) -> dict[str, dict[str, Any]]:
    """Arm -> figure -> mean over seeds, of every job of a method."""
    found: dict[str, dict[str, list[float]]] = {}
    for job in jobs.values():
        if job.config.method == method:
            for key, value in figures(job).items():
                found.setdefault(job.arm or job.stage, {}).setdefault(key, []).append(value)
    return {arm: {key: float(np.mean(values)) for key, values in keys.items()} for arm, keys in found.items()}


def _held_out_log_prob(job: Job) -> Mapping[str, float]:
    """Of the answers that students are to give, in nats per token, at the end of the training."""
    losses = [line["eval_loss"] for line in read_metrics(job.folder / METRICS_FILE) if "eval_loss" in line]
    return {"log_prob": -losses[-1]} if losses else {}


def _traces_of(job: Job) -> Mapping[str, float]:
    summary = json.loads((job.folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    figures = {"traces": float(summary["chosen"]), "of each question": float(summary["samples_per_question"])}
    if "honest" in summary.get("kinds_of_chosen", {}):
        figures["honest"] = summary["kinds_of_chosen"]["honest"]
    for name, found in summary.get("best_of_n", {}).items():
        figures |= {f"best {name}": found["best"], f"random {name}": found["random"]}
    return figures


# Tables


def _tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    for stage, found in summary["evaluations"].items():
        if found["models"]:
            yield _models_table(stage, found["models"], summary["held_out_log_prob"])
        if found["curves"]:
            yield _curves_table(found["curves"])
    if summary["traces"]:
        yield _traces_table(summary["traces"])
        if (table := _best_table(summary["traces"])) is not None:
            yield table


def _models_table(stage: str, models: Mapping[str, Any], log_probs: Mapping[str, Any]) -> Table:
    """One row for each arm."""
    table = _table(f"{stage}: share of right answers", ["model", "sampled pass@1", "greedy", "sampled, by seed"])
    first = next((name for found in models.values() for name in found.get("minus", {})), "")
    for column in (*([f"minus {first}"] if first else []), "held-out log-prob"):
        table.add_column(column, justify="right")
    for name, found in models.items():
        each = " ".join(f"{figures['pass@1']:.2f}" for figures in found["seeds"].values() if "pass@1" in figures)
        log_prob = log_probs.get(name, {}).get("log_prob")
        intervals = [_interval(found[figure]) if figure in found else "" for figure in _FIGURES]
        minus = found.get("minus", {}).get(first)
        difference = [f"{minus['mean']:+.2f} [{minus['low']:+.2f}, {minus['high']:+.2f}]" if minus else ""]
        table.add_row(
            name, *intervals, each, *(difference if first else []), "" if log_prob is None else f"{log_prob:.3f}"
        )
    table.caption = (
        f"intervals: {_COVERAGE_FRAC:.0%}, bootstrap over seeds and questions; log-prob: of right answers, per token"
    )
    return table


def _interval(figures: Mapping[str, float]) -> str:
    return f"{figures['mean']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _curves_table(curves: Mapping[str, Mapping[str, float]]) -> Table:
    steps = sorted({int(step) for found in curves.values() for step in found})
    table = _table("sampled pass@1 after that many steps", ["model", *map(str, steps)])
    for name, found in curves.items():
        table.add_row(name, *(f"{found[str(step)]:.3f}" if str(step) in found else "" for step in steps))
    return table


def _traces_table(traces: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("traces that were chosen", ["arm", "traces", "honest"])
    for arm, figures in traces.items():
        table.add_row(arm, f"{figures['traces']:.0f}", f"{figures['honest']:.3f}" if "honest" in figures else "")
    return table


def _best_table(traces: Mapping[str, Mapping[str, float]]) -> Table | None:
    """What ranking by the reward gains, of the arms that have several traces of a question."""
    several = {arm: figures for arm, figures in traces.items() if figures["of each question"] > 1}
    shown = {key: name for key, name in _BEST_OF_N.items() if any(f"best {key}" in f for f in several.values())}
    if not shown:
        return None
    columns = [f"{name}, {which}" for name in shown.values() for which in ("best", "random")]
    table = _table("best of n by reward, against a random one of them", ["arm", "n", *columns])
    for arm, figures in several.items():
        cells = [f"{figures[f'{which} {key}']:.3f}" for key in shown for which in ("best", "random")]
        table.add_row(arm, f"{figures['of each question']:.0f}", *cells)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _markdown(pipeline: PipelineConfig, tables: Sequence[Table]) -> str:
    """The tables as Markdown."""
    parts = [f"# {pipeline.run_name}"]
    parts += [f"Seeds: {', '.join(map(str, pipeline.seeds))}."] if pipeline.seeds else []
    plain = Console(width=10_000, color_system=None)
    for table in tables:
        columns = [[plain.render_str(str(cell)).plain for cell in column.cells] for column in table.columns]
        lines = [[str(column.header) for column in table.columns], ["---"] * len(columns), *zip(*columns, strict=True)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts += [f"## {table.title}", text, *([str(table.caption)] if table.caption else [])]
    return "\n\n".join(parts) + "\n"
