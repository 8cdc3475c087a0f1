"""Per-token log-probs of given spans for every role, without a [batch, tokens, vocabulary] tensor.

One scorer: student, teacher and reference (`score_spans`, no gradient) and the policy (`span_logprobs`, with gradient)
share the batching rule, the head and the temperature.

Letters: B rows of a batch, T tokens, H hidden size, N scored positions of a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rollout.batches import largest_group_tokens, make_batch, row_batches
from rollout.packed_attention import Layout, layout_of
from rollout.types import ScoringRow

DEFAULT_MAX_BATCH_TOKENS = 16384
DEFAULT_LOGIT_CHUNK_LEN = 256
CPU_BATCH_TOKENS: dict[Layout, int] = {"padded": 1024, "packed": 2048, "shared_prefix": 4096}
"""Larger batches are slower on a CPU: their activations leave its caches (docs/measurements.md)."""


@torch.no_grad()
def score_spans(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[ScoringRow],
    *,
    temperature: float = 1.0,
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    logit_chunk_len: int = DEFAULT_LOGIT_CHUNK_LEN,
    layout: Layout | None = None,
) -> list[tuple[Tensor, ...]]:
    """`log_softmax(logits_{t-1} / temperature)[x_t]` for every t in the spans of every row, in nats.

    A batch computes at most `max_batch_tokens` tokens, padding included (a longer row goes alone), see
    `rollout.batches`; `layout: None` is the model's own. Tokens after a row's last scored one are not computed.

    The caller decides on adapters, dropout (`model.eval()`) and what is on the GPU.

    Returns:
        One tuple per row with one float32 CPU tensor per span, in the order of `row.spans`; empty for an empty span.
    """
    results: list[tuple[Tensor, ...]] = [tuple(torch.empty(0) for _ in row.spans) for row in rows]
    layout = layout or layout_of(model)
    if model.device.type == "cpu":
        max_batch_tokens = cpu_batch_tokens(rows, max_batch_tokens, layout)
    for batch in row_batches(rows, max_batch_tokens, layout):
        batch_rows = [rows[i] for i in batch]
        logprobs_N, _ = span_logprobs(
            model, batch_rows, temperature=temperature, logit_chunk_len=logit_chunk_len, layout=layout
        )
        pieces = iter(logprobs_N.cpu().split([end - start for row in batch_rows for start, end in row.spans]))
        for index in batch:
            results[index] = tuple(next(pieces) for _ in rows[index].spans)
    return results


def cpu_batch_tokens(rows: Sequence[ScoringRow], max_batch_tokens: int, layout: Layout) -> int:
    """What a forward on a CPU takes of `max_batch_tokens`: no more than is good there, but whole groups."""
    return min(max_batch_tokens, max(CPU_BATCH_TOKENS[layout], largest_group_tokens(rows, layout)))


def span_logprobs(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[ScoringRow],
    *,
    temperature: float = 1.0,
    logit_chunk_len: int = DEFAULT_LOGIT_CHUNK_LEN,
    with_entropy: bool = False,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the spans of one batch of rows, with gradient where gradients are on.

    Runs the decoder's body, gathers the hidden states that predict a scored token and applies the head to
    `logit_chunk_len` of them at a time: at most `logit_chunk_len * V` float32 logits live at once, also in the
    backward, which computes them again.

    Returns:
        [N] float32 log-probs on the model's device, span after span and row after row; and, `with_entropy`, the [N]
        entropies of the distributions (nats at `temperature`, no gradient).
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal_lm.get_input_embeddings().weight.device
    batch = make_batch(rows, layout or layout_of(model))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    hidden_BTH = causal_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state

    spans = [(b, start, end) for b, row in enumerate(rows) for start, end in row.spans]
    before = [i for b, start, end in spans for i in batch.positions(b, start - 1, end - 1)]
    target_N = torch.tensor([t for b, start, end in spans for t in rows[b].token_ids[start:end]], device=device)
    hidden_NH = hidden_BTH.flatten(0, 1)[torch.tensor(before, device=device)]
    del hidden_BTH
    chunks = [
        _HeadLogProbs.apply(hidden_nH, causal_lm, target_n, temperature, with_entropy)
        for hidden_nH, target_n in zip(hidden_NH.split(logit_chunk_len), target_N.split(logit_chunk_len), strict=True)
    ]
    logprobs_N = torch.cat([logprobs_n for logprobs_n, _ in chunks])
    return logprobs_N, torch.cat([entropy_n for _, entropy_n in chunks]) if with_entropy else None


class _HeadLogProbs(torch.autograd.Function):
    """Log-probs and entropies of one chunk of hidden states; its logits live once in the forward and again in the
    backward, each time beside one tensor of their size."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, causal_lm: PreTrainedModel, target_N: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_NH, target_N)
        ctx.causal_lm, ctx.temperature = causal_lm, temperature
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logprobs_NV = _log_softmax_(_head_logits(causal_lm, hidden_NH), temperature)
        target_logprobs_N = logprobs_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return target_logprobs_N, target_logprobs_N.new_empty(0)
        return target_logprobs_N, -logprobs_NV.exp().mul_(logprobs_NV).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden_NH, target_N = ctx.saved_tensors
        hidden_NH = hidden_NH.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
            logits_NV = _head_logits(ctx.causal_lm, hidden_NH)
        # d log p(x) / d logits = (onehot(x) - p) / temperature, written over the logits' values, which no one needs.
        grad_NV = _log_softmax_(logits_NV.detach(), ctx.temperature).exp_().neg_()
        grad_NV.scatter_add_(-1, target_N.unsqueeze(-1), torch.ones_like(grad_N).unsqueeze(-1))
        grad_NV.mul_((grad_N / ctx.temperature).unsqueeze(-1))
        (grad_NH,) = torch.autograd.grad(logits_NV, hidden_NH, grad_NV)
        return grad_NH, None, None, None, None


def _log_softmax_(logits_NV: Tensor, temperature: float) -> Tensor:
    """`log_softmax(logits / temperature)` in the logits' own memory."""
    if temperature != 1.0:
        logits_NV.div_(temperature)
    return logits_NV.sub_(logits_NV.logsumexp(-1, keepdim=True))


class _Float32Product(torch.autograd.Function):
    """`hidden @ weight.T` of 16-bit factors, accumulated and kept in float32; for a weight that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(weight_VH)
        ctx.hidden_dtype = hidden_NH.dtype
        return torch.mm(hidden_NH.to(weight_VH.dtype), weight_VH.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, None]:
        (weight_VH,) = ctx.saved_tensors
        return (grad_NV.to(weight_VH.dtype) @ weight_VH).to(ctx.hidden_dtype), None


def _head_logits(causal_lm: PreTrainedModel, hidden_NH: Tensor) -> Tensor:
    """Float32 logits. A 16-bit head is accumulated and kept in float32: near -10 a bf16 logit has steps of 0.06."""
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype == torch.float32:
        logits_NV = head(hidden_NH).float()
    elif head.weight.device.type != "cpu":
        logits_NV = _Float32Product.apply(hidden_NH, head.weight)
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
