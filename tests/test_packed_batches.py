"""Packed batches equal padded ones: log-probs, gradients, every row once, no padding, a common prefix once."""

from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rollout.batches import input_len, make_batch, row_batches
from rollout.logprobs import score_spans, span_logprobs
from rollout.packed_attention import Layout, obstacle_to_packing, pack_sequences
from rollout.types import ScoringRow
from tests.helpers.families import SIZES, make_model

FAMILIES: dict[str, PretrainedConfig] = {
    "cohere": CohereConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "granite": GraniteConfig(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral_window": MistralConfig(**SIZES, sliding_window=6),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
PACKED: tuple[Layout, ...] = ("shared_prefix", "packed")


def make_rows(seed: int = 0, vocab_size: int = 97) -> list[ScoringRow]:
    """Three groups with a prefix each, rows without one, a row of one token, rows that score nothing."""
    generator = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        return generator.integers(0, vocab_size, length).tolist()

    rows = [ScoringRow(token_ids=draw(9), spans=((1, 4), (2, 9))), ScoringRow(token_ids=draw(5), spans=())]
    for prefix_len, lengths in ((7, (4, 1, 11)), (1, (3, 30)), (12, (2,))):
        prefix = draw(prefix_len)
        for length in lengths:
            end = prefix_len + length
            spans = ((prefix_len, end), (end - 1, end))
            rows.append(ScoringRow(token_ids=prefix + draw(length), spans=spans, prefix_len=prefix_len))
    return [rows[i] for i in generator.permutation(len(rows))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", PACKED)
def test_logprobs_are_those_of_each_row_alone(family: str, layout: Layout) -> None:
    model = make_model(FAMILIES[family], noise=0.05)
    rows = make_rows()
    expected = [score_spans(model, [row])[0] for row in rows]
    assert obstacle_to_packing(model) is None
    pack_sequences(model)
    for max_tokens in (1, 30, 10_000):
        scored = score_spans(model, rows, layout=layout, max_batch_tokens=max_tokens)
        for mine, theirs in zip(scored, expected, strict=True):
            for mine_T, theirs_T in zip(mine, theirs, strict=True):
                torch.testing.assert_close(mine_T, theirs_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("family", ["qwen2", "mistral_window"])
def test_gradients_of_an_adapter_are_those_of_a_padded_batch(family: str, layout: Layout, checkpointing: bool) -> None:
    model = get_peft_model(make_model(FAMILIES[family], noise=0.05), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    rows = [row for row in make_rows() if input_len(row)]
    weights_N = torch.randn(sum(end - start for row in rows for start, end in row.spans))

    def gradients(layout: Layout) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logprobs_N, _ = span_logprobs(model, rows, layout=layout, temperature=0.7)
        (logprobs_N * weights_N).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients("padded")
    pack_sequences(model.get_base_model())
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    found = gradients(layout)
    assert len(found) == len(expected) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("max_tokens", [1, 20, 47, 1000])
def test_every_row_is_in_one_batch_within_the_budget_and_nothing_is_computed_twice(
    seed: int, layout: Layout, max_tokens: int
) -> None:
    rows = make_rows(seed)
    batches = row_batches(rows, max_tokens, layout)
    assert sorted(i for batch in batches for i in batch) == [i for i, row in enumerate(rows) if input_len(row)]
    sizes = []
    for members in batches:
        batch = make_batch([rows[i] for i in members], layout)
        sizes.append(batch.num_tokens)
        assert batch.num_tokens <= max(max_tokens, *(input_len(rows[i]) for i in members)) or len(members) == 1
        for b, i in enumerate(members):  # every token of every row is found where the batch says
            found = batch.inputs["input_ids"][0][batch.positions(b, 0, input_len(rows[i]))].tolist()
            assert found == rows[i].token_ids[: input_len(rows[i])]
        if layout == "shared_prefix":
            prefixes = Counter(tuple(rows[i].token_ids[: rows[i].prefix_len]) for i in members if rows[i].prefix_len)
            saved = sum(len(prefix) * (count - 1) for prefix, count in prefixes.items())
            assert batch.num_tokens == sum(input_len(rows[i]) for i in members) - saved
    assert sizes == sorted(sizes, reverse=True)


def test_rows_that_share_no_prefix_are_not_mixed_up() -> None:
    rows = [ScoringRow(token_ids=[n, 5, 6, 7], spans=((3, 4),), prefix_len=2) for n in (1, 2)]
    assert make_batch(rows, "shared_prefix").num_tokens == 6
    assert make_batch([rows[0], rows[0]], "shared_prefix").num_tokens == 4


def test_a_model_whose_attention_cannot_is_named_with_the_reason() -> None:
    assert "caps" in str(obstacle_to_packing(make_model(Gemma2Config(**SIZES, head_dim=8), noise=0.05)))
    eager = AutoModelForCausalLM.from_config(FAMILIES["qwen2"], attn_implementation="eager")
    assert "eager" in str(obstacle_to_packing(eager))


def test_other_calls_of_a_packing_model_compute_what_they_did() -> None:
    model, ids_BT = make_model(FAMILIES["qwen2_window"], noise=0.05), torch.randint(3, 97, (2, 20))
    mask_BT = torch.ones_like(ids_BT).index_fill_(1, torch.arange(4), 0)
    with torch.no_grad():
        expected = model(ids_BT, attention_mask=mask_BT).logits
        generated = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=5, do_sample=False)
        pack_sequences(model)
        assert torch.equal(model(ids_BT, attention_mask=mask_BT).logits, expected)
        assert torch.equal(model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=5, do_sample=False), generated)
