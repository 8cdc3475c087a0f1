"""Chunked log-probs equal those of full logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    Qwen2Config,
)

from rollout.batches import largest_group_tokens, row_batches
from rollout.logprobs import CPU_BATCH_TOKENS, cpu_batch_tokens, score_spans, span_logprobs
from rollout.types import ScoringRow
from tests.helpers.families import SIZES, make_model

CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "granite_divides": GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere_multiplies": CohereConfig(**SIZES, logit_scale=0.2),
    "gemma2_caps": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5),
}


def make_rows() -> list[ScoringRow]:
    generator = torch.Generator().manual_seed(1)
    spans = [((1, 5), (7, 9)), ((2, 2),), ((3, 30), (10, 12)), ((1, 2),), ((19, 20), (4, 4), (1, 20))]
    lengths = [12, 6, 30, 2, 20]
    return [
        ScoringRow(token_ids=torch.randint(0, 97, (length,), generator=generator).tolist(), spans=row_spans)
        for length, row_spans in zip(lengths, spans, strict=True)
    ]


def plain_span_logprobs(model: torch.nn.Module, row: ScoringRow, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        logits_TV = model(torch.tensor([row.token_ids])).logits[0].float() / temperature
    targets_T = torch.tensor(row.token_ids[1:])
    logprobs_T = logits_TV[:-1].log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    return tuple(logprobs_T[start - 1 : end - 1] for start, end in row.spans)


def assert_same(scored: list[tuple[torch.Tensor, ...]], expected: list[tuple[torch.Tensor, ...]], atol: float) -> None:
    for mine, theirs in zip(scored, expected, strict=True):
        for mine_T, theirs_T in zip(mine, theirs, strict=True):
            torch.testing.assert_close(mine_T, theirs_T, atol=atol, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_full_logits(family: str, temperature: float) -> None:
    model, rows = make_model(CONFIGS[family]), make_rows()
    expected = [plain_span_logprobs(model, row, temperature) for row in rows]
    assert_same(score_spans(model, rows, temperature=temperature), expected, 1e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_and_entropies_are_those_of_full_logits(family: str, temperature: float) -> None:
    model, rows = make_model(CONFIGS[family]), make_rows()[2:]
    weights = torch.rand(sum(end - start for row in rows for start, end in row.spans))
    trained = model.model.layers[0].self_attn.q_proj.weight  # the head is not trained, and some families tie it
    logprobs_N, entropy_N = span_logprobs(model, rows, temperature=temperature, logit_chunk_len=7, with_entropy=True)
    (mine,) = torch.autograd.grad((logprobs_N * weights).sum(), trained)
    expected_logprobs, expected_entropies = [], []
    for row in rows:
        logits_TV = model(torch.tensor([row.token_ids])).logits[0].float() / temperature
        full_TV = logits_TV[:-1].log_softmax(-1)
        picked_T = full_TV.gather(-1, torch.tensor(row.token_ids[1:])[:, None])[:, 0]
        for start, end in row.spans:
            expected_logprobs.append(picked_T[start - 1 : end - 1])
            expected_entropies.append(-(full_TV.exp() * full_TV).sum(-1)[start - 1 : end - 1])
    (plain,) = torch.autograd.grad((torch.cat(expected_logprobs) * weights).sum(), trained)
    torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy_N, torch.cat(expected_entropies).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("logit_chunk_len", [1, 7, 512])
def test_batching_and_chunking_change_nothing(max_batch_tokens: int, logit_chunk_len: int) -> None:
    model, rows = make_model(CONFIGS["qwen2"]), make_rows()
    scored = score_spans(model, rows, max_batch_tokens=max_batch_tokens, logit_chunk_len=logit_chunk_len)
    assert_same(scored, [plain_span_logprobs(model, row) for row in rows], 1e-5)


def test_adapter_counts_in_a_peft_model() -> None:
    model = get_peft_model(make_model(CONFIGS["qwen2"]), LoraConfig(r=4, target_modules="all-linear")).eval()
    rows = make_rows()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted = score_spans(model, rows)
    assert_same(adapted, [plain_span_logprobs(model, row) for row in rows], 1e-5)
    with model.disable_adapter():
        assert (score_spans(model, rows)[0][0] - adapted[0][0]).abs().max() > 0.1


def test_the_head_sees_only_scored_positions_a_chunk_at_a_time() -> None:
    model, rows = make_model(CONFIGS["qwen2"]), make_rows()
    num_seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: num_seen.append(output.numel() // 97))
    score_spans(model, rows, logit_chunk_len=8)
    assert max(num_seen) <= 8
    assert sum(num_seen) == sum(end - start for row in rows for start, end in row.spans)


def test_tokens_after_the_last_scored_one_are_not_computed() -> None:
    model, row = make_model(CONFIGS["qwen2"]), make_rows()[2]
    short = ScoringRow(token_ids=row.token_ids, spans=((3, 10),))
    lengths: list[int] = []
    model.model.register_forward_hook(lambda module, args, output: lengths.append(output.last_hidden_state.shape[1]))
    score_spans(model, [short])
    assert lengths == [9]


def test_bf16_logits_are_kept_in_float32() -> None:
    model, rows = make_model(CONFIGS["qwen2"]).bfloat16(), make_rows()[2:3]
    with torch.no_grad():
        hidden_TH = model.model(torch.tensor([rows[0].token_ids[:-1]])).last_hidden_state[0]
    logits_TV = hidden_TH.float() @ model.lm_head.weight.float().T
    targets_T = torch.tensor(rows[0].token_ids[1:])
    exact_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    torch.testing.assert_close(score_spans(model, rows)[0][0], exact_T[2:29], atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_logits_are_kept_in_float32_on_the_gpu() -> None:
    model, rows = make_model(CONFIGS["qwen2"]).bfloat16().cuda(), make_rows()[2:3]
    with torch.no_grad():
        hidden_TH = model.model(torch.tensor([rows[0].token_ids[:-1]]).cuda()).last_hidden_state[0]
    logits_TV = hidden_TH.double() @ model.lm_head.weight.double().T
    targets_T = torch.tensor(rows[0].token_ids[1:]).cuda()
    exact_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    torch.testing.assert_close(score_spans(model, rows)[0][0], exact_T[2:29].float().cpu(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("span", [(0, 2), (3, 2), (1, 99)])
def test_span_outside_of_the_row_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        score_spans(make_model(CONFIGS["qwen2"]), [ScoringRow(token_ids=[1, 2, 3, 4], spans=(span,))])


def test_a_forward_on_a_cpu_is_small_but_never_splits_a_group() -> None:
    def rows(num: int, own_len: int) -> list[ScoringRow]:
        return [
            ScoringRow(token_ids=[1] * 100 + [2 + i] * own_len, spans=((100, 100 + own_len),), prefix_len=100)
            for i in range(num)
        ]

    assert cpu_batch_tokens(rows(4, 50), 16384, "shared_prefix") == CPU_BATCH_TOKENS["shared_prefix"]
    assert cpu_batch_tokens(rows(4, 50), 512, "shared_prefix") == 512  # what memory allows goes first
    large = rows(100, 50)
    limit = cpu_batch_tokens(large, 16384, "shared_prefix")
    assert (
        limit == largest_group_tokens(large, "shared_prefix") == 100 + 100 * 49
    )  # the last token of a row is not read
    assert len(row_batches(large, limit, "shared_prefix")) == 1
    assert cpu_batch_tokens(large, 16384, "padded") == CPU_BATCH_TOKENS["padded"]
