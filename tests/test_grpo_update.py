"""The update is TRL's: loss and gradients of our packed step against stock GRPOTrainer on the same rollouts."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from generation.policy import PolicySampler
from rewards import RewardBreakdown
from rollout.advantages import group_advantages
from rollout.packing import LOSS_NORMALISATION
from rollout.scoring import ScoredRollout
from rollout.types import Completion
from tests.helpers.golden_losses import GOLDEN_LOSSES_FILE, three_steps
from tests.helpers.tiny_run import make_trainer, write_random_model

NUM_PROMPTS, NUM_GENERATIONS, MAX_COMPLETION_LEN = 2, 4, 12
NUM_ROWS = NUM_PROMPTS * NUM_GENERATIONS
LENGTHS = [3, 12, 5, 1, 7, 12, 2, 9]
PACKINGS = {"8 x 1": 1, "packed": 500, "1 x 8": 10**6}
"""Tokens of a micro-batch; at 1 every row goes alone."""


Update = tuple[float, dict[str, torch.Tensor]]
"""Loss and gradients of one step."""


class FixedGenerator:
    """Returns the same completions whatever it is asked."""

    shares_trainer_weights = True

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def sync_adapter(self, model: Any) -> None:
        """Nothing is sampled from it."""

    def generate(self, *_: Any, **__: Any) -> list[Completion]:
        return self.completions


class NoCanary:
    def check(self) -> None:
        """Nothing to compare: completions are fixed."""


def write_trained_adapter(teacher: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GRPOTrainer, list[dict[str, Any]]]:
    """Our trainer, TRL's, and P dataset rows; the same base, the same adapter."""
    folder = write_random_model(tmp_path_factory.mktemp("model"), initializer_range=0.05)
    ours = make_trainer(
        folder,
        tmp_path_factory.mktemp("ours") / "run",
        "model_args.load_in_8bit=false",
        "model_args.torch_dtype=float32",
        "model_args.lora_r=4",
        f"train_batch_size={NUM_ROWS}",
        f"num_generations={NUM_GENERATIONS}",
        f"max_completion_length={MAX_COMPLETION_LEN}",
        "importance_sampling_correction=true",
        "num_eval_prompts=0",
        "temperature=0.8",
    )
    rows = [ours.train_dataset[i] for i in range(NUM_PROMPTS)]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock = GRPOTrainer(
        model=get_peft_model(
            base, LoraConfig(r=4, lora_alpha=ours.config.model_args.lora_alpha, target_modules="all-linear")
        ),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("stock")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            per_device_train_batch_size=NUM_ROWS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_COMPLETION_LEN,
            temperature=0.8,
            beta=0.04,
            log_completions=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )
    stock._prompt_ids = [row["prompt_ids"] for row in rows for _ in range(NUM_GENERATIONS)]
    stock._tokenize_prompts = lambda prompts: (stock._prompt_ids, None, {})
    return ours, stock, rows


def draw_completions(ours: Any, seed: int) -> list[Completion]:
    """Random ids of mixed lengths, some ended and some cut off; log-probs of a sampler that is a little off."""
    generator = torch.Generator().manual_seed(seed)
    completions = []
    for row, length in enumerate(LENGTHS):
        ids = torch.randint(20, 90, (length,), generator=generator).tolist()
        is_ended = row % 3 != 1
        completions.append(
            Completion(
                token_ids=[*ids[:-1], ours.processing_class.eos_token_id] if is_ended else ids,
                logprobs=(-4.0 + 0.5 * torch.randn(length, generator=generator)).tolist(),
                finish_reason="stop" if is_ended else "length",
            )
        )
    return completions


REWARDS = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4, -0.4, 1.5, 0.0])


def updates_of(trainer: Any, inputs: list[dict[str, Any]], num_steps: int) -> list[Update]:
    """Loss and gradients of `num_steps` steps on one rollout, with plain gradient descent between them."""
    model = trainer.model
    model.train()
    write_trained_adapter(model)
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for _ in range(num_steps):
        loss = trainer.training_step(model, inputs, None).item()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.2 * parameter.grad
                parameter.grad = None
        found.append((loss, gradients))
    return found


def updates_of_stock(
    stock: GRPOTrainer, rows: list[dict[str, Any]], completions: list[Completion], num_steps: int
) -> list[Update]:
    ids, logprobs = [c.token_ids for c in completions], [c.logprobs for c in completions]
    stock._generate_single_turn = lambda *_, **__: (ids, logprobs)
    stock.reward_funcs[0] = lambda completions, **_: REWARDS.tolist()
    stock._step, stock._buffered_inputs = 0, None
    return updates_of(stock, [{"prompt": row["prompt"]} for row in rows for _ in range(NUM_GENERATIONS)], num_steps)


def updates_of_ours(
    ours: Any, rows: list[dict[str, Any]], completions: list[Completion], num_steps: int, tokens: int
) -> list[Update]:
    ours.sampler = PolicySampler(ours.host, FixedGenerator(completions), NoCanary(), seed=0)
    ours.rlt = lambda rollout: ScoredRollout(
        breakdown=RewardBreakdown(reward=REWARDS.clone(), terms={}),
        rows=[ours.scorer._builder.build(row) for row in rollout.rows],
    )
    ours.plan = replace(ours.plan, settings=replace(ours.plan.settings, train_tokens=tokens))
    ours._rollout = None
    return updates_of(ours, rows, num_steps)


