"""MaskedDiffusionTrainer: transformers' Trainer with the loss and the evaluation of masked diffusion.

Letters: S samples of a batch, B rows, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from core.types import Phase
from data.samples import Sample
from data.tags import TagStyle
from models.masked_diffusion import (
    OUTSIDE,
    DiffusionBatch,
    loss_weights,
    low_discrepancy_levels,
    mask_by_level,
    random_stream,
    weighted_loss,
)
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from optimization.optimizers import MuonWithAdamW
from planner.plan import MemoryPlan
from schemas.llada import MaskedDiffusionRunConfig
from schemas.methods import method_of
from trainers.base import RunTrainer
from trainers.evaluation import evaluate_masked_diffusion

_TRAIN_STREAM = 0


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


class MaskedDiffusionTrainer(RunTrainer):
    """Trains a masked-diffusion model.

    What is masked is a function of (seed, step, micro-batch), so a resumed run repeats an uninterrupted one.

    Args:
        eval_samples: held-out samples for the likelihood bound and, where they have solutions, for exact match.
        tags: how a response marks its solution.
        on_progress: called with (what, done, total) while an evaluation works.
    """

    config: MaskedDiffusionRunConfig

    def __init__(
        self,
        *,
        config: MaskedDiffusionRunConfig,
        args: TrainingArguments,
        plan: MemoryPlan,
        meter: PhaseMeter,
        retries: MemoryRetries,
        model: Any,
        train_rows: Sequence[Sequence[Sample]],
        eval_samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase,
        tags: TagStyle,
        callbacks: Sequence[TrainerCallback] = (),
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.tags, self.eval_samples, self._on_progress = tags, eval_samples, on_progress
        self._micro_batch = (-1, 0)
        self._inputs_of_step: list[dict[str, Tensor]] = []
        super().__init__(
            config=config,
            plan=plan,
            meter=meter,
            retries=retries,
            model=model,
            args=args,
            train_dataset=SampleRows(train_rows),
            eval_dataset=SampleRows([[sample] for sample in eval_samples]) if eval_samples else None,
            data_collator=DiffusionCollator(
                filler_token_id=tokenizer.eos_token_id,
                fills_responses=config.objective == "sft" and not config.packing,
            ),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides by the accumulation steps

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.config.use_muon:
            self.optimizer: Any = MuonWithAdamW(self.model, self.args.learning_rate, self.args.weight_decay)
        return super().create_optimizer(model)

    # Loss

    def training_step(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Forward and backward of one micro-batch; transformers steps after `gradient_accumulation_steps` of them."""
        return self.guarded(lambda: self._gradients_of_micro_batch(model, inputs))

    def _gradients_of_micro_batch(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of a micro-batch, whose gradients are added to those of the step.

        After running out of memory the gradients of the step are made anew, from all its micro-batches so far, some
        rows at a time (models/memory_retries.py); masks and weights are drawn once.
        """
        if self._next_micro_batch() == 0:
            self._inputs_of_step.clear()
        self._inputs_of_step.append(self._masked(inputs))
        num_rows, row_len = inputs["token_ids_BT"].shape
        to_do = self._inputs_of_step[-1:]

        def loss_and_gradients(max_tokens: int) -> Tensor:
            nonlocal to_do
            if to_do is self._inputs_of_step:
                model.zero_grad(set_to_none=True)
            now, to_do = to_do, self._inputs_of_step
            with self.offloaded():
                losses = [self._backward_in_parts(model, masked, max(1, max_tokens // row_len)) for masked in now]
            return losses[-1]

        return self.retries(Phase.TRAIN, num_rows * row_len, loss_and_gradients, smallest=row_len)

    def _backward_in_parts(self, model: Any, masked: dict[str, Tensor], max_rows: int) -> Tensor:
        loss = torch.zeros((), device=self.args.device)
        for start in range(0, len(masked["token_ids_BT"]), max_rows):
            rows = slice(start, start + max_rows)
            part = {name: tensor if name == "weights_S" else tensor[rows] for name, tensor in masked.items()}
            loss += super().training_step(model, part)
        return loss

    def _pass_over_micro_batch(self) -> None:
        self._next_micro_batch()

    def _forget_unfinished_step(self) -> None:
        self._micro_batch = (-1, 0)

    def _masked(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A micro-batch with what is masked in it and what each sample counts."""
        batch = DiffusionBatch(**inputs)
        step, micro = self._micro_batch
        first = float(np.random.default_rng([self.args.seed, _TRAIN_STREAM, step]).random())
        offset = micro / self.args.gradient_accumulation_steps
        levels_S = low_discrepancy_levels(batch.num_samples, first, offset).to(batch.token_ids_BT.device)
        masked_BT = mask_by_level(batch, levels_S, random_stream(self.args.seed, _TRAIN_STREAM, step, micro))
        self._num_tokens[Phase.TRAIN] += int(batch.learned_BT.sum())
        weights_S = loss_weights(batch, levels_S, "tokens" if self.config.objective == "pretrain" else "samples")
        return inputs | {"masked_BT": masked_BT, "weights_S": weights_S}

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        weights_S, masked_BT = inputs.pop("weights_S"), inputs.pop("masked_BT")
        return weighted_loss(model, DiffusionBatch(**inputs), weights_S, masked_BT, self.model.config.mask_token_id)

    def _next_micro_batch(self) -> int:
        """Number of this micro-batch within its step."""
        step, micro = self._micro_batch
        self._micro_batch = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        return self._micro_batch[1]

    # Evaluation and result

    def held_out_metrics(self, dataset: SampleRows) -> dict[str, float]:
        """See `trainers.evaluation.evaluate_masked_diffusion`."""
        samples = [sample for row in dataset.rows for sample in row]
        with self.compute_loss_context_manager():
            return evaluate_masked_diffusion(
                self.model,
                samples,
                self.config,
                tokenizer=self.processing_class,
                tags=self.tags,
                meter=self.meter,
                retries=self.retries,
                on_progress=self._on_progress,
            )

    def model_card(self) -> str:
        return method_of(self.config).card_text(self.config, self)
