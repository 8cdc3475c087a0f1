"""Attention over a packed batch: rows one after another in one sequence, without padding, a common prefix once.

The tokens of a packed batch are cut into segments. A segment is a row, or the prefix that the rows of a group have in
common, or what such a row has after it. Its queries see its own keys causally, and all of its prefix's; no other. With
the positions that the tokens have in their own rows, every hidden state is that of the row alone (Prefix Grouper,
arXiv 2506.05433; exact but for the order of sums), forward and backward.

`pack_sequences(model)` lets a loaded model read packed batches; without the argument `packed` its attention stays what
it was. Letters: T tokens of the packed batch, S of one segment, P of its prefix, A heads, D size of a head.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Layout = Literal["shared_prefix", "packed", "padded"]
"""How the rows of a batch are laid out, see `rollout.batches`."""

_ATTENTION_NAMES: dict[Layout, str] = {"shared_prefix": "shared_prefix_sdpa", "packed": "packed_sdpa"}
"""Names under which transformers finds `packed_attention`; a model's own says which layout it is to be read in."""
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Segments:
    """How a packed batch is cut; handed to every attention layer as `packed`."""

    lengths: list[int]
    """[segments] tokens of each, in the order of the batch."""
    prefixes: list[int | None]
    """[segments] index of the segment that precedes it in its rows, or None."""
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, num_own: int, num_prefix: int, window: int | None, device: torch.device) -> Tensor:
        """[S, P + S] bool: what each of a segment's tokens sees. Made once and shared by all layers."""
        key = (num_own, num_prefix, window)
        if key not in self._masks:
            mask_SK = torch.ones(num_own, num_prefix + num_own, dtype=torch.bool, device=device).tril(num_prefix)
            self._masks[key] = mask_SK if window is None else mask_SK.triu(num_prefix - window + 1)
        return self._masks[key]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, A, T, D] queries, keys and values (fewer heads) to [1, T, A, D]."""
    if packed is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    return _by_segment(query, key, value, packed, window=sliding_window, dropout_p=dropout, scale=scaling), None


@torch.compiler.disable  # a step's segments are its own: compiled code would be made anew for each batch
def _by_segment(query: Tensor, key: Tensor, value: Tensor, packed: Segments, **options: Any) -> Tensor:
    # `split` has one backward for all segments; slices would each fill a tensor of the whole batch's size.
    lengths = packed.lengths
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    attended = []
    for own, (query_S, prefix) in enumerate(zip(query.split(lengths, dim=2), packed.prefixes, strict=True)):
        read = [own] if prefix is None else [prefix, own]
        keys_S, values_S = (torch.cat([tensors[i] for i in read], dim=2) for tensors in (keys, values))
        attended.append(_causal_attention(query_S, keys_S, values_S, packed, **options))
    return torch.cat(attended, dim=2).transpose(1, 2)


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Segments, *, window: int | None, **options: Any
) -> Tensor:
    """Attention of a segment, whose queries are the last of the keys' tokens."""
    num_own, num_read = query.shape[2], key.shape[2]
    if window is not None and window >= num_read:
        window = None
    if query.device.type == "cpu":
        grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    else:  # the fused kernels do not take a mask together with grouped heads
        groups, grouped = query.shape[1] // key.shape[1], {}
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if num_own == num_read and window is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options, **grouped)
    if window is None and query.device.type != "cpu":
        mask: Any = causal_lower_right(num_own, num_read)  # a name for the mask, which flash attention knows
    else:
        mask = packed.mask(num_own, num_read - num_own, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **options, **grouped)


def obstacle_to_packing(model: PreTrainedModel) -> str | None:
    """Why the attention of a loaded model cannot read packed batches; None where it can."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", *_ATTENTION_NAMES.values()):
        return f"its attention is {config._attn_implementation}, not sdpa"
    if not model._supports_attention_backend or not model._supports_sdpa:
        return "its attention is its own"
    other_layers = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps logits"
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    return None


def pack_sequences(model: PreTrainedModel, layout: Layout = "shared_prefix") -> None:
    """Let a model read packed batches; see `obstacle_to_packing`. Other calls of it compute what they did."""
    for name in _ATTENTION_NAMES.values():
        AttentionInterface.register(name, packed_attention)
        AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(_ATTENTION_NAMES.get(layout, "sdpa"))


def layout_of(model: PreTrainedModel | PeftModel) -> Layout:
    """The layout that `pack_sequences` gave a model; `padded` where it was not called."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    attention = base.config.get_text_config()._attn_implementation
    return next((layout for layout, name in _ATTENTION_NAMES.items() if name == attention), "padded")
