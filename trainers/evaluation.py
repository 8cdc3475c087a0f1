"""Evaluation of a policy on held-out data: sample, score, classify. Functions that need no trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from core.types import Phase
from data.formats import TagStyle
from data.masked_diffusion import Sample
from generation.masked_diffusion import generate_responses
from models.evaluation import evaluation_mode
from models.host import ModelHost
from models.masked_diffusion import likelihood_bound, random_stream
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from rollout.scoring import RolloutScorer
from rollout.tables import Classifier, completion_texts, evaluation_metrics, evaluation_table
from rollout.types import Group, Rollout
from schemas.llada import MaskedDiffusionRunConfig

_BOUND_STREAM, _SAMPLING_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    metrics: dict[str, float]
    """Means over the questions (`rollout.tables.evaluation_metrics`)."""
    table: dict[str, list[Any]]
    """A row per question: what was sampled, and every term of its reward (`rollout.tables.evaluation_table`)."""


def evaluate_policy(
    groups: Sequence[Group],
    *,
    sample: Callable[[Sequence[Group]], Rollout],
    host: ModelHost,
    scorer: RolloutScorer,
    tokenizer: PreTrainedTokenizerBase,
    classify: Classifier | None = None,
) -> PolicyEvaluation:
    """Sample an explanation for each held-out question, score it, and name its kind where the task can tell.

    `sample` fills the groups, e.g. `generation.policy.PolicySampler` with its stream, step and version set.
    """
    rollout = sample(groups)
    with host.phase(Phase.SCORE):
        scored = scorer(rollout, every_term=True)
    table = evaluation_table(rollout, scored, completion_texts(tokenizer, rollout.completions), classify)
    return PolicyEvaluation(metrics=evaluation_metrics(scored, table, scorer.format.tags), table=table)


def evaluate_masked_diffusion(
    model: Any,
    samples: Sequence[Sample],
    config: MaskedDiffusionRunConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tags: TagStyle,
    meter: PhaseMeter,
    retries: MemoryRetries,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """The likelihood bound of held-out samples, and how often a sampled response has the right solution.

    `nll_bound`: upper bound of the mean negative log-likelihood per learned token, in nats. `exact_match` where samples
    have solutions (objective sft). The maskings and the sampling seed are the same at every evaluation. Autocast is the
    caller's.
    """
    metrics = {}
    with torch.no_grad(), evaluation_mode(model):
        with meter.phase(Phase.SCORE):
            metrics["nll_bound"] = _nll_bound(model, samples, config, retries, on_progress)
        if config.objective == "sft" and (sampled := samples[: config.num_sampled_prompts]):
            with meter.phase(Phase.GENERATE):
                generate = partial(
                    generate_responses,
                    model,
                    [sample.prompt_ids for sample in sampled],
                    config,
                    mask_token_id=model.config.mask_token_id,
                    filler_token_id=tokenizer.eos_token_id,
                    seed=config.args.seed + _SAMPLING_STREAM,
                    on_progress=lambda done, total: on_progress("sampling", done, total),
                )
                at_once = min(len(sampled), config.args.per_device_train_batch_size)
                responses = retries(Phase.GENERATE, at_once, lambda rows: generate(max_rows=rows), unit="rows")
            texts = tokenizer.batch_decode(responses)
            metrics["exact_match"] = mean(
                stated_solution(text, tags) == sample.solution.strip()
                for text, sample in zip(texts, sampled, strict=True)
            )
    return metrics


def _nll_bound(
    model: Any,
    samples: Sequence[Sample],
    config: MaskedDiffusionRunConfig,
    retries: MemoryRetries,
    on_progress: Callable[[str, int, int], None],
) -> float:
    at_once = min(config.num_likelihood_samples, config.args.per_device_train_batch_size)
    total_nats, num_tokens = 0.0, 0
    for i, sample in enumerate(samples):
        bounds_K = retries(Phase.SCORE, at_once, partial(_bounds_of_sample, model, sample, i, config), unit="rows")
        total_nats -= bounds_K.mean().item()
        num_tokens += len(sample.token_ids) - sample.prompt_len
        on_progress("likelihood bound", i + 1, len(samples))
    return total_nats / num_tokens


def _bounds_of_sample(
    model: Any, sample: Sample, number: int, config: MaskedDiffusionRunConfig, max_rows: int
) -> torch.Tensor:
    token_ids_T = torch.tensor(sample.token_ids, device=next(model.parameters()).device)
    return likelihood_bound(
        model,
        token_ids_T,
        torch.arange(len(sample.token_ids), device=token_ids_T.device) >= sample.prompt_len,
        mask_token_id=model.config.mask_token_id,
        num_maskings=config.num_likelihood_samples,
        max_rows=max_rows,
        generator=random_stream(config.args.seed, _BOUND_STREAM, number),
    )


def stated_solution(response: str, tags: TagStyle) -> str | None:
    """The text between the first pair of solution tags; None where there is none."""
    _, opened, rest = response.partition(tags.solution.opening)
    content, closed, _ = rest.partition(tags.solution.closing)
    return content.strip() if opened and closed else None
