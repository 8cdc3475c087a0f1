"""The trainer on TRL's hooks: what is trained, what is reference, what is logged, what a checkpoint holds."""

import json
import time
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.types import Phase, Role
from data.embedded.task import classify_explanation, solve
from generation import start as start_module
from generation.policy import PolicySampler, sampling_seeds
from models.host import REFERENCE_ADAPTER
from rewards.format import is_well_formed
from rollout.tables import format_rate
from rollout.types import Completion, Group
from runs.summary import memory_by_phase, summarise
from tests.helpers.tiny_run import make_trainer, write_random_model
from trainers.callbacks import TEACHER_SHOWN, mix_into_reference
from trainers.teacher_grpo import EpochRepeatSampler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Two steps with a reference that follows the policy after each."""
    trainer = make_trainer(
        model,
        tmp_path_factory.mktemp("finished") / "run",
        "max_steps=2",
        "save_steps=1",
        "eval_steps=1",
        "sync_ref_model=true",
        "ref_model_sync_steps=1",
        "ref_model_mixup_alpha=0.9",
        "extra_rewards=[format]",
        "reward_weights=[1,0.5]",
    )
    trainer.train()
    trainer.finish()
    return trainer


def adapter_parameters(teacher: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in teacher.named_parameters() if f".{adapter}." in n}


def metrics_of(trainer) -> list[dict]:
    lines = Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_only_the_adapter_is_trained_and_it_is_float32(finished):
    trained = {n for n, p in finished.host.teacher.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    assert {p.dtype for p in adapter_parameters(finished.host.teacher).values()} == {torch.float32}
    assert any(p.abs().max() > 0 for n, p in adapter_parameters(finished.host.teacher).items() if "lora_B" in n)


def test_updates_below_bfloat16_resolution_are_kept(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", "max_steps=1", "learning_rate=1e-7", "num_eval_prompts=0")
    before = adapter_parameters(trainer.host.teacher)
    trainer.train()
    after = adapter_parameters(trainer.host.teacher)
    moved = [n for n in before if "lora_A" in n or "lora_B" in n if not torch.equal(before[n], after[n])]
    assert moved
    assert max((after[n] - before[n]).abs().max().item() for n in moved) < 1e-6


def test_every_reward_term_time_and_memory_is_logged(finished):
    step = next(line for line in metrics_of(finished) if line["step"] == 1 and "loss" in line)
    expected = {
        "reward",
        "kl",
        "sampling/logp_difference",
        "completions/mean_length",
        "rewards/rlt/mean",
        "rewards/format_reward/mean",
        *(f"rlt/{t}" for t in ("answer_log_prob_mean", "answer_log_prob_min", "reasoning_kl_mean", "match_reward")),
        *(f"time/{p}_s" for p in ("generate", "sync", "score", "train")),
        *(f"tokens_per_s/{p}" for p in ("generate", "score", "train")),
        *(f"memory/{p}_predicted_gb" for p in ("load", "generate", "score", "train")),
        *(f"memory/{p}_rss_gb" for p in ("load", "generate", "score", "train")),
    }
    assert expected <= step.keys()
    assert all(step[name] is not None for name in expected)


def test_the_sampler_and_the_trainer_agree_on_log_probs(finished):
    differences = [line["sampling/logp_difference"] for line in metrics_of(finished) if "loss" in line]
    assert max(differences) < 0.02


def test_held_out_questions_are_evaluated_before_between_and_after(finished):
    evaluated = [line["step"] for line in metrics_of(finished) if "eval_solution_log_prob" in line]
    assert evaluated == [0, 1, 2]


def test_rewards_of_the_table_are_those_of_the_completions(finished):
    folder = f"{finished.args.output_dir}/completions"
    table = pd.read_parquet(f"{folder}/completions_00001.parquet")
    assert len(table) == 8
    assert {"prompt", "completion", "rlt", "advantage", "answer_log_prob_mean"} <= set(table.columns)
    assert_described(table, finished)
    step = next(line for line in metrics_of(finished) if line["step"] == 1 and "loss" in line)
    assert table["rlt"].mean() == pytest.approx(step["rewards/rlt/mean"], abs=1e-4)


def assert_described(table, trainer):
    """Question, solution, explanation and its kind in each row, as prompt and completion have them."""
    closing = trainer.scorer.format.tags.explanation.closing
    for row in table.itertuples():
        assert row.question in row.prompt and row.solution in row.prompt and row.solution == solve(row.question)
        # A special token in the middle ends the explanation and leaves no text behind; half a character is a \ufffd.
        assert row.completion.partition(closing)[0].startswith(row.explanation.rstrip("\ufffd"))
        assert row.kind == classify_explanation(row.question, row.solution, row.explanation)


def test_the_table_of_an_evaluation_holds_what_its_metrics_are_means_of(finished):
    folder = Path(finished.args.output_dir, "evaluations")
    assert sorted(file.name for file in folder.iterdir()) == [f"evaluation_{step:05d}.parquet" for step in (0, 1, 2)]
    questions = set()
    for logged in (line for line in metrics_of(finished) if "eval_reward" in line):
        table = pd.read_parquet(folder / f"evaluation_{logged['step']:05d}.parquet")
        assert len(table) == 4 and set(table["step"]) == {logged["step"]}
        assert_described(table, finished)
        assert table["reward"].mean() == pytest.approx(logged["eval_reward"], abs=1e-4)
        log_prob = table["unprocessed_answer_log_prob_mean"].mean()
        assert log_prob == pytest.approx(logged["eval_solution_log_prob"], abs=1e-4)
        shares = {f"eval_share/{kind}": count / 4 for kind, count in table["kind"].value_counts().items()}
        assert shares == {key: value for key, value in logged.items() if key.startswith("eval_share/")}
        assert (table["sampler_log_prob"] < 0).all() and (table["num_tokens"] <= 8).all()
        questions.add(tuple(table["question"]))
    assert len(questions) == 1


def test_steps_that_are_logged_together_have_the_tokens_of_all_of_them(model, tmp_path):
    trainer = make_trainer(
        model, tmp_path / "run", "max_steps=4", "logging_steps=2", "eval_steps=2", "save_strategy=no"
    )
    counted, sample = [], trainer._sample

    def sampled_and_counted(*args, **kwargs):
        counted.append((rollout := sample(*args, **kwargs)).completions)
        return rollout

    trainer._sample = sampled_and_counted
    trainer.train()
    lines = [line for line in metrics_of(trainer) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    sampled = [sum(len(c.token_ids) for c in completions) for completions in counted]
    evaluations = {0, 3, 6}  # before the first step, after the second and after the fourth
    for line, calls in zip(lines, ((0, 1, 2), (3, 4, 5)), strict=True):
        for phase in ("generate", "score", "train"):
            counts = [sampled[call] for call in calls if phase != "train" or call not in evaluations]
            assert line[f"tokens_per_s/{phase}"] * line[f"time/{phase}_s"] == pytest.approx(sum(counts), rel=1e-6)


def test_a_run_whose_completions_are_all_truncated_and_masked_ends_with_its_summary(model, tmp_path):
    trainer = make_trainer(
        model, tmp_path / "run", "max_steps=1", "mask_truncated_completions=true", "max_completion_length=1"
    )
    trainer.train()
    trainer.finish()
    step = next(line for line in metrics_of(trainer) if "loss" in line)
    assert step["completions/clipped_ratio"] == 1 and step["loss"] == 0
    assert summarise(tmp_path / "run", memory_by_phase(trainer.plan, trainer.host.meter))["logp_difference"] is None
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_is_logged_at_the_end_leaves_the_last_steps_completions_alone(finished):
    trainer, file = finished, Path(finished.args.output_dir, "completions/completions_00002.parquet")
    before = file.read_bytes()
    logs = {key: values.copy() for key, values in trainer._logs.items() if key != "extra"}
    trainer._logs["prompt"].clear()
    trainer.log({"train_runtime": 1.0})
    trainer._logs |= logs
    assert file.read_bytes() == before


def test_the_format_rate_of_a_step_is_that_of_its_completions(finished):
    table = pd.read_parquet(f"{finished.args.output_dir}/completions/completions_00001.parquet")
    step = next(line for line in metrics_of(finished) if line["step"] == 1 and "loss" in line)
    tags = finished.scorer.format.tags
    assert step["rlt/format_rate"] == mean(is_well_formed(text, tags) for text in table["completion"])
    texts = ["1+1=2" + tags.explanation.closing, "1+1=2", "1" + tags.explanation.closing]
    assert format_rate(texts, tags) == pytest.approx(2 / 3)


def test_what_the_console_shows_of_a_step_is_logged(finished):
    step = next(line for line in metrics_of(finished) if line["step"] == 1 and "loss" in line)
    assert all(step[key] is not None for key, _ in TEACHER_SHOWN)


def test_the_reference_adapter_follows_the_policy_and_is_frozen(finished):
    teacher = finished.host.teacher
    policy, reference = adapter_parameters(teacher), adapter_parameters(teacher, REFERENCE_ADAPTER)
    assert not any(p.requires_grad for n, p in teacher.named_parameters() if f".{REFERENCE_ADAPTER}." in n)
    for name, values in reference.items():
        last = policy[name.replace(f".{REFERENCE_ADAPTER}.", ".default.")]
        assert torch.allclose(values, last, atol=1e-2)
    mix_into_reference(teacher, 1.0)
    mixed = adapter_parameters(teacher, REFERENCE_ADAPTER)
    assert all(torch.equal(mixed[n], policy[n.replace(".ref.", ".default.")]) for n in mixed)


def test_a_checkpoint_is_whole_and_holds_both_adapters(finished):
    folder = f"{finished.args.output_dir}/checkpoint-2"
    for name in ("default", REFERENCE_ADAPTER):
        sub = "" if name == "default" else f"/{name}"
        assert load_file(f"{folder}{sub}/adapter_model.safetensors")
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json"):
        assert Path(folder, file).stat().st_size > 0


def test_resuming_restores_both_adapters(finished, model, tmp_path):
    other = make_trainer(model, tmp_path / "run", "max_steps=2", "sync_ref_model=true", "seed=7")
    other._load_from_checkpoint(f"{finished.args.output_dir}/checkpoint-2")
    for adapter in ("default", REFERENCE_ADAPTER):
        saved = load_file(
            f"{finished.args.output_dir}/checkpoint-2/{'' if adapter == 'default' else adapter + '/'}"
            "adapter_model.safetensors"
        )
        loaded = adapter_parameters(other.host.teacher, adapter)
        assert len(saved) == len(loaded) > 0
        for name, values in loaded.items():
            assert torch.equal(values, saved[name.replace(f".{adapter}.", ".")])


def test_the_result_is_an_adapter_with_tokenizer_and_card(finished, model):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    PeftModel.from_pretrained(base, finished.args.output_dir)
    assert Path(finished.args.output_dir, "README.md").read_text().startswith("---")
    assert Path(finished.args.output_dir, "tokenizer.json").stat().st_size > 0


def test_without_sync_the_reference_costs_no_adapter(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", "max_steps=1")
    assert list(trainer.host.teacher.peft_config) == ["default"]


def test_starting_from_an_adapter_keeps_a_copy_as_reference(finished, model, tmp_path):
    trainer = make_trainer(
        model, tmp_path / "run", "max_steps=1", f"model_args.adapter_path={finished.args.output_dir}"
    )
    teacher = trainer.host.teacher
    start, reference = adapter_parameters(teacher), adapter_parameters(teacher, REFERENCE_ADAPTER)
    assert all(torch.equal(reference[n], start[n.replace(".ref.", ".default.")]) for n in reference)
    rows = [[5, 6, 7, 8, 9]]
    with trainer.host.acting_as(Role.REFERENCE):
        assert teacher.active_adapter == REFERENCE_ADAPTER
    assert trainer.host.policy_logprobs(rows, True) != trainer.host.policy_logprobs(rows, False)


def test_a_separate_reference_is_used_in_the_loss(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", "max_steps=1", "reference_model=separate", "num_eval_prompts=0")
    assert trainer.host.reference is not None
    assert list(trainer.host.teacher.peft_config) == ["default"]
    trainer.host.reference.lm_head.weight.data *= 2
    trainer.train()
    assert next(line for line in metrics_of(trainer) if "kl" in line)["kl"] > 0.1


def test_student_null_is_the_teachers_base(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", "max_steps=1", "student_model=null", "num_eval_prompts=0")
    with trainer.host.acting_as(Role.STUDENT) as student:
        assert student is trainer.host.teacher
        ids = torch.tensor([[5, 6, 7, 8]])
        without = student(ids).logits
        with student.disable_adapter():
            assert torch.equal(student(ids).logits, without)


def test_importance_sampling_is_off_where_the_generator_has_the_trainers_weights(finished):
    assert finished.sampler.generator.shares_trainer_weights
    assert not finished.vllm_importance_sampling_correction and not finished.use_vllm


def test_importance_sampling_can_be_turned_on(model, tmp_path):
    trainer = make_trainer(
        model, tmp_path / "run", "max_steps=1", "importance_sampling_correction=true", "num_eval_prompts=0"
    )
    trainer.train()
    step = next(line for line in metrics_of(trainer) if "loss" in line)
    assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)


def test_engine_is_awake_in_the_generate_phase_only(finished):
    events = []

    class Engine:
        def sleep(self):
            events.append("sleep")

        def wake(self):
            events.append("wake")

    host = finished.host
    before, host._engine = host._engine, Engine()
    with host.phase(Phase.TRAIN), host.phase(Phase.GENERATE):
        with host.phase(Phase.SYNC):
            events.append("sync")
        events.append("generate")
    with host.phase(Phase.SCORE):
        events.append("score")
    host._engine = before
    assert events == ["wake", "sync", "generate", "sleep", "score"]


def test_the_drivers_figure_stands_beside_what_torch_reserved_where_there_is_one(finished, monkeypatch):
    assert not any("driver" in name for name in finished._phase_metrics())
    monkeypatch.setattr(finished.host.meter.use[Phase.TRAIN], "peak_driver_bytes", 5_000_000_000)
    assert finished._phase_metrics()["memory/train_driver_gb"] == 5.0
    phases = memory_by_phase(finished.plan, finished.host.meter)["phases"]
    assert phases["train"]["driver_gb"] == 5.0 and "driver_gb" not in phases["score"]


def test_the_generator_is_started_within_the_loading_phase(model, tmp_path, monkeypatch):
    """vLLM takes minutes for it, and its memory is in the plan of that phase."""
    open_phases = []

    def start(config, host, *parts):
        open_phases.append(list(host.meter.open_phases))
        return start_generator(config, host, *parts)

    start_generator = start_module._start_generator
    monkeypatch.setattr(start_module, "_start_generator", start)
    make_trainer(model, tmp_path / "run", "max_steps=1")
    assert open_phases == [[Phase.LOAD]]


def test_phase_seconds_go_to_the_innermost_phase(finished):
    host, before = finished.host, finished.host.meter.checkpoint_use()
    with host.phase(Phase.TRAIN), host.phase(Phase.SCORE):
        time.sleep(0.05)
    after = host.meter.checkpoint_use()
    assert after[Phase.SCORE].seconds - before[Phase.SCORE].seconds >= 0.05
    assert after[Phase.TRAIN].seconds - before[Phase.TRAIN].seconds < 0.04


def test_seeds_depend_on_seed_stream_step_and_row_alone():
    seeds = sampling_seeds(1, stream=0, step=3, num_rows=50)
    assert seeds == sampling_seeds(1, stream=0, step=3, num_rows=50)
    assert sampling_seeds(1, stream=0, step=3, num_rows=9) == seeds[:9]
    others = [sampling_seeds(2, stream=0, step=3, num_rows=50), sampling_seeds(1, stream=1, step=3, num_rows=50)]
    assert len({*seeds, *others[0], *others[1], *sampling_seeds(1, stream=0, step=4, num_rows=50)}) == 200


def test_the_order_of_an_epoch_does_not_depend_on_earlier_epochs():
    def sampler():
        return EpochRepeatSampler(range(20), mini_repeat_count=2, batch_size=4, repeat_count=1, seed=3)

    through, resumed = sampler(), sampler()
    orders = []
    for epoch in range(3):
        through.set_epoch(epoch)
        orders.append(list(through))
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert orders[0] != orders[1]


def test_a_vllm_server_samples_through_trls_client(model, tmp_path, monkeypatch):
    class Server:
        """Stands in for TRL's VLLMGeneration, whose constructor connects to a server."""

        def __init__(self, **settings):
            self.mode, self.num_syncs = settings["mode"], 0

        def sync_weights(self):
            self.num_syncs += 1

        def generate(self, prompts, images, num_generations, profiler):
            assert len(prompts) % num_generations == 0
            return None, [[5, 6, 7]] * len(prompts), [[[-0.5]] * 3] * len(prompts), None

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Server)
    monkeypatch.setattr(Server, "vllm_client", None, raising=False)
    trainer = make_trainer(
        model,
        tmp_path / "run",
        "max_steps=2",
        "use_vllm_server=true",
        "model_args.load_in_8bit=false",
        "num_eval_prompts=0",
    )
    trainer.train()
    assert trainer.sampler is None
    assert (trainer.vllm_generation.mode, trainer.vllm_generation.num_syncs) == ("server", 2)
    steps = [line for line in metrics_of(trainer) if "loss" in line]
    assert [step["completions/mean_length"] for step in steps] == [3.0, 3.0]
    assert all("rlt/reasoning_kl_mean" in step and "sampling/logp_difference" in step for step in steps)


def test_prompts_are_generated_in_groups_in_the_order_of_the_batch(finished):
    calls = []

    class Recorder:
        shares_trainer_weights = True

        def sync_adapter(self, model):
            pass

        def generate(self, prompts, num_generations, seeds, on_progress):
            calls.append((prompts, num_generations, len(seeds)))
            return [Completion(token_ids=[1], logprobs=[-0.1], finish_reason="stop")] * len(seeds)

    class NoCanary:
        def check(self):
            pass

    sampler = finished.sampler
    finished.sampler = PolicySampler(finished.host, Recorder(), NoCanary(), seed=0)
    groups = [Group(question="q", solution="s", prompt_ids=[i]) for i in (1, 2)]
    rollout = finished._sample(groups, 2, stream=0)
    finished.sampler = sampler
    assert calls == [([[1], [2]], 2, 4)]
    assert [group.prompt_ids for group in rollout.groups] == [[1], [2]]
    assert [len(group.completions) for group in rollout.groups] == [2, 2]
