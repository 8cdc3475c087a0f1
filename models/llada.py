"""Bidirectional Llama: the network of a masked-diffusion language model (LLaDA, arXiv 2502.09992).

The layers are transformers' own. What differs from a causal Llama: no causal mask, no key-value cache, a mask token, a
head that can be applied to chosen positions only. The published LLaDA-8B checkpoints are read into this class: the
computation is the same, only names differ. Their own code, which would have to be trusted, is not run.

Letters: B rows, T tokens of a row, N chosen positions of a batch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutput

from schemas.llada import PUBLISHED_SETTINGS, NewModelShape
from schemas.model import ModelArgs

MASK_TOKEN = "<|mdm_mask|>"
"""The mask's name in LLaDA's tokenizer; new tokenizers get it too."""


# The published checkpoints' name of a weight -> ours. `ff_out` outside of the blocks is the head.
_PUBLISHED_WEIGHTS = {
    **{
        rf"^model\.transformer\.blocks\.(\d+)\.{published}\.": rf"model.layers.\1.{name}."
        for published, name in {
            "attn_norm": "input_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_norm": "post_attention_layernorm",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        }.items()
    },
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
}


class LladaConfig(LlamaConfig):
    """`LlamaConfig` with `mask_token_id`. `is_causal` False makes transformers build masks that look both ways."""

    model_type = "llada"

    mask_token_id: int | None = None
    is_causal: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for published, name in PUBLISHED_SETTINGS.items():
            if published in kwargs:
                setattr(self, name, kwargs.pop(published))
        kwargs.pop("auto_map", None)  # the code that the published checkpoints bring
        super().__post_init__(**kwargs)
        # LLaDA pads with end-of-text, which is learned: as `pad_token_id` its embedding would be zero and stay so.
        self.pad_token_id = None


class LladaModel(LlamaForCausalLM):
    """Predicts the tokens under the masks: logits at position t are for the token at position t (no shift)."""

    config_class = LladaConfig

    def __init__(self, config: LladaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            # Without a mask, sdpa and flash attention ask the module instead of the configuration.
            layer.self_attn.is_causal = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        at_BT: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits [N, V] of the positions that the boolean `at_BT` chooses, row after row; [B, T, V] without it.

        `attention_mask` is [B, T] (1: token, 0: padding) or boolean [B, 1, T, T] (True: query t may look at key s).
        """
        if attention_mask is not None and attention_mask.ndim == 4 and self.config._attn_implementation == "eager":
            # Eager attention adds its mask to the scores.
            lowest = torch.finfo(self.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=self.dtype).masked_fill(~attention_mask, lowest)
        hidden_BTH = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden_BTH if at_BT is None else hidden_BTH[at_BT]))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves under the names of this class: transformers' Trainer reads checkpoints without renaming."""
        super().save_pretrained(*args, **{"save_original_format": False} | kwargs)


def new_llada(shape: NewModelShape, args: ModelArgs, tokenizer: PreTrainedTokenizerBase) -> LladaModel:
    """A network with random weights in `args.torch_dtype`."""
    config = LladaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    dtype = getattr(torch, args.torch_dtype)
    return LladaModel._from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)


AutoConfig.register(LladaConfig.model_type, LladaConfig)
AutoModelForCausalLM.register(LladaConfig, LladaModel)
register_checkpoint_conversion_mapping(
    LladaConfig.model_type, [WeightRenaming(old, new) for old, new in _PUBLISHED_WEIGHTS.items()]
)
