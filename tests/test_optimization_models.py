"""Optimizations of loaded models against the plain ones: same results, less memory or other weights, undone again."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.models.activation_offloading import OffloadActivations

from core.errors import UserError
from generation import make_generator
from models.load import load_base, load_frozen
from optimization import ChosenSettings, Obstacle, check_fp8_support, compile_forward, quantise_to_fp8, tile_mlps
from optimization.apply import announce_models
from optimization.fp8_optim import Fp8Linear, _quantise_rows, choose_fp8
from optimization.memory_optim import CheckpointOffload
from planner.activations import train_activation_bytes
from rollout.logprobs import score_spans
from rollout.types import ScoringRow
from schemas.compose import compose_run_config
from schemas.generation import GenerationConfig
from schemas.model import ModelArgs, ModelConfig
from schemas.run import load_run_config
from tests.helpers import memory_simulator
from tests.helpers.step_models import build_model
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_optimization_process import A100, H100
from tests.test_planner_formula import point, predicted_static

ROWS = [ScoringRow(token_ids=list(range(2, 40)), spans=((1, 38),))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(shape)


def with_adapter(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).double()


def loss_and_gradients(model):
    model.zero_grad()
    token_ids = torch.arange(2, 2 + 3 * 13).view(3, 13)
    loss = model(input_ids=token_ids, labels=token_ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 7, 39, 1000])
def test_a_tiled_mlp_gives_the_plain_ones_output_and_gradients(tile_tokens, checkpointing, model):
    plain = with_adapter(model)
    tiled = copy.deepcopy(plain)
    record = tile_mlps(tiled, tile_tokens)
    if checkpointing:
        tiled.gradient_checkpointing_enable({"use_reentrant": False})
        tiled.enable_input_require_grads()
        tiled.train()
    expected, ours = loss_and_gradients(plain), loss_and_gradients(tiled)
    assert torch.allclose(expected[0], ours[0], rtol=1e-12)
    assert expected[1].keys() == ours[1].keys()
    assert all(torch.allclose(expected[1][name], ours[1][name], rtol=1e-9, atol=1e-12) for name in expected[1])
    assert "2 MLPs" in record.changes[0].what


def test_tiles_hold_no_more_than_their_tokens_and_undo_restores_the_mlp(model):
    seen = []
    mlp = model.model.layers[0].mlp
    mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    record = tile_mlps(model, 5)
    with torch.no_grad():
        model(input_ids=torch.arange(12)[None])
    assert seen == [5, 5, 2]
    record.undo()
    seen.clear()
    model(input_ids=torch.arange(12)[None])
    assert seen == [12] and "forward" not in vars(mlp)


def test_a_model_without_gated_mlps_is_left_alone():
    assert "no gated MLP" in tile_mlps(nn.Linear(2, 2), 4).skipped


@pytest.mark.parametrize(
    "settings",
    [
        point("0.5B", 4, 1024, 1024, "int8", mlp_tile_tokens=1024),
        point("7B", 1, 6144, 6144, "int8", mlp_tile_tokens=2048),
        point("1.5B", 1, 2048, 2048, "nf4", mlp_tile_tokens=1024),
        point("7B", 1, 6144, 6144, "int8", int8_matmul="llm_int8", mlp_tile_tokens=2048),
        point("7B", 1, 6144, 6144, "int8", mlp_tile_tokens=2048, checkpointing="layers_offloaded"),
    ],
    ids=lambda s: f"{s.teacher.name}-{s.precision}-{s.int8_matmul}-{s.checkpointing}",
)
def test_tiles_lower_the_simulated_peak_as_the_planner_says(settings):
    settings = memory_simulator.layer_count(settings, 3)

    def tiled_model(settings, device="meta"):
        built = build_model(settings, device)
        if settings.mlp_tile_tokens is not None:
            tile_mlps(built, settings.mlp_tile_tokens)
        return built

    with mock.patch.object(memory_simulator, "build_model", tiled_model):
        tiled = memory_simulator.simulate_training_step(settings)
        plain = memory_simulator.simulate_training_step(replace(settings, mlp_tile_tokens=None))
    assert tiled.peak_bytes - tiled.static_bytes < 0.75 * (plain.peak_bytes - plain.static_bytes)
    assert tiled.peak_bytes == pytest.approx(predicted_static(settings) + train_activation_bytes(settings), rel=0.03)


def test_every_micro_batch_runs_inside_the_offload(tmp_path):
    trainer = make_trainer(
        write_random_model(tmp_path / "model"), tmp_path / "run", "max_steps=1", "num_eval_prompts=0"
    )
    entered = []

    @contextmanager
    def offload():
        entered.append("in")
        yield
        entered.append("out")

    trainer.offload = offload
    trainer.train()
    assert entered == ["in", "out"] * trainer.args.gradient_accumulation_steps


def test_offloading_leaves_the_allocators_cache_alone_and_keeps_one_layer_on_the_card(monkeypatch):
    """TRL's own context empties the cache each time it is entered, where bitsandbytes is loaded."""
    cleanings = []

    class Stream:
        def synchronize(self):
            pass

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleanings.append("emptied"))
    linear, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    offload = CheckpointOffload(linear)
    for _ in range(3):
        with offload():
            linear(x).square().sum().backward()
    assert not cleanings
    assert offload._offload.max_fwd_stash_size == 1
    with OffloadActivations():
        pass
    assert cleanings == ["emptied"]


