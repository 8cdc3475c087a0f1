"""The plan of time: arithmetic by hand, properties, the table of GPUs, what is shown."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from core.types import Phase
from optimization import rates as measuring
from optimization.rates import count_ops, rates_here
from planner import contexts
from planner.planned import plan_config
from planner.rates import (
    COPY_FACTOR,
    GPUS,
    MATMUL_FACTOR,
    MEASUREMENTS,
    Rates,
    cpu_name,
    cpu_rates_file,
    num_threads,
    rates_as_json,
    rates_for_memory,
    rates_of_gpu,
    saved_cpu_rates,
)
from planner.settings import PlanSettings
from planner.time import Lengths, TimePlan, plan_time
from planner.work import OPS_PER_FORWARD, OPS_PER_LAYER, OPS_PER_SEGMENT, Rows, Work, forward_work, training_work
from rollout.logprobs import span_logprobs
from rollout.types import ScoringRow
from runs.metrics import METRICS_FILE, append_metrics
from runs.summary import time_table
from tests.helpers.tiny_run import make_trainer, write_random_model
from trainers.time_plan import time_beside_plan

GPU = Rates(copy_bytes_per_s=2e12, matmul_flop_per_s=4e14, op_s=1e-9, name="a GPU")
CPU = Rates(
    copy_bytes_per_s=1e10,
    matmul_flop_per_s=1e11,
    op_s=1e-5,
    by_width={kind: {64: 1e10, 1024: 4e10} for kind in ("bf16 forward", "bf16 training")},
)
LENGTHS = Lengths(prompt=100, completion=200, longest_completion=400, solution=40, source="made up")


@pytest.fixture(scope="module")
def run() -> PlanSettings:
    return plan_config("teacher_rlt_mono_85gb", int(85e9)).plan.settings


def planned(run: PlanSettings, rates: Rates = GPU, lengths: Lengths = LENGTHS) -> TimePlan:
    plan = plan_time(run, rates, lengths)
    assert plan is not None
    return plan


def test_a_gpu_computes_while_it_is_given_work_and_a_cpu_does_not() -> None:
    work = Work(flop=4e12, traffic_bytes=2e10, num_ops=1e6, width=64)
    assert work.seconds(GPU) == pytest.approx(0.01 + 0.01)  # 1e6 launches of 1 ns are hidden
    assert work.seconds(replace(GPU, op_s=1e-6)) == pytest.approx(1.0)  # and now they bind
    assert work.seconds(CPU) == pytest.approx(400 + 2 + 10)


def test_forward_by_hand(run: PlanSettings) -> None:
    """Two groups of two: a prefix once each, every row's own tokens, attention to prefix and own."""
    shape, rows = run.teacher, Rows(num_rows=4, group=2, prefix_len=10, own_len=6, scored_len=6)
    work = forward_work(shape, "bf16", rows, batch_tokens=1000)
    num_tokens, num_pairs = 2 * 10 + 4 * 6, 2 * 10**2 / 2 + 4 * (6 * 10 + 6**2 / 2)
    linear = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    expected = 2 * linear * num_tokens + 4 * 3584 * 28 * num_pairs + 2 * 152064 * 3584 * 4 * 6
    assert work.flop == pytest.approx(expected)
    assert work.traffic_bytes == 2 * linear
    assert work.num_ops == 40 + 28 * (110 + 5.8 * (4 + 2))


def test_recomputation_adds_a_forward(run: PlanSettings) -> None:
    rows = Rows(num_rows=4, group=2, prefix_len=10, own_len=0, scored_len=0)  # no head, little attention
    shape = replace(run.teacher, num_heads=1)
    forward = forward_work(shape, "bf16", rows, batch_tokens=1000)
    once, again = (
        training_work(shape, "bf16", rows, batch_tokens=1000, recomputes=recomputes, lora_r=1)
        for recomputes in (False, True)
    )
    assert once.flop / forward.flop == pytest.approx(2, rel=0.01)
    assert again.flop / forward.flop == pytest.approx(3, rel=0.01)
    assert again.num_ops == once.num_ops + forward.num_ops


