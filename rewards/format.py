"""Format reward: whether a completion keeps to the format."""

from collections.abc import Sequence
from typing import Any

from data.tags import TagStyle


def is_well_formed(completion: str, tags: TagStyle) -> bool:
    """Whether an explanation is closed exactly once, not empty, without other tags, and with nothing after it."""
    explanation, closed, after = completion.partition(tags.explanation.closing)
    return bool(closed and explanation.strip() and not after.strip()) and not any(
        tag in explanation for tag in tags.all_tags
    )


class FormatReward:
    """1 for a well-formed completion, 0 for any other: an entry of TRL's `reward_funcs`."""

    __name__ = "format_reward"

    def __init__(self, tags: TagStyle) -> None:
        self.tags = tags

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """One reward per completion; special tokens must have been left out when decoding, as TRL does."""
        return [float(is_well_formed(completion, self.tags)) for completion in completions]
