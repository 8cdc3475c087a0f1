"""Token by token scores of a sample of the completions, `token_scores/`: for the colours of the report.

A file has the name of the table of completions that its column `row` counts in. The columns `solution_tokens` and
`solution_log_prob`, `explanation_tokens` and `explanation_kl` are lists, one entry per token.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from runs.files import replaced_file
from runs.run_folder import TOKEN_SCORES_FOLDER

MAX_FOLDER_BYTES = 128 * 10**6


def write_token_scores(
    run_dir: Path,
    kind: Literal["completions", "evaluation"],
    step: int,
    table: Mapping[str, list[Any]],
    max_folder_bytes: int = MAX_FOLDER_BYTES,
) -> None:
    """Write `token_scores/KIND_STEP.parquet`, in place of an earlier one.

    Above `max_folder_bytes` the training steps that lie closest to their neighbours go, so that those which stay are
    spread over the run; its first and its last stay.
    """
    import pandas as pd  # takes a second: not where only the table's name is wanted

    folder = run_dir / TOKEN_SCORES_FOLDER
    folder.mkdir(exist_ok=True)
    with replaced_file(folder / f"{kind}_{step:05d}.parquet", synced=False) as partial:
        pd.DataFrame(table).to_parquet(partial)
    while sum(file.stat().st_size for file in folder.iterdir()) > max_folder_bytes:
        files = {int(file.stem.rpartition("_")[2]): file for file in folder.glob("completions_*.parquet")}
        steps = sorted(files)
        if len(steps) < 3:
            return
        inner = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
        files[steps[inner]].unlink()
