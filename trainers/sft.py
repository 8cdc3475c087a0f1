"""SupervisedTrainer: TRL's SFTTrainer with a training step of our own around TRL's loss.

transformers calls `training_step` once per optimizer step, with all its rows. They are laid out as those of a
teacher's step are (`rollout.batches`): under a token budget, rows of one forward one after another and kept apart, or
padded. TRL's loss of a micro-batch is a sum over its learned tokens, divided by those of the step: micro-batches add up
to one batch.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as tiles

from core.types import Phase
from models.evaluation import evaluation_mode
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from optimization.optimizers import MuonWithAdamW
from planner.plan import MemoryPlan
from rollout.batches import input_len, largest_batch_tokens, make_batch, row_batches
from rollout.logprobs import score_spans
from rollout.packed_attention import Layout, layout_of
from rollout.types import ScoringRow
from schemas.methods import method_of
from schemas.sft import SupervisedRunConfig
from trainers.base import RunTrainer

_TILE_COLUMNS = tiles._CHUNKED_LOGPROB_CHUNK_SIZE
_NOT_LEARNED = -100
"""TRL's label of a position whose next token is not learned."""


def learned_rows(rows: Iterable[Mapping[str, Any]]) -> list[ScoringRow]:
    """Rows of the dataset: everything behind the prompt is learned.

    Rows of one prompt have it in common but for its last token: TRL labels a position with one token, and what the rows
    learn first differs.
    """
    return [
        ScoringRow(
            token_ids=row["input_ids"],
            spans=((row["prompt_len"], len(row["input_ids"])),),
            prefix_len=row["prompt_len"] - 1,
        )
        for row in rows
    ]


def num_learned(rows: Sequence[ScoringRow]) -> int:
    return sum(end - start for row in rows for start, end in row.spans)


def model_inputs(rows: Sequence[ScoringRow], layout: Layout) -> dict[str, Any]:
    """Rows of one forward, as TRL's loss takes them: each position labelled with the token that it predicts."""
    batch = make_batch(rows, layout)
    inputs = dict(batch.inputs)
    positions = [
        p for b, row in enumerate(rows) for start, end in row.spans for p in batch.positions(b, start - 1, end - 1)
    ]
    targets = [token_id for row in rows for start, end in row.spans for token_id in row.token_ids[start:end]]
    labels = torch.full((batch.num_tokens,), _NOT_LEARNED)
    labels[positions] = torch.tensor(targets)
    if layout == "padded":  # which TRL counts tokens by; what lies behind a row, no token of it sees
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs | {"shift_labels": labels.view_as(inputs["input_ids"])}


class SupervisedTrainer(RunTrainer, SFTTrainer):
    """Trains a model, or an adapter on one, on the learned tokens of prepared rows.

    Args:
        config: the run.
        args: TRL's arguments (`build_sft_args(config)`).
        train_dataset: rows of `data.supervised.prepare_supervised`.
        eval_dataset: held-out rows, or None.
    """

    config: SupervisedRunConfig

    def __init__(
        self,
        *,
        config: SupervisedRunConfig,
        args: SFTConfig,
        plan: MemoryPlan,
        meter: PhaseMeter,
        retries: MemoryRetries,
        model: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            config=config,
            plan=plan,
            meter=meter,
            retries=retries,
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=learned_rows,  # no lists of numbers, which accelerate would walk through one by one
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        # TRL's head works on tiles of this many columns; of a smaller vocabulary the rest would be pages of nothing.
        tiles._CHUNKED_LOGPROB_CHUNK_SIZE = min(_TILE_COLUMNS, self.model.config.get_text_config().vocab_size)
        for name, parameter in self.model.named_parameters():
            if name in trained:  # TRL casts the adapter of a quantised base to bfloat16, where small updates vanish
                parameter.data = trained[name]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.config.use_muon:
            self.optimizer: Any = MuonWithAdamW(self.model, self.args.learning_rate, self.args.weight_decay)
        return super().create_optimizer(model)

    # One optimizer step

    def training_step(self, model: Any, inputs: list[ScoringRow], num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step on the rows of a batch; transformers clips, steps and logs afterwards."""
        return self.guarded(lambda: self._gradients_of_step(model, inputs))

    def _gradients_of_step(self, model: Any, rows: list[ScoringRow]) -> torch.Tensor:
        """Loss and backward of the step; what runs out of memory is repeated with half as many tokens at once."""
        layout = layout_of(self.model)
        loss, metrics = self.retries(
            Phase.TRAIN,
            self.plan.settings.micro_batch_tokens,
            partial(self._loss_and_gradients, model, rows, layout),
            taken=lambda max_tokens: largest_batch_tokens(rows, max_tokens, layout),
            smallest=max(map(input_len, rows)),
        )
        self._num_tokens[Phase.TRAIN] += num_learned(rows)
        self.state.num_input_tokens_seen += sum(len(row.token_ids) for row in rows)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        return loss

    def _loss_and_gradients(
        self, model: Any, rows: list[ScoringRow], layout: Layout, max_tokens: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Of micro-batches of at most `max_tokens`; nothing of an attempt that failed is left."""
        model.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.accelerator.device)
        total, metrics = num_learned(rows), defaultdict[str, float](float)
        before = self._metrics["train"]
        try:
            with self.offloaded():
                for batch in row_batches(rows, max_tokens, layout):
                    batch_rows = [rows[i] for i in batch]
                    self._metrics["train"] = defaultdict(list)
                    loss += super().training_step(model, model_inputs(batch_rows, layout), total)
                    for name in ("entropy", "mean_token_accuracy"):
                        metrics[name] += self._metrics["train"][name][0] * num_learned(batch_rows) / total
        finally:
            self._metrics["train"] = before
        return loss, metrics

    # Evaluation and result

    def held_out_metrics(self, dataset: Dataset) -> dict[str, float]:
        """`loss`: mean negative log-likelihood of the learned tokens of held-out rows, in nats per token."""
        rows = learned_rows(dataset)
        with self.meter.phase(Phase.SCORE), self.compute_loss_context_manager(), evaluation_mode(self.model):
            scored = self.retries(
                Phase.SCORE,
                self.plan.settings.score_batch_tokens,
                lambda max_tokens: score_spans(self.model, rows, max_batch_tokens=max_tokens),
                taken=lambda max_tokens: largest_batch_tokens(rows, max_tokens, layout_of(self.model)),
                smallest=max(map(input_len, rows)),
            )
        return {"loss": -sum(spans[0].sum().item() for spans in scored) / num_learned(rows)}

    def model_card(self) -> str:
        return method_of(self.config).card_text(self.config, self)
