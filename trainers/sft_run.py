"""A run of supervised fine-tuning from its validated configuration to its summary: cheap checks first, weights last."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from core.errors import UserError
from core.log import console, log
from core.types import Phase
from data.formats import PromptFormat
from data.supervised import prepare_supervised
from models.load import add_adapter, check_adapter, load_base, load_tokenizer, quiet_libraries
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from optimization import optimize_models, preallocate_planned, records_table
from optimization.gpu import memory_of
from planner.plan import MemoryPlan
from preflight.loggers import prepare_loggers
from runs.run_folder import RunFolder, open_run_folder
from runs.summary import FinishedRun, memory_by_phase, summarise
from schemas.methods import method_of
from schemas.sft import SupervisedRunConfig
from trainers.arguments import library_arguments
from trainers.callbacks import SFT_SHOWN, ConsoleProgress, MemoryWatch, MetricsFile
from trainers.memory_line import MemoryLine
from trainers.sft import SupervisedTrainer


def train_supervised(
    config: SupervisedRunConfig,
    values: dict[str, Any],
    plan: MemoryPlan,
    device: torch.device,
    on_results: Callable[[FinishedRun], None],
) -> FinishedRun:
    """Check, load, train, evaluate, save.

    Raises:
        UserError, ConfigError: the run cannot work; the run folder was not touched.
    """
    prepare_loggers(config.sft.report_to, Path(config.sft.output_dir))
    build_sft_args(config, use_cpu=device.type == "cpu")
    check_adapter(config.model_args)
    prepared = prepare_rows(config)
    folder = open_run_folder(values, config.sft.output_dir, config.resume)
    trainer = build_supervised_trainer(config, plan, device, *prepared, folder)
    trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint is not None else None)
    trainer.finish()
    report = method_of(config).report.object
    summary = summarise(folder.path, memory_by_phase(plan, trainer.meter), report)
    finished = FinishedRun(folder=folder.path, summary=summary, report=report)
    on_results(finished)
    return finished


def prepare_rows(config: SupervisedRunConfig) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """The tokenizer, the rows to train on and those that are held out.

    Raises:
        UserError: as `prepare_supervised`, or there are fewer rows than a step takes.
    """
    tokenizer = load_tokenizer(config.model_name_or_path, config.model_args)
    prompt_format = PromptFormat.from_config(config)
    train_dataset, eval_dataset = prepare_supervised(config, tokenizer, prompt_format, config.sft.seed)
    if len(train_dataset) < config.train_batch_size:
        raise UserError(
            f"{len(train_dataset)} rows to train on, and train_batch_size is {config.train_batch_size}",
            expected="at least one step's worth of rows",
            remedy="more data, or a smaller train_batch_size",
        )
    return tokenizer, train_dataset, eval_dataset


def build_sft_args(
    config: SupervisedRunConfig, *, use_cpu: bool, resuming: bool = False, num_held_out: int | None = None
) -> SFTConfig:
    """TRL's arguments: what the configuration sets, and what follows from our own settings.

    `num_held_out: None` is what the configuration asks for; a small dataset may have none to hold out. One training
    step is one optimizer step over the whole batch: micro-batches are made inside it (trainers/sft.py).

    Raises:
        ConfigError: TRL or transformers refuse a value (trainers/arguments.py).
    """
    values: dict[str, Any] = config.sft.model_dump(exclude_unset=True)
    num_held_out = config.num_eval_prompts if num_held_out is None else num_held_out
    has_eval = num_held_out > 0 and values.get("eval_strategy", "no") != "no"
    values |= {
        "use_cpu": use_cpu,
        "per_device_train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "eval_strategy": values.get("eval_strategy", "no") if has_eval else "no",
        "eval_on_start": has_eval and bool(values.get("eval_on_start")) and not resuming,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return library_arguments(SFTConfig, values)


def load_trained_model(config: SupervisedRunConfig, device: torch.device) -> Any:
    """The base in the run's precision, with an adapter where the run trains one.

    Raises:
        UserError: the model cannot be loaded.
    """
    base = load_base(config.model_name_or_path, config.model_args, device)
    return add_adapter(base, config.model_args) if config.trainable_weights == "adapter" else base.requires_grad_(True)


def build_supervised_trainer(
    config: SupervisedRunConfig,
    plan: MemoryPlan,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    folder: RunFolder,
) -> SupervisedTrainer:
    """Load the model and put the trainer together."""
    quiet_libraries()
    set_seed(config.sft.seed)  # a new adapter's initial values
    meter = PhaseMeter(device)
    optimizations = preallocate_planned(config, plan)
    with meter.phase(Phase.LOAD):
        model = load_trained_model(config, device)
    optimizations += optimize_models(config, model, None, None)
    if optimizations:
        console.print(records_table(optimizations, "optimizations of the model"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    log.info("the model is on %s; %s of %s parameters are trained", device, f"{trained:,}", f"{everything:,}")
    args = build_sft_args(
        config,
        use_cpu=device.type == "cpu",
        resuming=folder.checkpoint is not None,
        num_held_out=len(eval_dataset) if eval_dataset is not None else 0,
    )
    args.output_dir = str(folder.path)
    memory = MemoryLine(device=device, planned_bytes=plan.max_bytes, peaks=meter.peaks)
    watch = MemoryWatch(meter, limit_bytes=memory_of(device), max_warnings=config.max_growth_warnings)
    return SupervisedTrainer(
        config=config,
        args=args,
        plan=plan,
        meter=meter,
        retries=MemoryRetries(meter, max_retries=config.max_oom_retries),
        model=model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
        callbacks=[MetricsFile(folder.metrics_file), ConsoleProgress(SFT_SHOWN, memory), watch],
    )
