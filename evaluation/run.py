"""An evaluation from its validated configuration to its table: cheap checks first, then one model after another."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from rich.progress import Progress, TaskID

from core.errors import UserError
from core.log import can_animate, console, log
from core.types import Phase
from data.formats import PromptFormat
from evaluation.answers import final_answer, is_right, stated_solution
from evaluation.engine import Answerer, answerer
from evaluation.questions import Question, encoded_prompts, load_questions
from evaluation.results import GREEDY, SAMPLED, results_of
from evaluation.store import EVALUATION_FILE, SampleStore
from generation.choose import choose_engine
from generation.policy import sampling_seeds
from models.load import max_positions, quiet_libraries
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from models.trained import StoredModel, open_model
from planner.plan import MemoryPlan
from rollout.types import Completion
from runs.files import write_whole
from runs.run_folder import open_run_folder, write_summary
from runs.summary import FinishedRun, memory_by_phase
from schemas.evaluate import EvaluateRunConfig, Prompt
from schemas.methods import method_of

_STREAM = 2
"""Of seeds; those below are a teacher's run's (generation/policy.py)."""


def evaluate_models(
    config: EvaluateRunConfig,
    values: dict[str, Any],
    plan: MemoryPlan,
    device: torch.device,
    on_results: Callable[[FinishedRun], None],
) -> FinishedRun:
    """Let each model answer every question, judge the answers, write evaluation.json and samples.parquet.

    Chunks of `generation_aggregation_steps` questions are kept as soon as they are judged; an evaluation that was cut
    off goes on behind them, and its outputs are those of one that was not.

    Raises:
        UserError, ConfigError: it cannot work; the run folder was not touched.
    """
    models = [open_model(name, config.model_args) for name in config.models]
    _check_lengths(config, models)
    choose_engine(config.generator, device)
    questions = load_questions(config)
    folder = open_run_folder(values, config.sampling.output_dir, config.resume)
    quiet_libraries()
    store, meter = SampleStore(folder.path), PhaseMeter(device)
    retries = MemoryRetries(meter, max_retries=config.max_oom_retries)
    starts = range(0, len(questions), config.generation_aggregation_steps)
    chunks = [range(start, min(start + config.generation_aggregation_steps, len(questions))) for start in starts]
    for number, model in enumerate(models):
        left = [chunk for chunk in chunks if not store.has(model, number, chunk)]
        if len(left) < len(chunks):
            log.info(
                "%s: %d of %d chunks of questions are there already", model.name, len(chunks) - len(left), len(chunks)
            )
        if left:
            log.info("%s answers (%d of %d)", model.name, number + 1, len(models))
            with answerer(model, config, plan=plan, meter=meter, retries=retries, scratch=folder.path) as engine:
                save = partial(store.save, model, number)
                _answer(engine, questions, left, config, config.prompt_of(number), meter, save)
    tables = [store.load(model, number, chunks).assign(model=model.name) for number, model in enumerate(models)]
    samples = pd.concat(tables, ignore_index=True)
    store.finish(samples)
    results = results_of(samples, config)
    write_whole(folder.path / EVALUATION_FILE, json.dumps(results, indent=2) + "\n")
    summary = {"evaluation": results, "memory": memory_by_phase(plan, meter)}
    write_summary(folder.path, summary)
    store.remove_chunks()
    finished = FinishedRun(folder=folder.path, summary=summary, report=method_of(config).report.object)
    on_results(finished)
    return finished


def _check_lengths(config: EvaluateRunConfig, models: Sequence[StoredModel]) -> None:
    """
    Raises:
        UserError: prompt and answer together may be longer than a model reads.
    """
    row_len = config.max_prompt_length + config.sampling.max_completion_length
    for model in models:
        limit = max_positions(model.weights, model.args)
        if limit is not None and row_len > limit:
            raise UserError(
                f"max_prompt_length={config.max_prompt_length} and max_completion_length="
                f"{config.sampling.max_completion_length}, and {model.name} reads {limit} tokens",
                expected="prompt and answer within what each model reads",
                remedy=f"max_completion_length={max(1, limit - config.max_prompt_length)}, or a shorter "
                "max_prompt_length",
            )


def _answer(
    engine: Answerer,
    questions: Sequence[Question],
    chunks: Sequence[range],
    config: EvaluateRunConfig,
    prompt: Prompt,
    meter: PhaseMeter,
    save: Callable[[range, dict[str, list[Any]]], None],
) -> None:
    """Sample, judge and save chunk after chunk."""
    prompts = encoded_prompts(questions, prompt, config, engine.tokenizer)
    judge = partial(_judged, config=config, prompt=prompt, tokenizer=engine.tokenizer)
    passes = [(SAMPLED, engine.sampled, config.num_samples), *([(GREEDY, engine.greedy, 1)] if config.greedy else [])]
    rows_per_question = sum(num_samples for _, _, num_samples in passes)
    with Progress(console=console, transient=True, disable=not can_animate()) as progress:
        task = progress.add_task("answers", total=rows_per_question * sum(map(len, chunks)))
        for chunk in chunks:
            rows: list[dict[str, Any]] = []
            for decoding, settings, num_samples in passes:
                with meter.phase(Phase.GENERATE):
                    engine.generator.sampling = settings
                    completions = engine.generator.generate(
                        [prompts[i] for i in chunk],
                        num_samples,
                        _seeds(config, chunk, num_samples),
                        on_progress=partial(_show, progress, task, progress.tasks[task].completed),
                    )
                rows += [
                    {
                        "question_number": chunk[row // num_samples],
                        "decoding": decoding,
                        "sample": row % num_samples,
                        **judge(questions[chunk[row // num_samples]], completion),
                    }
                    for row, completion in enumerate(completions)
                ]
            save(chunk, {name: [row[name] for row in rows] for name in rows[0]})


def _show(progress: Progress, task: TaskID, num_before: float, num_done: int, num_rows: int) -> None:
    progress.update(task, completed=num_before + num_done)


def _seeds(config: EvaluateRunConfig, chunk: range, num_samples: int) -> list[int]:
    """One seed for each row, whatever chunk it is in; the same for every model, so that differences vary less."""
    return [
        seed
        for number in chunk
        for seed in sampling_seeds(config.sampling.seed, stream=_STREAM, step=number, num_rows=num_samples)
    ]


def _judged(
    question: Question, completion: Completion, *, config: EvaluateRunConfig, prompt: Prompt, tokenizer: Any
) -> dict[str, Any]:
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    tags = PromptFormat.from_config(config).tags
    answer = stated_solution(text, tags) if prompt == "student" else final_answer(text)
    return {
        "question": question.text,
        "solution": question.solution,
        "text": text,
        "answer": answer,
        "right": is_right(answer, question.solution, config.scoring),
        "num_tokens": len(completion.token_ids),
        "finished": completion.finish_reason == "stop",
        "seed": completion.seed,
    }
