"""Settings of the data: where the questions come from and how they are written into prompts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.values import CountingInt, Name, PositiveInt, ShareFloat

ARITHMETIC = "arithmetic"
"""The dataset name that stands for the embedded task, generated on the spot."""
ColumnField = Literal["question", "solution", "reasoning_trace", "messages", "text"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset_id_or_path: Name
    """Hub id, local file (.jsonl, .json, .csv, .tsv, each also as .gz, or .parquet), local folder, or `arithmetic` (the
    embedded task)."""
    dataset_config_name: Name | None = None
    """Subset of a hub dataset."""
    dataset_split: Name = "train"
    """Split to train on."""
    column_names: dict[ColumnField, Name] = field(default_factory=lambda: {})
    """Columns with names of their own: `column_names.question=my_question`, and so for `solution`, `reasoning_trace`,
    `messages` (chats) and `text` (plain text). The usual names are looked for where none is given."""
    eval_dataset_id_or_path: Name | None = None
    """Held-out questions; null takes `num_eval_prompts` rows off the training split before training."""
    num_eval_prompts: CountingInt = 64
    """Held-out questions that each evaluation uses; 0 turns evaluation off."""
    tag_format: Literal["bespoke", "r1"] = "bespoke"
    """Tags around thought, explanation and solution: `<|begin_of_thought|>` or `<think>` style."""
    prompt_style: Literal["stratos", "short"] = "stratos"
    """System prompts: those of the published run, or the one-line ones of the embedded task."""
    max_prompt_length: PositiveInt = 16384
    """Rows with a longer teacher prompt (in tokens) are dropped, counted and reported; never cut."""
    max_bad_rows_frac: ShareFloat = 0.01
    """Share of unusable rows (missing or empty fields, tags inside a field) above which the run stops."""

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """Variables that the chat template is given; of a teacher's run those of TRL's setting of this name."""
        return {}
