"""Train a Reinforcement Learning Teacher on one card.

    python train.py --config-name=teacher_rlt_mono_85gb max_steps=300 learning_rate=2e-5

Composes and validates the configuration, plans memory, builds, trains. Exit status: 0 done, 2 the call or the
configuration cannot work (nothing was started), 130 interrupted (the same call continues), 1 anything else.
"""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from core.errors import UserError
from core.log import configure_logging, console, log
from schemas.compose import register_search_path, run_config_names, to_hydra_overrides, to_values, with_run_name
from schemas.run import ConfigError, RunConfig, load_run_config


@hydra.main(config_path="cfgs", config_name="train", version_base="1.3")
def run(composed: DictConfig) -> None:
    values = to_values(composed)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        values["output_dir"] += f"/{HydraConfig.get().job.override_dirname}"
    train_teacher(load_run_config(values), values)


def train_teacher(config: RunConfig, values: dict) -> None:
    """Build every part of the run and train. Cheap checks come first, weights last."""
    from trainers.preflight import check_hardware_and_plan

    plan, device = check_hardware_and_plan(config)

    from data.dataset import prepare_datasets
    from data.formats import make_prompt_format
    from generation import make_generator
    from generation.canary import Canary
    from models.host import ModelHost
    from models.load import load_tokenizer
    from rewards.rollout import RolloutScorer
    from trainers.grpo_args import build_grpo_args
    from trainers.run_folder import open_run_folder

    build_grpo_args(config, use_cpu=device.type == "cpu")
    tokenizer = load_tokenizer(config.model_name_or_path, config.model_args)
    prompt_format = make_prompt_format(config)
    train_dataset, eval_dataset = prepare_datasets(config, tokenizer, prompt_format, seed=config.grpo.seed)
    folder = open_run_folder(values, config.grpo.output_dir, config.resume)
    host = ModelHost(config)
