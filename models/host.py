"""Who is on the card.

`ModelHost` owns every set of weights and is the only place where weights or the generation engine sleep, wake or move.
It measures seconds and peak memory per phase.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from core.log import log
from core.types import Phase, Role
from models.device import pick_device
from models.evaluation import evaluation_mode
from models.load import add_adapter, load_base, load_frozen
from rollout.logprobs import score_spans
from rollout.types import ScoringRow
from schemas.model import ModelConfig

REFERENCE_ADAPTER = "ref"
"""Name of the frozen second adapter; TRL's GRPOTrainer looks for this name."""


class SleepingEngine(Protocol):
    """What the host needs of a generation engine: memory that can be given back and taken again."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@dataclass(slots=True)
class PhaseUse:
    """What a phase took so far. On a CPU both figures are this process's resident set."""

    seconds: float = 0.0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0


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
        self._close_interval()
        wakes_engine = phase == Phase.GENERATE and self._engine is not None and phase not in self._open_phases
        self._open_phases.append(phase)
        try:
            if wakes_engine:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # vLLM maps its memory anew, and cannot use what the trainer only caches
                self._engine.wake()  # type: ignore[union-attr]
            yield
        finally:
            if wakes_engine:
                self._engine.sleep()  # type: ignore[union-attr]
            self._close_interval()
            self._open_phases.pop()

    def _close_interval(self) -> None:
        """Charge the time and memory since the last mark to the innermost open phase, and start a new interval."""
        now_s = time.perf_counter()
        if self._open_phases:
            use = self.use[self._open_phases[-1]]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                now_s = time.perf_counter()
                allocated = torch.cuda.max_memory_allocated(self.device)
                reserved = torch.cuda.max_memory_reserved(self.device)
            else:
                allocated = reserved = psutil.Process().memory_info().rss
            use.seconds += now_s - self._last_mark_s
            for seen in (use, self._recent_peak):
                seen.peak_allocated_bytes = max(seen.peak_allocated_bytes, allocated)
                seen.peak_reserved_bytes = max(seen.peak_reserved_bytes, reserved)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._last_mark_s = now_s

    def take_recent_peak(self) -> PhaseUse:
        """The peaks over all phases since the last call."""
        self._close_interval()
        recent, self._recent_peak = self._recent_peak, PhaseUse()
        return recent

    def checkpoint_use(self) -> dict[Phase, PhaseUse]:
        """A copy of what each phase took so far, the open interval included."""
        self._close_interval()
        return {
            phase: PhaseUse(u.seconds, u.peak_allocated_bytes, u.peak_reserved_bytes) for phase, u in self.use.items()
        }
