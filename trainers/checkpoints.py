"""Checkpoints that are whole or not there."""

import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import Trainer
from transformers.trainer_utils import rotate_checkpoints

from runs.run_folder import STAGING_FOLDER, publish_checkpoint


class WholeCheckpoints(Trainer):
    """Writes each checkpoint to a staging folder, then publishes it: a folder `checkpoint-N` is always whole."""

    _staging_dir: str | None = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the checkpoint of the last step is resumed from: transformers would train one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self.args.output_dir)
        staging = output_dir / STAGING_FOLDER
        shutil.rmtree(staging, ignore_errors=True)
        self._staging_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging_dir = None
        name = f"checkpoint-{self.state.global_step}"
        publish_checkpoint(staging / name, output_dir / name)
        staging.rmdir()
        rotate_checkpoints(output_dir=str(output_dir), save_total_limit=self.args.save_total_limit)
