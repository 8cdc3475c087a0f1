"""The head line of a report: what became of a run, in words, and what to worry about."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Literal

from runs.report.read import RunData, Series

_Z95 = 1.96
_MIN_WINDOW, _WINDOW_SHARE = 3, 0.1
Tone = Literal["good", "bad", "neutral"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a run is judged by."""

    key: str
    name: str
    unit: str
    higher_is_better: bool = True
    column: str | None = None
    """Of the evaluation tables: its value for each held-out question."""


HELD_OUT = (
    Measure(
        key="eval_solution_log_prob",
        name="held-out solution log-prob",
        unit="nats per token",
        column="unprocessed_answer_log_prob_mean",
    ),
    Measure(key="eval_nll_bound", name="held-out bound of the negative log-likelihood", unit="nats per token",
            higher_is_better=False),
    Measure(key="eval_loss", name="held-out negative log-likelihood", unit="nats per token", higher_is_better=False),
)  # fmt: skip
TRAINING = (
    Measure(key="reward", name="reward", unit=""),
    Measure(key="loss", name="training loss", unit="", higher_is_better=False),
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Before and after of a measure; `half_width` of the 95 % interval of the difference, None where unknown."""

    measure: Measure
    before: float
    after: float
    half_width: float | None
    basis: str
    """What is compared, in words."""

    @property
    def gain(self) -> float:
        """Positive is better."""
        return (self.after - self.before) * (1 if self.measure.higher_is_better else -1)

    @property
    def tone(self) -> Tone:
        if self.half_width is None or abs(self.gain) <= self.half_width:
            return "neutral"
        return "good" if self.gain > 0 else "bad"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    tone: Tone
    title: str
    """`Learned`, `Got worse`, ..."""
    sentence: str
    warnings: list[str]


def verdict_of(run: RunData) -> Verdict:
    change = next(_changes(run), None)
    tone, title, sentence = _words(run, change)
    return Verdict(tone=tone, title=title, sentence=sentence, warnings=warnings_of(run))


def _changes(run: RunData) -> Iterator[Change]:
    """The best evidence first: held-out questions, then the figures of training."""
    for measure in HELD_OUT:
        if len(run.series.get(measure.key, ())) >= 2:
            yield _held_out_change(run, measure)
    for measure in TRAINING:
        if len(run.series.get(measure.key, ())) >= 2 * _MIN_WINDOW:
            yield _training_change(run.series[measure.key], measure)


def _held_out_change(run: RunData, measure: Measure) -> Change:
    series = run.series[measure.key]
    first, last = min(series), max(series)
    differences = _paired_differences(run, measure, first, last)
    known = len(differences) >= 2
    questions = f" of {len(differences)} questions" if known else ""
    return Change(
        measure=measure,
        before=series[first],
        after=series[last],
        half_width=_Z95 * stdev(differences) / sqrt(len(differences)) if known else None,
        basis=f"evaluations{questions} at steps {first} and {last}",
    )


def _paired_differences(run: RunData, measure: Measure, first: int, last: int) -> list[float]:
    """Of each held-out question, last minus first; empty where a table is missing or the questions differ."""
    if measure.column is None or not {first, last} <= run.evaluations.keys():
        return []
    wanted = {"question", measure.column}
    tables = [run.table(run.evaluations[step], wanted) for step in (first, last)]
    before, after = tables
    if not before or not after or any(wanted - table.keys() for table in (before, after)):
        return []
    if before["question"] != after["question"]:
        return []
    pairs = zip(before[measure.column], after[measure.column], strict=True)
    return [b - a for a, b in pairs if a is not None and b is not None and a == a and b == b]


def _training_change(series: Series, measure: Measure) -> Change:
    first, last = _ends(series)
    spread = sqrt(sum(stdev(values) ** 2 / len(values) for values in (first, last)))
    return Change(
        measure=measure,
        before=mean(first),
        after=mean(last),
        half_width=_Z95 * spread,
        basis=f"means of the first and the last {len(first)} logged steps; nothing held out tells more",
    )


def _ends(series: Series) -> tuple[list[float], list[float]]:
    """The first and the last tenth of a series, at least three values each where there are so many."""
    values = list(series.values())
    window = max(1, min(len(values) // 2, max(_MIN_WINDOW, int(len(values) * _WINDOW_SHARE))))
    return values[:window], values[-window:]


def _words(run: RunData, change: Change | None) -> tuple[Tone, str, str]:
    max_steps = run.config.get("max_steps", -1)
    of_all = f" of {max_steps}" if isinstance(max_steps, int) and max_steps > 0 else ""
    where = f"after {run.last_step} steps" if run.is_finished else f"so far, at step {run.last_step}{of_all}"
    if not any("loss" in line for line in run.lines):
        return "neutral", "No step was finished", "There is nothing to judge yet."
    if change is None:
        return "neutral", "Too early to tell", f"Nothing was measured twice {where}."
    title = {"good": "Learned", "bad": "Got worse", "neutral": "No clear change"}[change.tone]
    if change.half_width is None and change.gain:
        title = f"{'Better' if change.gain > 0 else 'Worse'}, by how much is uncertain"
    width = f" ± {change.half_width:.2g}" if change.half_width is not None else ""
    direction = "" if change.measure.higher_is_better else "lower is better; "
    verb = "rose" if change.after > change.before else "fell"
    before, after = (f"{value:.3g}".replace("-", "\N{MINUS SIGN}") for value in (change.before, change.after))
    amount = f"{abs(change.after - change.before):.3g}{width} {change.measure.unit}".rstrip()
    return (
        change.tone,
        title,
        f"{_upper_first(change.measure.name)} {verb} by {amount}, from {before} to {after}, {where} "
        f"({direction}{change.basis}).",
    )


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


# What to worry about: one function each, a sentence or nothing


def warnings_of(run: RunData) -> list[str]:
    checks: Sequence[Callable[[RunData], str | None]] = (
        _hacking, _format, _kl, _leaks, _cut_off, _no_spread, _clipped, _entropy, _sampler, _recoveries, _not_finite,
        _memory,
    )  # fmt: skip
    return [text for check in checks if (text := check(run)) is not None]


def _tail(run: RunData, *keys: str) -> tuple[float, float] | None:
    """Mean of the first and of the last tenth of the first key that was logged."""
    for key in keys:
        if run.series.get(key):
            first, last = _ends(run.series[key])
            return mean(first), mean(last)
    return None


def _hacking(run: RunData) -> str | None:
    reward, held_out = run.series.get("reward", {}), run.series.get("eval_solution_log_prob", {})
    if len(reward) < 2 * _MIN_WINDOW or len(held_out) < 2:
        return None
    change, likelihood = _training_change(reward, TRAINING[0]), _held_out_change(run, HELD_OUT[0])
    if change.tone != "good" or likelihood.gain >= 0 or likelihood.tone == "neutral":
        return None
    return (
        f"The reward rose by {change.gain:.3g} while the held-out solution log-prob fell by {-likelihood.gain:.3g} "
        "nats per token: the reward is being hacked. Read the explanations; raise kl_penalty_reward_coeff or lower "
        "learning_rate."
    )


def _format(run: RunData) -> str | None:
    rate = _tail(run, "rlt/format_rate", "eval_format_rate")
    if rate is None or (rate[1] >= 0.9 and rate[1] >= rate[0] - 0.05):
        return None
    return f"{rate[1]:.0%} of the last completions keep to the format ({rate[0]:.0%} of the first)."


def _kl(run: RunData) -> str | None:
    kl = _tail(run, "rlt/unprocessed_thought_kl_mean")
    if kl is None or kl[1] <= max(1.0, 1.5 * kl[0]):
        return None
    return (
        f"The explanation's KL grew from {kl[0]:.2f} to {kl[1]:.2f} nats per token: explanations move away from what "
        "the student would have thought."
    )


def _leaks(run: RunData) -> str | None:
    share = run.series.get("eval_share/leak")
    if not share or (last := share[max(share)]) <= 0.1 or last < share[min(share)]:
        return None
    return f"{last:.0%} of the held-out explanations give the solution away without deriving it."


def _cut_off(run: RunData) -> str | None:
    share = _tail(run, "completions/clipped_ratio")
    if share is None or share[1] <= 0.1:
        return None
    return f"{share[1]:.0%} of the last completions were cut off at max_completion_length."


def _no_spread(run: RunData) -> str | None:
    share = _tail(run, "frac_reward_zero_std")
    if share is None or share[1] <= 0.3:
        return None
    return f"{share[1]:.0%} of the last completions are in groups of equal rewards, from which nothing is learned."


def _clipped(run: RunData) -> str | None:
    share = _tail(run, "clip_ratio/region_mean")
    if share is None or share[1] <= 0.2:
        return None
    return f"{share[1]:.0%} of the last tokens are clipped by the loss: the policy moves far in one step."


def _entropy(run: RunData) -> str | None:
    entropy = _tail(run, "entropy")
    if entropy is None or entropy[1] >= 0.02 or entropy[1] >= 0.2 * entropy[0]:
        return None
    return f"The policy's entropy fell from {entropy[0]:.3f} to {entropy[1]:.3f} nats per token: it hardly explores."


def _sampler(run: RunData) -> str | None:
    apart = _tail(run, "sampling/logp_difference", "sampling/sampling_logp_difference/mean")
    if apart is None or apart[1] <= 0.1:
        return None
    return f"Generator and trainer are {apart[1]:.2f} nats per token apart: samples are off the policy."


def _recoveries(run: RunData) -> str | None:
    bad = [line for line in run.lines if "recovery/action" in line]
    if not bad:
        return None
    cause = bad[-1].get("recovery/cause", "unknown")
    return f"{len(bad)} steps were not finite and were recovered from (the last: {cause})."


def _not_finite(run: RunData) -> str | None:
    if not run.num_not_finite:
        return None
    worst = sorted(run.num_not_finite, key=run.num_not_finite.__getitem__, reverse=True)[:3]
    return f"Logged values that are not finite: {', '.join(f'{k} ({run.num_not_finite[k]} times)' for k in worst)}."


def _memory(run: RunData) -> str | None:
    """On a GPU alone: a CPU's resident set is no prediction's subject."""
    over = []
    for key, series in run.series.items():
        if not key.startswith("memory/") or not key.endswith("_reserved_gb"):
            continue
        phase = key.removeprefix("memory/").removesuffix("_reserved_gb")
        predicted = run.series.get(f"memory/{phase}_predicted_gb")
        if predicted and max(series.values()) > 1.05 * max(predicted.values()):
            over.append(f"{phase} {max(series.values()):.1f} of {max(predicted.values()):.1f} GB")
    return f"More memory than the plan predicts: {', '.join(over)}." if over else None
