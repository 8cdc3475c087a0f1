"""Which tokens of a completion count, and where the solution lies in the student's chat."""

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.errors import UserError
from core.types import Role
from data.formats import encode
from rollout.logprobs import score_spans
from rollout.scoring import RolloutScorer
from rollout.spans import RowBuilder, find_explanation
from rollout.token_text import TokenText
from rollout.types import ScoringRow
from schemas.reward import RewardConfig
from scoring.with_models import score_with_models
from tests.helpers.golden import golden_format, golden_model, golden_tokenizer
from tests.helpers.rollouts import rollout_of, row_of

CLOSING = golden_format().tags.explanation.closing
EOS = golden_tokenizer().eos_token_id
TEXTS = [
    "plain words, 1 + 1 = 2.\n\n",
    "底辺 × 高さ ÷ 2 → 🙂👍🏽 naïve",
    "almost a tag <|end_of_explanatio and <|end_of_thought|> inside",
    "ends in a piece of the tag <|end_of_",
    " ",
    "",
]


def builder(
    tokenizer: PreTrainedTokenizerBase | None = None, student: PreTrainedTokenizerBase | None = None
) -> RowBuilder:
    return RowBuilder(tokenizer or golden_tokenizer(), golden_format(), student)


def with_token(text: str) -> PreTrainedTokenizerBase:
    """The golden tokenizer with one more, non-special token."""
    tokenizer = copy.deepcopy(golden_tokenizer())
    tokenizer.add_tokens([text])
    return tokenizer


