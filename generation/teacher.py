"""Trained teacher that writes explanations: base in the run's precision, adapter, prompt format and sampling."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, overload

from rich.progress import Progress

from core.errors import UserError
from core.log import can_animate, console, log
from core.types import Role
from data.formats import PromptFormat, encode
from generation.base import SamplingSettings
from generation.transformers_engine import TransformersGenerator
from models.host import ModelHost
from models.load import load_tokenizer, quiet_libraries
from models.trained import TrainedRun, open_run
from rollout.spans import find_explanation
from rollout.token_text import TokenText


def load_teacher(run: str | Path) -> "Teacher":
    """Load what a run trained, from its folder or from that of a checkpoint.

    Raises:
        UserError: there is no trained teacher, or its base cannot be loaded.
        ConfigError: the run's configuration is not valid any more.
    """
    return Teacher(open_run(run, needs_adapter=True))


class Teacher:
    """A trained teacher on the run's device; `close()` or a `with` block frees its weights."""

    def __init__(self, run: TrainedRun) -> None:
        config = run.config
        quiet_libraries()
        self.run = run
        self.format = PromptFormat.from_config(config)
        self.tokenizer = load_tokenizer(config.model_name_or_path, config.model_args)
        self._host = ModelHost(
            config, roles=[Role.TEACHER], max_score_tokens=run.row_len, max_oom_retries=config.max_oom_retries
        )
        self.model = self._host.teacher.requires_grad_(False)
        self.sampling = SamplingSettings.of_run(config, self.tokenizer, self.model)
        self._token_text = TokenText(self.tokenizer)
        rows_per_call = config.generation_aggregation_steps * config.grpo.num_generations
        self._generator = TransformersGenerator(self.model, self.sampling, rows_per_call, self._host.retries)

    def close(self) -> None:
        """Free the weights; the teacher cannot explain afterwards."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        config, sampling = self.run.config, self.sampling
        return (
            f"Teacher of {self.run.adapter}: an adapter on {config.model_name_or_path}, on {self.model.device}; "
            f"samples at temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens"
        )

    @overload
    def explain(self, question: str, solution: str, *, seed: int = 0) -> str: ...  # type: ignore[overload-overlap]

    @overload
    def explain(self, question: Sequence[str], solution: Sequence[str], *, seed: int = 0) -> list[str]: ...

    def explain(
        self, question: str | Sequence[str], solution: str | Sequence[str], *, seed: int = 0
    ) -> str | list[str]:
        """Write an explanation of a solution, or one for each of a list of questions and solutions.

        Sampled as in the run; the same seed gives the same explanations, another one others. An explanation is the text
        between the tags. One that was cut off at the run's `max_completion_length` is returned as far as it went, and
        said in the log.

        Raises:
            UserError: a question or solution is empty or holds one of the run's tags, or the lists differ in length.
        """
        if isinstance(question, str) and isinstance(solution, str):
            return self._explain([question], [solution], seed)[0]
        if isinstance(question, str) or isinstance(solution, str):
            raise UserError(
                "one text and a list", expected="a question and a solution, or two lists", remedy="explain([q], [s])"
            )
        return self._explain(list(question), list(solution), seed)

    def _explain(self, questions: list[str], solutions: list[str], seed: int) -> list[str]:
        self._check(questions, solutions)
        prompts = [
            encode(self.tokenizer, self.format.teacher_prompt_text(self.tokenizer, question, solution))
            for question, solution in zip(questions, solutions, strict=True)
        ]
        with Progress(console=console, transient=True, disable=len(prompts) == 1 or not can_animate()) as progress:
            task = progress.add_task("explaining", total=len(prompts))
            completions = self._generator.generate(
                prompts,
                num_generations=1,
                seeds=[seed * 1_000_003 + row for row in range(len(prompts))],
                on_progress=lambda done, total: progress.update(task, completed=done),
            )
        closing_tag = self.format.tags.explanation.closing
        found = [find_explanation(completion.token_ids, closing_tag, self._token_text) for completion in completions]
        if num_cut := sum(completion.finish_reason == "length" for completion in completions):
            log.warning(
                "%d of %d explanations were cut off at max_completion_length=%d tokens",
                *(num_cut, len(found), self.sampling.max_new_tokens),
            )
        return [explanation.text for explanation in found]

    def _check(self, questions: list[str], solutions: list[str]) -> None:
        if len(questions) != len(solutions):
            raise UserError(
                f"{len(questions)} questions and {len(solutions)} solutions",
                expected="one solution for each question",
                remedy="give lists of one length",
            )
        for name, texts in (("question", questions), ("solution", solutions)):
            for row, text in enumerate(texts):
                tag = next((tag for tag in self.format.tags.all_tags if isinstance(text, str) and tag in text), None)
                if not isinstance(text, str) or not text.strip() or tag is not None:
                    problem = f"holds the tag {tag}" if tag else "is empty" if isinstance(text, str) else "is no text"
                    raise UserError(
                        f"{name} {row} {problem}",
                        expected="texts without tags; the teacher's prompt puts them in",
                        remedy="give the text alone",
                    )
