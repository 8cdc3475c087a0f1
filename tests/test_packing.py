"""Micro-batches and scoring batches: every row once, within the budget, little padding; prompts tokenised once."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.formats import encode
from rollout.batches import BATCH_OVERHEAD_TOKENS, input_len, token_batches
from rollout.packing import micro_batches
from rollout.types import Completion, Group, Rollout
from schemas.compose import compose_run_config
from schemas.run import ConfigError, load_run_config
from tests.helpers.tiny_run import make_trainer, write_random_model


def long_tailed_lengths(num_rows: int, seed: int) -> list[int]:
    """Prompts of about 400 tokens, completions of median 150 with a long tail up to 6,144."""
    generator = np.random.default_rng(seed)
    completions = np.minimum(np.exp(generator.normal(np.log(150), 1.0, num_rows)), 6144)
    return [int(p + c) for p, c in zip(generator.normal(400, 60, num_rows), completions, strict=True)]


def padded_share(lengths: list[int], batches: list[list[int]]) -> float:
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_tokens", [12_288, 24_576])
def test_padding_is_under_a_tenth_on_long_tailed_lengths(seed: int, max_tokens: int) -> None:
    lengths = long_tailed_lengths(64, seed)
    batches = token_batches(lengths, max_tokens)
    share, one_batch = padded_share(lengths, batches), padded_share(lengths, [list(range(64))])
    print(f"padded share {share:.3f} in {len(batches)} batches; padded to the step's longest {one_batch:.3f}")
    assert share < 0.10 < one_batch
    assert sorted(i for batch in batches for i in batch) == list(range(64))
    assert all(len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)


def test_the_cut_is_the_cheapest_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = sorted(map(int, generator.integers(1, 900, 9)), reverse=True)
        limit = int(generator.integers(500, 3000))

        def cost(batches: list[list[int]], lengths: list[int] = lengths) -> int:
            return sum(len(batch) * max(lengths[i] for i in batch) + BATCH_OVERHEAD_TOKENS for batch in batches)

        costs = []
        for cuts in range(2**8):  # every way to cut nine sorted rows
            bounds = [0, *(i + 1 for i in range(8) if cuts >> i & 1), 9]
            batches = [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
            if all(len(b) == 1 or len(b) * lengths[b[0]] <= limit for b in batches):
                costs.append(cost(batches))
        assert cost(token_batches(lengths, limit)) == min(costs)


def test_a_row_above_the_budget_goes_alone_and_empty_rows_nowhere() -> None:
    assert token_batches([10, 0, 5000, 12], 100) == [[2], [3, 0]]
    assert token_batches([], 100) == []


def test_a_budget_below_one_row_and_what_does_not_add_up_are_refused() -> None:
    for word, said in (
        ("micro_batch_tokens=100", "less than one row of full length"),
        ("top_entropy_quantile=0.5", "taken over a micro-batch"),
        ("entropy_coef=0.1", "does not add up"),
        ("pad_to_multiple_of=8", "own longest row"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_run_config(compose_run_config("teacher_rlt_tiny", [word]))


def rollout_with(lengths: list[int]) -> Rollout:
    completions = tuple(
        Completion(token_ids=[row + 2] * n, logprobs=[-0.5] * n, finish_reason="length" if row % 3 == 1 else "stop")
        for row, n in enumerate(lengths)
    )
    group = Group(question="q", solution="s", prompt_ids=[1] * 30, completions=completions)
    return Rollout(groups=(group,), advantages_B=torch.arange(len(lengths)).float())


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_every_row_is_in_one_micro_batch_with_its_own_figures(mask_truncated: bool) -> None:
    lengths = [3, 700, 5, 1, 90, 700, 2, 9]
    batches = list(
        micro_batches(rollout_with(lengths), 1500, device=torch.device("cpu"), mask_truncated=mask_truncated)
    )
    assert len(batches) > 1
    assert sum(batch.row_frac for batch in batches) == pytest.approx(1)
    assert sum(batch.token_frac for batch in batches) == pytest.approx(1)
    seen = []
    for batch in batches:
        width = max(row.spans[0][1] - row.spans[0][0] for row in batch.rows)
        assert batch.tensors["completion_ids"].shape == (len(batch.rows), width)
        for b, row in enumerate(batch.rows):
            number = row.token_ids[-1] - 2
            seen.append(number)
            assert batch.tensors["advantages"][b] == number
            is_counted = not (mask_truncated and number % 3 == 1)
            assert batch.tensors["completion_mask"][b].sum() == (lengths[number] if is_counted else 0)
            assert batch.tensors["is_token"][b].sum() == lengths[number]
    assert sorted(seen) == list(range(len(lengths)))


def test_no_prompt_is_tokenised_in_a_step_and_no_text_twice(tmp_path, monkeypatch) -> None:
    trainer = make_trainer(
        write_random_model(tmp_path / "model"), tmp_path / "run", "max_steps=1", "num_eval_prompts=0"
    )
    texts: Counter[str] = Counter()

    def counted(tokenizer, text, *args, **kwargs):
        texts.update([text] if isinstance(text, str) else text)
        return tokenise(tokenizer, text, *args, **kwargs)

    tokenizer_class = type(trainer.processing_class)
    tokenise = tokenizer_class.__call__
    monkeypatch.setattr(tokenizer_class, "__call__", counted)
    trainer.train()
    monkeypatch.undo()
    prompts = set(trainer.train_dataset["prompt"])
    assert texts and not prompts & texts.keys()
    assert max(texts.values()) == 1
    rows = trainer.train_dataset.select(range(3))
    assert rows["prompt_ids"][:] == [encode(trainer.processing_class, text) for text in rows["prompt"]]


def test_no_token_is_computed_twice_by_a_model_in_a_pass(tmp_path) -> None:
    """Policy (in the loss), reference and student: every token once, and what a group has in common once for all."""
    trainer = make_trainer(
        write_random_model(tmp_path / "model"),
        tmp_path / "run",
        *("max_steps=1", "num_eval_prompts=0", "importance_sampling_correction=true", "beta=0.04"),
    )
    host, computed, rollouts = trainer.host, Counter[tuple[str, str]](), []
    for name, causal_lm in (("teacher", host.teacher.get_base_model()), ("student", host.student)):

        def count(module, args, kwargs, name=name) -> None:
            computed[name, str(host.meter.open_phases[-1])] += kwargs["input_ids"].numel()

        causal_lm.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    score = trainer._score
    trainer._score = lambda rollout: (rollouts.append(rollout), score(rollout))[1]
    trainer.train()
    (rollout,) = rollouts
    policy = sum(len(g.prompt_ids) + sum(len(c.token_ids) - 1 for c in g.completions) for g in rollout.groups)
    chats = [trainer.scorer._builder.build(row).student for row in rollout.rows]
    heads = {row.group.question: chat.prefix_len for row, chat in zip(rollout.rows, chats, strict=True)}
    student = sum(heads.values()) + sum(input_len(chat) - chat.prefix_len for chat in chats)
    assert computed["teacher", "train"] == policy  # the policy's forward with gradient, and no other
    assert computed["teacher", "score"] == policy  # the reference's
    assert computed["student", "score"] == student
