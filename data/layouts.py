"""Dataset layouts: the ways in which datasets write a question and its solution, read into rows of one kind.

A row holds either a chat (`conversations`, `messages`) or columns; both may have the reasoning before the solution.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isnan
from typing import Any

from core.errors import UserError
from data.sources import RawRow
from data.tags import TAG_STYLES, TagPair, TagStyle
from schemas.data import ColumnField

QUESTION_COLUMNS = ("question", "prompt", "problem")
SOLUTION_COLUMNS = ("solution", "answer", "completion")
CHAT_COLUMNS = ("conversations", "messages")
ROW_FIELDS: tuple[ColumnField, ...] = ("question", "solution", "reasoning_trace", "messages")
"""Names that `column_names` may give to columns of a dataset of questions; plain text has `text` alone."""

_FINAL_ANSWER = "#### "
_SPEAKERS = {"human": "user", "gpt": "assistant"}

Row = dict[str, Any]
"""`question`, `solution` and, where the source has one, `reasoning_trace`; once prepared `prompt` and `prompt_ids`."""


class BadRowError(ValueError):
    """A dataset row that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Content of an assistant's turn or of the column of the solution."""

    solution: str
    thought: str | None = None
    is_tagged: bool = False
    """Tags around the solution were removed."""


class RowParser:
    """Reads the raw rows of one dataset in any of the layouts; `notes` counts the rows that lost something by it.

    Raises:
        UserError: `column_names` renames what these rows do not have.
    """

    def __init__(self, column_names: Mapping[ColumnField, str], tags: TagStyle) -> None:
        check_fields(column_names, ROW_FIELDS)
        self.notes: Counter[str] = Counter()
        self._names, self._tags = column_names, tags
        self._has_named_columns = bool({"question", "solution"} & set(column_names))
        self._columns: dict[str, None] = {}
        if self._has_named_columns and "messages" in column_names:
            raise UserError(
                "`column_names` names `messages` beside `question` or `solution`",
                expected="one column of chats, or columns of questions and solutions",
                remedy="leave one of them out",
            )

    def parse(self, raw: RawRow) -> Row:
        """A raw row as question, solution and maybe trace, or `BadRowError`."""
        if raw.problem is not None:
            raise BadRowError(raw.problem)
        values = raw.values
        if not isinstance(values, dict):
            raise BadRowError(f"is of type {type(values).__name__}, not an object with fields")
        self._columns |= dict.fromkeys(values)
        chat = None if self._has_named_columns else self._find("messages", CHAT_COLUMNS, values)
        trace = self._read_trace(values)
        if chat is not None:
            question, answer = self._read_chat(chat, values[chat])
        else:
            question, answer = self._read_columns(values, splits_final_answer=trace is None)
        if trace is not None and answer.thought is not None:
            self.notes["the thought in front of the solution is left out: the row has a reasoning_trace"] += 1
        trace = trace or answer.thought
        row = {"question": question, "solution": answer.solution}
        if trace is not None and trace.strip():
            row["reasoning_trace"] = trace
        for name, value in row.items():
            for tag in self._tags.all_tags:
                if tag in value:
                    raise BadRowError(f"the tag {tag} is inside `{name}`")
        return row

    def check_columns(self, dataset: str) -> None:
        """Refuse a set column that no row has; called after the last row."""
        check_columns(self._names, self._columns, dataset)

    def _find(self, field: ColumnField, usual: tuple[str, ...], values: Mapping[str, Any]) -> str | None:
        """The column of a field that this row fills, or None."""
        names = (self._names[field],) if field in self._names else usual
        return next((name for name in names if not _is_missing(values.get(name))), None)

    def _need(self, field: ColumnField, usual: tuple[str, ...], values: Mapping[str, Any]) -> str:
        column = self._find(field, usual, values)
        if column is None:
            name = self._names.get(field, field)
            raise BadRowError(f"`{name}` is missing (the fields are {', '.join(map(str, values)) or 'none'})")
        return column

    def _read_trace(self, values: Mapping[str, Any]) -> str | None:
        """An empty cell is no trace."""
        column = self._find("reasoning_trace", ("reasoning_trace",), values)
        return None if column is None or values[column] == "" else _text(values[column], column)

    def _read_chat(self, column: str, value: object) -> tuple[str, Answer]:
        """The first exchange. Contents of tags keep their padding, as those of Bespoke-Stratos-17k do."""
        turns = self._turns(column, value)
        speakers = [speaker for speaker, _ in turns]
        if speakers[:2] != ["user", "assistant"]:
            raise BadRowError(f"`{column}` has turns of {speakers}, not of a user and then an assistant")
        if len(turns) > 2:
            self.notes["turns behind the first answer are left out"] += 1
        (_, question), (_, answer) = turns[:2]
        return _text(question, column), split_answer(_text(answer, column), column)

    def _read_columns(self, values: Mapping[str, Any], *, splits_final_answer: bool) -> tuple[str, Answer]:
        column = self._need("question", QUESTION_COLUMNS, values)
        question = _text(self._only_turn(column, values[column], "user"), column)
        column = self._need("solution", SOLUTION_COLUMNS, values)
        answer = split_answer(_text(self._only_turn(column, values[column], "assistant"), column), column)
        if answer.is_tagged:
            self.notes["the tags around the solution are removed"] += 1
        final = _final_answer(answer.solution) if splits_final_answer and answer.thought is None else None
        if final is not None:
            self.notes[f"the solution is what follows `{_FINAL_ANSWER.strip()}`, the text before it the trace"] += 1
        return question, final or answer

    def _only_turn(self, column: str, value: object, speaker: str) -> object:
        """TRL's conversational columns: a list of one turn, maybe behind a system turn. Other values as they are."""
        if not isinstance(value, list):
            return value
        turns = self._turns(column, value)
        if [name for name, _ in turns] != [speaker]:
            raise BadRowError(f"`{column}` has turns of {[name for name, _ in turns]}, not one of the {speaker}")
        return turns[0][1]

    def _turns(self, column: str, value: object) -> list[tuple[str, object]]:
        """(speaker, content) of each turn behind the system turns, which the run's own system prompt replaces."""
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            raise BadRowError(f"`{column}` is not a list of turns")
        turns = []
        for turn in value:
            speaker = str(turn.get("role") or turn.get("from") or "nobody")
            content = turn.get("content") if turn.get("content") is not None else turn.get("value")
            turns.append((_SPEAKERS.get(speaker, speaker), content))
        num_system = next((i for i, (speaker, _) in enumerate(turns) if speaker != "system"), 0)
        if num_system:
            self.notes["the system turn is left out: the run has its own system prompts (prompt_style)"] += 1
        return turns[num_system:]


