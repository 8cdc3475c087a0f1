"""MaskedDiffusionTrainer: transformers' Trainer with the loss, evaluation and sampling of masked diffusion.

Letters: S samples of a batch, B rows, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from data.formats import TagStyle
from data.masked_diffusion import Sample
from generation.masked_diffusion import generate_responses
from models.evaluation import evaluation_mode
from models.masked_diffusion import (
    OUTSIDE,
    DiffusionBatch,
    diffusion_loss,
    likelihood_bound,
    low_discrepancy_levels,
    mask_by_level,
)
from optimization.memory_optim import CheckpointOffload
from optimization.optimizers import MuonWithAdamW
from schemas.llada import MaskedDiffusionRunConfig
from schemas.methods import method_of
from trainers.callbacks import StopOnSignal
from trainers.checkpoints import WholeCheckpoints
from trainers.model_card import WritesModelCard
from trainers.recovery import RecoveryMixin

_TRAIN_STREAM, _BOUND_STREAM, _SAMPLING_STREAM = 0, 1, 2


class SampleRows(Dataset):
    """Rows of one sample, or of several that are packed."""

    def __init__(self, rows: Sequence[Sequence[Sample]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sequence[Sample]:
        return self.rows[index]


class DiffusionCollator:
    """Rows of samples as the tensors of a `DiffusionBatch`.

    A row of one response is filled with end-of-text tokens up to the longest row of the batch, and they are learned
    like the rest of the response (the paper's way to learn where to stop). Other rows are padded.
    """

    def __init__(self, *, filler_token_id: int, fills_responses: bool) -> None:
        self.filler_token_id, self.fills_responses = filler_token_id, fills_responses

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
        width = max(sum(len(sample.token_ids) for sample in row) for row in rows)
        token_ids_BT = torch.full((len(rows), width), self.filler_token_id)
        sample_ids_BT = torch.full_like(token_ids_BT, OUTSIDE)
        learned_BT = torch.zeros_like(token_ids_BT, dtype=torch.bool)
        position_ids_BT = torch.zeros_like(token_ids_BT)
        num_samples = 0
        for b, row in enumerate(rows):
            start = 0
            for sample in row:
                end = start + len(sample.token_ids)
                token_ids_BT[b, start:end] = torch.tensor(sample.token_ids)
                if self.fills_responses:
                    end = width
                sample_ids_BT[b, start:end] = num_samples
                learned_BT[b, start + sample.prompt_len : end - sample.num_after] = True
                position_ids_BT[b, start:end] = torch.arange(end - start)
                start, num_samples = end, num_samples + 1
        return {
            "token_ids_BT": token_ids_BT,
            "sample_ids_BT": sample_ids_BT,
            "learned_BT": learned_BT,
            "position_ids_BT": position_ids_BT,
        }


class MaskedDiffusionTrainer(RecoveryMixin, WholeCheckpoints, WritesModelCard):
    """Trains a masked-diffusion model.

    What is masked is a function of (seed, step, micro-batch), so a resumed run repeats an uninterrupted one.

    Args:
        eval_samples: held-out samples for the likelihood bound and, where they have solutions, for exact match.
        tags: how a response marks its solution.
        on_progress: called with (what, done, total) while an evaluation works.
    """

    def __init__(
        self,
        *,
        config: MaskedDiffusionRunConfig,
        args: TrainingArguments,
        model: Any,
        mask_token_id: int,
        train_rows: Sequence[Sequence[Sample]],
        eval_samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase,
        tags: TagStyle,
        callbacks: Sequence[TrainerCallback] = (),
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.config, self.mask_token_id, self.tags = config, mask_token_id, tags
        self.eval_samples, self._on_progress = eval_samples, on_progress
        self._micro_batch = (-1, 0)
        self._evaluated_step = -1
        super().__init__(
            model=model,
            args=args,
            train_dataset=SampleRows(train_rows),
            eval_dataset=SampleRows([[sample] for sample in eval_samples]) if eval_samples else None,
            data_collator=DiffusionCollator(
                filler_token_id=tokenizer.eos_token_id,
                fills_responses=config.objective == "sft" and not config.packing,
            ),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides by the accumulation steps
        self.remove_callback(PrinterCallback)
        offloads = config.offload_checkpoints and args.gradient_checkpointing and args.device.type == "cuda"
        self._offload = CheckpointOffload(model) if offloads else nullcontext
        self._stop = StopOnSignal(may_save=lambda: self.recovery is None or self.recovery.cause is None)
        self.add_callback(self._stop)  # before the recovery, which forgets the cause at the end of the step
        if config.recover_from_nan:
            self.start_recovery(max_recoveries=config.max_recoveries, lr_backoff=config.lr_backoff)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.config.use_muon:
            self.optimizer: Any = MuonWithAdamW(self.model, self.args.learning_rate, self.args.weight_decay)
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._stop.handling(Path(self.args.output_dir), self.config.resume):
            return super().train(*args, **kwargs)

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._offload():
            return self.guarded(lambda: super(MaskedDiffusionTrainer, self).training_step(*args, **kwargs))

    def _pass_over_micro_batch(self) -> None:
        self._next_micro_batch()

    def _forget_unfinished_step(self) -> None:
        self._micro_batch = (-1, 0)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        batch = DiffusionBatch(**inputs)
        step, micro = self.state.global_step, self._next_micro_batch()
        first = float(np.random.default_rng([self.args.seed, _TRAIN_STREAM, step]).random())
        offset = micro / self.args.gradient_accumulation_steps
        levels_S = low_discrepancy_levels(batch.num_samples, first, offset).to(batch.token_ids_BT.device)
        masked_BT = mask_by_level(batch, levels_S, self._generator(_TRAIN_STREAM, step, micro))
        mean_over: Any = "tokens" if self.config.objective == "pretrain" else "samples"
        return diffusion_loss(model, batch, levels_S, masked_BT, self.mask_token_id, mean_over=mean_over)

    def _next_micro_batch(self) -> int:
        """Number of this micro-batch within its step."""
        step, micro = self._micro_batch
        self._micro_batch = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        return self._micro_batch[1]

    def _generator(self, *key: int) -> torch.Generator:
        """A random stream that is a function of the run's seed and `key` alone."""
        seed = np.random.SeedSequence([self.args.seed, *key]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The likelihood bound of the held-out samples, and how often a sampled response has the right solution.

        `eval_nll_bound`: upper bound of the mean negative log-likelihood a learned token, in nats. The maskings and the
        sampling seed are the same at every evaluation.
        """
        with torch.no_grad(), evaluation_mode(self.model), self.compute_loss_context_manager():
            metrics = {f"{metric_key_prefix}_nll_bound": self._nll_bound()}
            sampled = self.eval_samples[: self.config.num_sampled_prompts]
            if self.config.objective == "sft" and sampled:
                metrics[f"{metric_key_prefix}_exact_match"] = self._exact_match(sampled)
        self._evaluated_step = self.state.global_step
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _nll_bound(self) -> float:
        total_nats, num_tokens = 0.0, 0
        for i, sample in enumerate(self.eval_samples):
            token_ids_T = torch.tensor(sample.token_ids, device=self.args.device)
            learned_T = torch.arange(len(sample.token_ids), device=self.args.device) >= sample.prompt_len
            bounds_K = likelihood_bound(
                self.model,
                token_ids_T,
                learned_T,
                mask_token_id=self.mask_token_id,
                num_maskings=self.config.num_likelihood_samples,
                max_rows=self.args.per_device_train_batch_size,
                generator=self._generator(_BOUND_STREAM, i),
            )
            total_nats -= bounds_K.mean().item()
            num_tokens += int(learned_T.sum())
            self._on_progress("likelihood bound", i + 1, len(self.eval_samples))
        return total_nats / num_tokens

    def _exact_match(self, samples: Sequence[Sample]) -> float:
        responses = generate_responses(
            self.model,
            [sample.prompt_ids for sample in samples],
            self.config,
            mask_token_id=self.mask_token_id,
            filler_token_id=self.processing_class.eos_token_id,
            max_rows=self.args.per_device_train_batch_size,
            seed=self.args.seed + _SAMPLING_STREAM,
            on_progress=lambda done, total: self._on_progress("sampling", done, total),
        )
        texts = self.processing_class.batch_decode(responses)
        return mean(
            stated_solution(text, self.tags) == sample.solution.strip()
            for text, sample in zip(texts, samples, strict=True)
        )

    def finish(self) -> None:
        """Evaluate once more if the last step was not, and write the model (or adapter) with its tokenizer."""
        if self.args.eval_strategy != "no" and self._evaluated_step != self.state.global_step:
            self.evaluate()
        self.save_model()

    def model_card(self) -> str:
        return str(method_of(self.config).card(self.config, self))


def stated_solution(response: str, tags: TagStyle) -> str | None:
    """The text between the first pair of solution tags; None where there is none."""
    _, opened, rest = response.partition(tags.solution.opening)
    content, closed, _ = rest.partition(tags.solution.closing)
    return content.strip() if opened and closed else None