@pytest.mark.gpu
def test_offloaded_checkpoints_give_the_same_gradients_on_less_memory():
    settings = point("0.5B", 2, 2048, 2048, "bf16")
    teacher = build_model(settings, "cuda")
    offload = CheckpointOffload(teacher)
    token_ids = torch.randint(1000, (2, 4096), device="cuda")

    def step(context):
        teacher.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with context(), torch.autocast("cuda", torch.bfloat16):
            teacher.get_base_model().model(input_ids=token_ids, use_cache=False).last_hidden_state.sum().backward()
        gradients = [p.grad.clone() for p in teacher.parameters() if p.grad is not None]
        return torch.cuda.max_memory_allocated(), gradients

    @contextmanager
    def nothing():
        yield

    step(nothing)
    (plain_bytes, plain), (offloaded_bytes, offloaded) = step(nothing), step(offload)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(plain, offloaded, strict=True))
    kept = settings.teacher.num_layers * 2 * settings.teacher.hidden * token_ids.numel()
    assert plain_bytes - offloaded_bytes > 0.5 * kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_fp8_is_that_of_a_float32_division(dtype):
    """Without a float32 copy of the matrix, which would be 4 bytes per value more on the GPU."""
    matrix = (torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    values, scale = _quantise_rows(matrix)
    assert torch.equal(values.float(), (matrix.float() / scale).to(torch.float8_e4m3fn).float())
    assert scale.dtype == torch.float32


@pytest.mark.gpu
def test_rounding_to_fp8_takes_the_planned_workspace():
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    _quantise_rows(matrix)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _quantise_rows(matrix)
    assert torch.cuda.max_memory_allocated() - before < 5.1 * matrix.numel()


def test_an_fp8_linear_is_within_its_rounding_of_the_plain_one():
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    x = torch.randn(4, 9, 256) * torch.logspace(-2, 2, 9)[:, None]
    with torch.no_grad():
        expected, ours = linear(x), Fp8Linear(linear)(x)
    error = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-3 < error.max() < 2**-4  # e4m3 has 3 bits of mantissa


def test_fp8_weights_replace_the_blocks_linears_and_undo_brings_them_back(model):
    expected = score_spans(model, ROWS)[0][0]
    record = quantise_to_fp8(model)
    replaced = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(replaced) == 2 * 7 and {m.weight.dtype for m in replaced} == {torch.float8_e4m3fn}
    assert type(model.lm_head) is nn.Linear
    ours = score_spans(model, ROWS)[0][0]
    assert 0 < (ours - expected).abs().mean() < 0.3
    record.undo()
    assert torch.equal(score_spans(model, ROWS)[0][0], expected)


def test_a_student_of_its_own_is_scored_in_fp8_on_request(tmp_path):
    folder = write_random_model(tmp_path / "model")
    config = ModelConfig(model_name_or_path=str(folder), scoring_weights="fp8", model_args=ModelArgs(load_in_8bit=True))
    student = load_frozen(str(folder), config, torch.device("cpu"))
    assert sum(isinstance(module, Fp8Linear) for module in student.modules()) == 2 * 7
    trainer = make_trainer(folder, tmp_path / "run", "max_steps=1", "num_eval_prompts=0", "scoring_weights=fp8")
    trainer.train()
    assert any(isinstance(module, Fp8Linear) for module in trainer.host.student.modules())
    assert not any(isinstance(module, Fp8Linear) for module in trainer.host.teacher.modules())


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["model_args.load_in_8bit=true"], {"kv_cache_dtype": "fp8", "scoring_weights": "fp8"}),
        (
            ["model_args.load_in_8bit=false", "student_model=null"],
            {"kv_cache_dtype": "fp8", "generator_weights": "fp8"},
        ),
        (["model_args.load_in_8bit=true", "student_model=null"], {"kv_cache_dtype": "fp8"}),
    ],
)
def test_fp8_changes_what_the_card_and_the_precision_allow(words, settings):
    config = load_run_config(compose_run_config("teacher_rlt_mono_85gb", words))
    assert choose_fp8(config, card=H100).settings == settings
    assert isinstance(choose_fp8(config, card=A100), Obstacle)


