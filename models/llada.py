"""A Llama whose attention looks both ways: the network of a masked-diffusion language model (LLaDA, arXiv 2502.09992).

The layers are transformers' own. What differs from a causal Llama: no causal mask, no key-value cache, a mask token, and
a head that can be applied to chosen positions only.

Letters: B rows, T tokens of a row, N chosen positions of a batch, V vocabulary.
"""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput


class LladaConfig(LlamaConfig):
    """`LlamaConfig` with `mask_token_id`. `is_causal` False makes transformers build masks that look both ways."""

    model_type = "llada_llama"

    mask_token_id: int | None = None
    is_causal: bool = False
    use_cache: bool = False


class LladaModel(LlamaForCausalLM):
    """Predicts the tokens under the masks: logits at position t are for the token at position t (no shift)."""

    config_class = LladaConfig

    def __init__(self, config: LladaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            # Without a mask, sdpa and flash attention ask the module instead of the configuration.
            layer.self_attn.is_causal = False

    def forward(  # type: ignore[override]
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
        hidden_BTH = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden_BTH if at_BT is None else hidden_BTH[at_BT]))


AutoConfig.register(LladaConfig.model_type, LladaConfig)
AutoModelForCausalLM.register(LladaConfig, LladaModel)