def metaspace_tokenizer(adds_leading_space: bool = False) -> PreTrainedTokenizerBase:
    """A SentencePiece-like vocabulary: `▁` for a space, bytes as `<0xE5>`."""
    pieces = ["<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)), "\n"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if adds_leading_space else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    wrapped.chat_template = golden_tokenizer().chat_template
    return wrapped


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level without merges: another vocabulary than the golden one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = golden_tokenizer().chat_template
    return wrapped


def split_characters(token_ids: list[int]) -> list[list[int]]:
    """Groups of tokens that decode to whole characters, found by decoding alone."""
    groups: list[list[int]] = [[]]
    for token_id in token_ids:
        groups[-1].append(token_id)
        if "\ufffd" not in golden_tokenizer().decode(groups[-1]):
            groups.append([])
    return groups


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("after", ["", "\n\nmore", CLOSING])
def test_tokens_before_the_closing_tag_count(text: str, after: str) -> None:
    completion_ids = encode(golden_tokenizer(), text + CLOSING + after) + [EOS]
    found = find_explanation(completion_ids, CLOSING, TokenText(golden_tokenizer()))
    assert found.matched and found.text == text
    # plain version: characters of whole-character groups, while they end before the tag
    num_inside, written = 0, ""
    for group in split_characters(completion_ids):
        written += golden_tokenizer().decode(group)
        if len(written) > len(text):
            break
        num_inside += len(group)
    assert found.token_slice == slice(0, num_inside)
    assert golden_tokenizer().decode(completion_ids[found.token_slice]) + found.leftover == text


@pytest.mark.parametrize("text", TEXTS)
def test_without_a_closing_tag_every_token_with_text_counts(text: str) -> None:
    ids = encode(golden_tokenizer(), text)
    for ending in ([], [EOS]):
        found = find_explanation(ids + ending, CLOSING, TokenText(golden_tokenizer()))
        assert not found.matched
        assert (found.text, found.token_slice) == (text, slice(0, len(ids)))


@pytest.mark.parametrize("stop_id", [EOS, 600], ids=["special token", "id outside of the vocabulary"])
def test_the_completion_ends_at_its_first_token_without_text(stop_id: int) -> None:
    ids = [*encode(golden_tokenizer(), "one"), stop_id, *encode(golden_tokenizer(), "two" + CLOSING)]
    found = find_explanation(ids, CLOSING, TokenText(golden_tokenizer()))
    assert (found.text, found.matched) == ("one", False)


def test_a_token_that_straddles_the_closing_tag_does_not_count_and_its_text_reaches_the_student() -> None:
    tokenizer = with_token("es.<|")
    completion_ids = encode(tokenizer, "two boxes." + CLOSING)
    straddling = tokenizer.convert_tokens_to_ids("es.<|")
    assert straddling in completion_ids
    row = builder(tokenizer).build(row_of("How many?", "two", completion_ids, tokenizer))
    assert row.matched and row.explanation == "two boxes."
    assert tokenizer.decode(completion_ids[row.explanation_slice]) == "two box"
    assert "<|begin_of_thought|>\n\ntwo boxes.<|end_of_thought|>" in tokenizer.decode(row.student.token_ids)
    (_, (start, end)), ((teacher_start, teacher_end),) = row.student.spans, row.teacher.spans
    assert row.student.token_ids[start:end] == row.teacher.token_ids[teacher_start:teacher_end]
    assert tokenizer.decode(row.student.token_ids[start:end]) == "two box"


def test_sampled_ids_are_scored_as_sampled_though_their_text_encodes_otherwise() -> None:
    sampled = [id_ for c in "There are" for id_ in encode(golden_tokenizer(), c)]
    assert sampled != encode(golden_tokenizer(), "There are")
    row = builder().build(row_of("q", "s", sampled + encode(golden_tokenizer(), CLOSING)))
    for scoring_row, (start, end) in ((row.student, row.student.spans[1]), (row.teacher, row.teacher.spans[0])):
        assert scoring_row.token_ids[start:end] == sampled


@pytest.mark.parametrize(
    "solution", ["end", "of", "|", "solution", "<|", "How many boxes?", "two", " two ", "\n\n二\n\n"]
)
def test_solution_span_is_the_solution_at_its_own_place(solution: str) -> None:
    completion_ids = encode(golden_tokenizer(), "two, the end of it" + CLOSING)
    row = builder().build(row_of("How many boxes?", solution, completion_ids))
    start, end = row.student.spans[0]
    assert golden_tokenizer().decode(row.student.token_ids[start:end]).strip() == solution.strip()
    assert golden_tokenizer().decode(row.student.token_ids[end:]).strip() == "<|end_of_solution|><|im_end|>"
    assert golden_tokenizer().decode(row.student.token_ids[:start]).strip().endswith("<|begin_of_solution|>")


def test_an_explanation_that_repeats_the_question_is_scored_where_it_stands() -> None:
    row = builder().build(row_of("two boxes", "two", encode(golden_tokenizer(), "two boxes" + CLOSING)))
    start, end = row.student.spans[1]
    assert golden_tokenizer().decode(row.student.token_ids[:start]).endswith("<|begin_of_thought|>\n\n")
    assert golden_tokenizer().decode(row.student.token_ids[start:end]) == "two boxes"


def test_an_empty_explanation_keeps_the_padding_in_the_students_chat_and_has_an_empty_span() -> None:
    for completion, matched in ((CLOSING, True), ("", False)):
        row = builder().build(row_of("q", "s", encode(golden_tokenizer(), completion)))
        assert row.matched == matched and row.explanation == ""
        assert row.student.spans[1][0] == row.student.spans[1][1]
        assert row.teacher.spans[0][0] == row.teacher.spans[0][1]
        chat = golden_tokenizer().decode(row.student.token_ids)
        assert "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n<|begin_of_solution|>s<|end_of_solution|>" in chat


def test_a_solution_without_a_token_of_its_own_is_refused() -> None:
    tokenizer = with_token("|>.<|")
    with pytest.raises(UserError, match="lies inside its tags"):
        builder(tokenizer).build(row_of("q", ".", encode(tokenizer, "text" + CLOSING), tokenizer))


def test_any_sampled_bytes_give_aligned_rows() -> None:
    """Bytes that are no valid UTF-8 and pieces of tags, as an untrained policy samples them."""
    chance = random.Random(0)
    rows = builder()
    for _ in range(200):
        ids = [chance.randrange(556) for _ in range(chance.randrange(30))]
        if chance.random() < 0.5:
            ids[5:5] = encode(golden_tokenizer(), CLOSING)
        row = rows.build(row_of("q", "s", ids))
        (start, end), (teacher_start, teacher_end) = row.student.spans[1], row.teacher.spans[0]
        assert row.student.token_ids[start:end] == row.teacher.token_ids[teacher_start:teacher_end]
        assert row.student.token_ids[start:end] == ids[row.explanation_slice]
        assert CLOSING not in row.explanation


@pytest.mark.parametrize("text", ["two boxes, 🙂 ", "  a\n"])
def test_sentencepiece_like_vocabularies_work_too(text: str) -> None:
    tokenizer = metaspace_tokenizer()
    ids = encode(tokenizer, text + CLOSING + " more")
    found = find_explanation(ids, CLOSING, TokenText(tokenizer))
    assert found.text == text and tokenizer.decode(ids[found.token_slice]) == text


def test_a_vocabulary_whose_tokens_do_not_join_to_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="do not join"):
        TokenText(metaspace_tokenizer(adds_leading_space=True))


