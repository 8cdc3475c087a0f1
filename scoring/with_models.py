"""Scoring of texts under models that the caller holds: the RLT reward. (`scoring.texts`: models of a run.)"""

from collections.abc import Sequence
from dataclasses import replace

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.types import Role
from data.formats import PromptFormat, encode
from rewards.rlt import RewardBreakdown
from rollout.logprobs import score_spans
from rollout.scoring import RolloutScorer
from rollout.types import Completion, Group, Rollout, ScoringRow
from schemas.reward import RewardConfig


def score_with_models(
    questions: Sequence[str],
    solutions: Sequence[str],
    explanations: Sequence[str],
    *,
    teacher: PreTrainedModel | PeftModel,
    student: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    reward_config: RewardConfig,
    temperature: float,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    close_explanations: bool = True,
) -> RewardBreakdown:
    """Score B (question, solution, explanation) texts and return every term.

    An explanation is what follows the opened tag and its padding in the teacher's prompt; what comes after its closing
    tag is ignored. Where it has no closing tag, one is added; `close_explanations=False` leaves it open, as a cut-off
    completion is. The teacher's log-probs always come from a forward.

    Example:
        >>> scores = score_with_models([question], [solution], [text], teacher=t, student=s, tokenizer=tok,
        ...                            prompt_format=fmt, reward_config=RewardConfig(), temperature=0.7)
        >>> scores.terms["answer_log_prob_mean"]

    Raises:
        UserError: different tokenizers with a KL term, or a solution without a token of its own.
        NonFiniteError: a log-prob is not finite.
    """
    models = {Role.TEACHER: teacher, Role.STUDENT: student}

    def score(role: Role, rows: Sequence[ScoringRow], temperature: float) -> list[tuple[Tensor, ...]]:
        return score_spans(models[role], rows, temperature=temperature)

    closing_tag = prompt_format.tags.explanation.closing
    texts = [text + closing_tag if close_explanations and closing_tag not in text else text for text in explanations]
    scorer = RolloutScorer(
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        reward_config=replace(reward_config, teacher_logprobs="forward"),
        sampling_temperature=temperature,
        score=score,
        student_tokenizer=student_tokenizer,
    )
    completion_ids = [encode(tokenizer, text) for text in texts]
    rollout = written_rollout(tokenizer, prompt_format, questions, solutions, completion_ids)
    return scorer(rollout, every_term=True).breakdown


def written_rollout(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    questions: Sequence[str],
    solutions: Sequence[str],
    completion_ids: Sequence[list[int]],
) -> Rollout:
    """Rollout of written texts: one completion per question, without a sampler's log-probs."""
    return Rollout(
        groups=tuple(
            Group(
                question=question,
                solution=solution,
                prompt_ids=encode(tokenizer, prompt_format.teacher_prompt_text(tokenizer, question, solution)),
                completions=(Completion(token_ids=ids, logprobs=None, finish_reason="stop"),),
            )
            for question, solution, ids in zip(questions, solutions, completion_ids, strict=True)
        )
    )
