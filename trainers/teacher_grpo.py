"""TeacherGRPOTrainer: TRL's GRPOTrainer with our generator, our reward and one card to share.

Only hooks are overridden. A step is TRL's: `_prepare_inputs` -> `_generate_single_turn` (here: GENERATE) ->
`_calculate_rewards` (here: SCORE) -> advantages and loss (TRAIN) -> optimizer. What TRL 1.16 cannot do with an 8-bit
adapter model is put right in `__init__`, each in one commented place.

Letters: P prompts, G generations per prompt, B = P*G rows, T tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from core.types import Completion, Phase
from core.units import gb
from data.formats import TEACHER_PROMPT_FILE
from generation.base import Generator
from generation.canary import Canary
from models.host import REFERENCE_ADAPTER, ModelHost
from optimization.memory_optim import CheckpointOffload
from planner.plan import MemoryPlan
from rewards import EXTRA_REWARDS, RolloutScorer
from rewards.format import is_well_formed
from rewards.rollout import ScoredRollout
from schemas.run import RunConfig
from trainers.callbacks import StopOnSignal, SyncReferenceAdapter
from trainers.checkpoints import WholeCheckpoints
from trainers.model_card import WritesModelCard, teacher_card
from trainers.recovery import RecoveryMixin
from trainers.run_folder import write_evaluation

_TRAIN_STREAM, _EVAL_STREAM = 0, 1


def sampling_seeds(seed: int, *, stream: int, step: int, num_rows: int) -> list[int]:
    """[B] one 32-bit seed a row: a function of (seed, stream, step, row) alone: a resumed run repeats itself."""
    return [int(np.random.SeedSequence([seed, stream, step, row]).generate_state(1)[0]) for row in range(num_rows)]


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, its permutation a function of the epoch: a run resumed in a later epoch finds its place."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class TeacherGRPOTrainer(RecoveryMixin, WholeCheckpoints, WritesModelCard, GRPOTrainer):
    """Trains the teacher's adapter with GRPO on the RLT reward.

    Args:
        config: the run.
        args: TRL's arguments (`build_grpo_args(config)`).
        host: owns teacher, student, reference and the engine's sleep.
        plan: the memory plan that the run is held to; logged beside what is measured.
        generator: samples explanations; None with `use_vllm_server` (TRL's client then does).
        canary: compares generator and trainer after every swap and wake-up; None without a generator.
        scorer: the RLT reward of sampled token ids.
        classify_explanation: names what kind of explanation a text is, for tasks that can tell; reported, not rewarded.
        on_progress: called with (what, done, total) while a phase works.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        args: GRPOConfig,
        host: ModelHost,
        plan: MemoryPlan,
        generator: Generator | None,
        canary: Canary | None,
        scorer: RolloutScorer,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
        classify_explanation: Callable[[str, str, str], str] | None = None,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.config, self.host, self.plan = config, host, plan
        self.generator, self.canary, self.scorer = generator, canary, scorer
        self._classify_explanation, self._on_progress = classify_explanation, on_progress
        self._synced_step = self._evaluated_step = -1
        self._sampled: list[Completion] = []
        self._num_tokens = dict.fromkeys((Phase.GENERATE, Phase.SCORE, Phase.TRAIN), 0)
        self._policy_logps_BT: torch.Tensor | None = None
        self._reported_use = host.checkpoint_use()
        trained = {name: p.data for name, p in host.teacher.named_parameters() if p.requires_grad}
        super().__init__(
            model=host.teacher,
            reward_funcs=[self.rlt, *(EXTRA_REWARDS[name](scorer.format.tags) for name in config.extra_rewards)],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self._restore_float32_adapter(trained)
        self._arrange_reference()
        if generator is not None:
            wanted = config.importance_sampling_correction
            self.vllm_importance_sampling_correction = (
                not generator.shares_trainer_weights if wanted == "auto" else wanted
            )
            # In TRL 1.16 `use_vllm` gates the correction; generation itself goes through `_generate_single_turn`.
            self.use_vllm = self.vllm_importance_sampling_correction
        offloads = config.offload_checkpoints and args.gradient_checkpointing and host.device.type == "cuda"
        self._offload = CheckpointOffload(host.teacher) if offloads else nullcontext
        self._stop = StopOnSignal(may_save=lambda: self.recovery is None or self.recovery.cause is None)
        self.add_callback(self._stop)  # before the recovery, which forgets the cause at the end of the step
        if config.recover_from_nan:
            self.start_recovery(max_recoveries=config.max_recoveries, lr_backoff=config.lr_backoff)

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
        teacher, wants_sync = self.host.teacher, self.config.grpo.sync_ref_model
        needs_adapter = self.config.model_args.adapter_path is not None or wants_sync
        if REFERENCE_ADAPTER in teacher.peft_config and (self.host.reference is not None or not needs_adapter):
            teacher.delete_adapter(REFERENCE_ADAPTER)
        if self.host.reference is not None and self.beta != 0:
            add_fused_lm_head(self.host.reference, temperature=self.temperature)
            self.ref_model = self.host.reference
        if wants_sync:
            self.add_callback(
                SyncReferenceAdapter(alpha=self.args.ref_model_mixup_alpha, every_steps=self.args.ref_model_sync_steps)
            )

    # Generation

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *_: Any, **__: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        prompts_P_T = prompt_ids[::num_generations]
        seeds = sampling_seeds(
            self.args.seed, stream=_TRAIN_STREAM, step=self.state.global_step, num_rows=len(prompt_ids)
        )
        self._sampled = self._sample(prompts_P_T, num_generations, seeds)
        return [c.token_ids for c in self._sampled], [c.logprobs for c in self._sampled]

    def _sample(self, prompts_P_T: list[list[int]], num_generations: int, seeds: list[int]) -> list[Completion]:
        """[B] completions of the current policy, for a step or an evaluation; they are then scored."""
        completions = self._draw(prompts_P_T, num_generations, seeds)
        num_tokens = sum(len(c.token_ids) for c in completions)
        self._num_tokens[Phase.GENERATE] += num_tokens
        self._num_tokens[Phase.SCORE] += num_tokens
        return completions

    def _draw(self, prompts_P_T: list[list[int]], num_generations: int, seeds: list[int]) -> list[Completion]:
        """[B] completions of the current policy, after the canary has seen that the generator holds it.

        Without a generator of ours, TRL's client of a vLLM server samples; it takes no seed for each row.
        """
        if self.generator is None or self.canary is None:
            rows_B_T = [prompt for prompt in prompts_P_T for _ in range(num_generations)]
            with self.host.phase(Phase.GENERATE):
                ids_B_T, logprobs_B_T = super()._generate_single_turn(rows_B_T, None, {}, num_generations)
            return [
                Completion(
                    token_ids=list(ids_T),
                    logprobs=list(logprobs_T),
                    finish_reason="stop" if ids_T[-1] in self.eos_token_ids else "length",
                )
                for ids_T, logprobs_T in zip(ids_B_T, logprobs_B_T, strict=True)
            ]
        with self.host.phase(Phase.GENERATE):
            with self.host.phase(Phase.SYNC):
                if self._synced_step != self.state.global_step:
                    self.generator.sync_adapter(self.host.teacher)
                    self._synced_step = self.state.global_step
                self.canary.check()
            return self.generator.generate(
                prompts_P_T,
                num_generations,
                seeds,
                on_progress=lambda done, total: self._on_progress("generating", done, total),
            )

    # Reward

    def rlt(
        self,
        completion_ids: list[list[int]],
        question: list[str],
        solution: list[str],
        sampler_logprobs: list[list[float]] | None = None,
        *,
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, list[Any]], None],
        **_: Any,
    ) -> list[float]:
        """TRL reward function: the RLT reward of B sampled completions, every term logged."""
        scored = self.scorer(question, solution, completion_ids, sampler_logprobs)
        for name, values_B in scored.breakdown.terms.items():
            log_metric(f"rlt/{name}", values_B.nanmean().item())
            log_extra(name, values_B.tolist())
        for name, texts in self._described(question, solution, scored).items():
            log_extra(name, texts)
        log_metric("rlt/format_rate", self._format_rate(completion_ids))
        return scored.breakdown.reward.tolist()

    def _described(self, questions: list[str], solutions: list[str], scored: ScoredRollout) -> dict[str, list[str]]:
        """What a table of B completions says about them beside their figures; `kind` where the task can tell it."""
        explanations = [row.explanation for row in scored.rows]
        columns = {"question": questions, "solution": solutions, "explanation": explanations}
        if self._classify_explanation is not None:
            columns["kind"] = list(map(self._classify_explanation, questions, solutions, explanations))
        return columns

    def _format_rate(self, completion_ids: Sequence[Sequence[int]]) -> float:
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return mean(is_well_formed(text, self.scorer.format.tags) for text in texts)

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> torch.Tensor:
        if self._sampled and len(self._sampled) == len(inputs):
            inputs = [{**row, "sampler_logprobs": c.logprobs} for row, c in zip(inputs, self._sampled, strict=True)]
        with self.host.phase(Phase.SCORE):
            return super()._calculate_rewards(inputs, *args)

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._offload():
            return super().training_step(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._policy_logps_BT = result[0].detach()
            return result
        with self.host.phase(Phase.SCORE):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        self._num_tokens[Phase.TRAIN] += int(inputs["completion_mask"].sum())
        sampler_logps_BT = inputs.get("sampling_per_token_logps")
        if sampler_logps_BT is not None and self._policy_logps_BT is not None:
            mask_BT = inputs["completion_mask"].bool()
            difference = (self._policy_logps_BT - sampler_logps_BT).abs()[mask_BT]
            if difference.numel():  # none where every completion is masked (`mask_truncated_completions`)
                self._metrics["train"]["sampling/logp_difference"].append(difference.mean().item())
        return loss

    def _pass_over_micro_batch(self) -> None:
        self._step += 1

    def _forget_unfinished_step(self) -> None:
        self._step, self._buffered_inputs, self._sampled = 0, None, []
        self._metrics["train"].clear()

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample one explanation for each held-out question, always from the same seeds, and score it.

        `eval_solution_log_prob` is the student's mean log-prob a solution token given the explanation (nats, at the
        reward's student temperature).
        """
        rows = (eval_dataset or self.eval_dataset)[:]
        prompts = self.processing_class(rows["prompt"], add_special_tokens=False)["input_ids"]
        seeds = sampling_seeds(self.args.seed, stream=_EVAL_STREAM, step=0, num_rows=len(prompts))
        completions = self._sample(prompts, 1, seeds)
        with self.host.phase(Phase.SCORE):
            scored = self.scorer(
                rows["question"],
                rows["solution"],
                [c.token_ids for c in completions],
                [c.logprobs for c in completions],
                every_term=True,
            )
        columns = self._described(rows["question"], rows["solution"], scored)
        self._write_evaluation(rows["prompt"], completions, columns, scored)
        means, kinds = scored.breakdown.means(), columns.get("kind", [])
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in {
                "solution_log_prob": means["unprocessed_answer_log_prob_mean"],
                "reward": means["reward"],
                "format_rate": self._format_rate([c.token_ids for c in completions]),
                "explanation_tokens": mean(row.explanation_slice.stop for row in scored.rows),
                **{f"share/{kind}": kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))},
            }.items()
        }
        self._evaluated_step = self.state.global_step
        Trainer.log(self, dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _write_evaluation(
        self, prompts: list[str], completions: list[Completion], columns: dict[str, list[str]], scored: ScoredRollout
    ) -> None:
        """The table of an evaluation: a row a held-out question, with every term of the reward."""
        table = {
            "step": [self.state.global_step] * len(prompts),
            "prompt": prompts,
            "completion": self.processing_class.batch_decode(
                [c.token_ids for c in completions], skip_special_tokens=True
            ),
            **columns,
            "num_tokens": [len(c.token_ids) for c in completions],
            "finish_reason": [c.finish_reason for c in completions],
            "sampler_log_prob": [sum(c.logprobs) for c in completions],
            "reward": scored.breakdown.reward.tolist(),
            **{name: values_B.tolist() for name, values_B in scored.breakdown.terms.items()},
        }
        write_evaluation(Path(self.args.output_dir), self.state.global_step, table)

    # Phases and metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output_dir = Path(self.args.output_dir)
        with self.host.phase(Phase.TRAIN), self._stop.handling(output_dir, self.config.resume):
            return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's metrics and completions; what is logged at the end of training has no completions of its own."""
        self.log_completions = "loss" in logs and self.model.training
        if self.log_completions:
            logs |= self._phase_metrics()
        super().log(logs, start_time)

    def _phase_metrics(self) -> dict[str, float]:
        """Seconds of each phase since the last log, peak memory so far beside the plan's, and tokens/s of that time.

        Tokens are those of completions (TRAIN: that the loss is of); an evaluation counts in time and tokens alike.
        On a GPU the measured memory is what torch reserved, a sleeping vLLM left out, and beside it what the driver
        reports as used. On a CPU it is this process's resident set (`rss`), and the plan's stays that of a GPU.
        """
        use, before = self.host.checkpoint_use(), self._reported_use
        self._reported_use = use
        seconds = {phase: use[phase].seconds - before[phase].seconds for phase in use}
        metrics = {f"time/{phase}_s": seconds[phase] for phase in use if seconds[phase] > 0}
        kind = "reserved" if self.host.device.type == "cuda" else "rss"
        for phase in (p for p in use if use[p].peak_reserved_bytes):
            metrics[f"memory/{phase}_{kind}_gb"] = gb(use[phase].peak_reserved_bytes)
            metrics[f"memory/{phase}_predicted_gb"] = gb(self.plan.peak_bytes(phase))
            if use[phase].peak_driver_bytes:
                metrics[f"memory/{phase}_driver_gb"] = gb(use[phase].peak_driver_bytes)
        for phase, num_tokens in self._num_tokens.items():
            if num_tokens and seconds[phase] > 0:
                metrics[f"tokens_per_s/{phase}"] = num_tokens / seconds[phase]
            self._num_tokens[phase] = 0
        return metrics

    def finish(self) -> None:
        """Evaluate once more if the last step was not, and write the adapter with tokenizer and model card."""
        if self.args.eval_strategy != "no" and self._evaluated_step != self.state.global_step:
            self.evaluate()
        self.save_model()

    def model_card(self) -> str:
        return teacher_card(self.config, self)

    def files_beside_model(self) -> dict[str, str]:
        return {TEACHER_PROMPT_FILE: self.scorer.format.teacher_prompt_template(self.processing_class)}

    def close(self) -> None:
        """Free the generator."""
        if self.generator is not None:
            self.generator.close()

    # Data order and checkpoints

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        plain = super()._get_train_sampler(dataset)
        if not plain.shuffle:
            return plain
        return EpochRepeatSampler(
            plain.data_source, plain.mini_repeat_count, plain.batch_size, plain.repeat_count, seed=plain.seed
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapters in place. The inherited method skips the trained one when a second one lies beside it."""
        for adapter in self.host.teacher.peft_config:
            folder = Path(resume_from_checkpoint) / ("" if adapter == "default" else adapter)
            set_peft_model_state_dict(
                self.host.teacher, load_file(folder / "adapter_model.safetensors"), adapter_name=adapter
            )
        self._synced_step = -1
