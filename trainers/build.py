"""Building a teacher's trainer from its configuration: cheap checks first, then everything that is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from core.errors import UserError
from core.log import console
from core.types import Role
from data.dataset import prepare_datasets
from data.embedded.task import classify_explanation
from data.formats import PromptFormat
from generation import Precision, check_generator
from generation.policy import PolicySampler
from generation.start import NUM_CANARY_ROWS, start_sampler
from models.export import EXPORT_FOLDER, remove_left_exports
from models.host import ModelHost
from models.load import check_adapter, load_tokenizers, quiet_libraries
from optimization import optimize_models, preallocate_planned, records_table
from optimization.gpu import memory_of
from planner.plan import MemoryPlan
from planner.teacher import choose_parking, teacher_settings
from preflight.loggers import prepare_loggers
from rollout.scoring import RolloutScorer, check_scoring
from runs.run_folder import RunFolder, open_run_folder
from schemas.data import ARITHMETIC
from schemas.run import RunConfig
from trainers.callbacks import TEACHER_SHOWN, ConsoleProgress, MemoryWatch, MetricsFile
from trainers.grpo_args import build_grpo_args
from trainers.memory_line import MemoryLine
from trainers.teacher_grpo import TeacherGRPOTrainer


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Parts of a run that are known before a model is loaded."""

    config: RunConfig
    plan: MemoryPlan
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase | None
    prompt_format: PromptFormat
    train_dataset: Dataset
    eval_dataset: Dataset | None
    folder: RunFolder

    @property
    def export_folder(self) -> Path:
        """The teacher's base as vLLM reads it; made anew by every process, and removed at its end."""
        return self.folder.path / EXPORT_FOLDER

    @property
    def resume_from(self) -> str | None:
        return str(self.folder.checkpoint) if self.folder.checkpoint is not None else None


def check_before_loading(
    config: RunConfig, values: dict[str, Any], plan: MemoryPlan, device: torch.device
) -> PreparedRun:
    """TRL's arguments, model paths, data; the run folder is opened last.

    Raises:
        UserError, ConfigError: the run cannot work; no model was loaded and the run folder was not touched.
    """
    prepare_loggers(config.grpo.report_to, Path(config.grpo.output_dir))
    build_grpo_args(config, use_cpu=device.type == "cpu")
    tokenizer, student_tokenizer = load_tokenizers(config)
    prompt_format = PromptFormat.from_config(config)
    train_dataset, eval_dataset = prepare_datasets(config, tokenizer, prompt_format, config.grpo.seed)
    if len(train_dataset) < config.num_prompts_per_step:
        raise UserError(
            f"{len(train_dataset)} rows to train on, and a step takes {config.num_prompts_per_step} prompts",
            expected="at least one step's worth of questions",
            remedy="more rows, or a smaller train_batch_size (it is prompts x num_generations)",
        )
    check_scoring(config, config.grpo.temperature, shares_tokens=student_tokenizer is None)
    check_adapter(config.model_args)
    if not config.use_vllm_server:
        args = config.model_args
        precision: Precision = "int8" if args.load_in_8bit else "nf4" if args.load_in_4bit else "bf16"
        check_generator(config, device, precision, args.lora_r)
    folder = open_run_folder(values, config.grpo.output_dir, config.resume)
    remove_left_exports(folder.path)
    return PreparedRun(
        config=config,
        plan=plan,
        device=device,
        tokenizer=tokenizer,
        student_tokenizer=student_tokenizer,
        prompt_format=prompt_format,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        folder=folder,
    )


def build_trainer(run: PreparedRun) -> TeacherGRPOTrainer:
    """Load the models, start the generator, put the trainer together; `close()` of the trainer frees them."""
    config = run.config
    quiet_libraries()
    set_seed(config.grpo.seed)  # the adapter's initial values
    optimizations = preallocate_planned(config, run.plan)
    roles = [Role.TEACHER, Role.STUDENT, *([Role.REFERENCE] if config.grpo.beta else [])]
    host = ModelHost(
        config,
        roles=roles,
        max_score_tokens=run.plan.settings.score_batch_tokens,
        max_oom_retries=config.max_oom_retries,
        student_parking=choose_parking(teacher_settings(config), run.plan.gpu_bytes),
    )
    try:
        optimizations += optimize_models(config, host.teacher, host.student, host.reference)
        if optimizations:
            console.print(records_table(optimizations, "optimizations of the models"))
        return _assemble(run, host)
    except BaseException:
        host.close()
        raise


def _assemble(run: PreparedRun, host: ModelHost) -> TeacherGRPOTrainer:
    config = run.config
    scorer = RolloutScorer(
        tokenizer=run.tokenizer,
        prompt_format=run.prompt_format,
        reward_config=config,
        sampling_temperature=config.grpo.temperature,
        score=host.score,
        student_tokenizer=run.student_tokenizer,
    )
    memory = MemoryLine(device=run.device, planned_bytes=run.plan.max_bytes, peaks=host.meter.peaks)
    progress = ConsoleProgress(TEACHER_SHOWN, memory)
    sampler = None if config.use_vllm_server else _make_sampler(run, host, progress)
    watch = MemoryWatch(host.meter, limit_bytes=memory_of(run.device), max_warnings=config.max_growth_warnings)
    args = build_grpo_args(
        config,
        use_cpu=run.device.type == "cpu",
        resuming=run.folder.checkpoint is not None,
        num_held_out=len(run.eval_dataset) if run.eval_dataset is not None else 0,
    )
    args.output_dir = str(run.folder.path)
    return TeacherGRPOTrainer(
        config=config,
        args=args,
        host=host,
        plan=run.plan,
        sampler=sampler,
        scorer=scorer,
        train_dataset=run.train_dataset,
        eval_dataset=run.eval_dataset,
        tokenizer=run.tokenizer,
        callbacks=[MetricsFile(run.folder.metrics_file), progress, watch],
        classify_explanation=_classifier(config),
    )


def _make_sampler(run: PreparedRun, host: ModelHost, progress: ConsoleProgress) -> PolicySampler:
    """The canary's tokens are the ends of training prompts, which hold what the policy is trained on."""
    return start_sampler(
        run.config,
        host,
        run.tokenizer,
        run.train_dataset[:NUM_CANARY_ROWS]["prompt_ids"],
        run.plan,
        num_generations=run.config.grpo.num_generations,
        export_folder=run.export_folder,
        on_progress=progress.phase,
    )


def _classifier(config: RunConfig) -> Callable[[str, str, str], str] | None:
    return classify_explanation if config.dataset_id_or_path == ARITHMETIC else None
