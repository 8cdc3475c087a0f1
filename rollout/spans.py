"""Spans of a completion that are scored, and the rows around them: which tokens count is decided here alone.

A token counts iff its text lies wholly inside the content between the tags; those that fuse with a tag do not. Of the
explanation only sampled tokens count; the padding after the opening tag belongs to the prompt. Spans are half-open.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from data.formats import PromptFormat, encode, encode_student_tail
from rollout.token_text import TokenText
from rollout.types import RolloutRow, ScoringRow

_NUM_CACHED_PROMPTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The explanation inside a completion."""

    token_slice: slice
    """Tokens of the completion that count: those before the closing tag, without one that straddles it."""
    leftover: str
    """Text of the explanation in the token that straddles the closing tag; usually empty."""
    text: str
    """What stands before the closing tag, or everything where there is none."""
    matched: bool
    """The closing tag was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplanationRow:
    """One completion, ready to be scored by both models."""

    student: ScoringRow
    """The student's chat. Spans: the solution; then the explanation, where both models share a tokenizer."""
    teacher: ScoringRow
    """Prompt and sampled ids. One span: the explanation."""
    explanation_slice: slice
    """The explanation within the sampled ids, and so within the sampler's log-probs."""
    explanation: str
    matched: bool


def find_explanation(token_ids: list[int], closing_tag: str, token_text: TokenText) -> Explanation:
    """Cut a completion at its first closing tag. It ends at its first token without text (end of turn)."""
    pieces: list[bytes] = []
    for token_id in token_ids:
        piece = token_text.bytes_of(token_id)
        if piece is None:
            break
        pieces.append(piece)
    written = b"".join(pieces)
    end = written.find(closing_tag.encode())
    matched = end >= 0
    if not matched:
        end = len(written)
    num_inside = position = 0
    for piece in pieces:
        if position + len(piece) > end:
            break
        position += len(piece)
        num_inside += 1
    return Explanation(
        token_slice=slice(0, num_inside),
        leftover=written[position:end].decode(errors="replace"),
        text=written[:end].decode(errors="replace"),
        matched=matched,
    )


class RowBuilder:
    """Builds `ExplanationRow`s; the completions of one group share its encoded texts.

    `student_tokenizer: None` means that the student reads the teacher's tokens and chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.format = prompt_format
        self.tokenizer = tokenizer
        self.student_tokenizer = student_tokenizer if student_tokenizer is not None else tokenizer
        self.shares_tokens = student_tokenizer is None or student_tokenizer.get_vocab() == tokenizer.get_vocab()
        self._token_text = TokenText(tokenizer)
        self._student_head_ids = lru_cache(_NUM_CACHED_PROMPTS)(self._encode_student_head)
        self._student_tail_ids = lru_cache(_NUM_CACHED_PROMPTS)(self._encode_student_tail)

    def build(self, row: RolloutRow) -> ExplanationRow:
        """One completion, ready to be scored.

        Raises:
            UserError: no token of the solution lies inside its tags (the data filter drops such rows beforehand).
        """
        question, solution, prompt_ids = row.group.question, row.group.solution, row.group.prompt_ids
        completion_ids = row.completion.token_ids
        found = find_explanation(completion_ids, self.format.tags.explanation.closing, self._token_text)
        head_ids = self._student_head_ids(question)
        if self.shares_tokens:
            thought_ids, leftover = completion_ids[found.token_slice], found.leftover
        else:
            thought_ids, leftover = encode(self.student_tokenizer, found.text), ""
        tail_ids, (start, end) = self._student_tail_ids(question, solution, leftover)
        if start == end:
            raise UserError(
                f"no token of the solution {solution!r} of the question {question[:80]!r} lies inside its tags",
                expected="a solution with at least one token of its own",
                remedy="remove the row",
            )
        before_tail = len(head_ids) + len(thought_ids)
        solution_span = (before_tail + start, before_tail + end)
        thought_span = (len(head_ids), before_tail)
        teacher_span = (len(prompt_ids), len(prompt_ids) + found.token_slice.stop)
        return ExplanationRow(
            student=ScoringRow(
                token_ids=head_ids + thought_ids + tail_ids,
                spans=(solution_span, thought_span) if self.shares_tokens else (solution_span,),
                prefix_len=len(head_ids),
            ),
            teacher=ScoringRow(
                token_ids=prompt_ids + completion_ids, spans=(teacher_span,), prefix_len=len(prompt_ids)
            ),
            explanation_slice=found.token_slice,
            explanation=found.text,
            matched=found.matched,
        )

    def explanation_token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Of sampled ids, and they join to the whole: a character of several tokens stands at the last of them."""
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        return [decoder.decode(self._token_text.bytes_of(token_id) or b"") for token_id in token_ids]

    def solution_token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Of the student's ids; another tokenizer's are decoded one by one."""
        if self.shares_tokens:
            return self.explanation_token_texts(token_ids)
        return self.student_tokenizer.batch_decode([[token_id] for token_id in token_ids])

    def _encode_student_head(self, question: str) -> list[int]:
        return encode(self.student_tokenizer, self.format.student_head_text(self.student_tokenizer, question))

    def _encode_student_tail(self, question: str, solution: str, leftover: str) -> tuple[list[int], tuple[int, int]]:
        return encode_student_tail(self.student_tokenizer, self.format, question, solution, leftover)
