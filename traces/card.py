"""The dataset card: README.md beside the traces, as the hub shows it."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from schemas.reward import as_list
from schemas.traces import TracesRunConfig
from traces.result import ALL_FILE, CHOSEN_FILE
from traces.summary import label_of

_MAX_EXAMPLE_CHARS = 600
_LIBRARIES = ("transformers", "peft", "torch")


@dataclass(frozen=True, kw_only=True)
class TracesCard:
    """What was collected, from whom, how, and what it is like."""

    config: TracesRunConfig
    """As it was given: `teacher_run` is a folder or null."""
    summary: dict[str, Any]
    """`traces.summary.summarise_traces`."""
    term_means: dict[str, float]
    """Means of the reward and its terms over the chosen traces."""
    example: dict[str, Any] | None
    """One of the chosen traces; None where there is none."""

    def markdown(self) -> str:
        config, summary = self.config, self.summary
        answer = _weighted(config.answer_log_prob_coeff, config.reduction_log_prob_fn)
        kl = _weighted(config.kl_penalty_reward_coeff, config.reduction_kl_fn)
        teacher = f"the teacher of the run `{Path(config.teacher_run).name}`" if config.teacher_run else "untrained"
        return f"""---
configs:
- config_name: chosen
  default: true
  data_files: {CHOSEN_FILE}
- config_name: all
  data_files: {ALL_FILE}
tags:
- rlt
- distillation
- synthetic
---

# {Path(config.arguments.output_dir).name}

{summary["chosen"]} explanations of {summary["questions"]} questions, written by a teacher that was given each \
question with its solution (Reinforcement Learning Teachers, arXiv 2506.08388), for a student to learn from.

- `{CHOSEN_FILE}`: the chosen ones, with `question`, `solution`, `reasoning_trace`, `reward`, and `messages` (the \
student's chat: the explanation as its thought, then the solution).
- `{ALL_FILE}`: all {summary["traces"]} of them, with `row` and `sample`, `rank` (0: the highest reward of its \
question), `chosen`, `problem`, `num_tokens` and every term of the reward.

## How it was made

- Teacher: `{config.model_name_or_path}`, {teacher}
- Questions: `{config.dataset_id_or_path}`, split `{config.dataset_split}`
- {config.num_samples} explanations a question, temperature {config.arguments.temperature:g}, at most \
{config.arguments.max_completion_length} tokens, seed {config.arguments.seed}
- Chosen of each question: {config.choose}{self._limits()}
- Reward under the student `{config.student_model or "the teacher's base"}` at temperature \
{config.unbias_student_log_probs_temp:g}: solution log-prob ({answer}) minus KL of the explanation ({kl})

## Figures

{self._figures()}
{self._example()}
Made with {", ".join(f"{name} {version(name)}" for name in _LIBRARIES)}.
"""

    def _limits(self) -> str:
        limits = [] if self.config.max_trace_tokens is None else [f"at most {self.config.max_trace_tokens} tokens"]
        limits += ["malformed ones among them"] if self.config.choose_malformed else ["well formed"]
        return f" ({', '.join(limits)})"

    def _figures(self) -> str:
        summary, num_traces = self.summary, self.summary["traces"]
        lines = ["| share of explanations | all | chosen |", "| --- | ---: | ---: |"]
        lines.append(f"| may be chosen | {summary['usable'] / num_traces:.1%} | |")
        lines += [f"| {name} | {count / num_traces:.1%} | |" for name, count in summary["problems"].items()]
        lines += [
            f"| {kind} | {share:.1%} | {summary['kinds_of_chosen'].get(kind, 0.0):.1%} |"
            for kind, share in summary["kinds"].items()
        ]
        lines += [
            "",
            f"| best of {summary['samples_per_question']} by reward | best | random |",
            "| --- | ---: | ---: |",
        ]
        lines += [
            f"| {label_of(name)} | {found['best']:.3f} | {found['random']:.3f} |"
            for name, found in summary["best_of_n"].items()
        ]
        lines += ["", "| mean over the chosen | |", "| --- | ---: |"]
        lines += [f"| `{name}` | {value:.3f} |" for name, value in self.term_means.items()]
        return "\n".join(lines)

    def _example(self) -> str:
        if self.example is None:
            return ""
        parts = {name: self.example[name] for name in ("question", "solution", "reasoning_trace")}
        shown = "\n\n".join(f"{name}: {_shortened(text)}" for name, text in parts.items())
        return f"\n## Example\n\n````text\n{shown}\n````\n"


def _weighted(coefficients: Any, reductions: Any) -> str:
    return ", ".join(f"{c:g} x {r}" for c, r in zip(as_list(coefficients), as_list(reductions), strict=True))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_EXAMPLE_CHARS else text[:_MAX_EXAMPLE_CHARS] + " [...]"
