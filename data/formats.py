"""Prompt formats: how question, solution and explanation are written for the teacher and for the student.

Every text is put together from its pieces; nothing is ever searched for in a finished text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from data.tags import PROMPT_STYLES, TAG_STYLES, TagStyle
from schemas.data import DataConfig

_ASSISTANT_CONTENT = "[[content of the assistant]]"


@dataclass(frozen=True, slots=True)
class StudentTail:
    """Text after the explanation in the student's chat, and the solution's place in it (characters, half-open)."""

    text: str
    solution_start: int
    solution_end: int


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Tags, system prompts and delimiters of a run (Sakana RLT: `delimiters_padding`, `think_solution_delimiter`).

    Chats are rendered with the tokenizer's template; encode them with `add_special_tokens=False`.
    """

    tags: TagStyle
    teacher_system_prompt: str
    student_system_prompt: str
    opening_padding: str = "\n\n"
    """Follows an opening tag that is forced on a model."""
    section_delimiter: str = "\n\n"
    """Between the two sections of an assistant's turn."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, the teacher's and the student's, such as `enable_thinking`."""

    @classmethod
    def from_config(cls, config: DataConfig) -> "PromptFormat":
        return cls.from_styles(config.tag_format, config.prompt_style, config.chat_template_kwargs)

    @classmethod
    def from_styles(
        cls, tag_format: str, prompt_style: str, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> "PromptFormat":
        tags, prompts = TAG_STYLES[tag_format], PROMPT_STYLES[prompt_style]
        names = {"thought": tags.thought, "explanation": tags.explanation, "solution": tags.solution}
        return cls(
            tags=tags,
            teacher_system_prompt=prompts.teacher_system.format(**names),
            student_system_prompt=prompts.student_system.format(**names),
            chat_template_kwargs=chat_template_kwargs or {},
        )

    def teacher_prompt_text(self, tokenizer: PreTrainedTokenizerBase, question: str, solution: str) -> str:
        """The policy's prompt: system, question, the whole solution, and the opened explanation with its padding."""
        head, _ = self._render(tokenizer, self.teacher_system_prompt, question)
        opened = self.tags.explanation.opening + self.opening_padding
        return head + self.tags.solution.wrap(solution) + self.section_delimiter + opened

    def teacher_prompt_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """`teacher_prompt_text` with `{question}` and `{solution}` in their places, for use without this framework."""
        return self.teacher_prompt_text(tokenizer, "{question}", "{solution}")

    def teacher_completion_text(self, tokenizer: PreTrainedTokenizerBase, question: str, explanation: str) -> str:
        """A well-formed completion of `teacher_prompt_text`, to the end of the turn: a supervised target.

        A trace that brings its own leading padding, as those of Bespoke-Stratos do, does not get it twice.
        """
        _, end_of_turn = self._render(tokenizer, self.teacher_system_prompt, question)
        return explanation.removeprefix(self.opening_padding) + self.tags.explanation.closing + end_of_turn

    def student_head_text(self, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
        """The student's chat up to where the explanation begins: system, question, opened thought with its padding."""
        head, _ = self._render(tokenizer, self.student_system_prompt, question)
        return head + self.tags.thought.opening + self.opening_padding

    def student_tail(
        self, tokenizer: PreTrainedTokenizerBase, question: str, solution: str, leftover: str = ""
    ) -> StudentTail:
        """The student's chat from the closing tag of the thought on.

        `leftover` is text of the explanation that comes before it because its token could not be taken over whole.
        """
        _, end_of_turn = self._render(tokenizer, self.student_system_prompt, question)
        before = leftover + self.tags.thought.closing + self.section_delimiter + self.tags.solution.opening
        text = before + solution + self.tags.solution.closing + end_of_turn
        return StudentTail(text=text, solution_start=len(before), solution_end=len(before) + len(solution))

    def student_messages(self, question: str, solution: str, explanation: str) -> list[dict[str, str]]:
        """The student's chat with an explanation as its thought: the texts that `student_tail` puts together."""
        thought = self.tags.thought.wrap(self.opening_padding + explanation)
        return [
            {"role": "system", "content": self.student_system_prompt},
            {"role": "user", "content": question},
            {"role": "assistant", "content": thought + self.section_delimiter + self.tags.solution.wrap(solution)},
        ]

    def _render(self, tokenizer: PreTrainedTokenizerBase, system: str, question: str) -> tuple[str, str]:
        return render_chat(tokenizer, system, question, self.chat_template_kwargs)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, system: str, question: str, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """The chat template's text before and after the assistant's content.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot hold a system, a user and an assistant turn.
    """
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": _ASSISTANT_CONTENT},
    ]
    name = tokenizer.name_or_path or type(tokenizer).__name__
    remedy = "use an instruct model whose template knows the roles system, user and assistant"
    if not tokenizer.chat_template:
        raise UserError(f"tokenizer `{name}` has no chat template", expected="a chat template", remedy=remedy)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **(template_kwargs or {}))
    except TemplateError as error:
        raise UserError(
            f"the chat template of `{name}` refuses a system, user, assistant conversation: {error}",
            expected="a template that renders the three roles",
            remedy=remedy,
        ) from error
    head, found, tail = text.rpartition(_ASSISTANT_CONTENT)
    if not found:
        raise UserError(
            f"the chat template of `{name}` leaves the assistant's content out",
            expected="a template that renders the assistant's content unchanged",
            remedy=remedy,
        )
    return head, _end_of_turn(tokenizer, head, tail)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, head: str, tail: str) -> str:
    """`tail` without the header of the next turn.

    The first templates of Llama 3, and LLaDA's, open one behind every conversation, also where none is asked for. What
    follows a turn of the assistant is then what follows the question: the end of the turn, and that header.
    """
    if not tail or not head.endswith(tail):
        return tail
    ends = [
        tail.index(token.content) + len(token.content)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content in tail
    ]
    return tail[: min(ends)] if ends else tail


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that already contains every special token it needs; never cut."""
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    return tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def encode_student_tail(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, question: str, solution: str, leftover: str = ""
) -> tuple[list[int], tuple[int, int]]:
    """Ids of `PromptFormat.student_tail` and the tokens in it that are the solution's, by character offsets."""
    (found,) = encode_student_tails(tokenizer, [prompt_format.student_tail(tokenizer, question, solution, leftover)])
    return found


def encode_student_tails(
    tokenizer: PreTrainedTokenizerBase, tails: Sequence[StudentTail]
) -> list[tuple[list[int], tuple[int, int]]]:
    """`encode_student_tail` of many tails, on all cores."""
    texts = [tail.text for tail in tails]
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    spans = map(_solution_tokens, tails, encoded["offset_mapping"])
    return list(zip(encoded["input_ids"], spans, strict=True))


def _solution_tokens(tail: StudentTail, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    inside = [i for i, (start, end) in enumerate(offsets) if start >= tail.solution_start and end <= tail.solution_end]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
