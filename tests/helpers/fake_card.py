"""A stand-in for a GPU: what torch's allocator counts, what vLLM's has mapped, and what the driver would report.

`FakeCard.install` puts it behind the functions of `torch.cuda` that the project calls, and behind vLLM's allocator.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

GB = 10**9
TOTAL_BYTES, CONTEXT_BYTES = 85 * GB, GB // 2
_TRAINER_POOL, _VLLM_POOL = (0, 0), (0, 7)


class FakeCard:
    """One GPU. `now_bytes` is the truth: every byte that is mapped, beside CUDA's context."""

    def __init__(self) -> None:
        self.segments: dict[int, dict[str, Any]] = {}
        self.cumem: dict[int, SimpleNamespace] = {}
        self.unmapped_for_good: set[int] = set()
        self.num_cache_cleanings = 0
        self._next_address = 1
        self._max_reserved = self._max_allocated = 0

    # The trainer's side

    def allocate(self, num_bytes: int) -> int:
        """A tensor of the trainer, in a free segment of its size where there is one."""
        free = [
            address
            for address, segment in self.segments.items()
            if (segment["segment_pool_id"], segment["allocated_size"]) == (_TRAINER_POOL, 0)
            and segment["total_size"] == num_bytes
        ]
        address = free[0] if free else self._segment(_TRAINER_POOL, num_bytes)
        self.segments[address]["allocated_size"] = num_bytes
        self._count()
        return address

    def free(self, address: int) -> None:
        """The tensor goes; torch keeps its segment."""
        self.segments[address]["allocated_size"] = 0

    def empty_cache(self) -> None:
        """Unused segments of the trainer go back; those of a pool in use stay."""
        self.num_cache_cleanings += 1
        for address, segment in list(self.segments.items()):
            if segment["segment_pool_id"] == _TRAINER_POOL and not segment["allocated_size"]:
                del self.segments[address]

    # vLLM's side

    def start_engine(self, num_bytes: int, *, slack_bytes: int = 0, trimmed_bytes: int = 0) -> None:
        """`num_bytes` of weights and cache, in segments with some slack; loading left `trimmed_bytes` free."""
        for part in (num_bytes // 2, num_bytes - num_bytes // 2):
            address = self._segment(_VLLM_POOL, part + slack_bytes // 2)
            self.segments[address]["allocated_size"] = part
            handle = (0, self.segments[address]["total_size"], address, 0)
            self.cumem[address] = SimpleNamespace(handle=handle, is_asleep=False)
        if trimmed_bytes:
            self.unmapped_for_good.add(self._segment(_VLLM_POOL, trimmed_bytes))
        self._count()

    def map_engine(self, *, is_asleep: bool) -> None:
        for data in self.cumem.values():
            data.is_asleep = is_asleep
        assert self.now_bytes <= TOTAL_BYTES, "out of memory"

    # What is reported

    @property
    def reserved_bytes(self) -> int:
        return sum(segment["total_size"] for segment in self.segments.values())

    @property
    def now_bytes(self) -> int:
        gone = sum(self.segments[address]["total_size"] for address in self.unmapped_for_good)
        return self.reserved_bytes - gone - sum(data.handle[1] for data in self.cumem.values() if data.is_asleep)

    def _segment(self, pool: tuple[int, int], num_bytes: int) -> int:
        self._next_address += 1
        self.segments[self._next_address] = {
            "address": self._next_address,
            "segment_pool_id": pool,
            "total_size": num_bytes,
            "allocated_size": 0,
        }
        return self._next_address

    @property
    def allocated_bytes(self) -> int:
        return sum(segment["allocated_size"] for segment in self.segments.values())

    def _count(self) -> None:
        self._max_reserved = max(self._max_reserved, self.reserved_bytes)
        self._max_allocated = max(self._max_allocated, self.allocated_bytes)

    def _reset_peaks(self, *_: Any) -> None:
        self._max_reserved, self._max_allocated = self.reserved_bytes, self.allocated_bytes

    def install(self, monkeypatch: Any) -> None:
        fakes = {
            "synchronize": lambda *_: None,
            "empty_cache": self.empty_cache,
            "max_memory_reserved": lambda *_: self._max_reserved,
            "max_memory_allocated": lambda *_: self._max_allocated,
            "memory_reserved": lambda *_: self.reserved_bytes,
            "reset_peak_memory_stats": self._reset_peaks,
            "mem_get_info": lambda *_: (TOTAL_BYTES - CONTEXT_BYTES - self.now_bytes, TOTAL_BYTES),
            "memory_snapshot": lambda *_: list(self.segments.values()),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        allocator = SimpleNamespace(pointer_to_data=self.cumem)
        stub_module(
            monkeypatch, "vllm.device_allocator.cumem", CuMemAllocator=SimpleNamespace(get_instance=lambda: allocator)
        )
        stub_module(monkeypatch, "vllm.distributed.parallel_state", cleanup_dist_env_and_memory=self.empty_cache)


class FakeLLM:
    """vLLM's `LLM` on a `FakeCard`; `events` is what was asked of it, each with whether it was asleep then."""

    def __init__(self, card: FakeCard, num_bytes: int, **start: int) -> None:
        self.card, self.is_asleep, self.events = card, False, []
        card.start_engine(num_bytes, **start)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))

    def sleep(self, level: int) -> None:
        self._set("sleep", True)

    def wake_up(self) -> None:
        self._set("wake", False)

    def _set(self, event: str, is_asleep: bool) -> None:
        self.events.append(event)
        self.card.map_engine(is_asleep=is_asleep)
        self.is_asleep = is_asleep

    def _shutdown(self) -> None:
        self.events.append("shutdown asleep" if self.is_asleep else "shutdown")
        for address in self.card.cumem:
            del self.card.segments[address]
        self.card.cumem.clear()


def stub_module(monkeypatch: Any, name: str, **attributes: Any) -> None:
    """A module of vLLM, and the packages above it, for `from name import attribute`."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
