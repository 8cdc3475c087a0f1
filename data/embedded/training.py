"""Training of the embedded models: batches of prompts with completions, and the optimizers that learn them.

Letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.formats import encode

IGNORED = -100
"""Label of a token without loss."""

_MATRIX_LR, _VECTOR_LR = 0.02, 6e-3
_NUM_WARMUP_STEPS = 20
_DECAY_FRAC = 0.3

Example = tuple[str, str]
"""A prompt and its completion; only the completion is learned."""
Draw = Callable[[], list[Example]]


def optimize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_steps: int, draws: tuple[Draw, ...]
) -> Iterator[None]:
    """One yield per step. Muon for the matrices, Adam for the rest; short warm-up, constant, linear decay at the end.

    Muon learns the task in a third of the steps that Adam takes alone.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=_MATRIX_LR, weight_decay=0.0),
        torch.optim.AdamW(others, lr=_VECTOR_LR, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _lr_factor(step, num_steps)) for o in optimizers]
    for _ in range(num_steps):
        for draw in draws:
            ids_BT, labels_BT = collate(tokenizer, draw())
            logits_BTV = model(ids_BT, use_cache=False).logits
            F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield


def _lr_factor(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / _NUM_WARMUP_STEPS, (num_steps - step) / (_DECAY_FRAC * num_steps))


def collate(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (not shifted), both [B, T], padded on the right."""
    pairs = [(encode(tokenizer, prompt), encode(tokenizer, completion)) for prompt, completion in examples]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids_BT = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(pairs), width), IGNORED)
    for i, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids_BT[i, :end] = torch.tensor(prompt + completion)
        labels_BT[i, len(prompt) : end] = torch.tensor(completion)
    return ids_BT, labels_BT