def assert_same_updates(mine: list, theirs: list) -> None:
    for (my_loss, my_gradients), (their_loss, their_gradients) in zip(mine, theirs, strict=True):
        assert my_loss == pytest.approx(their_loss, abs=1e-6, rel=5e-6)
        assert my_gradients.keys() == their_gradients.keys()
        scale = max(gradient.abs().max().item() for gradient in their_gradients.values())
        assert scale > 1e-4
        for name, gradient in their_gradients.items():
            difference = (my_gradients[name] - gradient).abs().max().item()
            assert difference <= 1e-6 * max(1.0, 2 * scale), (name, difference, scale)


def configure(trainers: tuple[Any, ...], **settings: Any) -> None:
    """Set TRL's attributes, which it reads from its arguments once, on both trainers."""
    on_args = ("use_bias_correction_kl", "delta")
    for trainer, (name, value) in itertools.product(trainers, settings.items()):
        setattr(trainer.args if name in on_args else trainer, name, value)


DEFAULTS: dict[str, Any] = {
    "loss_type": "grpo",
    "beta": 0.04,
    "num_iterations": 1,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "token_truncate",
    "mask_truncated_completions": False,
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "use_bias_correction_kl": False,
    "off_policy_mask_threshold": None,
    "multi_objective_aggregation": "sum_then_normalize",
}
CORRECTED = {"use_vllm": True, "vllm_importance_sampling_correction": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no reference": {"beta": 0.0},
    "two iterations": {"num_iterations": 2},
    "two iterations, no reference": {"num_iterations": 2, "beta": 0.0},
    "sampler corrected": CORRECTED,
    "sampler corrected by sequence": CORRECTED | {"vllm_importance_sampling_mode": "sequence_mask"},
    "sampler corrected by mask, two iterations": CORRECTED
    | {"vllm_importance_sampling_mode": "token_mask", "num_iterations": 2},
    "truncated masked": {"mask_truncated_completions": True, "num_iterations": 2},
    "truncated masked and corrected": CORRECTED | {"mask_truncated_completions": True},
    "sequence ratios": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "bias-corrected KL": {"use_bias_correction_kl": True, "num_iterations": 2},
    "off-policy rows masked": {"off_policy_mask_threshold": 0.2},
    "rewards scaled over the batch": {"scale_rewards": "batch"},
    "rewards not scaled": {"scale_rewards": "none"},
    "normalised, then summed": {"multi_objective_aggregation": "normalize_then_sum"},
}


@pytest.mark.parametrize("loss_type", LOSS_NORMALISATION)
def test_loss_and_gradients_are_those_of_stock_trl(loss_type: str, pair: Any) -> None:
    ours, stock, rows = pair
    completions = draw_completions(ours, seed=len(loss_type))
    for name, changed in VARIANTS.items():
        settings = DEFAULTS | {"loss_type": loss_type} | changed
        configure((ours, stock), **settings)
        num_steps = settings["num_iterations"]
        theirs = updates_of_stock(stock, rows, completions, num_steps)
        packings = PACKINGS if name in ("plain", "truncated masked") else {"packed": PACKINGS["packed"]}
        for tokens in packings.values():
            assert_same_updates(updates_of_ours(ours, rows, completions, num_steps, tokens), theirs)


def test_every_loss_type_that_can_be_set_is_pinned() -> None:
    from schemas.ranges import RANGES

    assert set(RANGES["loss_type"].__args__) == set(LOSS_NORMALISATION)


def test_metrics_of_packed_micro_batches_are_those_of_one_batch(pair: Any) -> None:
    ours, stock, rows = pair
    completions = draw_completions(ours, seed=3)
    configure((ours, stock), **(DEFAULTS | {"num_iterations": 2}))
    logged = []
    for run in (
        lambda: updates_of_stock(stock, rows, completions, 2),
        lambda: updates_of_ours(ours, rows, completions, 2, PACKINGS["packed"]),
    ):
        for trainer in (ours, stock):
            trainer._metrics["train"].clear()
        run()
        logged.append({k: list(v) for t in (ours, stock) for k, v in t._metrics["train"].items()})
    theirs, mine = logged
    only_theirs = {"step_time", "num_tokens"}
    for name in theirs.keys() - only_theirs:
        if not name.startswith("rewards/"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_advantages_are_ten_plain_lines() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_BF = torch.randn(12, 2, generator=generator)
    rewards_BF[3, 0] = rewards_BF[7] = torch.nan
    weights = torch.tensor([1.0, 0.5])
    mine, _ = group_advantages(rewards_BF, weights, 4)
    for start in range(0, 12, 4):
        totals = {}
        for row in range(start, start + 4):
            given = [(w * r).item() for w, r in zip(weights, rewards_BF[row], strict=True) if not r.isnan()]
            if given:
                totals[row] = sum(given)
        mean = sum(totals.values()) / len(totals)
        std = (sum((t - mean) ** 2 for t in totals.values()) / (len(totals) - 1)) ** 0.5
        for row in range(start, start + 4):
            expected = (totals[row] - mean) / (std + 1e-4) if row in totals else 0.0
            assert mine[row].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_losses_of_three_steps_are_the_recorded_ones(tmp_path: Any) -> None:
    """Renew them after a change that is meant: `python -m tests.helpers.golden_losses`."""
    recorded, now = json.loads(GOLDEN_LOSSES_FILE.read_text()), three_steps(tmp_path)
    assert now.keys() == recorded.keys()
    for name, values in recorded.items():
        assert now[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
