"""Train a Reinforcement Learning Teacher on one GPU.

    python train.py --config-name=teacher_rlt_mono_85gb max_steps=300 learning_rate=2e-5

Composes and validates the configuration, plans memory, builds, trains. Exit status: 0 done, 2 the call or the
configuration cannot work (nothing was started), 130 interrupted, 1 anything else.
Ctrl-C, SIGTERM or SIGHUP while training finishes the step at work and saves it; a second one stops at once. The same
call continues from the last checkpoint. A sweep (`-m`) on a GPU trains each job in a process of its own and ends with
the worst of their statuses.
"""

import json
import os
import sys
import traceback
from typing import Any

try:
    import hydra
except ModuleNotFoundError:
    sys.stderr.write(
        "The packages are not installed in this Python. Expected: the environment that ./launch_mono.sh makes.\n"
        "Run ./launch_mono.sh once, then: source .venv/bin/activate\n"
    )
    sys.exit(2)
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from core.errors import NonFiniteError, StoppedError, UserError
from core.faults import disk_fault
from core.imports import importing
from core.log import configure_logging, console, log
from core.one_gpu import show_one_gpu
from core.process import check_one_process, end_with_parent, prepare_process
from preflight.inputs import check_inputs
from preflight.unneeded import unneeded_packages
from schemas.compose import (
    JOB_OF_A_SWEEP,
    command_line,
    composition_problem,
    register_search_path,
    to_values,
    with_sweep_folders,
)
from schemas.methods import DEFAULT_METHOD, METHODS
from schemas.pipeline import PIPELINE
from schemas.run import ConfigError
from schemas.secrets import masked


@hydra.main(config_path="cfgs", config_name=METHODS[DEFAULT_METHOD].index, version_base="1.3")
def compose(composed: DictConfig) -> None:
    """Hydra's part: one call for a run, several for a sweep (`-m`)."""
    _composed.append(to_values(composed))


_composed: list[dict[str, Any]] = []


def _train_all(composed: list[dict[str, Any]]) -> int:
    """Train every run; the exit status."""
    if any(values.get("method") == PIPELINE for values in composed):
        from pipelines.run import run_pipeline

        return max(run_pipeline(values) for values in with_sweep_folders(composed))
    jobs = with_sweep_folders(composed)
    for values in jobs:
        check_inputs(values)
    show_one_gpu(jobs)
    without = unneeded_packages(jobs)
    with importing(without):  # these load torch, which takes seconds: not before the configuration is composed
        from optimization.gpu import has_gpu
        from trainers.start import train_runs
        from trainers.sweep import run_jobs

    if len(jobs) > 1 and has_gpu():
        return run_jobs([sys.executable, os.path.abspath(__file__), JOB_OF_A_SWEEP], jobs)
    for run in train_runs(jobs, lambda finished: console.print(*finished.tables()), without):
        log.info("the results are in %s", run.folder)
    return 0


def main() -> int:
    end_with_parent()
    prepare_process()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of exiting, so that there is one place for messages
    configure_logging()
    register_search_path()
    try:
        check_one_process()
        if sys.argv[1:] == [JOB_OF_A_SWEEP]:
            _composed.append(json.load(sys.stdin))
        else:
            sys.argv[1:] = command_line(sys.argv[1:])
            compose()
        if _composed:
            return _train_all(_composed)
    except (ConfigError, UserError) as error:
        return _refuse("this run cannot start", str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse("the configuration cannot be composed", composition_problem(error))
    except (NonFiniteError, StoppedError) as error:
        _refuse("training stopped", str(error))
        return 1
    except KeyboardInterrupt as error:
        outside = "not while training; whole checkpoints are kept, and the same command continues from the last one"
        log.warning("interrupted: %s", error if error.args else outside)
        return 1 if console.is_lost else 130
    except Exception as error:
        if (fault := disk_fault(error)) is not None:
            _refuse("the run could not start", fault)
            return 1
        console.copy(traceback.format_exc())  # the log of the run holds what ended it
        raise
    return 0


def _refuse(what: str, why: str) -> int:
    console.print(f"[bold red]{what}[/]")
    console.print(masked(why), markup=False, highlight=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
