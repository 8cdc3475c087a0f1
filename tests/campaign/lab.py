"""The tiny runs of the campaign, the folder of each trial, and the comparison of a run with an uninterrupted one."""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.child import Call
from tests.campaign.faults import BALLAST, Fault
from tests.campaign.process import TRACEBACK, Ended, Process, Starter
from tests.helpers import tiny_run

RUN = "run"
EXACT = 1e-6
_NOT_COMPARED = ("time/", "memory/", "tokens_per_s/", "step_time", "train_runtime", "train_samples", "train_steps")
_SMALL = ("max_steps=5", "save_steps=2", "eval_steps=3", "logging_steps=1", "num_eval_prompts=2", f"output_dir={RUN}")
_TEACHER = (
    "--config-name=teacher_rlt_tiny",
    *("train_batch_size=4", "per_device_train_batch_size=4", "num_generations=2", "max_completion_length=6"),
    *("sync_ref_model=true", "ref_model_sync_steps=3", "canary_tolerance=0.5"),
)
_DIFFUSION = (
    "--config-name=llada_tiny",
    *("train_batch_size=4", "per_device_train_batch_size=2", "num_likelihood_samples=2", "sampling_steps=2"),
    "num_sampled_prompts=2",
)
_POINTS = (
    "accelerate.optimizer:AcceleratedOptimizer.step",
    "runs.checkpoints:publish_checkpoint",
    "runs.checkpoints:rotate_checkpoints",
    "runs.metrics:append_metrics",
    "runs.run_folder:open_run_folder",
    "runs.summary:summarise",
    "trainers.base:RunTrainer._save_checkpoint",
    "trainers.base:RunTrainer.evaluate",
    "trainers.base:RunTrainer.finish",
)
_TEACHER_POINTS = (
    *_POINTS,
    "generation.canary:Canary.check",
    "generation.policy:PolicySampler.__call__",
    "rewards.rlt:RLTReward.__call__",
    "rollout.logprobs:score_spans",
    "rollout.scoring:RolloutScorer.__call__",
    "runs.run_folder:write_evaluation",
    "trainers.teacher_grpo:TeacherGRPOTrainer._compute_loss",
)


@dataclass(frozen=True)
class Program:
    """A kind of run. `points` are the functions of it that faults are aimed at."""

    name: str
    words: tuple[str, ...]
    points: tuple[str, ...]


TRANSFORMERS = Program(
    "transformers",
    (*_TEACHER, *_SMALL, "generator=transformers"),
    (*_TEACHER_POINTS, "generation.transformers_engine:TransformersGenerator._sample"),
)
VLLM = Program(
    "vllm",
    (*_TEACHER, *_SMALL, "generator=vllm"),
    (
        *_TEACHER_POINTS,
        "generation.vllm_engine:_start_engine",
        "generation.vllm_engine:VLLMGenerator._run",
        "generation.vllm_engine:VLLMGenerator.sync_adapter",
        "generation.vllm_engine:VLLMGenerator._load_adapter",
        "generation.vllm_engine:VLLMGenerator.close",
        "models.export:write_checkpoint",
    ),
)
DIFFUSION = Program(
    "masked diffusion",
    (*_DIFFUSION, *_SMALL),
    (*_POINTS, "trainers.masked_diffusion:MaskedDiffusionTrainer.compute_loss"),
)
_SUPERVISED = ("train_batch_size=4", "per_device_train_batch_size=2", "max_length=64")
STUDENT = Program(
    "student",
    ("--config-name=student_sft_tiny", *_SUPERVISED, *_SMALL),
    (*_POINTS, "rollout.logprobs:score_spans", "trl.trainer.sft_trainer:SFTTrainer.compute_loss"),
)
WARM_UP = Program(
    "warm-up",
    ("--config-name=teacher_sft_tiny", *_SUPERVISED, *_SMALL),
    (*_POINTS, "rollout.logprobs:score_spans", "trl.trainer.sft_trainer:SFTTrainer.compute_loss"),
)


@dataclass(frozen=True)
class Reference:
    """A run without faults."""

    folder: Path
    counts: Mapping[str, int]
    """How often it reached each point."""
    seconds: float


