"""Sampling with the trainer's own model and a key-value cache: no second engine, no second set of weights.

Letters: see `generation.base`; V vocabulary. Rows are padded on the left with their own first token, which the
attention mask hides, so no pad token is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.errors import NonFiniteError
from core.types import UnmappedMemory
from generation.base import ProgressCallback, RowsAtOnce, SamplingSettings, sample_in_calls
from models.evaluation import evaluation_mode
from models.memory_retries import MemoryRetries
from rollout.types import Completion


class TransformersGenerator:
    """A `Generator` on the trainer's model. It owns nothing: its adapter is always current, sleep frees nothing.

    Each token takes one uniform number u from the row's own random stream and is the first whose cumulative probability
    exceeds u. A row's completion thus depends on its prompt and seed; the rest of the batch only reaches it through
    floating-point rounding. Global random generators are left alone.
    """

    name = "transformers"
    weights = "the trainer's own"
    shares_trainer_weights = True

    def __init__(
        self, model: Any, sampling: SamplingSettings, rows_per_call: int, retries: MemoryRetries | None = None
    ) -> None:
        self._model = model
        self.sampling = sampling
        self._rows_per_call, self._retries = rows_per_call, retries

    @torch.no_grad()
    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        num_generations: int,
        seeds: Sequence[int],
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`. Every prompt is read once and its cache copied for its completions."""
        num_done = 0

        def sample(rows: RowsAtOnce) -> list[Completion]:
            nonlocal num_done
            completions = self._sample(rows.prompts, rows.num_generations, rows.seeds)
            num_done += len(completions)
            if on_progress is not None:
                on_progress(num_done, len(seeds))
            return completions

        with evaluation_mode(self._model):
            return sample_in_calls(
                sample,
                prompt_token_ids,
                num_generations,
                seeds,
                rows_per_call=self._rows_per_call,
                retries=self._retries,
            )

    def sync_adapter(self, model: Any) -> None:
        """See `Generator.sync_adapter`: samples from the trainer's model, so there is nothing to carry over."""
        if model is not self._model:
            raise ValueError("this generator samples from the model it was built with; another one was given")

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Generator.logprobs`."""
        token_ids_BT, mask_BT, position_ids_BT = _left_padded(rows, self._model.device)
        with evaluation_mode(self._model):
            logits_BTV = self._model(
                input_ids=token_ids_BT, attention_mask=mask_BT, position_ids=position_ids_BT, use_cache=False
            ).logits
        logprobs_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
        logprobs_BT = logprobs_BTV.gather(-1, token_ids_BT[:, 1:, None]).squeeze(-1)
        return [
            values[values.shape[0] - len(row) + 1 :].tolist() for values, row in zip(logprobs_BT, rows, strict=True)
        ]

    def sleep(self) -> None:
        """See `Generator.sleep`: the weights are the trainer's and the cache lives only within a call."""

    def wake(self) -> None:
        """See `Generator.wake`: nothing was given back."""

    def unmapped_memory(self) -> UnmappedMemory:
        """See `Generator.unmapped_memory`: nothing is ever unmapped."""
        return UnmappedMemory()

    def close(self) -> None:
        """See `Generator.close`: nothing is owned."""

    def _sample(self, prompts: Sequence[Sequence[int]], num_generations: int, seeds: Sequence[int]) -> list[Completion]:
        device, max_new_tokens = self._model.device, self.sampling.max_new_tokens
        processors, is_greedy = _logits_processors(self.sampling), self.sampling.temperature == 0
        uniforms_TB = _uniforms(seeds, max_new_tokens).to(device)
        stop_ids = torch.tensor(self.sampling.stop_token_ids, device=device)
        token_ids_BT, mask_BT, position_ids_BT = _left_padded(prompts, device)
        cache = DynamicCache(config=self._model.config)
        logits_BV = self._last_logits(token_ids_BT, mask_BT, position_ids_BT, cache)

        cache.batch_repeat_interleave(num_generations)
        token_ids_BT, mask_BT, logits_BV = (
            tensor.repeat_interleave(num_generations, dim=0) for tensor in (token_ids_BT, mask_BT, logits_BV)
        )
        next_position_B1 = mask_BT.sum(-1, keepdim=True)
        lengths_B = torch.full((len(seeds),), max_new_tokens, device=device)
        stopped_B = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        logprobs = []
        for step, uniform_B in enumerate(uniforms_TB):
            logprobs_BV = processors(token_ids_BT, logits_BV.float()).log_softmax(-1)
            sampled_B = logprobs_BV.argmax(-1) if is_greedy else _inverse_cdf(logprobs_BV.exp(), uniform_B)
            sampled_B1 = sampled_B[:, None]
            logprobs.append(logprobs_BV.gather(-1, sampled_B1))
            token_ids_BT = torch.cat([token_ids_BT, sampled_B1], dim=-1)
            stops_now_B = torch.isin(sampled_B1[:, 0], stop_ids) & ~stopped_B
            lengths_B[stops_now_B] = step + 1
            stopped_B |= stops_now_B
            if stopped_B.all() or step + 1 == max_new_tokens:
                break
            mask_BT = torch.cat([mask_BT, torch.ones_like(sampled_B1)], dim=-1)
            logits_BV = self._last_logits(sampled_B1, mask_BT, next_position_B1 + step, cache)
        logprobs_BT = torch.cat(logprobs, dim=-1)
        if not torch.isfinite(logprobs_BT).all():
            raise NonFiniteError("a sampled token has a log-prob that is not finite; the model's logits overflowed")
        return _completions(token_ids_BT, logprobs_BT, lengths_B, stopped_B, seeds)

    def _last_logits(
        self, token_ids_BT: Tensor, mask_BT: Tensor, position_ids_BT: Tensor, cache: DynamicCache
    ) -> Tensor:
        """[B, V] logits after the last token; the tokens' keys and values are added to `cache`."""
        return self._model(
            input_ids=token_ids_BT,
            attention_mask=mask_BT,
            position_ids=position_ids_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def _logits_processors(sampling: SamplingSettings) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors


def _uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """[T, B] numbers in [0, 1), column b from a generator of its own that is seeded with `seeds[b]`."""
    rows = [
        torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows, dim=1)


def _inverse_cdf(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] first index whose cumulative probability exceeds u; never one of probability zero."""
    cumulative_BV = probabilities_BV.double().cumsum(-1)
    targets_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    indices_B = torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)
    return indices_B.clamp_max(probabilities_BV.shape[-1] - 1)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids, each [B, T]."""
    longest = max(len(row) for row in rows)
    token_ids = [[row[0]] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    mask_BT = torch.tensor(mask, device=device)
    return torch.tensor(token_ids, device=device), mask_BT, (mask_BT.cumsum(-1) - 1).clamp_min(0)


def _completions(
    token_ids_BT: Tensor, logprobs_BT: Tensor, lengths_B: Tensor, stopped_B: Tensor, seeds: Sequence[int]
) -> list[Completion]:
    num_sampled = logprobs_BT.shape[1]
    rows = zip(
        token_ids_BT[:, -num_sampled:].tolist(),
        logprobs_BT.tolist(),
        lengths_B.tolist(),
        stopped_B.tolist(),
        seeds,
        strict=True,
    )
    return [
        Completion(
            token_ids=token_ids[:length],
            logprobs=logprobs[:length],
            finish_reason="stop" if stopped else "length",
            seed=seed,
        )
        for token_ids, logprobs, length, stopped, seed in rows
    ]
