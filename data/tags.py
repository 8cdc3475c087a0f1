"""Tags and prompt styles: what a question, a solution and an explanation are wrapped in, and the system prompts.

Adding one is one entry in `TAG_STYLES` or `PROMPT_STYLES` (and its name in `schemas.data.DataConfig`).
"""

from dataclasses import dataclass

from data.embedded.task import STUDENT_SYSTEM_SHORT, TEACHER_SYSTEM_SHORT


@dataclass(frozen=True, slots=True)
class TagPair:
    opening: str
    closing: str

    def wrap(self, content: str) -> str:
        return f"{self.opening}{content}{self.closing}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TagStyle:
    """Tags of a prompt format: plain text for the tokenizer, never special tokens."""

    thought: TagPair
    """Around the student's reasoning."""
    explanation: TagPair
    """Around the teacher's explanation."""
    solution: TagPair

    @property
    def all_tags(self) -> tuple[str, ...]:
        pairs = (self.thought, self.explanation, self.solution)
        return tuple(tag for pair in pairs for tag in (pair.opening, pair.closing))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptStyle:
    """System prompts; `{thought.opening}` and the like stand for the tags of the tag style."""

    teacher_system: str
    student_system: str


def _bespoke(name: str) -> TagPair:
    return TagPair(f"<|begin_of_{name}|>", f"<|end_of_{name}|>")


def _angle(name: str) -> TagPair:
    return TagPair(f"<{name}>", f"</{name}>")


TAG_STYLES: dict[str, TagStyle] = {
    "bespoke": TagStyle(
        thought=_bespoke("thought"), explanation=_bespoke("explanation"), solution=_bespoke("solution")
    ),
    "r1": TagStyle(thought=_angle("think"), explanation=_angle("explanation"), solution=_angle("solution")),
}

PROMPT_STYLES: dict[str, PromptStyle] = {
    "stratos": PromptStyle(
        teacher_system=(
            "You are a teacher who is given a question and writes two sections: first its solution, then an "
            "explanation that leads to it. The solution section holds the final, precise answer in the form "
            "{solution.opening} {{formatted final solution}} {solution.closing}. The explanation section shows the "
            "whole reasoning from which a student reaches that solution: analyse the question, recall what is known, "
            "try ideas, check each step, correct mistakes and revisit earlier steps where needed. Write it in the form "
            "{explanation.opening} {{steps separated by blank lines}} {explanation.closing}, in detail, one thought "
            "after the other."
        ),
        student_system=(
            "You are an assistant who works through a question systematically before answering it. Write two "
            "sections: a thought and a solution. In the thought section reason at length: analyse the question, "
            "summarise what matters, explore ideas, verify each step, fix errors and go back to earlier steps where "
            "needed. Write it in the form {thought.opening} {{steps separated by blank lines}} {thought.closing}. In "
            "the solution section give the final, precise answer that the thought arrived at, with the steps needed "
            "to follow it, in the form {solution.opening} {{formatted final solution}} {solution.closing}. Now answer "
            "the following question in this way."
        ),
    ),
    "short": PromptStyle(teacher_system=TEACHER_SYSTEM_SHORT, student_system=STUDENT_SYSTEM_SHORT),
}

TEACHER_PROMPT_FILE = "teacher_prompt.txt"
"""File beside an adapter, or a merged model, with the teacher's prompt as `PromptFormat.teacher_prompt_template`."""
STUDENT_PROMPT_FILE = "student_prompt.txt"
"""File beside a merged student with its prompt, `{question}` in its place."""
