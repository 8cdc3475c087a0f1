"""A collection of traces from its validated configuration to its files: cheap checks first, weights last."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from core.log import can_animate, console, log
from core.types import Role
from core.units import format_duration
from data.dataset import prepare_datasets
from data.formats import PromptFormat
from generation import Precision, check_generator
from generation.start import NUM_CANARY_ROWS, start_sampler
from models.export import EXPORT_FOLDER, remove_left_exports
from models.host import ModelHost
from models.load import check_adapter, load_tokenizers, quiet_libraries
from optimization import optimize_models, preallocate_planned, records_table
from planner.plan import MemoryPlan
from planner.teacher import choose_parking
from planner.traces import traces_settings
from rollout.scoring import RolloutScorer, check_scoring
from rollout.types import Group
from runs.run_folder import RunFolder, open_run_folder, write_summary
from runs.summary import FinishedRun, memory_by_phase
from schemas.methods import method_of
from schemas.traces import TracesRunConfig
from traces.chunks import CHUNKS_FOLDER, Chunk, finished, read_chunks, split, write_chunk
from traces.collector import TraceCollector
from traces.result import rows_of, write_traces
from traces.summary import summarise_traces
from traces.teacher import with_teacher


def collect_traces(
    config: TracesRunConfig,
    values: dict[str, Any],
    plan: MemoryPlan,
    device: torch.device,
    on_results: Callable[[FinishedRun], None],
) -> FinishedRun:
    """Check, load, collect chunk by chunk, write the traces; `on_results` is called once they are written.

    Raises:
        UserError: the run cannot work; the run folder was not touched.
    """
    config = with_teacher(config)
    tokenizer, student_tokenizer = load_tokenizers(config)
    prompt_format = PromptFormat.from_config(config)
    dataset, _ = prepare_datasets(config, tokenizer, prompt_format, config.arguments.seed)
    dataset = dataset.select(range(min(len(dataset), config.num_questions or len(dataset))))
    check_scoring(config, config.arguments.temperature, shares_tokens=student_tokenizer is None)
    check_adapter(config.model_args)
    args = config.model_args
    precision: Precision = "int8" if args.load_in_8bit else "nf4" if args.load_in_4bit else "bf16"
    check_generator(config, device, precision, args.lora_r)
    folder = open_run_folder(values, config.arguments.output_dir, config.resume)
    remove_left_exports(folder.path)
    chunks = split(len(dataset), config.questions_per_chunk)
    done = set(finished(chunks, folder.path, dataset["question"], config.num_samples))
    memory: dict[str, Any] = {"measured": "", "phases": {}}
    if missing := [chunk for chunk in chunks if chunk not in done]:
        memory = _collect(config, plan, folder, dataset, tokenizer, student_tokenizer, prompt_format, missing)
    report = method_of(config).report.object
    table = read_chunks(chunks, folder.path)
    write_traces(folder.path, table, prompt_format)
    summary = summarise_traces(rows_of(table), lambda row: row["problem"] is None) | {"memory": memory}
    write_summary(folder.path, summary)
    shutil.rmtree(folder.path / CHUNKS_FOLDER)
    result = FinishedRun(folder=folder.path, summary=summary, report=report)
    on_results(result)
    return result


def _collect(
    config: TracesRunConfig,
    plan: MemoryPlan,
    folder: RunFolder,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase | None,
    prompt_format: PromptFormat,
    chunks: Sequence[Chunk],
) -> dict[str, Any]:
    """Collect these chunks; the memory that it took."""
    quiet_libraries()
    optimizations = preallocate_planned(config, plan)
    export_folder = folder.path / EXPORT_FOLDER
    host = ModelHost(
        config,
        roles=(Role.TEACHER, Role.STUDENT),
        max_score_tokens=plan.settings.score_batch_tokens,
        max_oom_retries=config.max_oom_retries,
        student_parking=choose_parking(traces_settings(config), plan.gpu_bytes),
    )
    try:
        with closing(host):
            optimizations += optimize_models(config, host.teacher, host.student, None)
            if optimizations:
                console.print(records_table(optimizations, "optimizations of the models"))
            host.teacher.requires_grad_(False)
            sampler = start_sampler(
                config,
                host,
                tokenizer,
                dataset[:NUM_CANARY_ROWS]["prompt_ids"],
                plan,
                num_generations=config.num_samples,
                export_folder=export_folder,
            )
            scorer = RolloutScorer(
                tokenizer=tokenizer,
                prompt_format=prompt_format,
                reward_config=config,
                sampling_temperature=config.arguments.temperature,
                score=host.score,
                student_tokenizer=student_tokenizer,
            )
            collector = TraceCollector(config, host=host, sampler=sampler, scorer=scorer, tokenizer=tokenizer)
            _collect_chunks(collector, folder, dataset, chunks)
            return memory_by_phase(plan, host.meter)
    finally:
        shutil.rmtree(export_folder, ignore_errors=True)


def _collect_chunks(collector: TraceCollector, folder: RunFolder, dataset: Dataset, chunks: Sequence[Chunk]) -> None:
    start_s = time.perf_counter()
    num_questions, num_done = sum(chunk.stop - chunk.start for chunk in chunks), 0
    columns = (TextColumn("collecting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not can_animate()) as progress:
        task = progress.add_task("", total=num_questions)
        for chunk in chunks:
            rows = range(chunk.start, chunk.stop)
            groups = [Group.of_row(row) for row in dataset.select(rows)]
            table = collector(rows, groups)
            write_chunk(chunk, folder.path, table)
            num_done += len(rows)
            progress.update(task, completed=num_done)
            left_s = (time.perf_counter() - start_s) / num_done * (num_questions - num_done)
            log.info(
                "%d of %d questions  reward %.2f  chosen %d of %d  %s left",
                chunk.stop,
                len(dataset),
                sum(row["reward"] for row in table) / len(table),
                sum(row["chosen"] for row in table),
                len(table),
                format_duration(left_s),
            )
