"""Sampling from a masked-diffusion model: blocks from left to right, within a block the surest tokens first.

Letters: B rows, T tokens of a row, G tokens that are generated, N masked positions of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from schemas.llada import DiffusionSamplingConfig


@torch.no_grad()
def generate_responses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: DiffusionSamplingConfig,
    *,
    mask_token_id: int,
    filler_token_id: int,
    max_rows: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Token ids of one response per prompt, `settings.max_response_length` each, without masks (LLaDA, section 2.4).

    A response starts as masks. Each step predicts all masked tokens of the block at hand and keeps some of them; the
    others are masked again (`settings.remasking`). Prompts are never changed. Runs `max_rows` prompts at once, padded
    on the left; equal arguments give equal responses. The caller decides on dropout and adapters.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    responses: list[list[int]] = []
    for start in range(0, len(prompts), max_rows):
        rows = prompts[start : start + max_rows]
        token_ids_BT, padding_BT = _canvas(rows, settings.max_response_length, mask_token_id, filler_token_id, device)
        num_prompt = token_ids_BT.shape[1] - settings.max_response_length
        for block_start in range(num_prompt, token_ids_BT.shape[1], settings.block_length):
            block = slice(block_start, block_start + settings.block_length)
            _fill_block(model, token_ids_BT, padding_BT, num_prompt, block, settings, mask_token_id, generator)
        responses += token_ids_BT[:, num_prompt:].tolist()
        on_progress(len(responses), len(prompts))
    return responses


def _canvas(
    prompts: Sequence[Sequence[int]], num_generated: int, mask_token_id: int, filler_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[B, T] prompts on the left, padded on their left, and masks on the right; [B, T] True where there is padding."""
    num_prompt = max(len(prompt) for prompt in prompts)
    token_ids_BT = torch.full((len(prompts), num_prompt + num_generated), mask_token_id)
    padding_BT = torch.zeros_like(token_ids_BT, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        padding_BT[b, : num_prompt - len(prompt)] = True
        token_ids_BT[b, num_prompt - len(prompt) : num_prompt] = torch.tensor(prompt)
    return token_ids_BT.masked_fill(padding_BT, filler_token_id).to(device), padding_BT.to(device)


def _fill_block(
    model: Any,
    token_ids_BT: Tensor,
    padding_BT: Tensor,
    num_prompt: int,
    block: slice,
    settings: DiffusionSamplingConfig,
    mask_token_id: int,
    generator: torch.Generator,
) -> None:
    """Replace the masks of one block, in place."""
    num_blocks = settings.max_response_length // settings.block_length
    for num_kept in tokens_per_step(settings.block_length, settings.sampling_steps // num_blocks):
        masked_BT = torch.zeros_like(padding_BT)
        masked_BT[:, block] = token_ids_BT[:, block] == mask_token_id
        logits_NV = _guided_logits(model, token_ids_BT, padding_BT, masked_BT, num_prompt, settings, mask_token_id)
        logits_NV[:, mask_token_id] = -torch.inf
        predicted_N, confidence_N = _predict(logits_NV, settings, generator)
        # Every row has the same number of masks left, so the flat results are a rectangle.
        column_BM = masked_BT.nonzero()[:, 1].view(len(token_ids_BT), -1)
        kept_BK = confidence_N.view_as(column_BM).topk(num_kept, dim=1).indices
        token_ids_BT.scatter_(1, column_BM.gather(1, kept_BK), predicted_N.view_as(column_BM).gather(1, kept_BK))


def tokens_per_step(block_length: int, num_steps: int) -> list[int]:
    """Number of tokens of a block that each step keeps: as even as possible, the larger numbers first."""
    return [block_length // num_steps + (step < block_length % num_steps) for step in range(num_steps)]


def _guided_logits(
    model: Any,
    token_ids_BT: Tensor,
    padding_BT: Tensor,
    masked_BT: Tensor,
    num_prompt: int,
    settings: DiffusionSamplingConfig,
    mask_token_id: int,
) -> Tensor:
    """[N, V] logits of the masked tokens; with guidance w: (1 + w) * logits - w * logits without the prompt."""
    attention_mask = (~padding_BT).long() if bool(padding_BT.any()) else None

    def logits_of(ids_BT: Tensor) -> Tensor:
        return model(input_ids=ids_BT, attention_mask=attention_mask, at_BT=masked_BT).logits.float()

    logits_NV = logits_of(token_ids_BT)
    if settings.guidance_scale == 0:
        return logits_NV
    without_prompt_BT = token_ids_BT.clone()
    without_prompt_BT[:, :num_prompt] = mask_token_id
    w = settings.guidance_scale
    return (1 + w) * logits_NV - w * logits_of(without_prompt_BT)


def _predict(logits_NV: Tensor, settings: DiffusionSamplingConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[N] a token for each mask, and [N] how sure the model is of it (or a random number)."""
    temperature = settings.sampling_temperature
    if temperature == 0:
        predicted_N = logits_NV.argmax(-1)
    else:
        predicted_N = (logits_NV / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
    if settings.remasking == "random":
        return predicted_N, torch.rand(predicted_N.shape, generator=generator, device=logits_NV.device)
    return predicted_N, logits_NV.log_softmax(-1).gather(-1, predicted_N[:, None])[:, 0]
