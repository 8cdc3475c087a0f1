"""A collection of traces from its validated configuration to its files: cheap checks first, weights last."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import pyarrow
import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from core.errors import StoppedError, UserError
from core.hub import check_push, push_folder
from core.log import can_animate, console, log
from core.types import Role
from core.units import format_duration
from data.dataset import prepare_datasets
from data.formats import PromptFormat
from generation import Precision, check_generator
from generation.start import NUM_CANARY_ROWS, start_sampler
from models.export import EXPORT_FOLDER, remove_left_exports
from models.host import ModelHost
from models.load import load_tokenizers, quiet_libraries
from optimization import optimize_models, preallocate_planned, records_table
from planner.plan import MemoryPlan
from planner.teacher import choose_parking
from planner.traces import traces_settings
from rollout.scoring import RolloutScorer, check_scoring
from rollout.types import Group
from runs.files import write_whole
from runs.run_folder import RunFolder, open_run_folder, write_summary
from runs.summary import FinishedRun, memory_by_phase
from schemas.methods import method_of
from schemas.traces import TracesRunConfig
from traces.candidates import Row
from traces.card import TracesCard
from traces.chunks import CHUNKS_FOLDER, Chunk, finished, read_chunks, split, write_chunk
from traces.collector import TraceCollector
from traces.judge import Judge, with_judgement
from traces.result import CARD_FILE, DATASET_FILES, write_traces
from traces.summary import summarise_traces
from traces.teacher import with_teacher


@dataclass(frozen=True, kw_only=True)
class PreparedCollection:
    """Parts of a collection that are known before a model is loaded."""

    given: TracesRunConfig
    """The configuration as it was validated."""
    config: TracesRunConfig
    """With the teacher's weights in the place of `teacher_run`."""
    plan: MemoryPlan
    tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase | None
    prompt_format: PromptFormat
    dataset: Dataset
    folder: RunFolder
    chunks: list[Chunk]
    missing: list[Chunk]
    """Those that are still to be collected."""


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
        KeyboardInterrupt: a signal stopped it; the same command goes on after the last whole chunk.
    """
    run = _check_before_loading(config, values, plan, device)
    quiet_libraries()
    memory: dict[str, Any] = {"measured": "nothing", "phases": {}}
    with _stopped_by_signals(run):
        if run.missing:
            memory = _collect(run)
        table = read_chunks(run.chunks, run.folder.path)
        if config.judge_model is not None:
            judge = Judge(run.config, run.tokenizer, plan.settings.score_batch_tokens)
            table = with_judgement(table, judge, config.questions_per_chunk * config.num_samples)
        result = _write(run, table, memory)
    on_results(result)
    return result


def _check_before_loading(
    config: TracesRunConfig, values: dict[str, Any], plan: MemoryPlan, device: torch.device
) -> PreparedCollection:
    """Teacher, data, generator, upload; the run folder is opened last."""
    if config.push_to_hub is not None:
        check_push(config.push_to_hub)
    with_weights = with_teacher(config)
    tokenizer, student_tokenizer = load_tokenizers(with_weights)
    prompt_format = PromptFormat.from_config(config)
    dataset, _ = prepare_datasets(config, tokenizer, prompt_format, config.arguments.seed)
    dataset = dataset.select(range(min(len(dataset), config.num_questions or len(dataset))))
    check_scoring(config, config.arguments.temperature, shares_tokens=student_tokenizer is None)
    args = with_weights.model_args
    precision: Precision = args.quantisation or "bf16"
    check_generator(config, device, precision, args.lora_r)
    folder = open_run_folder(values, config.arguments.output_dir, config.resume)
    remove_left_exports(folder.path)
    chunks = split(len(dataset), config.questions_per_chunk)
    done = set(finished(chunks, folder.path, dataset["question"], config.num_samples))
    if done:
        log.info("%d of %d chunks are here already", len(done), len(chunks))
    return PreparedCollection(
        given=config,
        config=with_weights,
        plan=plan,
        tokenizer=tokenizer,
        student_tokenizer=student_tokenizer,
        prompt_format=prompt_format,
        dataset=dataset,
        folder=folder,
        chunks=chunks,
        missing=[chunk for chunk in chunks if chunk not in done],
    )


@contextmanager
def _stopped_by_signals(run: PreparedCollection) -> Iterator[None]:
    """SIGTERM and SIGHUP end a collection as Ctrl-C does: at once, since what is whole is saved."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = {kind: signal.signal(kind, stop) for kind in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        num_done = sum(chunk.file(run.folder.path).is_file() for chunk in run.chunks)
        raise KeyboardInterrupt(
            f"{num_done} of {len(run.chunks)} chunks are saved, and the same command goes on after them"
        ) from None
    finally:
        for kind, handler in earlier.items():
            signal.signal(kind, handler)


