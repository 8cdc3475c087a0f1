"""The model card of a result and of each checkpoint, in place of the libraries' templates."""

from pathlib import Path
from typing import Any

from models.load import resolve_model_path
from runs.model_card import DiffusionCard, SupervisedCard, TeacherCard
from schemas.llada import MaskedDiffusionRunConfig
from schemas.run import RunConfig
from schemas.sft import SupervisedRunConfig


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


def supervised_card(config: SupervisedRunConfig, trainer: Any) -> str:
    row = trainer.train_dataset[0]
    return SupervisedCard(
        config=config,
        base_path=_resolved(config.model_name_or_path),
        prompt=trainer.processing_class.decode(row["input_ids"][: row["prompt_len"]]),
        num_rows=len(trainer.train_dataset),
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
