"""Calls that users copy from documents, as they are written there, and every example of our own."""

import copy
import inspect
import logging
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import optimization
from core.errors import UserError
from core.log import log
from optimization import (
    Efficient,
    Helpers,
    compile_forward,
    enable_torch_compile,
    get_optimal_batch_size_for_gpu,
    get_optimizer,
    get_vram,
    recommend_config,
)
from optimization.small.estimates import estimate_memory
from optimization.small.mixed_precision import MixedPrecision
from optimization.small.models import Size
from optimization.small.quantize import quantised_bytes
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config
from tests.helpers.full_step import small_model

ROOT = CONFIG_ROOT.parent
TOY = Size(64, 160, 2, 2)
IDS = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


@pytest.fixture
def log_lines():
    """What is logged while the test runs; (level, text)."""
    lines, level = [], log.level
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    log.addHandler(handler)
    log.setLevel("INFO")
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


# batch size


def test_a_batch_choice_unpacks_into_two_and_keeps_its_names():
    batch_size, grad_accum = get_optimal_batch_size_for_gpu(model_type="llada", size="medium")
    choice = get_optimal_batch_size_for_gpu(model_type="llada", size="medium")
    assert (batch_size, grad_accum) == (choice.batch_size, choice.gradient_accumulation_steps)
    config = load_run_config(compose_run_config("llada_pretrain", ["model_cfg=llada_medium"]))
    assert batch_size * grad_accum == config.train_batch_size
    assert choice.peak_bytes <= choice.card_bytes and "llada" in choice.reason


# the model comes back


def test_compiling_answers_with_the_model_and_logs_why_it_did_nothing(log_lines):
    model = given = small_model(TOY, 300).eval()
    model = enable_torch_compile(model)
    assert model is given
    level, line = log_lines[-1]
    assert level == "WARNING" and "torch.compile: nothing changed (the model is on a CPU" in line


def test_a_compiled_model_gives_the_same_and_its_record_takes_it_back(log_lines):
    model = small_model(TOY, 300).eval()
    expected = loss_of(model)
    counter = CompileCounter()
    model = enable_torch_compile(model, backend=counter)
    assert torch.allclose(loss_of(model), expected, atol=1e-5) and counter.frame_count > 0
    assert log_lines[-1][0] == "INFO" and "eager -> compiled" in log_lines[-1][1]
    record = compile_forward(model, backend=counter)
    record.undo()
    frames = counter.frame_count
    model(input_ids=IDS[:, :7], use_cache=False)
    assert counter.frame_count == frames


