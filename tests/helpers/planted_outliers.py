"""A tiny random Qwen2 with outlier activation channels, as every real model has, quantised by bitsandbytes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY_SIZE = 128


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w1")


def write_planted_model(
    folder: Path, outlier_scale: float, *, tied: bool = False, bias_scale: float = 0.0, num_rows: int = VOCABULARY_SIZE
) -> Path:
    """A bf16 checkpoint in which three channels of every norm's output are `outlier_scale` times the others.

    The columns that read those channels are divided by the scale, so the model stays the same function of its input.
    `bias_scale` is that of the biases of q, k and v, `num_rows` those of embedding and head.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=num_rows,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    outlier_channels = [5, 33, 61]
    with torch.no_grad():
        for layer in model.model.layers:
            readers = {
                layer.input_layernorm: (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                layer.post_attention_layernorm: (layer.mlp.gate_proj, layer.mlp.up_proj),
            }
            if bias_scale:
                for linear in readers[layer.input_layernorm]:
                    linear.bias.normal_(std=bias_scale)
            for norm, linears in readers.items():
                norm.weight[outlier_channels] *= outlier_scale
                for linear in linears:
                    linear.weight[:, outlier_channels] /= outlier_scale
    model.to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def load_quantised(folder: Path, bits: int, device: str = "cpu") -> Any:
    """The checkpoint through bitsandbytes: 8 (LLM.int8, threshold 6) or 4 (NF4, double quantisation) or 16 bits."""
    quantisation = {
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        16: None,
    }[bits]
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, quantization_config=quantisation
    ).eval()
