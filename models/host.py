"""Who is on the card.

`ModelHost` owns every set of weights and is the only place where weights or the generation engine sleep, wake or move.
It measures seconds and peak memory per phase.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from core.log import log
from core.types import Phase, Role, UnmappedMemory
from models.evaluation import evaluation_mode
from models.load import add_adapter, load_base, load_frozen
from optimization.gpu import pick_device
from rollout.logprobs import score_spans
from rollout.types import ScoringRow
from schemas.model import ModelConfig

REFERENCE_ADAPTER = "ref"
"""Name of the frozen second adapter; TRL's GRPOTrainer looks for this name."""


class SleepingEngine(Protocol):
    """What the host needs of a generation engine: memory that can be given back and taken again."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def unmapped_memory(self) -> UnmappedMemory: ...


@dataclass(slots=True)
class PhaseUse:
    """What a phase took so far. On a CPU the first two peaks are this process's resident set and the third is 0."""

    seconds: float = 0.0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_driver_bytes: int = 0
    """All that was in use on the card as the driver reports it: CUDA's context, graphs and other processes too."""


class ModelHost:
    """Teacher (base and adapter), student and reference on one device.

    `student_model: null` and `reference_model: shared` cost no memory: both are then the teacher's base with its
    adapter off (or with the frozen reference adapter on).
    """

    def __init__(self, config: ModelConfig, *, max_score_tokens: int) -> None:
        """Load everything. `max_score_tokens`: padded tokens of one scoring forward, as the memory plan has it."""
        self.max_score_tokens = max_score_tokens
        self.device = pick_device(config.model_args.device_map)
        self.use: dict[Phase, PhaseUse] = {phase: PhaseUse() for phase in Phase}
        self._engine: SleepingEngine | None = None
        self._open_phases: list[Phase] = []
        self._recent_peak = PhaseUse()
        self._last_mark_s = time.perf_counter()
        self._unmapped_at_mark = UnmappedMemory()
        args = config.model_args
        with self.phase(Phase.LOAD):
            self.teacher: PeftModel = add_adapter(load_base(config.model_name_or_path, args, self.device), args)
            self.student: PreTrainedModel | None = (
                load_frozen(config.student_model, config, self.device) if config.student_model is not None else None
            )
            self.reference: PreTrainedModel | None = (
                load_frozen(config.model_name_or_path, config, self.device)
                if config.reference_model == "separate"
                else None
            )
        trainable = sum(p.numel() for p in self.teacher.parameters() if p.requires_grad)
        log.info("teacher, student and reference are on %s; %s adapter parameters", self.device, f"{trainable:,}")

    def attach_engine(self, engine: SleepingEngine) -> None:
        """Take charge of the generation engine's memory; it sleeps until the next GENERATE phase."""
        self._engine = engine
        self._close_interval()
        engine.sleep()

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[Any]:
        """The model of a role, ready for a forward without gradient: adapters set for the role, dropout off.

        Yields the peft model for the roles that share the teacher's base, the plain model otherwise.
        """
        own = {Role.STUDENT: self.student, Role.REFERENCE: self.reference}.get(role)
        model, adapter = (own, nullcontext()) if own is not None else (self.teacher, self._adapter_for(role))
        with torch.no_grad(), evaluation_mode(model), adapter:
            yield model

    def score(self, role: Role, rows: Sequence[ScoringRow], temperature: float) -> list[tuple[torch.Tensor, ...]]:
        """`rollout.logprobs.score_spans` under the model of a role."""
        with self.acting_as(role) as model:
            return score_spans(model, rows, temperature=temperature, max_batch_tokens=self.max_score_tokens)

    def policy_logprobs(self, rows: Sequence[Sequence[int]], adapter_on: bool) -> list[list[float]]:
        """Log-prob of every token of each row after its first, at temperature 1, with the adapter or without it."""
        scoring_rows = [ScoringRow(token_ids=list(row), spans=((1, len(row)),)) for row in rows]
        with self.acting_as(Role.TEACHER) as teacher, nullcontext() if adapter_on else teacher.disable_adapter():
            scored = score_spans(teacher, scoring_rows, max_batch_tokens=self.max_score_tokens)
        return [spans[0].tolist() for spans in scored]

    def _adapter_for(self, role: Role) -> Any:
        if role == Role.TEACHER:
            return nullcontext()
        has_reference_adapter = role == Role.REFERENCE and REFERENCE_ADAPTER in self.teacher.peft_config
        return use_adapter(self.teacher, REFERENCE_ADAPTER if has_reference_adapter else None)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Enter a phase. Phases nest: time and peak memory go to the innermost one that is open.

        The engine is awake in GENERATE only (and in SYNC inside it).
        """
        wakes_engine = phase == Phase.GENERATE and self._engine is not None and phase not in self._open_phases
        if wakes_engine and self.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM maps its memory anew, and cannot use what the trainer only caches
        self._close_interval()
        self._open_phases.append(phase)
        try:
            if wakes_engine:
                self._engine.wake()  # type: ignore[union-attr]
            yield
        finally:
            if wakes_engine:
                self._close_interval()
                self._engine.sleep()  # type: ignore[union-attr]
            self._close_interval()
            self._open_phases.pop()

    def _close_interval(self) -> None:
        """Charge the time and memory since the last mark to the innermost open phase, and start a new interval."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now_s = time.perf_counter()
        if self._open_phases:
            use, peak = self.use[self._open_phases[-1]], self._interval_peak()
            use.seconds += now_s - self._last_mark_s
            for seen in (use, self._recent_peak):
                seen.peak_allocated_bytes = max(seen.peak_allocated_bytes, peak.peak_allocated_bytes)
                seen.peak_reserved_bytes = max(seen.peak_reserved_bytes, peak.peak_reserved_bytes)
                seen.peak_driver_bytes = max(seen.peak_driver_bytes, peak.peak_driver_bytes)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._unmapped_at_mark = self._unmapped()
        self._last_mark_s = now_s

    def _interval_peak(self) -> PhaseUse:
        """Peaks since the last mark; on a CPU the resident set now.

        torch's counters go on counting what a sleeping engine has unmapped (vllm#17117), so on a GPU

            peak reserved = max_memory_reserved - bytes unmapped throughout the interval     (allocated alike)
            peak of the driver = used now + max_memory_reserved - memory_reserved

        Unmapped throughout is the smaller of the figures at the interval's two ends. `phase` and `attach_engine` mark
        before each change of the engine, and empty the trainer's cache before the mark that precedes a wake-up: so
        nothing is counted beside the awake engine that was gone before it woke.
        """
        if self.device.type != "cuda":
            resident = psutil.Process().memory_info().rss
            return PhaseUse(peak_allocated_bytes=resident, peak_reserved_bytes=resident)
        before, now = self._unmapped_at_mark, self._unmapped()
        reserved = torch.cuda.max_memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return PhaseUse(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self.device)
            - min(before.allocated_bytes, now.allocated_bytes),
            peak_reserved_bytes=reserved - min(before.reserved_bytes, now.reserved_bytes),
            peak_driver_bytes=total - free + reserved - torch.cuda.memory_reserved(self.device),
        )

    def _unmapped(self) -> UnmappedMemory:
        return self._engine.unmapped_memory() if self._engine is not None else UnmappedMemory()

    def peaks(self) -> dict[Phase, int]:
        """Peak bytes of each phase up to the last mark, by the driver's count on a GPU; the device is not asked."""
        return {phase: use.peak_driver_bytes or use.peak_reserved_bytes for phase, use in self.use.items()}

    def take_recent_peak(self) -> PhaseUse:
        """The peaks over all phases since the last call."""
        self._close_interval()
        recent, self._recent_peak = self._recent_peak, PhaseUse()
        return recent

    def checkpoint_use(self) -> dict[Phase, PhaseUse]:
        """A copy of what each phase took so far, the open interval included."""
        self._close_interval()
        return {phase: replace(use) for phase, use in self.use.items()}
