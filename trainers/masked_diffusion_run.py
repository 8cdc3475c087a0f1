"""A masked-diffusion run from its validated configuration to its summary: what costs little is checked first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from core.errors import UserError
from core.log import console, log
from core.types import Phase
from data.formats import PromptFormat
from data.masked_diffusion import pack, prepare_samples
from data.samples import Sample
from models.llada import MASK_TOKEN, LladaModel, new_llada
from models.load import add_adapter, load_base, load_tokenizer, quiet_libraries
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from optimization import optimize_models, preallocate_planned, records_table
from optimization.gpu import memory_of
from planner.plan import MemoryPlan
from preflight.loggers import prepare_loggers
from runs.run_folder import RunFolder, open_run_folder
from runs.summary import FinishedRun, memory_by_phase, summarise
from schemas.llada import MaskedDiffusionRunConfig
from schemas.methods import method_of
from schemas.run import ConfigError
from trainers.callbacks import DIFFUSION_SHOWN, ConsoleProgress, MemoryWatch, MetricsFile
from trainers.masked_diffusion import MaskedDiffusionTrainer
from trainers.memory_line import MemoryLine


def train_masked_diffusion(
    config: MaskedDiffusionRunConfig,
    values: dict[str, Any],
    plan: MemoryPlan,
    device: torch.device,
    on_results: Callable[[FinishedRun], None],
) -> FinishedRun:
    """Check, load, train, evaluate, save.

    Raises:
        UserError, ConfigError: the run cannot work; the run folder was not touched.
    """
    prepare_loggers(config.args.report_to, Path(config.args.output_dir))
    build_training_args(config, use_cpu=device.type == "cpu")
    tokenizer = load_diffusion_tokenizer(config)
    prompt_format = PromptFormat.from_config(config)
    train_samples, eval_samples = prepare_samples(config, tokenizer, prompt_format, config.args.seed)
    rows = list(pack(train_samples, config.row_length)) if config.packing else [[sample] for sample in train_samples]
    if len(rows) < config.train_batch_size:
        raise UserError(
            f"{len(rows)} rows to train on, and train_batch_size is {config.train_batch_size}",
            expected="at least one step's worth of rows",
            remedy="more data, or a smaller train_batch_size",
        )
    log.info("%d samples to train on in %d rows, %d held out", len(train_samples), len(rows), len(eval_samples))
    folder = open_run_folder(values, config.args.output_dir, config.resume)
    trainer = build_diffusion_trainer(config, plan, device, tokenizer, rows, eval_samples, folder)
    trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint is not None else None)
    trainer.finish()
    report = method_of(config).report.object
    summary = summarise(folder.path, memory_by_phase(plan, trainer.meter), report)
    finished = FinishedRun(folder=folder.path, summary=summary, report=report)
    on_results(finished)
    return finished


def build_training_args(
    config: MaskedDiffusionRunConfig, *, use_cpu: bool, resuming: bool = False, num_held_out: int | None = None
) -> TrainingArguments:
    """transformers' arguments: what the configuration sets, and what follows from our own settings.

    `num_held_out: None` is what the configuration asks for; a small dataset may have none to hold out.

    Raises:
        ConfigError: transformers refuses a value.
    """
    values: dict[str, Any] = config.args.model_dump(exclude_unset=True)
    num_held_out = config.num_eval_prompts if num_held_out is None else num_held_out
    has_eval = num_held_out > 0 and values.get("eval_strategy", "no") != "no"
    values |= {
        "use_cpu": use_cpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": values.get("eval_strategy", "no") if has_eval else "no",
        "eval_on_start": has_eval and bool(values.get("eval_on_start")) and not resuming,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"- refused by the trainer: {error}") from error


def load_diffusion_tokenizer(config: MaskedDiffusionRunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; a new model's gets a mask token where it has none.

    Raises:
        UserError: it cannot be loaded, or has more tokens than the new model's vocabulary.
    """
    name = config.tokenizer_name_or_path or config.model_name_or_path
    assert name is not None  # the schema sees to it
    tokenizer = load_tokenizer(name, config.model_args)
    if config.new_model is not None:
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        if len(tokenizer) > config.new_model.vocab_size:
            raise UserError(
                f"`new_model.vocab_size` {config.new_model.vocab_size} for a tokenizer of {len(tokenizer)} tokens",
                expected="a row of the embedding for each token, the mask among them",
                remedy=f"set new_model.vocab_size={-(-len(tokenizer) // 64) * 64}",
            )
    return tokenizer


def load_diffusion_model(
    config: MaskedDiffusionRunConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """The network to train: new, or loaded in the run's precision; with an adapter where the run trains one.

    Raises:
        UserError: the model cannot be loaded, or is not a masked-diffusion model.
    """
    args = config.model_args
    if config.new_model is not None:
        return new_llada(config.new_model, args, tokenizer).to(device)
    assert config.model_name_or_path is not None  # the schema sees to it
    base = load_base(config.model_name_or_path, args, device)
    if not isinstance(base, LladaModel) or base.config.mask_token_id is None:
        raise UserError(
            f"{config.model_name_or_path!r} is a {type(base).__name__}",
            expected="a masked-diffusion model of model_type llada, with mask_token_id in its config.json",
            remedy="GSAI-ML/LLaDA-8B-Base, GSAI-ML/LLaDA-8B-Instruct, or the output folder of a run of this method",
        )
    return add_adapter(base, args) if config.trainable_weights == "adapter" else base.requires_grad_(True)


def build_diffusion_trainer(
    config: MaskedDiffusionRunConfig,
    plan: MemoryPlan,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[Sample]],
    eval_samples: list[Sample],
    folder: RunFolder,
) -> MaskedDiffusionTrainer:
    """Load or make the model and put the trainer together."""
    quiet_libraries()
    set_seed(config.args.seed)  # a new model's or adapter's initial values
    meter = PhaseMeter(device)
    optimizations = preallocate_planned(config, plan)
    with meter.phase(Phase.LOAD):
        model = load_diffusion_model(config, device, tokenizer)
    optimizations += optimize_models(config, model, None, None)
    if optimizations:
        console.print(records_table(optimizations, "optimizations of the model"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    log.info("the model is on %s; %s of %s parameters are trained", device, f"{trained:,}", f"{everything:,}")
    args = build_training_args(
        config,
        use_cpu=device.type == "cpu",
        resuming=folder.checkpoint is not None,
        num_held_out=len(eval_samples),
    )
    args.output_dir = str(folder.path)
    memory = MemoryLine(device=device, planned_bytes=plan.max_bytes, peaks=meter.peaks)
    progress = ConsoleProgress(DIFFUSION_SHOWN, memory)
    watch = MemoryWatch(meter, limit_bytes=memory_of(device), max_warnings=config.max_growth_warnings)
    return MaskedDiffusionTrainer(
        config=config,
        args=args,
        model=model,
        plan=plan,
        meter=meter,
        retries=MemoryRetries(meter, max_retries=config.max_oom_retries),
        train_rows=rows,
        eval_samples=eval_samples,
        tokenizer=tokenizer,
        tags=PromptFormat.from_config(config).tags,
        callbacks=[MetricsFile(folder.metrics_file), progress, watch],
        on_progress=progress.phase,
    )