def split_answer(text: str, column: str) -> Answer:
    """Thought and solution of an answer, by the tags of any style; an answer without tags is all solution.

    The thought stands at the beginning. Traces of R1 are often stored without the opening `<think>`, which the chat
    template writes; then everything up to the closing tag is the thought.
    """
    for style in TAG_STYLES.values():
        opening, closing = style.thought.opening, style.thought.closing
        is_opened = text.lstrip().startswith(opening)
        if is_opened and closing not in text:
            raise BadRowError(f"`{column}` opens its thought with {opening} and never closes it")
        if closing in text and (is_opened or opening not in text):
            thought, _, rest = text.partition(closing)
            thought = thought.partition(opening)[2] if is_opened else thought
            inside = _between(rest, style.solution)
            solution = rest.strip() if inside is None else inside
            if not solution.strip():
                raise BadRowError(f"`{column}` has nothing behind its thought")
            return Answer(solution, thought, is_tagged=inside is not None)
    for style in TAG_STYLES.values():
        if text.strip().startswith(style.solution.opening) and text.strip().endswith(style.solution.closing):
            inside = _between(text, style.solution)
            if inside is not None:
                return Answer(_text(inside, column), is_tagged=True)
    return Answer(text)


def _between(text: str, pair: TagPair) -> str | None:
    _, opened, rest = text.partition(pair.opening)
    content, closed, _ = rest.partition(pair.closing)
    return content if opened and closed else None


def _final_answer(text: str) -> Answer | None:
    """GSM8K: worked steps, and the answer in a last line that begins with `####`."""
    steps, marker, final = text.rpartition(_FINAL_ANSWER)
    if not marker or not final.strip() or "\n" in final.strip() or (steps and not steps.endswith("\n")):
        return None
    return Answer(final.strip(), steps.strip() or None)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))


def _text(value: object, column: str) -> str:
    """A text as it is, a number as it is written; a float that is whole without its `.0` (a column with gaps has such).

    JSON and CSV files come with their numbers as text already (`data.sources`).
    """
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if _is_missing(value):
        raise BadRowError(f"`{column}` has a turn without content")
    if not isinstance(value, str):
        raise BadRowError(f"`{column}` is of type {type(value).__name__}, not a text")
    if not value.strip():
        raise BadRowError(f"`{column}` is empty")
    return value


def check_fields(column_names: Mapping[ColumnField, str], fields: tuple[ColumnField, ...]) -> None:
    """Refuses names for fields that the run does not read.

    Raises:
        UserError: there is one.
    """
    unread = sorted(set(column_names) - set(fields))
    if unread:
        raise UserError(
            f"`column_names` names {', '.join(unread)}, which this run does not read",
            expected=f"names for {', '.join(fields) or 'nothing: the embedded task has no columns'}",
            remedy=f"remove column_names.{unread[0]}",
        )


def check_columns(column_names: Mapping[ColumnField, str], columns: Iterable[str], dataset: str) -> None:
    """Refuses names of columns that a dataset does not have (`columns`: what its rows have; empty without rows).

    Raises:
        UserError: there is one; the columns that exist are listed.
    """
    there = list(columns)
    for field, column in column_names.items():
        if there and column not in there:
            raise UserError(
                f"`column_names.{field}` is `{column}`, and `{dataset}` has no such column",
                expected=f"one of {', '.join(map(str, there))}",
                remedy=f"set column_names.{field} to one of them",
            )
