"""Properties of the memory plan, of what fits a GPU, and of the models' shapes. No torch."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import UserError
from core.types import Phase
from core.units import gb
from planner.components import (
    adapter_checkpoint_bytes,
    kv_bytes_per_token,
    num_lora_params,
    optimizer_bytes_per_param,
    weight_bytes,
)
from planner.fit import (
    divisors,
    largest_context,
    largest_micro_batch,
    levers,
    nearest_fit,
    override_word,
    resolve_auto,
    why_not,
    with_overrides,
)
from planner.host_memory import pinned_bytes, vllm_tensors
from planner.plan import MemoryPlan, plan, plan_run, usable_bytes
from planner.planned import plan_config, plan_on_own_card
from planner.readme_table import END, START, main
from planner.report import lever_lines, plan_table, summary_lines
from planner.settings import Precision
from planner.shapes import known_shapes, load_shape, shape_from_config
from planner.teacher import teacher_settings
from schemas.compose import compose_run_config, run_config_names
from schemas.run import load_run_config

CARD_85 = int(85e9)
NAME = "teacher_rlt_mono_85gb"


@pytest.fixture(scope="module")
def values() -> dict:
    return compose_run_config(NAME)


def planned(values: dict, card: int | None = CARD_85, **overrides: object) -> MemoryPlan:
    changed = with_overrides(values, {key.replace("__", "."): value for key, value in overrides.items()})
    return plan_run(load_run_config(changed), card)


# Shapes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-0.5B", 0.494),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616),
        ("Qwen/Qwen2.5-32B", 32.76),
        ("Qwen/Qwen3-8B", 8.19),
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("meta-llama/Llama-3.2-1B", 1.236),
    ],
)
def test_built_in_shapes_count_the_published_parameters(name: str, billions: float) -> None:
    assert load_shape(name).num_params == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config_json_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is no JSON"):
        load_shape(str(tmp_path))


def test_shape_of_a_folder_is_the_one_transformers_writes(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path))
    assert (shape.hidden, shape.intermediate, shape.num_layers, shape.head_dim, shape.kv_dim) == (64, 160, 2, 16, 32)
    assert shape.attention_bias and not shape.qk_norm


def test_unknown_models_and_experts_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="hf download"):
        load_shape("nobody/no-such-model")
    with pytest.raises(UserError, match="experts"):
        shape_from_config("x", {"model_type": "qwen3_moe", "num_experts": 128})
    with pytest.raises(UserError, match=r"no config\.json"):
        load_shape(str(tmp_path))


# Components


def test_an_8_bit_7b_is_8_7_gb_and_not_7() -> None:
    shape = load_shape("Qwen/Qwen2.5-7B-Instruct")
    assert gb(weight_bytes(shape, "int8")) == pytest.approx(8.71, abs=0.02)
    assert gb(weight_bytes(shape, "bf16")) == pytest.approx(15.23, abs=0.02)
    assert gb(weight_bytes(shape, "nf4")) == pytest.approx(5.55, abs=0.02)


def test_lora_and_kv_sizes_are_the_known_ones() -> None:
    shape = load_shape("Qwen/Qwen2.5-7B-Instruct")
    assert num_lora_params(shape, 32) == 80_740_352
    assert kv_bytes_per_token(shape) == 57_344
    assert optimizer_bytes_per_param("paged_adamw_8bit") == pytest.approx(2.03, abs=0.01)
    assert optimizer_bytes_per_param("adamw_torch_fused") == 8
    assert optimizer_bytes_per_param("lion_8bit") == pytest.approx(1.016, abs=0.001)


# Plan


def test_85gb_run_stays_below_the_promised_figures(values: dict) -> None:
    memory_plan = planned(values)
    assert gb(memory_plan.max_bytes) <= 55 and memory_plan.fits()
    assert memory_plan.kv_cache_bytes == memory_plan.kv_needed_bytes


def test_batch_and_generations_do_not_move_the_training_peak(values: dict) -> None:
    before, after = planned(values), planned(values, train_batch_size=32, num_generations=8)
    assert before.peak_bytes(Phase.TRAIN) == after.peak_bytes(Phase.TRAIN)
    assert before.kv_needed_bytes > after.kv_needed_bytes


def test_kv_cache_is_what_the_batch_needs_within_utilization_and_card(values: dict) -> None:
    roomy, capped = planned(values), planned(values, vllm_gpu_memory_utilization=0.2)
    assert roomy.kv_cache_bytes == roomy.kv_needed_bytes
    own = sum(
        size
        for name, size in capped.components[Phase.GENERATE].items()
        if name.startswith("vLLM") and "residue" not in name
    )
    assert own + capped.kv_cache_bytes == pytest.approx(0.2 * CARD_85, rel=1e-6)
    assert planned(values, card=None).kv_cache_bytes == roomy.kv_needed_bytes
    assert planned(values, kv_cache_gb=3.5).kv_cache_bytes == 3_500_000_000
    tight = planned(values, card=int(30e9))
    assert tight.kv_cache_bytes < tight.kv_needed_bytes and tight.max_bytes <= usable_bytes(int(30e9))


def test_a_kv_cache_below_one_row_does_not_fit(values: dict) -> None:
    memory_plan = planned(values, kv_cache_gb=0.1)
    assert not memory_plan.fits()
    assert "kv_cache_gb" in why_not(memory_plan)


def test_a_separate_reference_costs_one_more_base_in_every_phase(values: dict) -> None:
    shared, separate = (
        planned(values, sync_ref_model=False),
        planned(values, sync_ref_model=False, reference_model="separate"),
    )
    base = weight_bytes(load_shape(values["model_name_or_path"]), "int8")
    for phase in Phase:
        assert separate.peak_bytes(phase) - shared.peak_bytes(phase) == pytest.approx(base, abs=2)


def test_a_synchronised_reference_costs_one_more_adapter(values: dict) -> None:
    with_adapter, without = planned(values, sync_ref_model=True), planned(values, sync_ref_model=False)
    extra = with_adapter.components[Phase.TRAIN]["adapter"] - without.components[Phase.TRAIN]["adapter"]
    assert extra == num_lora_params(load_shape(values["model_name_or_path"]), 32) * 4


def test_vllm_sleeps_while_the_trainer_scores_and_trains(values: dict) -> None:
    memory_plan = planned(values, generator_base="export")
    for phase in (Phase.SCORE, Phase.TRAIN):
        assert not {"vLLM weights", "KV cache"} & set(memory_plan.components[phase])
    assert set(memory_plan.host_components) == {"sleeping vLLM weights"}
    transformers = planned(values, generator="transformers")
    assert "vLLM weights" not in transformers.components[Phase.GENERATE] and transformers.host_bytes == 0


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 4096, 4097, 20 << 20, 130 << 20, (1 << 30) + 1])
def test_pinned_memory_comes_in_the_next_power_of_two(num_bytes: int) -> None:
    block = pinned_bytes(num_bytes)
    assert block.bit_count() == 1 and block / 2 < num_bytes <= block


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int8_groups", "fp8"])
def test_the_tensors_of_the_generator_are_its_weights_and_their_pinned_copies_up_to_twice_that(
    values: dict, model: str, precision: Precision
) -> None:
    settings = planned(values, generator_base="export").settings
    settings = replace(settings, teacher=load_shape(model), generator_precision=precision)
    awake = plan(settings).components[Phase.GENERATE]
    weights = awake["vLLM weights"] + awake["vLLM adapter"]
    assert sum(count * size for count, size in vllm_tensors(settings)) == pytest.approx(weights, rel=1e-6)
    assert weights <= plan(settings).host_bytes <= 2.1 * weights


def test_the_generator_of_a_7b_takes_twice_its_weights_of_host_memory(values: dict) -> None:
    """Gate and up of a layer: 136 MB in a block of 268. Embedding and head: 1.09 GB each in one of 2.15."""
    memory_plan = planned(values, generator_base="export")
    layer = (256 << 20) + (128 << 20) + 2 * (16 << 20)
    expected = 28 * layer + 2 * (2 << 30)
    assert memory_plan.host_bytes == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_generator_on_the_trainers_base_has_little_of_its_own(values: dict, precision: str) -> None:
    """A 7B: norms, biases, rope and one adapter slot, on the GPU and in host memory; nothing is written."""
    changes = {"model_args__load_in_8bit": precision == "int8", "model_args__load_in_4bit": precision == "nf4"}
    shared, export = (planned(values, **changes, generator_base=base) for base in ("auto", "export"))
    shape = load_shape(values["model_name_or_path"])
    slot = 2 * num_lora_params(shape, 32)
    own = [shared.components[Phase.GENERATE][name] for name in ("vLLM weights", "vLLM adapter")]
    assert own == [2 * (shape.num_small_params + 32768 * 128), slot] and gb(own[0]) < 0.02
    assert sum(count * size for count, size in vllm_tensors(shared.settings)) == pytest.approx(sum(own))
    assert sum(own) <= shared.host_bytes <= 2.1 * sum(own) and export.host_bytes > 60 * own[0]
    for phase in (Phase.SCORE, Phase.TRAIN):  # they stay, where only the cache is given back
        assert shared.peak_bytes(phase) - export.peak_bytes(phase) == pytest.approx(sum(own), abs=2)
    saved = export.peak_bytes(Phase.GENERATE) - shared.peak_bytes(Phase.GENERATE)
    base = weight_bytes(shape, "int8" if precision == "int8" else "int8_groups")
    assert saved == pytest.approx(base, rel=0.03)
    checkpoint = adapter_checkpoint_bytes(shared.settings, shared.settings.num_adapters)
    assert shared.settings.written_bytes(2) == 2 * checkpoint
    assert export.settings.written_bytes(2) == 2 * checkpoint + base
    tight = [planned(values, card=int(34e9), student_model=None, generator_base=base) for base in ("auto", "export")]
    assert tight[0].kv_cache_bytes > tight[1].kv_cache_bytes


def test_offloaded_layer_inputs_are_counted_in_host_memory(values: dict) -> None:
    before, after = planned(values), planned(values, offload_checkpoints=True)
    s = after.settings
    moved = 2 * s.teacher.hidden * s.teacher.num_layers * s.micro_batch * s.row_len
    assert moved <= after.host_bytes - before.host_bytes <= 5 * moved
    assert set(after.host_components) == {"sleeping vLLM weights", "offloaded layer inputs"}
    assert any("offloaded layer inputs" in line for line in summary_lines(after))
    unchecked = planned(values, offload_checkpoints=True, gradient_checkpointing=False, student_parking="none")
    assert unchecked.host_bytes == before.host_bytes


def test_fp8_scoring_counts_the_models_that_it_converts_and_no_other(values: dict) -> None:
    """The reference on the teacher's own base stays in the teacher's precision."""
    bf16 = {"model_args__load_in_8bit": False, "reference_model": "separate", "sync_ref_model": False}
    plain, fp8 = planned(values, **bf16), planned(values, **bf16, scoring_weights="fp8")
    for role in ("student", "reference"):
        sizes = [p.components[Phase.SCORE][role] for p in (plain, fp8)]
        assert sizes == pytest.approx([15.23e9, 8.71e9], rel=0.01)
    assert plain.components[Phase.SCORE]["teacher"] == fp8.components[Phase.SCORE]["teacher"]
    assert plain.host_bytes == fp8.host_bytes


def test_nf4_bases_generate_from_their_int8_export(values: dict) -> None:
    changes = {"model_args__load_in_8bit": False, "model_args__load_in_4bit": True}
    memory_plan = planned(values, **changes, generator_base="export")
    assert memory_plan.settings.generator_precision == "int8_groups"
    assert memory_plan.components[Phase.GENERATE]["vLLM weights"] > memory_plan.components[Phase.GENERATE]["teacher"]


def test_allocator_setting_of_the_environment_counts(values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(values)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert planned(values).peak_bytes(Phase.TRAIN) < before.peak_bytes(Phase.TRAIN)


def test_plan_as_json_has_every_phase_and_says_predicted(values: dict) -> None:
    result = json.loads(json.dumps(planned(values).to_dict()))
    assert result["label"] == "predicted" and result["fits"] is True
    assert set(result["phases_gb"]) == set(result["peaks_gb"]) == {phase.value for phase in Phase}
    assert result["peaks_gb"]["train"] == pytest.approx(sum(result["phases_gb"]["train"].values()), abs=0.01)


def test_report_marks_the_binding_phase(values: dict) -> None:
    from rich.console import Console

    memory_plan = planned(values)
    console = Console(width=160, file=io.StringIO())
    console.print(plan_table(memory_plan, title="x"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{memory_plan.binding_phase} *" in text and f"{gb(memory_plan.max_bytes):.1f}" in text
    assert any("KV cache" in line for line in summary_lines(memory_plan))


# Fit


def test_auto_micro_batch_is_the_largest_divisor_that_fits(values: dict) -> None:
    resolved = resolve_auto({**values, "per_device_train_batch_size": "auto"}, CARD_85)
    rows = resolved["per_device_train_batch_size"]
    batch = values["train_batch_size"]
    assert batch % rows == 0 and plan_run(load_run_config(resolved), CARD_85).fits()
    larger = next(d for d in divisors(batch) if d > rows)
    assert not planned(values, per_device_train_batch_size=larger).fits()
    assert resolve_auto(values, CARD_85) == values
    assert resolve_auto({**values, "per_device_train_batch_size": "auto"}, None)["per_device_train_batch_size"] == 1
    chosen = resolve_auto({**values, "per_device_train_batch_size": "auto", "gpu_gb": 40.0}, CARD_85)
    assert chosen["per_device_train_batch_size"] < rows


def test_largest_context_fits_and_the_next_does_not(values: dict) -> None:
    settings = planned(values, per_device_train_batch_size=4).settings
    context = largest_context(settings, CARD_85)
    assert context is not None and context < settings.teacher.max_positions

    def at(row_len: int) -> MemoryPlan:
        return plan(replace(settings, max_prompt_len=row_len // 2, max_completion_len=row_len // 2), CARD_85)

    assert at(context).fits() and not at(context + 256).fits()
    assert largest_micro_batch(settings, int(10e9)) is None


@pytest.mark.parametrize("card_gb", [8, 12, 16, 24, 40])
def test_the_nearest_configuration_is_a_command_line_that_fits(values: dict, card_gb: int) -> None:
    card = int(card_gb * 1e9)
    overrides = nearest_fit(values, card)
    composed = compose_run_config(NAME, [override_word(key, value) for key, value in overrides.items()])
    assert plan_run(load_run_config(composed), card).fits()


def test_a_run_that_fits_needs_no_change(values: dict) -> None:
    assert nearest_fit(values, CARD_85) == {}


def test_what_fits_no_card_says_so(values: dict) -> None:
    with pytest.raises(UserError, match="larger GPU"):
        nearest_fit(values, int(1.5e9))


def test_levers_save_what_they_say(values: dict) -> None:
    found = levers(values)
    assert any(lever.change.startswith("micro-batch 2 -> 1") for lever in found)
    before = planned(values, card=None)
    for lever in found:
        after = plan_run(load_run_config(with_overrides(values, lever.overrides)), None)
        assert before.peak_bytes(lever.phase) - after.peak_bytes(lever.phase) == lever.saved_bytes > 0
    assert lever_lines(found)[0].startswith(found[0].change)


def test_a_student_larger_than_its_teacher_is_scored_within_the_same_token_budget() -> None:
    """A 32B student of a 1.5B teacher: its forward sets SCORE, over the tokens that the run hands to the scorer."""
    words = ["model_name_or_path=Qwen/Qwen2.5-1.5B-Instruct", "student_model=Qwen/Qwen2.5-32B-Instruct"]
    made = plan_run(load_run_config(compose_run_config("teacher_rlt_mono_85gb_aggressive", words)), None)
    settings = made.settings
    assert settings.score_batch_tokens == 16_384 < settings.micro_batch_tokens == 65_536
    by_hand = (8 * 5120 + 6 * 27648) * 16_384  # docs/memory.md: (8h + 6i) T of a 16-bit product
    assert made.components[Phase.SCORE]["activations"] == by_hand
    alone = plan_run(load_run_config(compose_run_config("teacher_rlt_mono_85gb_aggressive", words[:1])), None)
    assert alone.components[Phase.SCORE]["activations"] < by_hand


@pytest.mark.parametrize("method", ["teacher_rlt_mono_85gb", "llada_sft"])
def test_expandable_segments_are_known_to_every_plan(method: str) -> None:
    plain, expandable = (
        plan_run(load_run_config(compose_run_config(method, [f"expandable_segments={on}"])), None)
        for on in ("false", "true")
    )
    assert expandable.components[Phase.TRAIN]["allocator"] < plain.components[Phase.TRAIN]["allocator"]
    assert expandable.components[Phase.TRAIN]["activations"] == plain.components[Phase.TRAIN]["activations"]


def test_why_not_names_the_binding_phase(values: dict) -> None:
    assert "train phase" in why_not(planned(values, card=int(24e9)))


# Run configurations and README


def test_without_a_gpu_a_run_is_planned_for_the_card_of_its_configuration_whatever_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("planner.planned.find_gpu", lambda: None)
    name = "teacher_rlt_mono_24gb"
    assert plan_config(name, None).plan.gpu_bytes == int(24e9)
    assert plan_config(name, None, ["card_gb=48.5"]).plan.gpu_bytes == int(48.5e9)
    assert plan_config(name, None, ["card_gb=48.5", "gpu_gb=80"]).plan.gpu_bytes == int(80e9)


SMALL_CARDS = [f"teacher_rlt_mono_{card}" for card in ("8gb", "12gb", "16gb", "24gb", "24gb_int8", "48gb", "48gb_int8")]
LARGE_MODELS = ["teacher_rlt_mono_85gb_32b", "teacher_rlt_mono_85gb_72b"]


@pytest.mark.parametrize("name", SMALL_CARDS + LARGE_MODELS)
def test_files_made_for_a_card_say_model_context_and_every_predicted_peak(name: str) -> None:
    memory_plan = plan_on_own_card(name).plan
    settings = memory_plan.settings
    assert memory_plan.fits()
    title, peaks = Path(f"cfgs/run_cfg/{name}.yaml").read_text().splitlines()[2:4]
    assert title.startswith(f"# {settings.teacher.name.split('/')[1]}, ")
    assert f"context {settings.max_prompt_len} + {settings.max_completion_len}" in title
    assert f"predicted peak {gb(memory_plan.max_bytes):.1f} GB ({memory_plan.binding_phase} phase)" in title
    for phase in Phase:
        assert f"{phase} {gb(memory_plan.peak_bytes(phase)):.1f}" in peaks
    assert f"KV cache {gb(memory_plan.kv_cache_bytes):.1f}, host RAM {gb(memory_plan.host_bytes):.1f}." in peaks


@pytest.mark.parametrize("name", SMALL_CARDS + LARGE_MODELS)
def test_their_context_is_the_largest_that_fits_beside_four_completions(name: str) -> None:
    """In steps of 512 tokens, up to what the model was trained for."""
    memory_plan = plan_on_own_card(name).plan
    settings, card = memory_plan.settings, memory_plan.gpu_bytes

    def holds_four(row_len: int) -> bool:
        longer = replace(settings, max_prompt_len=row_len // 2, max_completion_len=row_len // 2)
        made = plan(longer, card)
        return made.fits() and made.kv_cache_bytes >= kv_bytes_per_token(settings.teacher) * 5 * (row_len // 2)

    assert settings.max_prompt_len == settings.max_completion_len
    assert holds_four(settings.row_len)
    assert settings.row_len == settings.teacher.max_positions or not holds_four(settings.row_len + 512)


@pytest.mark.parametrize("card_gb", [8, 12, 16, 24, 48])
def test_small_cards_run_the_largest_qwen_that_any_setting_fits(card_gb: int) -> None:
    """The next size does not fit at 4096 + 4096 tokens, even in 4 bits, with every lever and without CUDA graphs."""
    sizes = ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]
    values = compose_run_config(f"teacher_rlt_mono_{card_gb}gb")
    chosen = values["model_name_or_path"].removeprefix("Qwen/Qwen2.5-").removesuffix("-Instruct")
    following = sizes[sizes.index(chosen) + 1]
    smallest = {
        "model_name_or_path": f"Qwen/Qwen2.5-{following}-Instruct",
        "student_model": None,
        "model_args.load_in_8bit": False,
        "model_args.load_in_4bit": True,
        "per_device_train_batch_size": 1,
        "max_prompt_length": 4096,
        "max_completion_length": 4096,
        "vllm_enforce_eager": True,
        "expandable_segments": True,
        "offload_checkpoints": True,
        "mlp_tile_tokens": 2048,
    }
    made = plan_run(load_run_config(with_overrides(values, smallest)), int(card_gb * 1e9))
    one_in_four = kv_bytes_per_token(made.settings.teacher) * 5 * 4096
    assert not made.fits() or made.kv_cache_bytes < one_in_four


def test_every_run_config_has_a_row_and_the_check_sees_an_old_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"intro\n{START}\nbefore\n{END}\nend\n")
    assert main(["--check"], readme) == 1
    assert main([], readme) == 0 and main(["--check"], readme) == 0
    text = readme.read_text()
    assert text.startswith("intro\n") and text.endswith(f"{END}\nend\n") and "before" not in text
    assert all(f"`{name}`" in text for name in run_config_names())
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="no <!-- table"):
        main([], readme)


def test_the_planner_answers_without_torch() -> None:
    program = (
        "import sys; from planner.plan import plan_run; from planner.fit import nearest_fit; "
        "from schemas.compose import compose_run_config; from schemas.run import load_run_config; "
        f"plan_run(load_run_config(compose_run_config({NAME!r})), {CARD_85}); "
        "print(sorted({'torch', 'trl', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_constants_agree_with_the_code_that_they_describe() -> None:
    from generation import start
    from models.int8_linear import _CUDA_CHUNK_BYTES
    from planner import constants
    from rollout.logprobs import DEFAULT_LOGIT_CHUNK_LEN, DEFAULT_MAX_BATCH_TOKENS

    assert constants.SCORE_BATCH_TOKENS.value == DEFAULT_MAX_BATCH_TOKENS
    assert constants.HEAD_CHUNK_TOKENS.value == DEFAULT_LOGIT_CHUNK_LEN
    assert constants.INT8_CHUNK_BYTES.value == _CUDA_CHUNK_BYTES
    assert constants.CANARY_TOKENS.value == start.NUM_CANARY_ROWS * start.CANARY_ROW_LEN


def test_every_built_in_shape_can_be_planned(values: dict) -> None:
    settings = teacher_settings(load_run_config(values))
    for shape in known_shapes().values():
        memory_plan = plan(replace(settings, teacher=shape, student=None))
        assert all(memory_plan.peak_bytes(phase) > 0 for phase in Phase)


def test_readme_has_the_present_table() -> None:
    assert main(["--check"]) == 0, "run python -m planner.readme_table"


def test_the_embedded_model_has_the_built_in_shape() -> None:
    from data.embedded.model import model_config
    from data.embedded.tokenizer import build_tokenizer

    config = model_config(build_tokenizer()).to_dict()
    assert replace(shape_from_config("tiny", config), name="tiny") == load_shape("tiny")
