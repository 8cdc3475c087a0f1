"""Checkpoints of a run without a trainer: published as training publishes them, or damaged."""

import json
from pathlib import Path

from runs.checkpoints import publish_checkpoint

FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "sub/adapter_model.safetensors")


def write_checkpoint(run: Path, step: int) -> Path:
    """A whole checkpoint whose files hold their names; `trainer_state.json` its step."""
    staged, target = run / ".saving" / f"checkpoint-{step}", run / f"checkpoint-{step}"
    (staged / "sub").mkdir(parents=True)
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in FILES:
        (staged / name).write_text(f"{name} of step {step}")
    publish_checkpoint(staged, target)
    return target


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


DAMAGES = (truncate, zero, empty, remove)