def test_checkpointing_answers_with_the_model_which_then_trains(log_lines):
    model = given = small_model(TOY, 300)
    model = Efficient.enable_checkpointing(model)
    assert model is given and model.is_gradient_checkpointing and "False -> True" in log_lines[-1][1]
    model.train()
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    Efficient.enable_checkpointing(model)
    assert log_lines[-1] == ("WARNING", "gradient checkpointing: nothing changed (it is on already)")
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# mixed precision

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def torch_loop(model, optimizer, scaler, dtype, num_steps, num_accumulated=1):
    for _ in range(num_steps):
        for _ in range(num_accumulated):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = loss_of(model) / num_accumulated
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "muon", "adam8bit"])
def test_both_forms_of_mixed_precision_train_alike(name, dtype):
    models = [small_model(TOY, 300) for _ in range(2)]
    optimizers = [get_optimizer(model, name, lr=1e-2) for model in models]
    amp = Efficient.mixed_precision(models[0], optimizers[0], dtype=dtype)
    before = loss_of(models[0]).item()
    for _ in range(4):
        with amp.autocast():
            loss = loss_of(models[0])
        assert amp.step(loss)
    model, optimizer, scaler = Efficient.mixed_precision(models[1], optimizers[1], dtype=dtype)
    assert model is models[1] and optimizer is optimizers[1]
    torch_loop(model, optimizer, scaler, dtype, 4)
    assert loss_of(model).item() < 0.95 * before
    for one, other in zip(models[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_mixed_precision_as_written_is_bf16_here_and_its_scaler_does_nothing():
    model = small_model(TOY, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, scaler = Efficient.mixed_precision(model, optimizer)
    loss = loss_of(model)
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1.0 and not scaler.is_enabled()
    before = copy.deepcopy(model.state_dict())
    torch_loop(model, optimizer, scaler, torch.bfloat16, 1, num_accumulated=3)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_fp16_loop_is_scaled_unscaled_and_survives_an_overflow():
    model = small_model(TOY, 300)
    model, optimizer, scaler = Efficient.mixed_precision(model, torch.optim.SGD(model.parameters(), lr=0.1))
    expected = torch.autograd.grad(loss_of(model), list(model.parameters()))
    with torch.autocast("cpu", torch.float16):  # the loop's own choice, as in older documents
        loss = loss_of(model)
    scaled = scaler.scale(loss)
    assert scaled.item() == pytest.approx(loss.item() * 2**16, rel=1e-3)
    scaled.backward()
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() < 0.02 * gradient.norm()
    next(model.parameters()).grad[0, 0] = float("inf")
    optimizer.zero_grad()
    scaler.update()
    before = copy.deepcopy(model.state_dict())
    scaler.scale(loss_of(model) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2**15


def test_a_copy_of_the_model_has_a_scaler_of_its_own_and_no_optimizer():
    model = small_model(TOY, 300)
    _, _, scaler = Efficient.mixed_precision(model, get_optimizer(model, "adamw", lr=1e-3))
    with torch.autocast("cpu", torch.float16):
        loss_of(copy.deepcopy(model))
    assert not scaler.is_enabled()


def test_a_loop_in_fp16_refuses_an_optimizer_that_updates_in_backward():
    pytest.importorskip("lomo_optim")
    model = small_model(TOY, 300)
    model, _, _ = Efficient.mixed_precision(model, get_optimizer(model, "adalomo", lr=1e-3))
    with pytest.raises(UserError, match="AdaLomo"), torch.autocast("cpu", torch.float16):
        loss_of(model)


# estimates

PARTS = ("model", "activations", "gradients", "optimizer")


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit", "muon", "adafactor", "adalomo"])
@pytest.mark.parametrize("seq_len", [16, 2048])
def test_estimated_memory_has_its_parts_in_gb_and_they_add_up(seq_len, optimizer):
    model = Efficient.nano_llm(vocab_size=32000, device="meta")
    mem = Efficient.estimate_memory(model, batch_size=4, seq_len=seq_len, optimizer=optimizer)
    assert set(mem) == {*PARTS, "total"} and all(isinstance(mem[name], float) for name in mem)
    assert sum(mem[name] for name in PARTS) == pytest.approx(mem["total"], rel=1e-9)
    assert mem["total"] == pytest.approx(mem.peak_bytes / 1e9) and min(mem[name] for name in PARTS) >= 0
    assert mem["model"] == pytest.approx(4e-9 * Helpers.count_params(model))
    if optimizer == "adamw":
        assert mem["gradients"] == pytest.approx(mem["model"]) and mem["optimizer"] == pytest.approx(2 * mem["model"])
    assert mem.fits(85_000_000_000) and mem.binding_moment in mem.moments


def test_estimated_memory_is_readable():
    mem = Efficient.estimate_memory(Efficient.nano_llm(vocab_size=32000, device="meta"), batch_size=4, seq_len=2048)
    assert f"total {mem['total']:.2f} GB" in repr(mem) and f"model {mem['model']:.4f} GB" in repr(mem)
    assert "predicted" in repr(mem) and mem.binding_moment in str(mem)


def test_estimated_memory_is_of_the_model_as_it_is():
    model = Efficient.nano_llm(vocab_size=300, device="meta")
    plain = estimate_memory(model, batch_size=4, seq_len=512)
    assert estimate_memory(model.bfloat16(), batch_size=4, seq_len=512)["model"] == plain["model"] / 2
    model = Efficient.enable_checkpointing(model.float())
    assert estimate_memory(model, batch_size=4, seq_len=512)["activations"] < 0.5 * plain["activations"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_estimated_savings_are_those_of_quantised_weights(bits, dtype):
    model = small_model(Size(192, 512, 2, 6), 300).to(dtype)
    savings = Efficient.estimate_savings(model, bits=bits)
    assert list(savings) == ["original", "quantized", "savings"]
    assert savings["original"] == quantised_bytes(model) / 1e9
    assert savings["savings"] == pytest.approx(savings["original"] - savings["quantized"])
    assert f"{savings['savings'] / savings['original']:.1%}" in repr(savings)
    model = Efficient.quantize.static(model, bits=bits)
    assert savings["quantized"] == pytest.approx(quantised_bytes(model) / 1e9, rel=1e-9)


def test_savings_of_other_widths_and_of_models_without_linears_are_refused():
    with pytest.raises(UserError, match="bits=8 or bits=4"):
        Efficient.estimate_savings(small_model(TOY, 300), bits=3)
    with pytest.raises(UserError, match="without linear layers"):
        Efficient.estimate_savings(torch.nn.Sequential(torch.nn.ReLU()))


# recommendations


def test_a_machine_without_a_gpu_is_recommended_something_that_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for get, recommend in ((get_vram, recommend_config), (Helpers.get_vram, Helpers.recommend_config)):
        assert recommend(vram_gb=get(), training=True).device == "cpu"
    config = Efficient.recommend_config(vram_gb=get_vram())
    assert config.precision == "float32" and config.attention == "sdpa"
    made = {"Efficient": Efficient, "lr": 1e-3}
    make, optimizer = config.use.split(", ", 1)
    model = made["model"] = eval(make, made)
    with torch.no_grad():
        ids = torch.zeros((config.batch_size, config.seq_len), dtype=torch.long)
        assert model(input_ids=ids).logits.shape[:2] == ids.shape
    assert eval(optimizer, made).param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("vram_gb", [4, 12, 24, 80])
def test_a_recommendation_names_precision_attention_and_calls_that_exist(vram_gb):
    config = Efficient.recommend_config(vram_gb=vram_gb, training=True)
    assert "bf16" in config.precision and "sdpa" in config.attention and config.device == "cuda"
    assert all(hasattr(Efficient, name) for name in re.findall(r"Efficient\.(\w+)", config.use))
    assert ("checkpointing" in config.optimizations) == ("enable_checkpointing" in config.use)


# what our own documents say


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def docstring_blocks(thing: object) -> list[str]:
    """Code of a docstring: what is indented, between lines that are not."""
    text = (inspect.getdoc(thing) or "").split("Raises:")[0]
    return [textwrap.dedent(block) for block in re.findall(r"^(?:(?: {4}.*)?\n)* {4}.*\n", text, flags=re.MULTILINE)]


EXPLAINED = (
    optimization.small.efficient,
    MixedPrecision,
    get_optimal_batch_size_for_gpu,
    recommend_config,
    estimate_memory,
)
EXAMPLES = [
    *((f"optimization/README.md {i}", b) for i, b in enumerate(python_blocks(ROOT / "optimization" / "README.md"))),
    *((f"docs/optimizations.md {i}", b) for i, b in enumerate(python_blocks(ROOT / "docs" / "optimizations.md"))),
    *((f"{thing.__name__} {i}", b) for thing in EXPLAINED for i, b in enumerate(docstring_blocks(thing))),
]


def test_every_example_is_found():
    assert len(EXAMPLES) == 2 + 1 + 1 + 2 + 1 + 1 + 1, [name for name, _ in EXAMPLES]


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_an_example_runs_as_written(code):
    model = small_model(TOY, 300)
    names = {name: getattr(optimization, name) for name in optimization.__all__}
    names |= {"estimate_memory": estimate_memory, "MixedPrecision": MixedPrecision, "torch": torch, "model": model}
    names |= {"optimizer": get_optimizer(model, "adamw", lr=1e-3), "batches": [{"input_ids": IDS, "labels": IDS}] * 2}
    exec(compile(code, "example", "exec"), names)


OLDER_NAMES = {
    "complexity.api": (
        *("Efficient.nano_llm", "micro_llm", "tiny_llm", "small_llm", "SmallModels.tiny_llm"),
        *("Efficient.enable_checkpointing", "Efficient.mixed_precision", "MixedPrecision.setup"),
        *("Efficient.quantize.dynamic", ".static", "Efficient.quantize_model", "Quantize.static"),
        *("Efficient.estimate_memory", "Efficient.estimate_savings", "Efficient.get_vram", "recommend_config"),
        *("MemoryEfficient.accumulate", "Helpers.count_params", "Helpers.init_weights", "Debug.count_params"),
        *("Debug.memory_usage", "Trainer", "TrainerConfig", "Model", "Tokenizer", "Dataset", "CUDA", "INLDynamics"),
    ),
    "complexity.training": ("get_optimizer", "Trainer", "TrainingConfig"),
    "earlier `optimization` module": (
        *("get_optimal_batch_size_for_gpu", "configure_all_optimizations", "enable_torch_compile"),
        *("setup_cuda_optimizations", "optimize_memory_for_device", "check_fp8_support", "print_gpu_stats"),
        *("is_fp8_compatible", "ada_fp8_autocast", "get_best_precision_for_ada", "optimize_fp8_settings"),
        *("cleanup_memory", "print_memory_stats", "set_memory_optim_env_vars", "set_seed", "patch_train_loop"),
        *("optimize_distributed_params", "check_cuda_graph_compatibility", "initialize_optimizer"),
        *("optimize_training_parameters", "recover_from_nan"),
    ),
}


def rows_of(heading: str) -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "optimizations.md").read_text()
    table = text.split(f"| {heading if '`' in heading else f'`{heading}`'} | here |\n", 1)[1].split("\n\n", 1)[0]
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table.splitlines()[1:]]


@pytest.mark.parametrize("heading", OLDER_NAMES)
def test_every_older_name_is_mapped(heading):
    was = {name.split("(")[0] for cell, _ in rows_of(heading) for name in re.findall(r"`([^`]+)`", cell)}
    missing = [name for name in OLDER_NAMES[heading] if name not in was]
    assert not missing


def test_every_function_that_a_name_is_mapped_to_exists():
    """Names with brackets on the right side are ours, or a method of a thing that is ours."""
    cells = [now for heading in OLDER_NAMES for _, now in rows_of(heading)]
    for name in {name for cell in cells for name in re.findall(r"`([\w.]+)\(", cell)}:
        parts = name.split(".")
        things = {"amp": MixedPrecision, "model": Efficient.nano_llm(300, device="meta"), "Efficient": Efficient}
        places = (optimization, MixedPrecision, optimization.AppliedOptimization)
        thing = things.get(parts[0]) or next(getattr(p, parts[0]) for p in places if hasattr(p, parts[0]))
        for part in parts[1:]:
            thing = getattr(thing, part, None)
        assert callable(thing), name


def test_the_table_of_recommendations_is_what_is_recommended():
    text = (ROOT / "optimization" / "README.md").read_text()
    table = re.search(r"<!-- table:recommended -->\n(.*?)<!--", text, flags=re.DOTALL)[1].splitlines()[2:]
    for row in table:
        card, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        scratch, teacher = (recommend_config(float(card.split()[0]), kind) for kind in ("scratch", "teacher"))
        assert cells == [
            f"`{scratch.model}`",
            f"{scratch.batch_size} x {scratch.seq_len}",
            ", ".join(scratch.optimizations[1:]),
            f"{scratch.predicted_gb:.1f}",
            teacher.model.split("/")[1].removesuffix("-Instruct"),
            f"{teacher.batch_size} x {teacher.seq_len}",
            teacher.optimizations[0],
            f"{teacher.predicted_gb:.1f}",
        ]
    assert len(table) > 5
