"""docs/configuration.md from the schemas: `python -m schemas.document [--check]`."""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

from schemas.library_settings import GRPO_CONFIG, SFT_CONFIG, TRAINING_ARGUMENTS, LibrarySettings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
_MODULES = (
    *("model", "data", "generation", "reward", "trainer", "optimization"),
    *("llada", "sft", "traces", "evaluate", "pipeline"),
)
_HEAD = """# Settings

Written by `python -m schemas.document` from `schemas/`; the field is the one place where a setting is declared. All
are flat on the command line (`key=value`), those of the section `model_args` as `model_args.key=value`. The
fields of TRL's [GRPOConfig](https://huggingface.co/docs/trl/grpo_trainer) are settings too, but for those listed at the
end; `cfgs/trainer_cfg/grpo.yaml` names those whose default differs from the published run.

Numbers are finite: whole ones at most 2147483647, others at most 1e12 in size, where the type says nothing narrower
(`schemas/values.py`; those of TRL and transformers: `schemas/ranges.py`). A `Name` is a path, hub id or other text that
is not blank. Secrets are refused: they come from the environment ([SECURITY.md](../SECURITY.md)).
"""
_LIBRARY = """## Settings of TRL and transformers that a run does not take

Each field of GRPOConfig (a masked-diffusion run: of transformers' TrainingArguments; supervised fine-tuning: of TRL's
SFTConfig) is passed on and has its effect, follows from a setting of ours, or is refused; `schemas/library_settings.py`
is the list.
"""


def page() -> str:
    """The whole page as Markdown."""
    sections = [_HEAD]
    for module in _MODULES:
        path = ROOT / "schemas" / f"{module}.py"
        if path.exists():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            sections += [_section(node) for node in tree.body if isinstance(node, ast.ClassDef) and _fields(node)]
    return "\n".join(sections + _library())


def _library() -> list[str]:
    """What GRPOConfig's fields become, then where those of other methods differ."""
    return [
        _LIBRARY,
        _grouped("use instead", GRPO_CONFIG.derived),
        _grouped("refused, because", GRPO_CONFIG.refused),
        *_differences("A masked-diffusion run", TRAINING_ARGUMENTS),
        *_differences("Supervised fine-tuning", SFT_CONFIG),
    ]


def _differences(run: str, library: LibrarySettings) -> list[str]:
    everywhere = {**GRPO_CONFIG.derived, **GRPO_CONFIG.refused}
    own = {**library.derived, **library.refused}
    differing = {key: text for key, text in own.items() if everywhere.get(key) != text}
    taken = sorted(library.used - GRPO_CONFIG.used)
    return [f"{run} takes {_quoted(taken)}, and not:\n", _grouped("because, or use instead", differing)]


def _grouped(title: str, texts: Mapping[str, str]) -> str:
    """One line for all settings that share a text."""
    by_text: dict[str, list[str]] = {}
    for key, text in texts.items():
        by_text.setdefault(text, []).append(key)
    rows = [f"| {_quoted(keys)} | {text.replace('|', chr(92) + '|')} |" for text, keys in by_text.items()]
    return "\n".join([f"| setting | {title} |", "|---|---|", *rows, ""])


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _section(node: ast.ClassDef) -> str:
    title = "model_args.*" if node.name == "ModelArgs" else node.name
    rows = [f"| `{name}` | `{kind}` | {default} | {text} |" for name, kind, default, text in _fields(node)]
    head = "| setting | type | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {title}", "", ast.get_docstring(node) or "", "", head, *rows, ""])


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(name, type, default, explanation) of the annotated fields that have an explanation below them."""
    found = []
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            default = "required" if field.value is None else f"`{_default(field.value)}`"
            text = " ".join(str(below.value.value).split()).replace("|", "\\|")
            found.append((field.target.id, ast.unparse(field.annotation).replace("|", "\\|"), default, text))
    return found


def _default(value: ast.expr) -> str:
    """The value itself; for `field(default_factory=...)` what the factory makes."""
    if isinstance(value, ast.Call):
        factory = next(kw.value for kw in value.keywords if kw.arg == "default_factory")
        return ast.unparse(factory.body if isinstance(factory, ast.Lambda) else factory)
    return ast.unparse(value)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
            else f"{PAGE} is stale: python -m schemas.document"
        )
    PAGE.write_text(page())
