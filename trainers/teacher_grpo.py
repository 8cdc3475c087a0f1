"""TeacherGRPOTrainer: TRL's GRPOTrainer with a training step of our own around TRL's loss.

transformers calls `training_step` once per optimizer step. Inside it, in this order: sample (GENERATE), score and
reward (SCORE), advantages, then for each micro-batch TRL's loss and its backward (TRAIN). A rollout is the object that
these stages fill. What TRL 1.16 cannot do with an 8-bit adapter model is put right in `__init__`, in commented places.

Letters: P prompts, G completions per prompt, B = P*G rows, T tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from core.types import Phase, Role
from data.tags import TEACHER_PROMPT_FILE
from generation.policy import EVAL_STREAM, TRAIN_STREAM, PolicySampler, with_completions
from models.host import REFERENCE_ADAPTER, ModelHost
from planner.plan import MemoryPlan
from rewards import EXTRA_REWARDS
from rollout.advantages import group_advantages, importance_ratios
from rollout.batches import input_len, largest_batch_tokens
from rollout.logprobs import span_logprobs
from rollout.packed_attention import layout_of
from rollout.packing import MicroBatch, micro_batches
from rollout.scoring import RolloutScorer, ScoredRollout
from rollout.tables import (
    Classifier,
    completion_texts,
    explanation_columns,
    format_rate,
    term_columns,
)
from rollout.token_scores import token_score_table
from rollout.types import Completion, Group, Rollout
from runs.run_folder import write_evaluation
from runs.token_scores import write_token_scores
from schemas.methods import method_of
from schemas.run import RunConfig
from trainers.base import RunTrainer
from trainers.callbacks import SyncReferenceAdapter
from trainers.evaluation import evaluate_policy
from trainers.step_metrics import StepMetrics, rollout_metrics, sampler_metrics


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, its permutation a function of the epoch: a run resumed in a later epoch finds its place."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class TeacherGRPOTrainer(RunTrainer, GRPOTrainer):
    """Trains the teacher's adapter with GRPO on the RLT reward.

    Args:
        config: the run.
        args: TRL's arguments (`build_grpo_args(config)`).
        host: owns teacher, student, reference and the engine's sleep.
        plan: the memory plan that the run is held to; logged beside what is measured.
        sampler: samples completions; None with `use_vllm_server` (TRL's client then does).
        scorer: the RLT reward of sampled token ids.
        classify_explanation: names what kind of explanation a text is, for tasks that can tell; reported, not rewarded.
    """

    config: RunConfig

    def __init__(
        self,
        *,
        config: RunConfig,
        args: GRPOConfig,
        host: ModelHost,
        plan: MemoryPlan,
        sampler: PolicySampler | None,
        scorer: RolloutScorer,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
        classify_explanation: Classifier | None = None,
    ) -> None:
        self.host, self.sampler, self.scorer = host, sampler, scorer
        self._classify_explanation = classify_explanation
        self._rollout: Rollout | None = None
        self._num_uses = 0
        self._scored: tuple[Rollout, ScoredRollout] | None = None
        trained = {name: p.data for name, p in host.teacher.named_parameters() if p.requires_grad}
        follows = SyncReferenceAdapter(alpha=args.ref_model_mixup_alpha, every_steps=args.ref_model_sync_steps)
        super().__init__(
            config=config,
            plan=plan,
            meter=host.meter,
            retries=host.retries,
            model=host.teacher,
            reward_funcs=[self.rlt, *(EXTRA_REWARDS[name](scorer.format.tags) for name in config.extra_rewards)],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*callbacks, *([follows] if config.grpo.sync_ref_model else [])],
        )
        self._restore_float32_adapter(trained)
        self._arrange_reference()
        if sampler is not None:
            wanted = config.importance_sampling_correction
            self.vllm_importance_sampling_correction = (
                not sampler.generator.shares_trainer_weights if wanted == "auto" else wanted
            )
            # In TRL 1.16 `use_vllm` gates the correction in the loss; generation itself goes through `_sample`.
            self.use_vllm = self.vllm_importance_sampling_correction

    def _restore_float32_adapter(self, trained: dict[str, torch.Tensor]) -> None:
        """TRL casts the adapter of a quantised base to bfloat16, where small updates vanish: undo that."""
        for name, parameter in self.host.teacher.named_parameters():
            if name in trained:
                parameter.data = trained[name]
            elif f".{REFERENCE_ADAPTER}." in name:
                parameter.data = trained[name.replace(f".{REFERENCE_ADAPTER}.", ".default.")].clone()

    def _arrange_reference(self) -> None:
        """Give TRL the reference that the configuration asks for, at the lowest cost.

        TRL always adds a frozen copy of the adapter. It is needed only where the reference differs from the bare base:
        when training starts from an adapter, or when the reference follows the policy.
        """
        teacher = self.host.teacher
        needs_adapter = self.config.model_args.adapter_path is not None or self.config.grpo.sync_ref_model
        if REFERENCE_ADAPTER in teacher.peft_config and (self.host.reference is not None or not needs_adapter):
            teacher.delete_adapter(REFERENCE_ADAPTER)

    # One optimizer step

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step on P dataset rows; transformers clips, steps and logs afterwards.

        A rollout serves `num_iterations` optimizer steps.
        """
        return self.guarded(lambda: self._gradients_of_step(model, inputs))

    def _gradients_of_step(self, model: Any, inputs: list[dict[str, Any]]) -> torch.Tensor:
        """The whole step up to the optimizer: sample, score, reward, advantages; loss and backward of micro-batches.

        What runs out of memory is repeated with half as much at once (models/memory_retries.py): the rows of a call in
        the generator, the tokens of a forward in the host, and here those of a micro-batch. The rollout stays.
        """
        start_s = time.perf_counter()
        if self._rollout is None or self._num_uses == self.num_iterations:
            rollout = self._sample([Group.of_row(row) for row in inputs], self.num_generations, TRAIN_STREAM)
            rollout = self._score(rollout)
            rollout = self._reward(rollout)
            self._rollout, self._num_uses = self._with_advantages(rollout), 0
        self._num_uses += 1
        rows = [row.scoring_row for row in self._rollout.rows]
        loss, metrics = self.retries(
            Phase.TRAIN,
            self.plan.settings.micro_batch_tokens,
            partial(self._loss_and_gradients, model, self._rollout, self._num_tokens[Phase.TRAIN]),
            taken=lambda max_tokens: largest_batch_tokens(rows, max_tokens, layout_of(self.host.teacher)),
            smallest=max(map(input_len, rows)),
        )
        self._record(metrics.combined() | {"step_time": time.perf_counter() - start_s})
        return loss

    def _loss_and_gradients(
        self, model: Any, rollout: Rollout, num_tokens_before: int, max_tokens: int
    ) -> tuple[torch.Tensor, StepMetrics]:
        """Loss and backward of micro-batches of at most `max_tokens`; nothing of an attempt that failed is left."""
        model.zero_grad(set_to_none=True)
        self._num_tokens[Phase.TRAIN] = num_tokens_before
        loss = torch.zeros((), device=self.accelerator.device)
        metrics = StepMetrics(self)
        with self.offloaded():
            for batch in self._pack(rollout, max_tokens):
                with metrics.of_micro_batch(self, batch):
                    loss += Trainer.training_step(self, model, batch)  # forward, `_compute_loss`, backward
        return loss, metrics

    def _sample(
        self, groups: Sequence[Group], num_generations: int, stream: int, *, step: int | None = None
    ) -> Rollout:
        """`num_generations` completions of the current policy for each group.

        Without a sampler of ours, TRL's client of a vLLM server samples; it takes no seed per row.
        """
        now = self.state.global_step
        if self.sampler is None:
            rollout = self._sample_by_server(groups, num_generations)
        else:
            seed_step = now if step is None else step
            rollout = self.sampler(groups, num_generations, stream=stream, step=seed_step, version=now)
        num_tokens = sum(len(completion.token_ids) for completion in rollout.completions)
        self._num_tokens[Phase.GENERATE] += num_tokens
        self._num_tokens[Phase.SCORE] += num_tokens
        return rollout

    def _sample_by_server(self, groups: Sequence[Group], num_generations: int) -> Rollout:
        prompts_B_T = [group.prompt_ids for group in groups for _ in range(num_generations)]
        with self.host.phase(Phase.GENERATE):
            ids_B_T, logprobs_B_T = self._generate_single_turn(prompts_B_T, None, {}, self.num_generations)
        completions = [
            Completion(
                token_ids=list(ids_T),
                logprobs=list(logprobs_T),
                finish_reason="stop" if ids_T[-1] in self.eos_token_ids else "length",
            )
            for ids_T, logprobs_T in zip(ids_B_T, logprobs_B_T, strict=True)
        ]
        return with_completions(groups, completions)

    def _score(self, rollout: Rollout) -> Rollout:
        """Log-probs of the completions under the old policy and the reference, where the loss uses them.

        The old policy is the one that the loss's own forward computes, unless the rollout serves several steps, or
        dropout makes that forward another policy.
        """
        needed = []
        has_dropout = self.config.model_args.lora_dropout > 0
        if self.num_iterations > 1 or (self.vllm_importance_sampling_correction and has_dropout):
            needed.append(Role.TEACHER)
        if self.beta != 0:
            needed.append(Role.REFERENCE)
        rows = [row.scoring_row for row in rollout.rows]
        with self.host.phase(Phase.SCORE), self.accelerator.autocast():
            logprobs = {role: [spans[0] for spans in self.host.score(role, rows, self.temperature)] for role in needed}
        ratios = None
        if self.vllm_importance_sampling_correction and Role.TEACHER in logprobs:
            sampled = [torch.tensor(completion.logprobs) for completion in rollout.completions]
            ratios = self._importance_ratios(logprobs[Role.TEACHER], sampled)
        return replace(rollout, logprobs=logprobs, importance_ratios=ratios)

    def _importance_ratios(
        self, trainer: Sequence[torch.Tensor], sampler: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Weights that correct for the sampler's policy; how far it was from the trainer's is logged."""
        ratios = importance_ratios(
            trainer,
            sampler,
            mode=self.vllm_importance_sampling_mode,
            clip_min=self.vllm_importance_sampling_clip_min,
            clip_max=self.vllm_importance_sampling_clip_max,
        )
        self._record(sampler_metrics(trainer, sampler, ratios))
        return ratios

    def rlt(self, rollout: Rollout) -> ScoredRollout:
        """The RLT reward of a rollout; the first of `reward_funcs`, which names its column in the tables."""
        with self.host.phase(Phase.SCORE):
            return self.scorer(rollout)

    def _reward(self, rollout: Rollout) -> Rollout:
        """The RLT reward and those of `extra_rewards`; every term, and what was written, goes to `completions/`."""
        scored, texts = self.rlt(rollout), completion_texts(self.processing_class, rollout.completions)
        self._scored = rollout, scored
        written = explanation_columns(rollout, scored, self._classify_explanation)
        columns = {
            "prompts": [row.group.columns["prompt"] for row in rollout.rows],
            "completions": texts,
            "completion_ids": [completion.token_ids for completion in rollout.completions],
            "question": written["question"],
            "solution": written["solution"],
        }
        rewards = [scored.breakdown.reward]
        rewards += [torch.tensor(function(**columns)) for function in self.reward_funcs[1:]]
        self._record(
            {f"rlt/{name}": values_B.nanmean().item() for name, values_B in scored.breakdown.terms.items()}
            | {"rlt/format_rate": format_rate(texts, self.scorer.format.tags)}
        )
        self._logs["prompt"].extend(columns["prompts"])
        self._logs["completion"].extend(texts)
        for name, values in {**term_columns(scored), **written}.items():
            self._logs["extra"][name].extend(values)
        return replace(rollout, breakdown=scored.breakdown, rewards_BF=torch.stack(rewards, -1))

    def _with_advantages(self, rollout: Rollout) -> Rollout:
        """Advantages within groups; the rollout is complete now and its figures are logged."""
        rewards_BF = rollout.rewards_BF
        assert rewards_BF is not None
        advantages_B, std_B = group_advantages(
            rewards_BF,
            self.reward_weights.cpu(),
            self.num_generations,
            scale_rewards=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
        )
        rollout = replace(rollout, advantages_B=advantages_B)
        self.state.num_input_tokens_seen += sum(len(row.token_ids) for row in rollout.rows)
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        self._record(rollout_metrics(rollout, std_B, self.reward_func_names, self.reward_weights.cpu()))
        for name, values_B in zip(self.reward_func_names, rewards_BF.T, strict=True):
            self._logs["rewards"][name].extend(values_B.tolist())
        self._logs["advantages"].extend(advantages_B.tolist())
        return rollout

    def _pack(self, rollout: Rollout, max_tokens: int) -> Iterator[MicroBatch]:
        return micro_batches(
            rollout,
            max_tokens,
            device=self.accelerator.device,
            layout=layout_of(self.host.teacher),
            mask_truncated=self.mask_truncated_completions,
        )

    # TRL's loss of one micro-batch

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A micro-batch is ready; TRL would sample here."""
        return inputs

    def _compute_loss(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """TRL's loss of a micro-batch, weighted so that those of a step add up to one batch's."""
        with self.accelerator.autocast():
            logprobs_N, entropy_N = span_logprobs(
                self.accelerator.unwrap_model(model), batch.rows, temperature=self.temperature, with_entropy=True
            )
        assert entropy_N is not None
        logprobs_bT = batch.pad(logprobs_N)
        if self.vllm_importance_sampling_correction and "importance_sampling_ratio" not in batch.tensors:
            sampled_N = batch.tensors["sampling_per_token_logps"][batch.tensors["is_token"]]
            lengths = [end - start for row in batch.rows for start, end in row.spans]
            ratios = self._importance_ratios(logprobs_N.detach().split(lengths), sampled_N.split(lengths))
            batch.tensors["importance_sampling_ratio"] = pad_sequence(ratios, batch_first=True, padding_value=1.0)
        loss = super()._compute_loss((logprobs_bT, batch.pad(entropy_N), None), batch.tensors)
        mask_bT = batch.tensors["completion_mask"].bool()
        self._num_tokens[Phase.TRAIN] += int(mask_bT.sum())
        sampler_bT = batch.tensors.get("sampling_per_token_logps")
        if sampler_bT is not None and mask_bT.any():  # all are masked where `mask_truncated_completions` says so
            difference_N = (logprobs_bT.detach() - sampler_bT).abs()[mask_bT]
            self._metrics["train"]["sampling/logp_difference"].append(difference_N.mean().item())
        return loss * batch.loss_weight(self.loss_type)

    def _get_per_token_logps_and_entropies(self, model: Any, *_: Any, **__: Any) -> Any:
        """TRL's loss asks here for the log-probs and entropies of its `model`, which is them: see `_compute_loss`."""
        return model

    def _forget_unfinished_step(self) -> None:
        self._rollout, self._num_uses = None, 0
        self._metrics["train"].clear()

    # Metrics, evaluation and result

    def _record(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's metrics and completions; what is logged at the end of training has no completions of its own."""
        self.log_completions = "loss" in logs and self.model.training
        super().log(logs, start_time)
        if self.log_completions and self._scored is not None:
            table = token_score_table(*self._scored, self.scorer)
            write_token_scores(Path(self.args.output_dir), "completions", self.state.global_step, table)

    def held_out_metrics(self, dataset: Dataset) -> dict[str, float]:
        """One explanation for each held-out question, from equal seeds each time; their table is in `evaluations/`."""
        found = evaluate_policy(
            [Group.of_row(row) for row in dataset],
            sample=lambda groups: self._sample(groups, 1, EVAL_STREAM, step=0),
            host=self.host,
            scorer=self.scorer,
            tokenizer=self.processing_class,
            classify=self._classify_explanation,
        )
        step = self.state.global_step
        write_evaluation(Path(self.args.output_dir), step, {"step": [step] * len(dataset), **found.table})
        write_token_scores(Path(self.args.output_dir), "evaluation", step, found.token_scores)
        return found.metrics

    def model_card(self) -> str:
        return method_of(self.config).card_text(self.config, self)

    def files_beside_model(self) -> dict[str, str]:
        return {TEACHER_PROMPT_FILE: self.scorer.format.teacher_prompt_template(self.processing_class)}

    def close(self) -> None:
        """Free the generator and all weights."""
        self.host.close()

    # Data order and checkpoints

    def get_train_dataloader(self) -> Any:
        """Batches of P dataset rows, one per optimizer step; TRL's repeat each prompt G times."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.config.num_prompts_per_step,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        sampler_class = EpochRepeatSampler if self.shuffle_dataset else RepeatSampler
        return sampler_class(
            data_source=dataset if dataset is not None else self.train_dataset,
            mini_repeat_count=1,
            batch_size=self.config.num_prompts_per_step,
            repeat_count=self.num_iterations,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapters in place. The inherited method skips the trained one when a second one lies beside it."""
        for adapter in self.host.teacher.peft_config:
            folder = Path(resume_from_checkpoint) / ("" if adapter == "default" else adapter)
            set_peft_model_state_dict(
                self.host.teacher, load_file(folder / "adapter_model.safetensors"), adapter_name=adapter
            )
        if self.sampler is not None:
            self.sampler.synced_version = None
