"""Written explanations: which texts can be scored, and as which completion of the teacher.

The teacher's prompt ends with the opened explanation tag and its padding. Three ways to write down what follows:

* the explanation alone: the text between the tags, without any tag. It is closed here; a padding that it begins with is
  not doubled.
* a completion: the text up to the closing tag, as the teacher writes it. What comes after that tag is ignored.
* a whole turn: either of the two behind the opening tag, with or without the solution's section before it.

Anything else (the tags of a thought or a solution inside, those of another format around it, a special token, a tag
twice) is a problem with a reason, for there is no completion that it stands for.
"""

from collections.abc import Sequence

from data.formats import PromptFormat
from data.tags import TAG_STYLES


class WrittenExplanationError(ValueError):
    """A text that is no explanation in this format; the message says why."""


def as_completion(
    text: object, solution: str, prompt_format: PromptFormat, special_tokens: Sequence[str], *, close: bool = True
) -> str:
    """The completion that a written explanation stands for.

    Args:
        special_tokens: texts of the tokenizer's special tokens, which end an explanation wherever they stand.
        close: add the closing tag where there is none; false leaves such a text open, as one that was cut off.

    Raises:
        WrittenExplanationError: see above.
    """
    if not isinstance(text, str):
        raise WrittenExplanationError(f"the explanation is of type {type(text).__name__}, not a text")
    pair, padding = prompt_format.tags.explanation, prompt_format.opening_padding
    written, is_closed, _ = text.partition(pair.closing)
    before, is_opened, content = written.partition(pair.opening)
    if not is_opened:
        content = before
    elif before.strip() not in ("", prompt_format.tags.solution.wrap(solution).strip()):
        raise WrittenExplanationError(f"text before {pair.opening} that is not the solution's section")
    if is_opened or (close and not is_closed):
        content = content.removeprefix(padding)
    _check_content(content, prompt_format, special_tokens)
    return content + (pair.closing if is_closed or close else "")


def _check_content(content: str, prompt_format: PromptFormat, special_tokens: Sequence[str]) -> None:
    pair = prompt_format.tags.explanation
    hint = f"give the text alone, or with {pair.opening} and {pair.closing} around it"
    for tag in prompt_format.tags.all_tags:
        if tag in content:
            raise WrittenExplanationError(f"the tag {tag} is inside the explanation; {hint}")
    for token in special_tokens:
        if token in content:
            raise WrittenExplanationError(f"the special token {token} is inside the explanation; {hint}")
    stripped = content.strip()
    for style in TAG_STYLES.values():
        for foreign in (style.explanation, style.thought, style.solution):
            if stripped.startswith(foreign.opening) or stripped.endswith(foreign.closing):
                raise WrittenExplanationError(f"it is written with the tags of another format; {hint}")