@pytest.mark.parametrize(
    "changed",
    [{"prompt": 150}, {"completion": 300}, {"longest_completion": 800}, {"solution": 80}],
    ids=lambda changed: next(iter(changed)),
)
def test_more_tokens_never_take_less(run: PlanSettings, changed: dict[str, float]) -> None:
    before, after = planned(run), planned(run, lengths=replace(LENGTHS, **changed))
    assert after.step_s >= before.step_s


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(("prompt", "completion"), [(10, 10), (100, 2000), (4000, 30), (6144, 6144)])
def test_shares_add_up_and_twice_the_rows_take_twice_the_products(
    run: PlanSettings, groups: int, prompt: float, completion: float
) -> None:
    lengths = Lengths(
        prompt=prompt, completion=completion, longest_completion=completion, solution=prompt / 2, source="made up"
    )
    plan = planned(replace(run, train_batch=16 * groups), lengths=lengths)
    assert sum(plan.shares.values()) == pytest.approx(1)
    assert plan.run_s == pytest.approx(plan.step_s * (run.num_steps or 0))
    twice = planned(replace(run, train_batch=32 * groups), lengths=lengths)
    assert twice.seconds[Phase.SCORE] == pytest.approx(2 * plan.seconds[Phase.SCORE], rel=0.5)


def test_twice_the_matmul_rate_halves_what_is_bound_by_it(run: PlanSettings) -> None:
    free = replace(GPU, op_s=0.0, copy_bytes_per_s=1e30)
    before, after = planned(run, free), planned(run, replace(free, matmul_flop_per_s=2 * GPU.matmul_flop_per_s))
    for phase in (Phase.SCORE, Phase.TRAIN):
        assert after.seconds[phase] == pytest.approx(before.seconds[phase] / 2)


def test_a_decoding_step_reads_the_weights_whatever_the_matmul_rate(run: PlanSettings) -> None:
    free = replace(GPU, op_s=0.0)
    slower = planned(run, replace(free, copy_bytes_per_s=GPU.copy_bytes_per_s / 2))
    assert slower.seconds[Phase.GENERATE] == pytest.approx(2 * planned(run, free).seconds[Phase.GENERATE], rel=0.1)


def test_a_rollout_that_serves_two_steps_costs_half_of_each(run: PlanSettings) -> None:
    once, twice = planned(run), planned(replace(run, steps_per_rollout=2))  # type: ignore[call-arg]
    assert twice.seconds[Phase.GENERATE] == pytest.approx(once.seconds[Phase.GENERATE] / 2)
    assert twice.seconds[Phase.TRAIN] == once.seconds[Phase.TRAIN]


def test_a_shared_prefix_saves_what_the_group_has_in_common(run: PlanSettings) -> None:
    shared, packed = (
        planned(replace(run, sequence_layout=layout), lengths=replace(LENGTHS, prompt=2000))
        for layout in ("shared_prefix", "packed")
    )
    assert packed.seconds[Phase.TRAIN] > 4 * shared.seconds[Phase.TRAIN]


def test_widths_between_two_that_were_measured() -> None:
    assert CPU.flop_per_s(64, "bf16 forward") == CPU.flop_per_s(8, "bf16 forward") == 1e10
    assert CPU.flop_per_s(256, "bf16 forward") == pytest.approx(2e10)
    assert CPU.flop_per_s(4096, "bf16 forward") == 4e10
    assert GPU.flop_per_s(64, "bf16 forward") == GPU.matmul_flop_per_s


@pytest.mark.parametrize(
    ("driver_name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A10", "A10"),
    ],
)
def test_a_gpu_is_found_by_the_name_of_its_driver(driver_name: str, known: str) -> None:
    rates = rates_of_gpu(driver_name)
    assert rates is not None
    assert rates.name == known
    assert rates.label != "measured"
    assert rates.matmul_flop_per_s == GPUS[known].tflop_per_s * 1e12 * MATMUL_FACTOR
    assert rates.copy_bytes_per_s == GPUS[known].tb_per_s * 1e12 * COPY_FACTOR


def test_a_gpu_that_the_table_does_not_know_has_no_rates() -> None:
    assert rates_of_gpu("NVIDIA Unheard-of 9000") is None


def test_measured_rates_go_before_the_makers(tmp_path: Path) -> None:
    file = tmp_path / "measurements.json"
    entry = {"machine": {"card": "NVIDIA L4"}, "date": "2026-12-01"}
    file.write_text(f'[{{"machine": {{"card": "NVIDIA L4"}}, "date": "{entry["date"]}", "rates": '
                    '{"copy_bytes_per_s": 2e11, "matmul_flop_per_s": 8e13}}]')  # fmt: skip
    rates = rates_of_gpu("NVIDIA L4", file)
    assert rates is not None
    assert (rates.label, rates.copy_bytes_per_s, rates.matmul_flop_per_s) == ("measured", 2e11, 8e13 * MATMUL_FACTOR)
    assert rates_of_gpu("NVIDIA L4", MEASUREMENTS) != rates


@pytest.mark.parametrize(("memory_gb", "name"), [(8, "RTX 4060"), (24, "RTX 4090"), (85, "H100 80GB"), (150, "H200")])
def test_so_much_memory_is_the_gpu_that_people_mean(memory_gb: float, name: str) -> None:
    assert rates_for_memory(int(memory_gb * 1e9)).name == name


def test_rates_of_another_cpu_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    mine = replace(CPU, name=f"{cpu_name()}, {num_threads()} threads")
    file.write_text(rates_as_json(mine))
    assert saved_cpu_rates(file) == mine
    file.write_text(rates_as_json(replace(CPU, name="another CPU")))
    assert saved_cpu_rates(file) is None
    assert saved_cpu_rates(tmp_path / "none") is None


def test_longer_contexts_cost_more_a_token_and_fit_less(run: PlanSettings) -> None:
    found = contexts.contexts(run, int(24e9), rates_for_memory(int(24e9)))
    costs = [sum(at.seconds_per_million_tokens(phase) for phase in at.time.seconds) for at in found]
    assert costs[2:] == sorted(costs[2:])  # the shortest pay for their launches
    assert [at.peak_bytes for at in found] == sorted(at.peak_bytes for at in found)
    fits = [at.fits for at in found]
    assert fits == sorted(fits, reverse=True)


def test_the_command_of_contexts_prints_the_longest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert contexts.main(["--config-name", "teacher_rlt_mono_24gb", "--gpu-gb", "24"]) == 0
    shown = capsys.readouterr().out
    assert "64k" in shown and "does not fit" in shown and "not measured" in shown
    assert contexts.main(["--config-name", "llada_sft"]) == 2


def test_the_table_at_the_end_sets_the_plan_beside_the_measured_time() -> None:
    phases = {"train": {"planned_s": 1.0, "measured_s": 1.5}, "score": {"planned_s": 1.0, "measured_s": 0.5}}
    table = time_table({"rates": "r", "lengths": "l", "tokens_per_s": 10.0, "phases": phases})
    assert [list(column.cells) for column in table.columns[1:]] == [
        ["1", "1", "2"],
        ["50%", "50%", "100%"],
        ["1.5", "0.5", "2"],
        ["75%", "25%", "100%"],
    ]


def test_the_summary_holds_the_median_step_beside_its_plan(
    run: PlanSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines count two steps each; the first, with what is done once, is left out."""
    monkeypatch.setattr("trainers.time_plan.rates_here", lambda device, measures=True: GPU)
    for seconds in (100.0, 4.0, 6.0, 8.0):
        figures = {f"time/{phase}_s": seconds for phase in ("generate", "score", "train", "sync")}
        lengths = {"completions/mean_length": 200.0, "completions/max_length": 400.0}
        append_metrics(tmp_path / METRICS_FILE, 1, figures | lengths)
    append_metrics(tmp_path / METRICS_FILE, 8, {"train_runtime": 1.0})
    rows = Dataset.from_list([{"prompt_ids": [1] * 100, "solution": "x" * 40}] * 3)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), logging_steps=2, max_steps=8),
        meter=SimpleNamespace(device=torch.device("cpu")),
        plan=SimpleNamespace(settings=run),
        train_dataset=rows,
        processing_class=lambda texts, add_special_tokens: {"input_ids": [list(text) for text in texts]},
    )
    seconds = time_beside_plan(trainer)
    expected = planned(run)
    assert {name: phase["measured_s"] for name, phase in seconds["phases"].items()} == dict.fromkeys(
        ("sync", "generate", "score", "train"), 3.0
    )
    for phase, planned_s in expected.seconds.items():
        assert seconds["phases"][str(phase)]["planned_s"] == pytest.approx(planned_s)
    assert seconds["tokens_per_s"] == pytest.approx(run.train_batch * 200 / 12)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """Operations of a forward, and of a training pass: (kind, segments) -> of 2 layers less those of 1."""
    ops: dict[tuple[str, int, int], int] = {}
    for num_layers in (1, 2):
        folder = tmp_path_factory.mktemp(f"layers{num_layers}")
        model = write_random_model(folder / "model", num_layers=num_layers)
        trainer = make_trainer(model, folder / "run", "num_eval_prompts=0", "student_model=null")
        for num_rows in (4, 16):
            ids = [list(range(20, 40)) + [40 + i] * 4 for i in range(num_rows)]
            rows = [ScoringRow(token_ids=row, spans=((20, 24),), prefix_len=20) for row in ids]

            def scores(rows: list[ScoringRow] = rows, trainer: object = trainer) -> None:
                with torch.no_grad(), trainer.host.teacher.disable_adapter():  # type: ignore[attr-defined]
                    span_logprobs(trainer.host.teacher, rows)  # type: ignore[attr-defined]

            def learns(rows: list[ScoringRow] = rows, trainer: object = trainer) -> None:
                logprobs, _ = span_logprobs(trainer.host.teacher, rows, with_entropy=True)  # type: ignore[attr-defined]
                logprobs.sum().backward()

            for kind, call in (("forward", scores), ("training", learns)):
                call()
                ops[kind, num_layers, num_rows + 1] = count_ops(call)
        trainer.close()
    return {(kind, s): ops[kind, 2, s] - ops[kind, 1, s] for kind in ("forward", "training") for s in (5, 17)} | {
        ("rest", 0): ops["forward", 1, 5] - (ops["forward", 2, 5] - ops["forward", 1, 5])
    }


@pytest.mark.parametrize("kind", ["forward", "training"])
def test_operations_of_a_block_are_those_that_were_counted(counted: dict[tuple[str, int], float], kind: str) -> None:
    few, many = counted[kind, 5], counted[kind, 17]
    assert OPS_PER_SEGMENT[kind] == pytest.approx((many - few) / 12, rel=0.2)  # type: ignore[index]
    assert OPS_PER_LAYER[kind] == pytest.approx(few - 5 * (many - few) / 12, rel=0.2)  # type: ignore[index]
    assert pytest.approx(counted["rest", 0], rel=0.3) == OPS_PER_FORWARD


def test_rates_that_cannot_be_kept_are_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    monkeypatch.setenv("RLT_CACHE", str(tmp_path / "cache"))
    here = replace(CPU, name=f"{cpu_name()}, {num_threads()} threads")
    monkeypatch.setattr(measuring, "measured_cpu_rates", lambda: here)
    assert rates_here(torch.device("cpu")) is here
    assert "could not be kept" in caplog.text
    monkeypatch.setenv("RLT_CACHE", str(tmp_path / "other"))
    assert rates_here(torch.device("cpu")) is here and saved_cpu_rates() == here
    assert [file.name for file in (tmp_path / "other").iterdir()] == [cpu_rates_file().name]
