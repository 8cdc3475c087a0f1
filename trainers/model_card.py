"""The model card of a result and of each checkpoint, in place of the libraries' templates."""

from pathlib import Path
from typing import Any

from transformers.trainer import Trainer

from models.load import resolve_model_path
from runs.model_card import DiffusionCard, TeacherCard
from schemas.llada import MaskedDiffusionRunConfig
from schemas.run import RunConfig


class WritesModelCard(Trainer):
    """Writes `model_card()` beside every model that is saved; a first base class, before the trainer it extends."""

    def model_card(self) -> str:
        raise NotImplementedError

    def files_beside_model(self) -> dict[str, str]:
        """More files that the card speaks of: name -> text."""
        return {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        for name, text in {"README.md": self.model_card(), **self.files_beside_model()}.items():
            Path(output_dir or self.args.output_dir, name).write_text(text, encoding="utf-8")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The libraries' own, called at checkpoints and uploads; ours lies beside the weights by then."""


def teacher_card(config: RunConfig, trainer: Any) -> str:
    row = trainer.train_dataset[0]
    return TeacherCard(
        config=config,
        base_path=_resolved(config.model_name_or_path),
        question=row["question"],
        solution=row["solution"],
        num_rows=len(trainer.train_dataset),
        **_so_far(trainer),
    ).markdown()


def masked_diffusion_card(config: MaskedDiffusionRunConfig, trainer: Any) -> str:
    base, sample = config.model_name_or_path, (trainer.eval_samples or trainer.train_dataset.rows[0])[0]
    return DiffusionCard(
        config=config,
        base_path=_resolved(base) if base is not None else None,
        prompt=trainer.processing_class.decode(sample.prompt_ids or sample.token_ids[:8]),
        optimizer=trainer.args.optim.value,
        **_so_far(trainer),
    ).markdown()


def _so_far(trainer: Any) -> dict[str, Any]:
    state = trainer.state
    return {"step": state.global_step, "max_steps": state.max_steps, "history": state.log_history}


def _resolved(base: str) -> str:
    """A hub id, or the absolute path of a folder."""
    path = resolve_model_path(base)
    return str(Path(path).resolve()) if Path(path).exists() else path
