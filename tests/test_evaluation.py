"""An evaluation needs no trainer: from a run's folder it finds what the trainer found."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.types import Phase, Role
from data.embedded.task import classify_explanation
from generation import Canary, SamplingSettings
from generation.policy import EVAL_STREAM, PolicySampler
from generation.transformers_engine import TransformersGenerator
from models.host import ModelHost
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from models.trained import open_run
from rollout.scoring import RolloutScorer
from rollout.types import Group
from runs.summary import memory_by_phase
from tests.helpers.tiny_diffusion import make_diffusion_trainer
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_masked_diffusion_trainer import SMALL_BATCH, counting_samples
from trainers.evaluation import evaluate_masked_diffusion, evaluate_policy

FLOAT32 = ("model_args.load_in_8bit=false", "model_args.torch_dtype=float32")


def test_a_policy_from_a_runs_folder_has_the_figures_that_its_trainer_found(tmp_path):
    teacher, student = (write_random_model(tmp_path / name, seed) for seed, name in enumerate(("teacher", "student")))
    words = (*FLOAT32, "max_steps=1", "learning_rate=0.02", f"student_model={student}", "save_strategy=no")
    trainer = make_trainer(teacher, tmp_path / "run", *words)
    untrained = trainer.evaluate()
    trainer.train()
    expected = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    trainer.finish()
    groups = [Group.of_row(row) for row in trainer.eval_dataset]
    tokenizer, prompt_format = trainer.processing_class, trainer.scorer.format
    trainer.close()

    config = open_run(Path(tmp_path / "run"), needs_adapter=True).config
    with ModelHost(config, roles=[Role.TEACHER, Role.STUDENT], max_score_tokens=512) as host:
        generator = TransformersGenerator(host.teacher, SamplingSettings.of_run(config, tokenizer, host.teacher), 8)
        canary = Canary(generator, host.policy_logprobs, [group.prompt_ids for group in groups], tolerance=0.1)
        sampler = PolicySampler(host, generator, canary, seed=config.grpo.seed)
        found = evaluate_policy(
            groups,
            sample=lambda groups: sampler(groups, 1, stream=EVAL_STREAM, step=0, version=0),
            host=host,
            scorer=RolloutScorer(
                tokenizer=tokenizer,
                prompt_format=prompt_format,
                reward_config=config,
                sampling_temperature=config.grpo.temperature,
                score=host.score,
            ),
            tokenizer=tokenizer,
            classify=classify_explanation,
        )
        assert host.meter.use[Phase.GENERATE].seconds > 0 and host.meter.use[Phase.SCORE].seconds > 0
    assert found.metrics == pytest.approx(expected, abs=1e-4)
    assert abs(untrained["eval_reward"] - found.metrics["reward"]) > 1e-2
    assert found.table["question"] == [group.question for group in groups]


def test_a_masked_diffusion_model_from_a_runs_folder_has_the_figures_that_its_trainer_found(tmp_path):
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *SMALL_BATCH, "save_strategy=no")
    trainer.train()
    expected = trainer.evaluate()
    trainer.finish()
    meter = PhaseMeter(torch.device("cpu"))
    found = evaluate_masked_diffusion(
        AutoModelForCausalLM.from_pretrained(tmp_path / "run"),
        trainer.eval_samples,
        trainer.config,
        tokenizer=trainer.processing_class,
        tags=trainer.tags,
        meter=meter,
        retries=MemoryRetries(meter, max_retries=0),
    )
    assert {f"eval_{name}": value for name, value in found.items()} == pytest.approx(expected, abs=1e-5)
    assert set(found) == {"nll_bound", "exact_match"}
    assert all(meter.use[phase].seconds > 0 for phase in (Phase.SCORE, Phase.GENERATE))

    # The run has one meter, and its trainer logs what that measured, as a teacher's does.
    phases = {str(phase) for phase in (Phase.LOAD, Phase.TRAIN, Phase.SCORE, Phase.GENERATE)}
    assert set(memory_by_phase(trainer.plan, trainer.meter)["phases"]) == phases
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert {"time/train_s", "memory/train_rss_gb", "memory/train_predicted_gb"} <= steps[0].keys()
    num_learned = 8 * 3  # rows of a step, and tokens that are learned in each
    assert all(step["tokens_per_s/train"] * step["time/train_s"] == pytest.approx(num_learned) for step in steps)