class Trial:
    """A folder of its own, and runs of one program in it."""

    def __init__(self, lab: "Lab", program: Program, folder: Path) -> None:
        self.lab, self.program, self.folder = lab, program, folder
        self.shared_memory = folder / "shm"
        folder.mkdir(parents=True, exist_ok=True)
        self.shared_memory.mkdir(mode=0o1777)

    @property
    def run(self) -> Path:
        return self.folder / RUN

    def call(self, *words: str, faults: Sequence[Fault] = (), environment: Mapping[str, str | None] = {}) -> Call:
        return Call(
            words=(*self.program.words, *self.lab.words_of(self.program), *words),
            folder=self.folder,
            faults=tuple(faults),
            environment=environment,
            shared_memory=self.shared_memory if os.geteuid() == 0 else None,
        )

    def start(self, *words: str, faults: Sequence[Fault] = ()) -> Process:
        return self.lab.starter.fork(self.call(*words, faults=faults))

    def end(self, *words: str, faults: Sequence[Fault] = ()) -> Ended:
        return self.start(*words, faults=faults).end()

    def continued(self, *, but_for: Collection[str] = ()) -> list[str]:
        """Give the same command once more; what is wrong with it, or with the run that it leaves."""
        ended = self.end()
        if ended.status != 0:
            return [f"the same command ended with {ended.status}:\n{ended.last_lines}"]
        problems = [f"the same command shows a traceback:\n{ended.last_lines}"] * bool(ended.num_tracebacks)
        return problems + self.differences(but_for=but_for)

    def differences(self, *, but_for: Collection[str] = (), tolerance: float = EXACT) -> list[str]:
        """From the program's uninterrupted run, as `differences` has them, and what lies outside the run's folder."""
        reference = self.lab.reference(self.program).folder
        found = differences(self.run, reference, but_for, tolerance)
        # The semaphores of multiprocessing are removed by a process that does not see this /dev/shm.
        left = [path for path in self.shared_memory.iterdir() if not path.name.startswith("sem.")]
        found += [f"left in /dev/shm: {path.name}" for path in left]
        kept = {RUN, self.shared_memory.name, BALLAST}
        found += [
            f"left beside the run: {path.name}"
            for path in self.folder.iterdir()
            if path.name not in kept and not path.name.startswith(f"{RUN}.")
        ]
        return found

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Lab:
    """What the campaigns share: the processes, the tiny model and data, references, the seed, and how many at a time.

    Args:
        base: folder for everything; that of a lost trial stays there.
        scale: factor of every campaign's number of trials.
    """

    def __init__(self, base: Path, *, seed: int, scale: float, jobs: int) -> None:
        self.base, self.seed, self.scale, self.jobs = base, seed, scale, jobs
        (base / "consoles").mkdir(parents=True)
        self.starter = Starter(base / "consoles")
        self.starter.call_function(tiny_run.write_random_model, base / "model")
        rows = [{"question": f"{i}+{i}", "solution": f"={2 * i}", "reasoning_trace": f"{i};"} for i in range(12)]
        self.rows = base / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._references: dict[str, Reference] = {}
        self._lock = threading.RLock()
        self._num_trials = 0

    def words_of(self, program: Program) -> list[str]:
        """Model and data, which lie where this lab is."""
        words = [f"dataset_id_or_path={self.rows}"]
        if program is not DIFFUSION:
            words.append(f"model_name_or_path={self.base / 'model'}")
        if program in (TRANSFORMERS, VLLM):
            words.append(f"student_model={self.base / 'model'}")
        return words

    def random(self, what: str) -> random.Random:
        """A generator for a campaign: the seed's, whatever else runs."""
        return random.Random(f"{self.seed} {what}")

    def number(self, at_scale_1: int) -> int:
        return max(1, round(at_scale_1 * self.scale))

    def trial(self, program: Program, folder: Path | None = None) -> Trial:
        with self._lock:
            self._num_trials += 1
            folder = folder or self.base / f"trial-{self._num_trials:05d}"
        return Trial(self, program, folder)

    def reference(self, program: Program) -> Reference:
        with self._lock:
            if program.name not in self._references:
                self._references[program.name] = self._make_reference(program)
            return self._references[program.name]

    def _make_reference(self, program: Program) -> Reference:
        trial = self.trial(program)
        counts = trial.folder / "counts.json"
        call = trial.call()
        whole = Call(**vars(call) | {"points": program.points, "counts": counts})
        ended = self.starter.fork(whole).end()
        assert ended.status == 0 and TRACEBACK not in ended.text, f"{program.name}: {ended.status}\n{ended.text}"
        reached = json.loads(counts.read_text())
        never = [point for point in program.points if point not in reached]
        assert not never, f"{program.name} never reaches {', '.join(never)}: aim elsewhere"
        return Reference(trial.run, reached, ended.seconds)

    def each(self, things: Iterable[Any], try_it: Callable[[Any], object]) -> None:
        """Call `try_it` for each, `jobs` at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(try_it, things):
                pass


def differences(run: Path, reference: Path, but_for: Collection[str] = (), tolerance: float = EXACT) -> list[str]:
    """In what a run differs from another one that was not disturbed: metrics, adapter or model, tables, files.

    Args:
        but_for: patterns of files that are not looked at.
        tolerance: of metrics and weights.
    """
    if not (run / "summary.json").is_file():
        return ["there is no summary.json"]
    found = []
    ours, theirs = (
        {name for name in _files(folder) if not any(fnmatch(name, pattern) for pattern in but_for)}
        for folder in (run, reference)
    )
    found += [f"missing: {name}" for name in sorted(theirs - ours)]
    found += [f"left behind: {name}" for name in sorted(ours - theirs)]
    for name in sorted(ours & theirs):
        compare = _COMPARISONS.get(name.rpartition("/")[2]) or _COMPARISONS.get(Path(name).suffix)
        problem = compare(run / name, reference / name, tolerance) if compare else None
        if problem:
            found.append(f"{name}: {problem}")
    return found


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def comparable(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file without times and memory."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [line for line in lines if "train_loss" not in line]
    return [{k: v for k, v in line.items() if not k.startswith(_NOT_COMPARED)} for line in kept]


def _compare_metrics(ours: Path, theirs: Path, tolerance: float) -> str | None:
    a, b = comparable(ours), comparable(theirs)
    if [line["step"] for line in a] != [line["step"] for line in b]:
        return f"steps {[line['step'] for line in a]} and not {[line['step'] for line in b]}"
    for x, y in zip(a, b, strict=True):
        if x != pytest.approx(y, abs=tolerance):
            keys = [key for key in x.keys() | y.keys() if x.get(key) != pytest.approx(y.get(key), abs=tolerance)]
            return f"step {x['step']}: {', '.join(f'{k} {x.get(k)} and not {y.get(k)}' for k in sorted(keys)[:3])}"
    return None


def _compare_tensors(ours: Path, theirs: Path, tolerance: float) -> str | None:
    from safetensors.numpy import load_file

    a, b = load_file(ours), load_file(theirs)
    if a.keys() != b.keys():
        return "other tensors"
    apart = max((float(abs(a[name] - b[name]).max()) for name in a if a[name].size), default=0.0)
    return None if apart <= tolerance else f"weights are {apart:.2g} apart"


def _compare_tables(ours: Path, theirs: Path, tolerance: float) -> str | None:
    import pyarrow.parquet

    columns = ["step", "completion"]
    a, b = (pyarrow.parquet.ParquetFile(file).read(columns=columns, use_threads=False) for file in (ours, theirs))
    return None if a.equals(b) else "other completions"


def _compare_summaries(ours: Path, theirs: Path, tolerance: float) -> str | None:
    a, b = (json.loads(file.read_text()) for file in (ours, theirs))
    keys = (a.keys() | b.keys()) - {"memory", "time"}
    other = [key for key in keys if a.get(key) != pytest.approx(b.get(key), abs=tolerance)]
    return f"other {', '.join(sorted(other))}" if other else None


_COMPARISONS: dict[str, Callable[[Path, Path, float], str | None]] = {
    "metrics.jsonl": _compare_metrics,
    "summary.json": _compare_summaries,
    ".safetensors": _compare_tensors,
    ".parquet": _compare_tables,
}
