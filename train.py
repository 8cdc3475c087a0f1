"""Train a Reinforcement Learning Teacher on one card.

    python train.py --config-name=teacher_rlt_mono_85gb max_steps=300 learning_rate=2e-5

Composes and validates the configuration, plans memory, builds, trains. Exit status: 0 done, 2 the call or the
configuration cannot work (nothing was started), 130 interrupted, 1 anything else.
Ctrl-C or SIGTERM while training finishes the step at work and saves it; a second one stops at once. The same call
continues from the last checkpoint. A sweep (`-m`) on a GPU trains each job in a process of its own and ends with the
worst of their statuses.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# Read when torch is loaded: idle threads sleep instead of spinning, so that torch and vLLM can share a CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

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

from core.errors import NonFiniteError, UserError
from core.log import configure_logging, console, log
from core.one_gpu import show_one_gpu
from schemas.compose import (
    JOB_OF_A_SWEEP,
    command_line,
    register_search_path,
    run_config_names,
    to_values,
    with_sweep_folders,
)
from schemas.llada import MaskedDiffusionRunConfig
from schemas.run import ConfigError, RunConfig, resolved_values

if TYPE_CHECKING:
    import torch

    from planner.plan import MemoryPlan


@hydra.main(config_path="cfgs", config_name="train", version_base="1.3")
def compose(composed: DictConfig) -> None:
    """Hydra's part: one call for a run, several for a sweep (`-m`)."""
    _composed.append(to_values(composed))


_composed: list[dict[str, Any]] = []


def _train_all(composed: list[dict[str, Any]]) -> int:
    """Train every run; the exit status."""
    show_one_gpu(composed)
    import torch

    from trainers.preflight import check_hardware_and_plan, load_for_this_machine
    from trainers.sweep import run_jobs

    jobs = with_sweep_folders(composed)
    if len(jobs) > 1 and torch.cuda.is_available():
        return run_jobs([sys.executable, os.path.abspath(__file__), JOB_OF_A_SWEEP], jobs)
    runs = [(load_for_this_machine(values), values) for values in jobs]

    from optimization import optimized  # imports bitsandbytes and transformers: seconds that a wrong key need not wait

    for config, composed_values in runs:
        values = resolved_values(config, composed_values)
        with optimized(config) as config:
            _TRAIN[config.method](config, values, *check_hardware_and_plan(config))
    return 0


def train_teacher(config: RunConfig, values: dict[str, Any], plan: "MemoryPlan", device: "torch.device") -> None:
    """Build the parts of the run and train: cheap checks first, weights last."""
    # Imported only now: TRL and vLLM take ten seconds, and most mistakes are found without them.
    from trainers.build import build_trainer, check_before_loading
    from trainers.summary import memory_by_phase, memory_table, summarise, summary_table

    prepared = check_before_loading(config, values, plan, device)
    trainer = build_trainer(prepared)
    try:
        trainer.train(resume_from_checkpoint=prepared.resume_from)
        trainer.finish()
        summary = summarise(prepared.folder.path, memory_by_phase(plan, trainer.host))
        console.print(summary_table(summary), memory_table(summary))
        log.info("adapter, metrics and completions are in %s", prepared.folder.path)
    finally:  # after the results are written: what vLLM does as it ends can no longer cost them
        trainer.close()
        shutil.rmtree(prepared.export_folder, ignore_errors=True)


def train_masked_diffusion(
    config: MaskedDiffusionRunConfig, values: dict[str, Any], plan: "MemoryPlan", device: "torch.device"
) -> None:
    from trainers import masked_diffusion_run

    masked_diffusion_run.train_masked_diffusion(config, values, plan, device)


_TRAIN: dict[str, Callable[..., None]] = {"rlt": train_teacher, "masked_diffusion": train_masked_diffusion}


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of exiting, so that there is one place for messages
    configure_logging()
    register_search_path()
    try:
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
        return _refuse("the configuration cannot be composed", f"{error}\nshipped: {', '.join(run_config_names())}")
    except NonFiniteError as error:
        _refuse("training stopped", str(error))
        return 1
    except KeyboardInterrupt as error:
        outside = "not while training; whole checkpoints are kept, and the same command continues from the last one"
        log.warning("interrupted: %s", error if error.args else outside)
        return 130
    return 0


def _refuse(what: str, why: str) -> int:
    console.print(f"[bold red]{what}[/]")
    console.print(why, markup=False, highlight=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
