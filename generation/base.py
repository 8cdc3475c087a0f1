"""Generator: the protocol of every sampling engine, and the settings of sampling.

Letters: P prompts, G completions per prompt, B = P * G rows (prompt-major), T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.types import Phase, UnmappedMemory
from models.memory_retries import MemoryRetries
from rollout.types import Completion
from schemas.sampled_run import SampledRunConfig

ProgressCallback = Callable[[int, int], None]
"""Called with (finished rows, all rows) while a batch is sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """Settings of sampling, e.g. `SamplingSettings(temperature=0.7, max_new_tokens=6144, stop_token_ids=(151645,))`."""

    temperature: float
    """0 takes the likeliest token."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    """A row ends with the first of these; it is kept in the completion. The model's own end tokens are not implied."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of_run(cls, config: SampledRunConfig, tokenizer: Any, model: Any) -> "SamplingSettings":
        """Settings of a run; a row ends with any end token of the tokenizer or of the model."""
        return cls(
            temperature=config.arguments.temperature,
            max_new_tokens=config.arguments.max_completion_length,
            stop_token_ids=stop_token_ids(tokenizer, model.generation_config),
            top_p=config.arguments.top_p,
            top_k=config.arguments.top_k,
            min_p=config.arguments.min_p or 0.0,
            repetition_penalty=config.arguments.repetition_penalty,
        )


def stop_token_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """Any end token of the tokenizer or of the model."""
    end_ids = generation_config.eos_token_id
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids] if end_ids is not None else []
    return tuple(sorted({tokenizer.eos_token_id, *end_ids}))


class Generator(Protocol):
    """A sampler of the policy: a base model and the adapter that was given to it last."""

    name: str
    weights: str
    """Whose values the base has, in words for the log."""
    shares_trainer_weights: bool
    """Whether the base's values are the trainer's; if not, importance sampling should correct for the difference."""
    sampling: SamplingSettings
    """May be replaced between two calls."""

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        num_generations: int,
        seeds: Sequence[int],
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """[B] completions, row p * G + g for completion g of prompt p, each drawn with its own seed `seeds[row]`."""

    def sync_adapter(self, model: Any) -> None:
        """Sample from the active adapter of this peft model, as it is now, from the next call on."""

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of every token of each row given those before it, [len(row) - 1] in nats, at temperature 1."""

    def sleep(self) -> None:
        """Give the device memory back (weights to host memory, KV cache dropped) where the engine holds any."""

    def wake(self) -> None:
        """Undo `sleep`; the adapter of the last `sync_adapter` serves again."""

    def unmapped_memory(self) -> UnmappedMemory:
        """Memory that torch's counters still hold of this engine although it is not on the GPU."""

    def close(self) -> None:
        """Free everything. The generator cannot be used afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsAtOnce:
    """Some of B rows, sampled together: whole prompt groups, or a part of one."""

    prompts: Sequence[Sequence[int]]
    num_generations: int
    seeds: Sequence[int]


def sample_in_calls(
    sample: Callable[[RowsAtOnce], list[Completion]],
    prompt_token_ids: Sequence[Sequence[int]],
    num_generations: int,
    seeds: Sequence[int],
    *,
    rows_per_call: int,
    retries: MemoryRetries | None,
) -> list[Completion]:
    """[B] completions of `sample`, called with at most `rows_per_call` rows at once, and at least a prompt group.

    An evaluation (one generation each) gets as many rows as a training step. Rows that ran out of memory are sampled
    again, fewer at once and then also a part of a group; those that are done stay.
    """
    check_rows(prompt_token_ids, num_generations, seeds)
    completions: list[Completion] = []

    def sample_the_rest(max_rows: int) -> list[Completion]:
        while len(completions) < len(seeds):
            rows = _next_rows(len(completions), len(seeds), num_generations, max_rows)
            group_rows = min(num_generations, len(rows))
            prompts = [prompt_token_ids[row // num_generations] for row in rows[::group_rows]]
            row_seeds = seeds[rows.start : rows.stop]
            completions.extend(sample(RowsAtOnce(prompts=prompts, num_generations=group_rows, seeds=row_seeds)))
        return completions

    at_once = min(max(rows_per_call, num_generations), len(seeds))
    return (
        sample_the_rest(at_once) if retries is None else retries(Phase.GENERATE, at_once, sample_the_rest, unit="rows")
    )


def _next_rows(start: int, num_rows: int, num_generations: int, max_rows: int) -> range:
    """Whole groups from `start` on, or what is left of one and fits."""
    is_within_group = start % num_generations > 0
    if is_within_group or max_rows < num_generations:
        end_of_group = (start // num_generations + 1) * num_generations
        return range(start, min(start + max_rows, end_of_group))
    return range(start, min(start + max_rows // num_generations * num_generations, num_rows))


def check_rows(prompt_token_ids: Sequence[Sequence[int]], num_generations: int, seeds: Sequence[int]) -> None:
    """Check that every row has a seed and no prompt is empty."""
    num_rows = len(prompt_token_ids) * num_generations
    if len(seeds) != num_rows:
        raise ValueError(
            f"{len(seeds)} seeds for {len(prompt_token_ids)} prompts x {num_generations} = {num_rows} rows"
        )
    empty = [index for index, token_ids in enumerate(prompt_token_ids) if not token_ids]
    if empty:
        raise ValueError(f"prompts {empty} have no tokens")