def _collect(run: PreparedCollection) -> dict[str, Any]:
    """Collect the missing chunks; the memory that it took."""
    config, export_folder = run.config, run.folder.path / EXPORT_FOLDER
    optimizations = preallocate_planned(config, run.plan)
    host = ModelHost(
        config,
        roles=(Role.TEACHER, Role.STUDENT),
        max_score_tokens=run.plan.settings.score_batch_tokens,
        max_oom_retries=config.max_oom_retries,
        student_parking=choose_parking(traces_settings(run.given), run.plan.gpu_bytes),
    )
    try:
        with closing(host):
            host.teacher.requires_grad_(False)
            optimizations += optimize_models(config, host.teacher, host.student, None)
            if optimizations:
                console.print(records_table(optimizations, "optimizations of the models"))
            _collect_chunks(run, _make_collector(run, host))
            return memory_by_phase(run.plan, host.meter)
    finally:
        shutil.rmtree(export_folder, ignore_errors=True)


def _make_collector(run: PreparedCollection, host: ModelHost) -> TraceCollector:
    config = run.config
    sampler = start_sampler(
        config,
        host,
        run.tokenizer,
        run.dataset[:NUM_CANARY_ROWS]["prompt_ids"],
        run.plan,
        num_generations=config.num_samples,
        export_folder=run.folder.path / EXPORT_FOLDER,
    )
    scorer = RolloutScorer(
        tokenizer=run.tokenizer,
        prompt_format=run.prompt_format,
        reward_config=config,
        sampling_temperature=config.arguments.temperature,
        score=host.score,
        student_tokenizer=run.student_tokenizer,
    )
    return TraceCollector(config, host=host, sampler=sampler, scorer=scorer, tokenizer=run.tokenizer)


def _collect_chunks(run: PreparedCollection, collector: TraceCollector) -> None:
    """Chunk by chunk, with a bar and a line for each; the time left is that of the questions of this process."""
    start_s, num_done = time.perf_counter(), 0
    num_questions = sum(chunk.stop - chunk.start for chunk in run.missing)
    columns = (TextColumn("collecting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not can_animate()) as progress:
        task = progress.add_task("", total=num_questions)
        for chunk in run.missing:
            rows = range(chunk.start, chunk.stop)
            table = collector(rows, [Group.of_row(row) for row in run.dataset.select(rows)])
            write_chunk(chunk, run.folder.path, table)
            num_done += len(rows)
            progress.update(task, completed=num_done)
            left_s = (time.perf_counter() - start_s) / num_done * (num_questions - num_done)
            figures = f"reward {mean(row['reward'] for row in table):.2f}  chosen {sum(row['chosen'] for row in table)}"
            log.info("question %d/%d  %s  %s left", chunk.stop, len(run.dataset), figures, format_duration(left_s))


def _write(run: PreparedCollection, table: pyarrow.Table, memory: dict[str, Any]) -> FinishedRun:
    """The dataset's files, its upload, and last the summary, whose presence says that the run is finished.

    Raises:
        StoppedError: it could not be uploaded.
    """
    config, path = run.given, run.folder.path
    write_traces(path, table, run.prompt_format)
    rows: list[Row] = table.to_pylist()
    summary = summarise_traces(rows, max_tokens=config.max_trace_tokens, malformed=config.choose_malformed)
    chosen = [row for row in rows if row["chosen"]]
    card = TracesCard(config=config, summary=summary, term_means=_means(chosen), example=chosen[0] if chosen else None)
    write_whole(path / CARD_FILE, card.markdown())
    if config.push_to_hub is not None:
        _push(run, config.push_to_hub)
    summary["memory"] = memory
    write_summary(path, summary)
    shutil.rmtree(path / CHUNKS_FOLDER)
    return FinishedRun(folder=path, summary=summary, report=method_of(config).report.object)


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Of the reward and each of its terms, where a row has them."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)] if rows else []
    values = {name: [row[name] for row in rows if row[name] == row[name]] for name in names if name != "matched"}
    return {name: mean(found) for name, found in values.items() if found}


def _push(run: PreparedCollection, repository: str) -> None:
    try:
        url = push_folder(
            run.folder.path, repository, private=run.given.push_private, kind="dataset", files=DATASET_FILES
        )
    except UserError as error:
        raise StoppedError(
            error.given,
            expected=error.expected,
            remedy=error.remedy,
            continues="the traces are written; the same command uploads them",
        ) from error
    log.info("the traces are at %s", url)