def test_an_fp8_cache_is_refused_on_a_cpu(model, tmp_path, monkeypatch):
    monkeypatch.setattr("generation.choose._vllm_obstacle", lambda device: None)
    with pytest.raises(UserError, match="kv_cache_dtype=fp8: the teacher is on a CPU"):
        make_generator(
            GenerationConfig(generator="vllm", kv_cache_dtype="fp8"),
            model=get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")),
            tokenizer=None,
            base_checkpoint="unused",
            sampling=None,
            num_generations=2,
            max_model_len=8,
            export_folder=tmp_path,
            planned_kv_cache_bytes=1,
            gpu_memory_utilization=0.3,
        )


@pytest.mark.gpu
def test_fp8_scoring_is_close_on_a_card_that_has_it():
    if check_fp8_support().skipped:
        pytest.skip(check_fp8_support().skipped)
    linear = nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected, ours = linear(x), Fp8Linear(linear)(x)
    assert ((ours - expected).norm() / expected.norm()).item() < 2**-4


def test_a_compiled_forward_is_used_gives_the_same_and_is_undone(model):
    model.eval().requires_grad_(False)
    expected = score_spans(model, ROWS)[0][0]
    counter = CompileCounter()
    record = compile_forward(model, backend=counter)
    assert torch.allclose(score_spans(model, ROWS)[0][0], expected, atol=1e-5)
    assert counter.frame_count > 0 and record.applied
    record.undo()
    frames = counter.frame_count
    other = [ScoringRow(token_ids=list(range(2, 9)), spans=((1, 7),))]
    score_spans(model, other)
    assert counter.frame_count == frames


@pytest.mark.parametrize(("with_model", "reason"), [(True, "on a CPU"), (False, "teacher's own base")])
def test_what_is_not_compiled_says_why(with_model, reason, model):
    assert reason in compile_forward(model if with_model else None).skipped


@pytest.mark.parametrize(
    ("words", "num_breaks"),
    [
        ({"load_in_8bit": False}, 0),
        ({"load_in_8bit": False, "load_in_4bit": True}, 0),
        ({"load_in_8bit": True}, 0),
        ({"load_in_8bit": True, "int8_matmul": "llm_int8", "llm_int8_threshold": 0.0}, 0),
        ({"load_in_8bit": True, "int8_matmul": "llm_int8"}, 2 * 7),
    ],
)
def test_what_is_compiled_is_one_graph_and_what_is_not_would_break_at_each_linear(words, num_breaks, tmp_path):
    folder = write_random_model(tmp_path / "model")
    model = load_base(str(folder), ModelArgs(**words), torch.device("cpu")).eval()
    token_ids = torch.arange(8)[None]
    with torch.no_grad():
        model.get_decoder()(token_ids, use_cache=False)
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model.get_decoder())(token_ids, use_cache=False)
    assert explained.graph_break_count >= num_breaks and (explained.graph_break_count == 0) == (num_breaks == 0)
    record = compile_forward(model, backend="eager")
    assert (record.skipped is None) == (num_breaks == 0)
    assert num_breaks == 0 or "every LLM.int8 linear ends the graph" in record.skipped
    record.undo()


@pytest.mark.parametrize(
    ("words", "compiled"),
    [
        ([], True),
        (["model_args.int8_matmul=llm_int8"], False),
        (["model_args.int8_matmul=llm_int8", "scoring_weights=fp8"], True),
        (["model_args.load_in_8bit=false"], True),
    ],
)
def test_the_obstacle_is_said_before_anything_is_loaded(words, compiled, monkeypatch):
    monkeypatch.setattr("optimization.apply.find_card", lambda: H100)
    words = ["compile_models=true", "model_args.load_in_8bit=true", *words]
    (record,) = announce_models(load_run_config(compose_run_config("teacher_rlt_mono_85gb", words)))
    assert record.name == "torch.compile" and (record.skipped is None) == compiled


def test_what_is_announced_before_loading_is_chosen_not_changed(monkeypatch):
    monkeypatch.setattr("optimization.apply.find_card", lambda: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = load_run_config(compose_run_config("teacher_rlt_mono_85gb", ["optimization_cfg=all"]))
    records = announce_models(config)
    assert not any(record.applied for record in records)
    chosen = [record.settings for record in records if isinstance(record, ChosenSettings)]
    merged = {key: value for settings in chosen for key, value in settings.items()}
    assert {"mlp_tile_tokens", "offload_checkpoints", "recover_from_nan"} < set(merged)
    assert all(getattr(config, key) == value for key, value in merged.items())


def test_a_non_finite_activation_stays_visible_through_fp8():
    linear = Fp8Linear(nn.Linear(16, 16))
    x = torch.zeros(1, 16)
    x[0, 3] = math.nan
    assert linear(x).isnan().any()
