"""ModelHost: the models of a run by role, and which of them are on the GPU in each phase.

`ModelHost` owns every set of weights and is the only place where weights or the generation engine sleep, wake or move.
"""

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, Self

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from core.log import log
from core.types import Phase, Role, UnmappedMemory
from models.evaluation import evaluation_mode
from models.load import add_adapter, load_base, load_frozen
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from models.parking import ParkedModel
from models.shared_base import SharedBase, share_base
from optimization.gpu import pick_device
from planner.teacher import StudentParking
from rollout.batches import input_len, largest_batch_tokens
from rollout.logprobs import score_spans
from rollout.packed_attention import layout_of
from rollout.types import ScoringRow
from schemas.model import ModelConfig

REFERENCE_ADAPTER = "ref"
"""Name of the frozen second adapter; TRL's GRPOTrainer looks for this name."""


class SleepingEngine(Protocol):
    """A generation engine as the host sees it: memory that can be given back and taken again."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def unmapped_memory(self) -> UnmappedMemory: ...


class ModelHost:
    """The models of the roles that a run needs, on one device: the teacher (base and adapter), student, reference.

    `student_model: null` and `reference_model: shared` cost no memory: both are then the teacher's base with its
    adapter off (or with the frozen reference adapter on).

        with ModelHost(config, roles=[Role.TEACHER, Role.STUDENT], max_score_tokens=8192) as host:
            host.score(Role.STUDENT, rows, temperature=1.0)

    Args:
        roles: who will be asked for; nothing else is loaded.
        max_score_tokens: padded tokens of one scoring forward, as the memory plan has it.
        max_oom_retries: how often scoring that runs out of memory is repeated with half of them.
        student_parking: where a student of its own lies while it does not score (`planner.teacher.choose_parking`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        roles: Collection[Role],
        max_score_tokens: int,
        max_oom_retries: int = 0,
        student_parking: StudentParking = "none",
    ) -> None:
        self.roles = frozenset(roles)
        self.max_score_tokens = max_score_tokens
        self.device = pick_device(config.model_args.device_map)
        self.meter = PhaseMeter(self.device)
        self.retries = MemoryRetries(self.meter, max_retries=max_oom_retries)
        self._engine: SleepingEngine | None = None
        self._shared_base: SharedBase | None = None
        self._is_closed = False
        self._models: dict[Role, Any] = {}
        self._student_parking = student_parking
        self._parked_student: ParkedModel | None = None
        self._student_was_used = False
        own_names = {
            Role.STUDENT: config.student_model,
            Role.REFERENCE: config.model_name_or_path if config.reference_model == "separate" else None,
        }
        with self.phase(Phase.LOAD):
            if student_parking != "none" and Role.STUDENT in self.roles and config.student_model is not None:
                self._load_and_park(config.student_model, config)
            if Role.TEACHER in self.roles or any(own_names[role] is None for role in self.roles):
                base = load_base(config.model_name_or_path, config.model_args, self.device)
                self._models[Role.TEACHER] = add_adapter(base, config.model_args)
            for role, name in own_names.items():
                if role in self.roles and name is not None and role not in self._models:
                    self._models[role] = load_frozen(name, config, self.device)
        trainable = sum(p.numel() for model in self._models.values() for p in model.parameters() if p.requires_grad)
        log.info("%s on %s; %s adapter parameters", ", ".join(sorted(self.roles)), self.device, f"{trainable:,}")

    @property
    def teacher(self) -> PeftModel:
        """The teacher: base and adapter.

        Raises:
            ValueError: none was asked for, or the host is closed.
        """
        if Role.TEACHER not in self._models:
            raise ValueError(f"no teacher: the host {self._state()}")
        return self._models[Role.TEACHER]

    @property
    def student(self) -> PreTrainedModel | None:
        """A student with weights of its own; None where it is the teacher's base, or was not asked for."""
        return self._models.get(Role.STUDENT)

    @property
    def reference(self) -> PreTrainedModel | None:
        """A reference with weights of its own; None where it is the teacher's base, or was not asked for."""
        return self._models.get(Role.REFERENCE)

    def _load_and_park(self, name: str, config: ModelConfig) -> None:
        """The student alone on the GPU, before anything else is there."""
        student = load_frozen(name, config, self.device)
        self._models[Role.STUDENT] = student
        self._parked_student = ParkedModel(student, self.device, streamed=self._student_parking == "streamed")

    def prefetch_student(self) -> None:
        """Begin to copy a parked student to the GPU, if the plan has room for it before the generator sleeps."""
        if self._parked_student is not None and self._student_parking == "early":
            self._parked_student.fetch()

    def _park_student(self) -> None:
        self._student_was_used = False
        if self._parked_student is not None and self._parked_student.is_here:
            self._parked_student.leave()

    def _state(self) -> str:
        return "is closed" if self._is_closed else f"was made for {', '.join(sorted(self.roles))}"

    def share_base(self) -> SharedBase:
        """Make the teacher's quantised base one that an engine, which is to be started after this, can read as well.

        Raises:
            CannotShareError: see `models.shared_base.share_base`.
        """
        self._shared_base = share_base(self.teacher)
        return self._shared_base

    def check_shared_base(self) -> None:
        """
        Raises:
            RuntimeError: teacher and engine do not read the same base any more.
        """
        if self._shared_base is not None:
            self._shared_base.check()

    def attach_engine(self, engine: SleepingEngine) -> None:
        """Take charge of the generation engine: it sleeps until the next GENERATE phase and is closed with the host.

        From here on a shared base stays where it is: the engine has its addresses.
        """
        self._engine = engine
        if self._shared_base is not None:
            self._shared_base.hold_in_place(self.teacher)
        self.meter.unmapped_memory = engine.unmapped_memory
        self.meter.mark()
        engine.sleep()

    def close(self) -> None:
        """Close the engine and free all weights. The models, where somebody still holds one, are empty afterwards."""
        if self._is_closed:
            return
        self._is_closed = True
        engine, self._engine = self._engine, None
        models, self._models = self._models, {}
        self._shared_base = None
        try:
            if engine is not None:
                engine.close()
        finally:
            self.meter.unmapped_memory = UnmappedMemory
            if self._parked_student is not None:
                self._parked_student.close()
            for model in models.values():
                _drop_weights(model)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[Any]:
        """The model of a role, ready for a forward without gradient: adapters set for the role, dropout off.

        Yields the peft model for the roles that share the teacher's base, the plain model otherwise.

        Raises:
            ValueError: the role was not asked for, or the host is closed.
        """
        if role not in self.roles or self._is_closed:
            raise ValueError(f"no {role}: the host {self._state()}")
        own = None if role == Role.TEACHER else self._models.get(role)
        model, adapter = (own, nullcontext()) if own is not None else (self.teacher, self._adapter_for(role))
        with torch.no_grad(), evaluation_mode(model), adapter, self._on_gpu(role):
            yield model

    @contextmanager
    def _on_gpu(self, role: Role) -> Iterator[None]:
        """A parked student is there; it stays until the SCORE phase ends, as more rows may follow."""
        if role != Role.STUDENT or self._parked_student is None:
            yield
            return
        self._parked_student.fetch()
        self._parked_student.wait()
        self._student_was_used = True
        try:
            yield
        finally:
            if Phase.SCORE not in self.meter.open_phases:
                self._park_student()

    def score(self, role: Role, rows: Sequence[ScoringRow], temperature: float) -> list[tuple[torch.Tensor, ...]]:
        """`rollout.logprobs.score_spans` under the model of a role."""
        with self.acting_as(role) as model:
            return self._score_spans(model, rows, temperature)

    def policy_logprobs(self, rows: Sequence[Sequence[int]], adapter_on: bool) -> list[list[float]]:
        """Log-prob of every token of each row after its first, at temperature 1, with the adapter or without it."""
        scoring_rows = [ScoringRow(token_ids=list(row), spans=((1, len(row)),)) for row in rows]
        with self.acting_as(Role.TEACHER) as teacher, nullcontext() if adapter_on else teacher.disable_adapter():
            scored = self._score_spans(teacher, scoring_rows, temperature=1.0)
        return [spans[0].tolist() for spans in scored]

    def _score_spans(
        self, model: Any, rows: Sequence[ScoringRow], temperature: float
    ) -> list[tuple[torch.Tensor, ...]]:
        return self.retries(
            Phase.SCORE,
            self.max_score_tokens,
            lambda max_tokens: score_spans(model, rows, temperature=temperature, max_batch_tokens=max_tokens),
            taken=lambda max_tokens: largest_batch_tokens(rows, max_tokens, layout_of(model)),
            smallest=max(map(input_len, rows), default=1),
        )

    def _adapter_for(self, role: Role) -> Any:
        if role == Role.TEACHER:
            return nullcontext()
        has_reference_adapter = role == Role.REFERENCE and REFERENCE_ADAPTER in self.teacher.peft_config
        return use_adapter(self.teacher, REFERENCE_ADAPTER if has_reference_adapter else None)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Enter a phase; the meter charges it. The engine is awake in GENERATE only (and in SYNC inside it).

        A parked student leaves the GPU with the SCORE phase that it was used in, and before a generator wakes.
        """
        begins = phase not in self.meter.open_phases
        engine = self._engine if phase == Phase.GENERATE and begins else None
        if phase == Phase.GENERATE and begins:
            self._park_student()
        if engine is not None and self.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM maps its memory anew, and cannot use what the trainer only caches
        with self.meter.phase(phase):
            try:
                if engine is not None:
                    engine.wake()
                yield
            finally:
                if engine is not None:
                    self.meter.mark()
                    engine.sleep()
                if phase == Phase.SCORE and begins and self._student_was_used:
                    self._park_student()


def _drop_weights(model: nn.Module) -> None:
    """Empty every parameter and buffer, whoever holds them: bitsandbytes' optimizers do, for as long as the process."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            for name in ("CB", "SCB", "quant_state"):  # of an int8 or 4-bit weight
                vars(tensor).pop(name, None)
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        for name in ("state", "quant_state"):  # of the linear that holds it
            vars(module).pop(name, None)
