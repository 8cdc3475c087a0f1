"""The experiment loggers that `report_to` names, made ready before anything is loaded."""

import importlib.util
import os
from pathlib import Path

from core.errors import UserError
from core.log import log

_PACKAGES = ("wandb", "tensorboard", "trackio")


def prepare_loggers(report_to: str | list[str] | None, run_dir: Path) -> None:
    """Check that each logger is installed; let wandb work without an account and keep its files in the run's folder.

    Raises:
        UserError: a name that is not known, or a package that is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name == "none":
            continue
        if name not in _PACKAGES:
            raise UserError(
                f"`report_to` names {name!r}",
                expected=f"none, or one or more of {', '.join(_PACKAGES)}",
                remedy="report_to=none; metrics.jsonl holds every figure in any case",
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"`report_to` names {name}, and it is not installed",
                expected=f"the package {name} in this environment",
                remedy=f"pip install {name}, or report_to=none",
            )
    if "wandb" in names:
        _prepare_wandb(run_dir)


def _prepare_wandb(run_dir: Path) -> None:
    import wandb

    os.environ.setdefault("WANDB_DIR", str(run_dir))
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # wandb reads its environment once; the next use reads it again
        log.info("wandb: no account on this machine, so it works offline; `wandb sync` sends its folder later")