NO_KL = RewardConfig(kl_penalty_reward_coeff=[0.0, 0.0], teacher_logprobs="forward")


def make_scorer(config: RewardConfig, student: PreTrainedTokenizerBase) -> RolloutScorer:
    def score(role: Role, rows: Sequence[ScoringRow], temperature: float) -> list[tuple[torch.Tensor, ...]]:
        assert role == Role.STUDENT
        return score_spans(golden_model(role), rows, temperature=temperature)

    return RolloutScorer(
        tokenizer=golden_tokenizer(),
        prompt_format=golden_format(),
        reward_config=config,
        sampling_temperature=0.7,
        score=score,
        student_tokenizer=student,
    )


def test_a_student_with_another_tokenizer_scores_the_solution_from_text() -> None:
    student = byte_tokenizer()
    scored = make_scorer(NO_KL, student)(rollout_of(["q"], ["二 s"], [encode(golden_tokenizer(), "two 🙂" + CLOSING)]))
    row = scored.rows[0]
    assert len(row.student.spans) == 1
    start, end = row.student.spans[0]
    assert student.decode(row.student.token_ids[start:end]) == "二 s"
    assert student.decode(row.student.token_ids[:start]).endswith("two 🙂<|end_of_thought|>\n\n<|begin_of_solution|>")
    assert set(scored.breakdown.terms) >= {"solution_log_prob_reward"} and "kl_reward" not in scored.breakdown.terms


def test_the_kl_term_is_refused_where_the_tokenizers_differ() -> None:
    with pytest.raises(UserError, match="different tokenizers"):
        make_scorer(RewardConfig(), byte_tokenizer())


def test_an_equal_vocabulary_counts_as_one_tokenizer() -> None:
    assert make_scorer(RewardConfig(), copy.deepcopy(golden_tokenizer())).reward.needs_kl


def test_sampler_logprobs_at_another_temperature_are_refused() -> None:
    with pytest.raises(UserError, match="unbias_teacher_log_probs"):
        make_scorer(RewardConfig(unbias_teacher_log_probs=False), golden_tokenizer())


def test_missing_sampler_logprobs_are_refused() -> None:
    scorer = make_scorer(RewardConfig(), golden_tokenizer())
    with pytest.raises(UserError, match="returned no log-probs"):
        scorer(rollout_of(["q"], ["s"], [encode(golden_tokenizer(), "x" + CLOSING)]))


def test_score_texts_closes_open_explanations_unless_told_otherwise() -> None:
    def match_reward(text: str, **options: bool) -> float:
        breakdown = score_with_models(
            ["q"],
            ["s"],
            [text],
            teacher=golden_model("teacher"),
            student=golden_model("student"),
            tokenizer=golden_tokenizer(),
            prompt_format=golden_format(),
            reward_config=RewardConfig(),
            temperature=1.0,
            **options,
        )
        return breakdown.terms["match_reward"].item()

    assert match_reward("why") == match_reward("why" + CLOSING, close_explanations=False) == 0.0
    assert match_reward("why", close_explanations=False) == -1.0
