"""Which logged figures are shown together, under which title and unit. What no panel names has one of its own."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from core.types import Phase


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart. A pattern with `*` stands for every key that it matches, labelled by what the star stands for."""

    section: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    """(key or pattern, label)."""
    note: str = ""
    kind: Literal["lines", "stack"] = "lines"


_LEARNING, _TEXTS, _UPDATE = "Learning", "What it writes", "The update"
_COST, _OTHER = "Time and memory", "Other figures"

PANELS = (
    Panel(section=_LEARNING, title="Reward", unit="", lines=(("reward", "training"), ("eval_reward", "held-out"))),
    Panel(
        section=_LEARNING,
        title="Log-prob of the solution",
        unit="nats per token",
        lines=(("rlt/unprocessed_answer_log_prob_mean", "training"), ("eval_solution_log_prob", "held-out")),
        note="The student's, after reading the explanation; 0 is certainty.",
    ),
    Panel(
        section=_LEARNING,
        title="Terms of the reward",
        unit="reward",
        lines=(
            ("rlt/solution_log_prob_reward", "solution"),
            ("rlt/kl_reward", "KL"),
            ("rlt/match_reward", "format"),
            ("rewards/*/mean", "*"),
        ),
        note="As they are added, coefficients and signs included.",
    ),
    Panel(
        section=_LEARNING,
        title="KL of the explanation",
        unit="nats per token",
        lines=(("rlt/unprocessed_thought_kl_mean", "teacher to student"), ("kl", "policy to reference")),
        note="How far the explanation is from what the student itself would have thought.",
    ),
    Panel(
        section=_LEARNING,
        title="Held-out negative log-likelihood, upper bound",
        unit="nats per token",
        lines=(("eval_nll_bound", "held-out"),),
    ),
    Panel(
        section=_LEARNING,
        title="Negative log-likelihood of what is learned",
        unit="nats per token",
        lines=(("eval_loss", "held-out"),),
    ),
    Panel(section=_LEARNING, title="Held-out exact match", unit="share", lines=(("eval_exact_match", "held-out"),)),
    Panel(
        section=_TEXTS, title="Kinds of held-out explanations", unit="share", lines=(("eval_share/*", "*"),)
    ),
    Panel(
        section=_TEXTS,
        title="Length of completions",
        unit="tokens",
        lines=(
            ("completions/mean_length", "mean"),
            ("completions/min_length", "shortest"),
            ("completions/max_length", "longest"),
            ("eval_explanation_tokens", "held-out explanation"),
        ),
    ),
    Panel(
        section=_TEXTS,
        title="Format kept and completions cut off",
        unit="share",
        lines=(
            ("rlt/format_rate", "format kept"),
            ("eval_format_rate", "format kept, held-out"),
            ("completions/clipped_ratio", "cut off"),
        ),
    ),
    Panel(
        section=_TEXTS,
        title="Learned tokens that are the likeliest ones",
        unit="share",
        lines=(("mean_token_accuracy", "training"),),
    ),
    Panel(section=_TEXTS, title="Entropy of the policy", unit="nats per token", lines=(("entropy", "entropy"),)),
    Panel(
        section=_UPDATE,
        title="Spread of rewards",
        unit="reward",
        lines=(("reward_std", "standard deviation"),),
    ),
    Panel(
        section=_UPDATE,
        title="Completions in groups without spread",
        unit="share",
        lines=(("frac_reward_zero_std", "share"),),
        note="Where all rewards of a group are equal, nothing is learned.",
    ),
    Panel(section=_UPDATE, title="Loss", unit="", lines=(("loss", "training"),)),
    Panel(section=_UPDATE, title="Gradient norm", unit="", lines=(("grad_norm", "gradient norm"),)),
    Panel(section=_UPDATE, title="Learning rate", unit="", lines=(("learning_rate", "learning rate"),)),
    Panel(
        section=_UPDATE,
        title="Tokens clipped by the loss",
        unit="share",
        lines=(
            ("clip_ratio/region_mean", "both"),
            ("clip_ratio/low_mean", "low"),
            ("clip_ratio/high_mean", "high"),
            ("cispo_clip_ratio", "CISPO"),
        ),
    ),
    Panel(
        section=_UPDATE,
        title="Generator against trainer",
        unit="nats per token",
        lines=(
            ("sampling/logp_difference", "mean difference"),
            ("sampling/sampling_logp_difference/mean", "mean difference before the step"),
            ("sampling/sampling_logp_difference/max", "largest"),
        ),
        note="Log-probs of the sampled tokens by both. The canary stops a run whose generator lost the adapter.",
    ),
    Panel(
        section=_UPDATE,
        title="Importance ratios",
        unit="p trainer / p sampler",
        lines=(("sampling/importance_sampling_ratio/*", "*"),),
    ),
    Panel(section=_COST, title="Seconds by phase", unit="s", lines=(("time/*_s", "*"),), kind="stack",
          note="Since the line before, evaluations included."),
    Panel(section=_COST, title="Tokens per second by phase", unit="tokens/s", lines=(("tokens_per_s/*", "*"),)),
    Panel(section=_COST, title="Peak memory: reserved on the GPU", unit="GB", lines=(("memory/*_reserved_gb", "*"),)),
    Panel(section=_COST, title="Peak memory: the driver's count", unit="GB", lines=(("memory/*_driver_gb", "*"),)),
    Panel(section=_COST, title="Peak memory: the process (no GPU)", unit="GB", lines=(("memory/*_rss_gb", "*"),)),
)  # fmt: skip

_SHOWN_ELSEWHERE = ("memory/*_predicted_gb", "epoch", "total_flos", "train_*")
"""In the table of memory, or said of the whole run."""


def panels_of(keys: Iterable[str]) -> list[dict[str, Any]]:
    """The panels that have a line, for the page; patterns resolved."""
    left = sorted(keys, key=lambda key: (next((i for i, phase in enumerate(Phase) if f"/{phase}" in key), 0), key))
    shown = []
    for panel in PANELS:
        lines = [line for pattern, label in panel.lines for line in _resolved(pattern, label, left)]
        lines = list(dict(lines).items())
        if len([key for key, _ in lines if key.startswith("rewards/")]) == 1:  # that of the RLT reward, shown above
            lines = [line for line in lines if not line[0].startswith("rewards/")]
        if lines:
            shown.append({**asdict(panel), "lines": lines})
    named = {pattern for panel in PANELS for pattern, _ in panel.lines} | set(_SHOWN_ELSEWHERE)
    others = [key for key in left if not any(fnmatchcase(key, pattern) for pattern in named)]
    shown += [asdict(Panel(section=_OTHER, title=key, unit="", lines=((key, key),))) for key in others]
    return shown


def _resolved(pattern: str, label: str, keys: list[str]) -> Iterator[tuple[str, str]]:
    before, star, after = pattern.partition("*")
    for key in keys:
        if not star and key == pattern:
            yield key, label
        elif star and fnmatchcase(key, pattern):
            yield key, key[len(before) : len(key) - len(after)]
