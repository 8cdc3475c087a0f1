"""Secrets: settings that are credentials by their name or by what they hold, and texts with secrets masked.

A run writes its settings to its folder, so none of them may be a credential: those come from the environment.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from schemas.leaves import leaves

MASK = "***"
_WORDS = frozenset(["password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"])
_KEYS = frozenset(["api", "access", "auth", "private", "secret", "signing"])
"""Words before `key` that make it a secret."""
_TEXT_TOKENS = frozenset(
    [
        "eos",
        "bos",
        "pad",
        "unk",
        "mask",
        "sep",
        "cls",
        "image",
        "stop",
        "start",
        "end",
        "begin",
        "first",
        "last",
        "next",
        "new",
        "special",
        "think",
    ]
)
"""Words before `token` with which it is one of a text."""
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_LOGIN_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_SHORTEST_MASKED = 8
"""Characters: a shorter value of the environment may be a word of any text."""
_INSTEAD = "HF_TOKEN (or `hf auth login`) and WANDB_API_KEY in the environment"


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name is a credential: `hub_token`, `WANDB_API_KEY`; not `eos_token`."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if not words or _WORDS & set(words):
        return bool(words)
    before = words[-2] if len(words) > 1 else ""
    return (words[-1] == "token" and before not in _TEXT_TOKENS) or (words[-1] == "key" and before in _KEYS)


def masked(text: str) -> str:
    """The text without logins in addresses, tokens of the hub, and values of the environment's secret variables."""
    text = _HUB_TOKEN.sub(MASK, _LOGIN_OF_URL.sub(MASK, text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_MASKED and value in text and is_secret_name(name):
            text = text.replace(value, MASK)
    return text


def secret_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """One line for each setting that is a credential or holds one; the value is not shown."""
    for path, value in leaves(values):
        name = ".".join(map(str, path))
        if any(is_secret_name(str(part)) for part in path) and value not in (None, "", False):
            yield (
                f"`{masked(name)}` is a secret, and settings are written to the run's folder. Leave it out, and set "
                f"{_INSTEAD}."
            )
        elif isinstance(value, str) and masked(value) != value:
            yield (
                f"`{masked(name)}` holds a secret ({masked(value)}), and settings are written to the run's folder. "
                f"Leave it out, and set {_INSTEAD}; a login for an address belongs in ~/.netrc."
            )
