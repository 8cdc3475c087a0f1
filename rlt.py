"""Train, plan, explain and score from Python or a notebook: the command line's names, checks and messages.

    from rlt import load_teacher, plan, score_texts, train

    plan("teacher_rlt_mono_85gb", gpu_gb=24)
    run = train("teacher_rlt_tiny", max_steps=2, learning_rate=1e-4)
    teacher = load_teacher(run.folder)
    explanation = teacher.explain("1+0+5+5+2", "=3")
    score_texts(["1+0+5+5+2"], ["=3"], [explanation], run=run.folder)

Importing this module loads neither torch nor a model, reads no arguments and sets up nothing. Mistakes are exceptions,
`ConfigError` and `UserError`, whose text is what the command line prints.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

_CHECKOUT = Path(__file__).resolve().parent
for _name in ("core", "schemas", "data", "planner", "optimization", "models", "generation", "rewards", "trainers"):
    _found = importlib.util.find_spec(_name)
    if _found is None or _found.origin is None or Path(_found.origin).resolve().parent.parent != _CHECKOUT:
        raise ImportError(
            f"`{_name}` is imported from {_found and _found.origin or 'nowhere'}, and rlt needs that of its checkout "
            f"{_CHECKOUT}. Start Python in a folder without a package of that name, or in the checkout."
        )

from hydra.errors import HydraException  # noqa: E402 - only now is it known whose packages the next lines import
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from core.errors import NonFiniteError, UserError  # noqa: E402
from core.log import configure_logging, log  # noqa: E402
from core.one_gpu import show_one_gpu  # noqa: E402
from core.process import prepare_process  # noqa: E402
from planner.planned import Planned, plan_config  # noqa: E402
from schemas.compose import (  # noqa: E402
    compose_run_config,
    composition_problem,
    run_config_name,
    run_config_names,
    setting_words,
)
from schemas.run import ConfigError  # noqa: E402

if TYPE_CHECKING:
    import pandas as pd

    from generation.teacher import Teacher
    from runs.summary import FinishedRun
    from scoring.texts import TextScorer

__all__ = [
    "ConfigError",
    "NonFiniteError",
    "UserError",
    "load_scorer",
    "load_teacher",
    "plan",
    "run_config_names",
    "score_texts",
    "train",
]


def train(run: str = "teacher_rlt_tiny", **settings: Any) -> "FinishedRun":
    """Train a run configuration and return its folder and summary; the same as `python train.py --config-name=RUN`.

    Settings are those of the command line: `max_steps=2`, `model_args={"lora_r": 8}` or `**{"model_args.lora_r": 8}`,
    `model_cfg="qwen25_7b_nf4"`. Relative paths start at the current folder. An unfinished run of the same settings goes
    on from its last checkpoint, as there.

    Raises:
        ConfigError, UserError: the run cannot work; nothing was loaded.
        NonFiniteError: a log-prob, reward or loss was not finite.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button: the step at work was finished and saved.
    """
    from preflight.inputs import check_inputs

    values = _compose(run, settings)
    check_inputs(values)
    show_one_gpu([values])
    _prepare()
    from trainers.start import train_runs

    (finished,) = train_runs([values])
    return finished


def plan(run: str = "teacher_rlt_tiny", **settings: Any) -> Planned:
    """The memory plan of a run: GB per phase on a GPU, as a table; `.plan` holds the numbers, `.fits` the verdict.

    Planned for `gpu_gb`, for the GPU of this machine, or for `card_gb`, the GPU that the run is for. Takes a second
    and loads nothing.

    Raises:
        ConfigError, UserError: the settings are not valid, or a model's shape is not known here.
    """
    try:
        return plan_config(run_config_name(run), None, setting_words(settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composition_problem(error)) from error


def load_teacher(run: str | Path) -> "Teacher":
    """Load the teacher of a run, from its folder or a checkpoint's: `.explain(question, solution)`, `.close()`.

    Raises:
        UserError: there is no trained teacher, or its base cannot be loaded.
    """
    _prepare()
    from generation.teacher import load_teacher

    return load_teacher(run)


def score_texts(
    questions: Sequence[str],
    solutions: Sequence[str],
    explanations: Sequence[str],
    *,
    run: str | Path,
    close_explanations: bool = True,
) -> "pd.DataFrame":
    """Every term of a run's reward for explanations of your own, one row each; see `scoring.texts.score_texts`.

    `run` is the folder of a run, or the name of a run configuration. A row that is not written in the run's format has
    no numbers and says why in its column `problem`.

    Raises:
        UserError: no row can be scored, or the run's models cannot be loaded.
    """
    _prepare()
    from scoring.texts import score_texts

    return score_texts(questions, solutions, explanations, run=run, close_explanations=close_explanations)


def load_scorer(run: str | Path) -> "TextScorer":
    """The models behind `score_texts`, loaded once for many calls of `.score(questions, solutions, explanations)`.

    `.close()` frees them.

    Raises:
        UserError: the run's models cannot be loaded.
    """
    _prepare()
    from scoring.texts import TextScorer

    return TextScorer(run)


def _compose(run: str, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        return compose_run_config(run_config_name(run), setting_words(settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composition_problem(error)) from error


def _prepare() -> None:
    """Before anything loads torch: threads that can share a CPU; log lines, where the program shows none of ours."""
    if not prepare_process():
        log.info("torch was loaded before: on a CPU, OMP_WAIT_POLICY=PASSIVE in the environment makes runs faster")
    if not log.handlers:
        configure_logging()
