"""A checkpoint of a real shape with random weights, its tokenizer, and questions of a wanted length.

Made on the spot, on the GPU where there is one. Every row of the embedding has a token, so that whatever is sampled
decodes; the weights follow transformers' own initial values (normal, 0.02), so that log-probs are close to uniform.
"""

import json
import random
import shutil
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from core.log import log
from core.units import format_gb
from data.formats import PromptFormat, encode
from data.tags import TAG_STYLES
from optimization.gpu import pick_device
from planner.shapes import ModelShape, load_shape, model_sizes

TINY = ModelShape(
    name="tiny",
    hidden=128,
    intermediate=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab=4096,
    tied_embeddings=False,
    attention_bias=True,
    qk_norm=False,
    max_positions=32768,
)
NUM_QUESTIONS = 32

_INITIAL_STD = 0.02
_SHARD_BYTES = 4 << 30
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHARACTERS = "etaoinshrdlucmfwypvbgkjqxzĠETAOINSHRDLUCMFWYPVBGKJQXZ0123456789.,;:!?-+*/=()[]{}'\""
_TEXT = "the sum of two numbers is one more than what we had so we go on and add the next to it"


def shape_named(name: str) -> ModelShape:
    """`tiny`, or a size of Qwen2.5."""
    return TINY if name == "tiny" else load_shape(model_sizes("Qwen2.5")[name])


def ensure_random_model(name: str, folder: Path) -> Path:
    """The checkpoint of a shape in `folder`, made where it is missing; other shapes go where the disk is short."""
    checkpoint, shape = folder / name, shape_named(name)
    if (checkpoint / "config.json").exists():
        return checkpoint
    for other in sorted(folder.glob("*")) if folder.exists() else []:
        if shutil.disk_usage(folder).free < 5 * shape.num_params:  # 16-bit weights twice (the export), and a margin
            log.info("removing %s: the disk is short", other)
            shutil.rmtree(other)
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    tokenizer = build_tokenizer(shape.vocab)
    tokenizer.save_pretrained(checkpoint)
    config = _model_config(shape, tokenizer)
    num_bytes = _write_weights(config, checkpoint)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(
        checkpoint
    )
    config.save_pretrained(checkpoint)  # last: it marks the folder as complete
    log.info("random %s: %s in %s", name, format_gb(num_bytes), checkpoint)
    return checkpoint


def build_tokenizer(num_rows: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly `num_rows` tokens: bytes, then pairs of printable characters, then pairs of pairs."""
    tags = [tag for style in TAG_STYLES.values() for tag in style.all_tags]
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    num_merges = num_rows - len(vocab) - len(_SPECIAL_TOKENS) - len(tags)
    level = list(_CHARACTERS)
    while len(merges) < num_merges:
        longer = []
        for pair in product(level, level):
            if len(merges) < num_merges and (text := "".join(pair)) not in vocab:
                vocab[text] = len(vocab)
                merges.append(pair)
                longer.append(text)
        level = longer
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=TINY.max_positions,
        clean_up_tokenization_spaces=False,
    )


def write_questions(path: Path, tokenizer: PreTrainedTokenizerFast, max_prompt_len: int) -> list[int]:
    """`NUM_QUESTIONS` rows whose teacher prompts have 95 to 100 % of `max_prompt_len` tokens; returns their lengths.

    Raises:
        ValueError: the system prompt alone is longer.
    """
    prompts = PromptFormat.from_styles(tag_format="bespoke", prompt_style="stratos")
    rng = random.Random(0)

    def row(index: int, num_words: int) -> dict[str, str]:
        text = _TEXT.split()
        words = [text[(index + k) % len(text)] for k in range(num_words)]
        num_solution = max(1, num_words // 20)
        return {"question": f"{index}: {' '.join(words[num_solution:])}?", "solution": " ".join(words[:num_solution])}

    def length(written: dict[str, str]) -> int:
        return len(encode(tokenizer, prompts.teacher_prompt_text(tokenizer, written["question"], written["solution"])))

    fixed_len = length(row(NUM_QUESTIONS, 1))
    if fixed_len >= max_prompt_len:
        raise ValueError(f"the prompt around a question has {fixed_len} tokens, and {max_prompt_len} are allowed")
    tokens_per_word = (length(row(NUM_QUESTIONS, 1001)) - fixed_len) / 1000
    rows, lengths = [], []
    for index in range(NUM_QUESTIONS):
        num_words = max(1, int((max_prompt_len * rng.uniform(0.97, 1.0) - fixed_len) / tokens_per_word))
        while num_words > 1 and length(row(index, num_words)) > max_prompt_len:
            num_words -= 1
        rows.append(row(index, num_words))
        lengths.append(length(rows[-1]))
    path.write_text("".join(json.dumps(r | {"reasoning_trace": "so it is"}) + "\n" for r in rows), encoding="utf-8")
    return lengths


def _model_config(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _write_weights(config: Qwen2Config, folder: Path) -> int:
    """Tensor after tensor into shards: there is never a second copy of the model. Returns the bytes written."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    device = pick_device("auto").type
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    shard_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, shard_bytes = {}, 0

    for name, meta in state.items():
        if shard and shard_bytes + meta.nbytes > _SHARD_BYTES:
            flush()
        tensor = torch.empty(meta.shape, dtype=torch.bfloat16, device=device)
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0.0, _INITIAL_STD, generator=generator)
        shard[name] = tensor.cpu()
        shard_bytes += meta.nbytes
        total_bytes += meta.nbytes
    flush()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if device == "cuda":
        torch.cuda.empty_cache()  # what follows is measured
    return total_bytes
