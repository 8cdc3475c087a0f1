"""Per-token log-probs of given spans, without a [batch, tokens, vocabulary] tensor.

Letters: B rows of a batch, T tokens (right-padded), H hidden size, N scored positions of a batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.types import ScoringRow

DEFAULT_MAX_BATCH_TOKENS = 16384
DEFAULT_LOGIT_CHUNK_LEN = 512


@torch.no_grad()
def score_spans(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[ScoringRow],
    *,
    temperature: float = 1.0,
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    logit_chunk_len: int = DEFAULT_LOGIT_CHUNK_LEN,
) -> list[tuple[Tensor, ...]]:
    """`log_softmax(logits_{t-1} / temperature)[x_t]` for every t in the spans of every row, in nats.

    Runs the decoder's body, gathers the hidden states that predict a scored token and applies the head to
    `logit_chunk_len` of them at a time: at most `logit_chunk_len * V` float32 logits live at once. Rows are batched by
    length, with at most `max_batch_tokens` padded tokens a batch (a longer row goes alone). Tokens after a row's last
    scored one are not computed.

    The caller decides on adapters, dropout (`model.eval()`) and what is on the card.

    Returns:
        One tuple a row with one float32 CPU tensor a span, in the order of `row.spans`; empty for an empty span.
    """
    results: list[tuple[Tensor, ...]] = [tuple(torch.empty(0) for _ in row.spans) for row in rows]
    lengths = [_input_len(row) for row in rows]
    for batch in _batches(lengths, max_batch_tokens):
        scored = _score_batch(
            model, [rows[i] for i in batch], [lengths[i] for i in batch], temperature, logit_chunk_len
        )
        for index, row_scores in zip(batch, scored, strict=True):
            results[index] = row_scores
    return results


def _input_len(row: ScoringRow) -> int:
    """Tokens that must be read to predict the row's last scored one; 0 where nothing is scored."""
    for start, end in row.spans:
        if not 1 <= start <= end <= len(row.token_ids):
            raise ValueError(f"span {(start, end)} does not fit a row of {len(row.token_ids)} tokens (start >= 1)")
    return max((end - 1 for start, end in row.spans if end > start), default=0)


def _batches(lengths: list[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the rows with something to score, longest first: the largest batch meets the memory limit first."""
    batch: list[int] = []
    for index in sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(
    model: PreTrainedModel | PeftModel,
    rows: list[ScoringRow],
    lengths: list[int],
    temperature: float,
    logit_chunk_len: int,
) -> list[tuple[Tensor, ...]]:
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal_lm.get_input_embeddings().weight.device
    input_ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids_BT[b, :length] = torch.tensor(row.token_ids[:length])
    # No mask: attention is causal and the padding comes last, so no scored position sees it.
    hidden_BTH = causal_lm.get_decoder()(input_ids=input_ids_BT.to(device), use_cache=False).last_hidden_state

    spans = [(b, start, end) for b, row in enumerate(rows) for start, end in row.spans]
    row_N = torch.tensor([b for b, start, end in spans for _ in range(start, end)], device=device)
    position_N = torch.tensor([t for _, start, end in spans for t in range(start, end)], device=device)
    target_N = torch.tensor([t for b, start, end in spans for t in rows[b].token_ids[start:end]], device=device)
    hidden_NH = hidden_BTH[row_N, position_N - 1]
    del hidden_BTH
    logprobs_N = torch.cat(
        [
            _target_logprobs(_head_logits(causal_lm, hidden_nH), target_n, temperature)
            for hidden_nH, target_n in zip(
                hidden_NH.split(logit_chunk_len), target_N.split(logit_chunk_len), strict=True
            )
        ]
    ).cpu()
    pieces = iter(logprobs_N.split([end - start for _, start, end in spans]))
    return [tuple(next(pieces) for _ in row.spans) for row in rows]


def _target_logprobs(logits_NV: Tensor, target_N: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV / temperature if temperature != 1.0 else logits_NV
    return logits_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1) - logits_NV.logsumexp(-1)


def _head_logits(causal_lm: PreTrainedModel, hidden_NH: Tensor) -> Tensor:
    """Float32 logits. A 16-bit head is accumulated and kept in float32: near -10 a bf16 logit has steps of 0.06."""
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype == torch.float32:
        logits_NV = head(hidden_NH).float()
    elif head.weight.device.type == "cuda":
        logits_NV = torch.mm(hidden_NH.to(head.weight.dtype), head.weight.t(), out_dtype=torch.float32)
        logits_NV = logits_NV if head.bias is None else logits_NV + head.bias
    else:
        bias = None if head.bias is None else head.bias.float()
        logits_NV = nn.functional.linear(hidden_NH.float(), head.weight.float(), bias)
    return _transform_logits(causal_lm, logits_NV)


def _transform_logits(causal_lm: PreTrainedModel, logits_NV: Tensor) -> Tensor:
    """What some families do to the head's output: Cohere multiplies, Granite divides, Gemma 2 caps smoothly."""
    config = causal_lm.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits_NV = logits_NV * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits_NV = logits_NV / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV
