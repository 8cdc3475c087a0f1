"""benchmarks/gpu on a machine without a GPU: the runner, the arithmetic, the pages, and every script end to end."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import floors, kernels, memory, planner_grid, report, training
from benchmarks.gpu.__main__ import SHAPES, main
from benchmarks.gpu.cell import Setup
from benchmarks.gpu.machine import ROOT, Machine, _digest_of_sources
from benchmarks.gpu.memory import DriverWatch, MemoryCap, component_table, module_bytes
from benchmarks.gpu.parts import _NUM_GRID_POINTS, PARTS, cells_of
from benchmarks.gpu.planner_grid import propose
from benchmarks.gpu.random_model import (
    NUM_QUESTIONS,
    build_tokenizer,
    ensure_random_model,
    shape_named,
    write_questions,
)
from benchmarks.gpu.runner import Cell, Figures, Result, run_cell, run_cells
from core.types import Phase
from data.formats import PromptFormat, encode
from data.tags import TAG_STYLES
from models.meter import PhaseUse
from planner.activations import train_activation_bytes
from planner.components import num_lora_params, weight_bytes
from planner.plan import plan_run
from planner.readme_table import measured_peaks
from planner.shapes import load_shape
from schemas.compose import compose_run_config
from schemas.run import load_run_config
from tests.helpers.measured_step import Measured
from tests.helpers.step_models import build_model
from tests.test_planner_formula import point, predicted_static
from tests.test_planner_gpu import GPU_GRID

HERE = Machine(card=None, card_gb=None, driver=None, python="3", versions={"torch": "2"}, commit="abc", sources="1")


def cell(name, **changes):
    function = f"tests.helpers.gpu_cells:{name}"
    values = {"part": "x", "name": name, "function": function, "expected_s": 1, "arguments": {"number": 7}}
    return Cell(**(values | changes))


def run(cells, out, machine=HERE, **changes):
    values = {"shape": "tiny", "out": out, "limit_s": 60.0, "again": False}
    return list(run_cells(cells, machine, **(values | changes)))


# The runner


def test_a_cell_that_fails_stops_no_other_and_the_next_call_repeats_only_what_failed(tmp_path):
    cells = [cell("fails"), cell("refused"), cell("skips"), cell("works")]
    results = {result.cell: result for result in run(cells, tmp_path)}
    assert {name: result.status for name, result in results.items()} == {
        "fails": "failed", "refused": "failed", "skips": "skipped", "works": "ok",
    }  # fmt: skip
    assert "the GPU is on fire" in results["fails"].reason and results["fails"].figures["measured_before"] == "4.2"
    assert "remedy" in results["refused"].reason and "take the other" in results["refused"].reason
    assert results["skips"].reason == "nothing to measure here"
    assert results["works"].figures["argument"] == 7 and results["works"].figures["shape"] == "tiny"
    written = [(tmp_path / f"x-{name}.json").stat().st_mtime_ns for name in ("fails", "works")]
    assert run([cells[0], cells[3]], tmp_path)[1] == results["works"]
    again = [(tmp_path / f"x-{name}.json").stat().st_mtime_ns for name in ("fails", "works")]
    assert again[0] > written[0] and again[1] == written[1]


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({}, True),
        ({"machine": replace(HERE, commit="def")}, True),  # e.g. the figures were committed
        ({"machine": replace(HERE, sources="2")}, False),
        ({"machine": replace(HERE, card="H200", card_gb=150.0)}, False),
        ({"machine": replace(HERE, versions={"torch": "3"})}, False),
        ({"shape": "7B"}, False),
        ({"again": True}, False),
    ],
)
def test_a_result_is_kept_for_the_same_card_versions_sources_and_shape(tmp_path, changes, is_kept, monkeypatch):
    known = Result(
        part="x", cell="works", shape="tiny", status="ok", reason="", seconds=1.0, date="2026-01-01", command="",
        machine=HERE.to_dict(), figures={},
    )  # fmt: skip
    (tmp_path / "x-works.json").write_text(json.dumps(vars(known)))
    measured_anew = replace(known, date="2026-02-02")
    monkeypatch.setattr("benchmarks.gpu.runner.run_cell", lambda *_, **__: measured_anew)
    assert run([cell("works")], tmp_path, **changes) == [known if is_kept else measured_anew]


def test_a_cell_ends_with_its_time_and_leaves_what_it_had(tmp_path):
    started = time.monotonic()
    result = run_cell(cell("hangs"), HERE, shape="tiny", out=tmp_path, limit_s=5.0)
    assert time.monotonic() - started < 30
    assert result.status == "out of time" and "compiling for ever" in result.reason
    assert result.figures["measured_before"] == "4.2"


def test_a_cell_that_does_not_fit_the_rest_of_the_time_is_left_for_the_next_call(tmp_path):
    cells = [cell("skips", expected_s=1000), cell("works", expected_s=1000)]
    assert [result.cell for result in run(cells, tmp_path)] == ["skips"]


def test_a_wrong_call_is_one_message_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--part", "z"])
    assert end.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_a_change_of_a_source_is_seen_and_one_of_the_docs_is_not(tmp_path):
    for name in ("planner/a.py", "docs/b.py", "cfgs/c.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = _digest_of_sources(tmp_path)
    (tmp_path / "docs/b.py").write_text("2")
    assert _digest_of_sources(tmp_path) == before
    (tmp_path / "cfgs/c.yaml").write_text("2")
    assert _digest_of_sources(tmp_path) != before


# Parts


@pytest.mark.parametrize("letter", sorted(PARTS))
def test_every_cell_has_its_function_and_fits_its_part(letter):
    cells = cells_of(letter, "7B")
    for one in cells:
        module, _, function = one.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert one.expected_s <= 540
    assert {one.name for one in cells_of(letter, "tiny")} <= {one.name for one in cells}
    assert {one.function for one in cells_of(letter, "tiny")} == {one.function for one in cells}


def test_the_whole_grid_is_measured():
    assert len(GPU_GRID) == _NUM_GRID_POINTS


def test_small_cards_get_the_shape_that_their_configuration_names():
    for one in cells_of("e", "7B"):
        values = compose_run_config(one.arguments["config"])
        assert values["model_args"].get("load_in_4bit") or values["model_args"]["load_in_8bit"]
        assert f"-{one.arguments['shape']}-" in values["model_name_or_path"]
        assert values["card_gb"] < 85


# The random model


@pytest.mark.parametrize("num_rows", [4096, 20_000])
def test_the_tokenizer_names_every_row(num_rows):
    tokenizer = build_tokenizer(num_rows)
    assert len(tokenizer) == num_rows
    texts = tokenizer.batch_decode([[row] for row in range(300, num_rows, 997)])
    assert all(texts)
    tags = [tag for style in TAG_STYLES.values() for tag in style.all_tags]
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in tags)


def test_questions_are_as_long_as_wanted_and_never_longer(tmp_path):
    tokenizer = build_tokenizer(4096)
    lengths = write_questions(tmp_path / "q.jsonl", tokenizer, 1024)
    prompts = PromptFormat.from_styles(tag_format="bespoke", prompt_style="stratos")
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(rows) == NUM_QUESTIONS == len({row["question"] for row in rows})
    for row, length in zip(rows, lengths, strict=True):
        text = prompts.teacher_prompt_text(tokenizer, row["question"], row["solution"])
        assert len(encode(tokenizer, text)) == length and 0.95 * 1024 <= length <= 1024
    with pytest.raises(ValueError, match="around a question"):
        write_questions(tmp_path / "q.jsonl", tokenizer, 64)


def test_the_checkpoint_has_the_planned_shape_and_is_made_once(tmp_path):
    folder = ensure_random_model("tiny", tmp_path)
    assert replace(load_shape(str(folder)), name="tiny") == shape_named("tiny")
    written = (folder / "config.json").stat().st_mtime_ns
    assert ensure_random_model("tiny", tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_known(name):
    assert shape_named(name).num_params > 0


# Memory


@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16"])
def test_bytes_of_a_loaded_model_are_those_of_the_plan(precision):
    settings = replace(point("0.5B", 1, 8, 8, precision), teacher=shape_named("tiny"))
    model = build_model(settings, "cpu")
    planned = weight_bytes(settings.teacher, precision, double_quant=settings.double_quant)
    assert module_bytes(model, adapters=False) == pytest.approx(planned, rel=0.01)
    assert module_bytes(model, adapters=True) == 4 * num_lora_params(settings.teacher, settings.lora_r)


def test_peaks_belong_to_the_innermost_phase(monkeypatch):
    used = iter([5, 9, 7, 30, 20, 1])  # bytes in use, one sample after the other
    watch = DriverWatch()
    monkeypatch.setattr(memory, "used_bytes", lambda: next(used))

    def samples(count):
        answers = iter([False] * count + [True])
        monkeypatch.setattr(watch._stop, "wait", lambda _: next(answers))
        watch._sample()

    with watch.phase("generate"):
        samples(2)
        with watch.phase("sync"):
            samples(1)
        samples(1)
    samples(2)
    assert watch.peak_bytes == {"generate": 30, "sync": 7, memory.OUTSIDE: 20}


def test_a_phase_has_the_larger_of_both_figures_of_the_driver():
    values_85gb = compose_run_config("teacher_rlt_mono_85gb")
    gigabyte = int(1e9)
    use = {Phase.LOAD: PhaseUse(9.0, 1, 1, 40 * gigabyte), Phase.TRAIN: PhaseUse(9.0, 1, 1, 30 * gigabyte)}
    meter = SimpleNamespace(checkpoint_use=lambda: use, device=torch.device("cuda"))
    watch = DriverWatch()
    watch.peak_bytes = {"load": 20 * gigabyte, "train": 35 * gigabyte}
    rows = memory.phase_rows(plan_run(load_run_config(values_85gb), int(85e9)), meter, watch)
    assert {phase: row["driver_gb"] for phase, row in rows.items()} == {"load": 40, "train": 35}


def test_a_paused_watch_asks_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "used_bytes", lambda: asked.append(1) or 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    watch = DriverWatch()
    with watch.watching():
        while not asked:
            time.sleep(0.001)
        with watch.paused():
            before = len(asked)
            time.sleep(0.1)
            assert len(asked) == before


class FakeCard:
    """A GPU of 100 GB of which 3 are in use outside of torch."""

    def __init__(self, monkeypatch):
        self.reserved, self.asleep, self.fraction = int(2e9), 0, 1.0
        for name, answer in {
            "mem_get_info": lambda *_: (int(100e9) - int(3e9) - self.reserved + self.asleep, int(100e9)),
            "memory_reserved": lambda *_: self.reserved,
            "synchronize": lambda *_: None,
            "set_per_process_memory_fraction": lambda fraction: setattr(self, "fraction", fraction),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(memory, "vllm_pool_bytes", lambda *_, **__: self.asleep)


def test_the_cap_counts_what_lies_outside_of_torch_and_follows_the_sleeping_engine(monkeypatch):
    card = FakeCard(monkeypatch)
    cap = MemoryCap(int(24e9), warm_up=lambda: None)
    assert card.fraction == pytest.approx((24 - 3) / 100)
    card.asleep = int(9e9)  # torch goes on counting it
    cap.apply()
    assert card.fraction == pytest.approx((24 - 3 + 9) / 100)
    assert cap.share(0.5) == pytest.approx(0.12)


def test_sleeping_bytes_are_those_that_the_allocator_marks(monkeypatch):
    cumem = pytest.importorskip("vllm.device_allocator.cumem")

    def data(size, tag, asleep):
        return SimpleNamespace(handle=(0, size, 0, 0), tag=tag, is_asleep=asleep)

    pointers = {1: data(10, "weights", True), 2: data(20, "kv_cache", True), 3: data(5, "weights", False)}
    monkeypatch.setattr(cumem, "cumem_available", True)
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", SimpleNamespace(pointer_to_data=pointers))
    assert memory.vllm_pool_bytes() == 35
    assert memory.vllm_pool_bytes("weights") == 15
    assert memory.vllm_pool_bytes(asleep=True) == 30


def test_components_on_a_card_add_up(monkeypatch):
    """Figures of a stand-in for the GPU: each component is what is left after the others."""
    gigabyte = int(1e9)
    card = FakeCard(monkeypatch)
    card.reserved, card.asleep = 40 * gigabyte, 27 * gigabyte
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 39 * gigabyte)
    pool = {"weights": 9 * gigabyte, "kv_cache": 18 * gigabyte}
    monkeypatch.setattr(training, "vllm_pool_bytes", lambda tag=None, asleep=None: pool[tag] if tag else card.asleep)
    monkeypatch.setattr(training, "module_bytes", lambda model, adapters: gigabyte if adapters else 5 * gigabyte)
    use = {phase: PhaseUse(1.0, 15 * gigabyte, 18 * gigabyte) for phase in Phase}
    host = SimpleNamespace(teacher="t", student="s", meter=SimpleNamespace(checkpoint_use=lambda: use))
    sizes = SimpleNamespace(gradient_bytes=gigabyte, optimizer_bytes=gigabyte // 2)
    found = training._measured(SimpleNamespace(host=host), sizes, context_bytes=3 * gigabyte)
    assert found["vLLM weights"] == 9 and found["KV cache"] == 18 and found["CUDA context"] == 3
    in_use_asleep = 3 + 40 - 27
    assert found["vLLM residue"] == pytest.approx(in_use_asleep - 3 - (5 + 1 + 0.5 + 5))
    at_rest = 39 - 27
    assert found["activations, train"] == pytest.approx(15 - at_rest - 1)
    assert found["activations, score"] == pytest.approx(15 - at_rest)
    assert found["allocator, train"] == pytest.approx(18 - 15)


def test_a_component_that_was_not_measured_has_no_figure():
    rows = component_table({"teacher": 8.0, "canary": 1.0}, {"teacher": 8.4, "other": 2.0})
    assert rows == [
        ["teacher", "8.000", "8.400", "+5.0 %"],
        ["canary", "1.000", "", ""],
        ["other", "", "2.000", ""],
    ]


# Arithmetic


def test_proposed_constants_are_those_that_made_the_points():
    def made(dynamic, overhead, outside):
        allocated = 3.0 + dynamic
        return {
            "static_gb": 3.0, "allocated_gb": allocated, "reserved_gb": allocated + overhead * dynamic,
            "predicted_gb": allocated - 0.1, "outside_torch_gb": outside,
        }  # fmt: skip

    exact = {p.constant: p for p in propose([made(1.0, 0.15, 0.4), made(5.0, 0.15, 0.6)])}
    assert exact["FRAGMENTATION_FRAC"].least_squares == pytest.approx(0.15)
    assert exact["FRAGMENTATION_FRAC"].covering == pytest.approx(0.15)
    assert exact["CUDA_CONTEXT_BYTES"].covering == pytest.approx(0.6e9)
    spread = {p.constant: p for p in propose([made(1.0, 0.3, 0.5), made(5.0, 0.1, 0.5)])}
    fragmentation = spread["FRAGMENTATION_FRAC"]
    assert 0.1 < fragmentation.least_squares < 0.12 < fragmentation.covering == pytest.approx(0.3)
    (workspace,) = [p for name, p in exact.items() if name.startswith("workspace")]
    assert workspace.covering == pytest.approx(0.1e9)


def test_the_grid_becomes_points_and_the_points_proposals(tmp_path, monkeypatch):
    def measured_step(settings):
        static, dynamic = predicted_static(settings), train_activation_bytes(settings)
        return Measured(int(static), int(static + dynamic), int(static + 1.25 * dynamic), int(0.7e9))

    monkeypatch.setattr(planner_grid, "measure_training_step", measured_step)
    monkeypatch.setattr(planner_grid, "require_cuda", lambda: None)
    for one in cells_of("c", "7B"):
        setup = Setup(cell=one.name, shape="7B", out=tmp_path, arguments=dict(one.arguments))
        figures = Figures(tmp_path / "figures")
        getattr(planner_grid, one.function.partition(":")[2])(setup, figures)
        values = json.loads((tmp_path / "figures").read_text())
        result = measured(part="c", cell=one.name, figures=values)
        (tmp_path / f"{one.file_name}.json").write_text(json.dumps(vars(result)))
    proposals = {proposal["constant"]: proposal for proposal in values["proposals"]}
    assert proposals["FRAGMENTATION_FRAC"]["num_points"] == len(GPU_GRID)
    assert proposals["FRAGMENTATION_FRAC"]["least_squares"] == pytest.approx(0.25)
    assert proposals["CUDA_CONTEXT_BYTES"]["covering"] == pytest.approx(0.7e9)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_gradients_are_looked_at(monkeypatch, masked):
    """On a CPU, whose fused kernel stands for a GPU's; a kernel that does not exist says so."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    time_ms, gradients = kernels._forward_and_backward(SDPBackend.FLASH_ATTENTION, masked, length=80, device="cpu")
    assert float(time_ms) > 0 and gradients == "finite"
    time_ms, reason = kernels._forward_and_backward(SDPBackend.CUDNN_ATTENTION, masked, length=80, device="cpu")
    assert time_ms == "" and reason


def step_work(**changes):
    values = {"generator_precision": "bf16", "rows": 64, "group": 16, "prompt_len": 6144, "completion_len": 6144}
    return floors.StepWork(shape=shape_named("7B"), **(values | changes))


RATES = floors.Rates(copy_bytes_per_s=4.3e12, matmul_flop_per_s=790e12)


@pytest.mark.parametrize(("lengths", "seconds"), [((1024, 2048), 28.7), ((2048, 4096), 66.5), ((6144, 6144), 153.2)])
def test_floors_are_those_of_an_independent_count(lengths, seconds):
    """7B, 64 completions in groups of 16, 4.3 TB/s, 790 TFLOP/s; those of a study that counted each layer."""
    work = step_work(prompt_len=lengths[0], completion_len=lengths[1])
    assert sum(floors.floor_seconds(work, RATES).values()) == pytest.approx(seconds, rel=0.01)


def test_floors_follow_the_rate_that_binds():
    plain = floors.floor_seconds(step_work(), RATES)
    wide = floors.floor_seconds(step_work(), replace(RATES, copy_bytes_per_s=2 * RATES.copy_bytes_per_s))
    assert wide["train"] == plain["train"] and 0.5 * plain["generate"] < wide["generate"] < 0.6 * plain["generate"]
    fast = floors.floor_seconds(step_work(), replace(RATES, matmul_flop_per_s=2 * RATES.matmul_flop_per_s))
    assert fast["train"] == pytest.approx(plain["train"] / 2) and fast["score"] == pytest.approx(plain["score"] / 2)
    assert floors.floor_seconds(step_work(generator_precision="int8"), RATES)["generate"] < plain["generate"]


# The pages


@pytest.fixture
def project(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/measurements.json").write_text("[]")
    for name in ("README.md", "docs/measurements.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    report.write_pages(tmp_path)
    return tmp_path


def measured(card="H200", seconds="1.0", **changes):
    table = {"title": "peaks", "columns": ["phase", "s"], "rows": [["train", seconds]]}
    peaks = {"generate": 47.4, "score": 27.2, "train": 38.3}
    values = {
        "part": "a", "cell": "whole_run", "shape": "7B", "status": "ok", "reason": "", "seconds": 9.0,
        "date": "2026-12-01", "command": "python -m benchmarks.gpu --part a",
        "machine": replace(HERE, card=card, card_gb=150.8, driver="580.65").to_dict(),
        "figures": {"tables": [table], "config": "teacher_rlt_mono_85gb", "peaks_gb": peaks, "steps": ["left out"]},
    }  # fmt: skip
    return Result(**(values | changes))


def test_figures_of_a_card_reach_both_pages_and_replace_their_like(project):
    before = (project / "docs/measurements.md").read_text()
    assert before.count("| not measured |") == len(PARTS)
    report.publish([measured(seconds="1.0"), measured(status="failed", cell="other")], project)
    report.publish([measured(seconds="2.5")], project)
    report.publish([measured(card="L4", seconds="7.5")], project)
    page = (project / "docs/measurements.md").read_text()
    assert "| train | 2.5 |" in page and "| train | 7.5 |" in page and "| train | 1.0 |" not in page
    for word in ("H200", "L4", "driver 580.65", "torch 2", "2026-12-01", "commit abc", "benchmarks.gpu --part a"):
        assert word in page
    assert "left out" not in (project / "docs/measurements.json").read_text()
    lines = (project / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| `teacher_rlt_mono_85gb` |")]
    assert row.endswith("| 47 / 27 / 38 (L4) |")


def test_results_of_another_machine_are_taken_in(project, tmp_path):
    results = [measured(), measured(shape="0.5B", cell="small"), measured(card=None, cell="cpu")]
    for result in results:
        (tmp_path / f"a-{result.cell}.json").write_text(json.dumps(vars(result)))
    assert report.results_in(tmp_path) == results[:1]


def test_a_run_without_all_phases_is_no_measured_peak():
    entry = {"date": "2026-12-01", "config": "x", "machine": {"card": "L4"}}
    assert measured_peaks([entry | {"peaks_gb": {"train": 3.0}}, entry]) == {}


def test_the_pages_show_the_present_figures():
    assert report.main(["--check"]) == 0, "run python -m benchmarks.gpu.report"


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="measured on a GPU"):
        report.with_section("no markers", [])


# End to end


@pytest.mark.slow
def test_whole_run_floors_and_embedded_run_work_end_to_end_without_a_card(tmp_path):
    pages = [ROOT / name for name in ("docs/measurements.json", "docs/measurements.md", "README.md")]
    before = [page.read_text() for page in pages]
    words = ["--shape", "tiny", "--out", str(tmp_path), *(w for part in "adg" for w in ("--part", part))]
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    logs = "".join(path.read_text()[-3000:] for path in Path(tmp_path).glob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:] + logs
    assert [page.read_text() for page in pages] == before
    whole_run = json.loads((tmp_path / "a-whole_run.json").read_text())["figures"]
    assert len(whole_run["steps"]) == 2
    calls = whole_run["calls"]
    if "int8" in whole_run["generator"]:  # vLLM is installed
        assert {"load", "export", "engine start", "adapter swap", "canary", "sleep", "wake", "scoring"} <= set(calls)
    forced_len = 32
    assert all(step["completions/mean_length"] == forced_len for step in whole_run["steps"])
    assert all(step["completions/min_length"] == forced_len for step in whole_run["steps"])
    components = whole_run["components"]
    for name in ("teacher", "student", "adapter", "gradients"):
        assert components["measured_gb"][name] == pytest.approx(components["planned_gb"][name], rel=0.01)
    assert "times the floor" in done.stdout
    assert json.loads((tmp_path / "g-embedded_run.json").read_text())["figures"]["num_steps"] == 2
