"""`optimization.Efficient`: every function does what it says, on a CPU."""

import copy
import random
import sys

import pytest
import torch
from torch import nn

from core.errors import UserError
from data.embedded.task import generate_rows
from data.embedded.tokenizer import build_tokenizer
from examples.train_small import lr_factor, parse, text_batch, train
from optimization import Efficient
from optimization.memory_optim import checkpoint_blocks
from optimization.optimizers import OPTIMIZERS
from optimization.small.models import BUILDERS, Size
from optimization.small.quantize import quantised_bytes
from planner.full_training import FullTraining, plan_full_training
from planner.plan import plan_run
from planner.shapes import load_shape, shape_from_config
from schemas.compose import compose_run_config, run_config_names
from schemas.run import load_run_config
from tests.helpers.full_step import measured_peak_bytes, small_model

TOY = Size(64, 160, 2, 2)
LIBRARY = {"adalomo": "lomo_optim", "apollo": "apollo_torch"}


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


# sizes


@pytest.mark.parametrize(
    ("name", "num_params"), [("nano", 10e6), ("micro", 30e6), ("tiny", 125e6), ("small", 350e6), ("medium", 760e6)]
)
def test_sizes_are_what_their_names_promise(name, num_params):
    model = getattr(Efficient, f"{name}_llm")(32_000, device="meta")
    assert Efficient.count_params(model) == pytest.approx(num_params, rel=0.05)
    assert model.get_input_embeddings().weight.shape[0] == 32_000
    assert next(model.parameters()).device.type == "meta"


def test_nano_runs_on_the_cpu():
    model = Efficient.nano_llm(300)
    assert torch.isfinite(loss_of(model, torch.randint(300, (2, 16))))


def test_parameters_are_counted_once_and_by_value_where_quantised():
    model = small_model(TOY, 300)
    counted = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert Efficient.count_params(model) == counted
    model.requires_grad_(False)
    assert Efficient.count_params(model, trainable_only=True) == 0
    for bits in (8, 4):
        assert Efficient.count_params(Efficient.quantize.static(copy.deepcopy(model), bits=bits)) == counted


def test_vram_without_a_gpu_is_zero():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert Efficient.get_vram() == 0.0


@pytest.mark.gpu
def test_vram_is_what_the_driver_reports():
    assert Efficient.get_vram() == pytest.approx(torch.cuda.mem_get_info()[1] / 1e9, rel=0.01)


# training


def test_checkpointing_saves_memory_keeps_gradients_and_can_be_undone():
    plain, checkpointed = small_model(TOY, 300), small_model(TOY, 300)
    record = checkpoint_blocks(checkpointed)
    assert record.applied
    ids = torch.randint(300, (4, 64))
    for model in (plain, checkpointed):
        model.train()
        loss_of(model, ids).backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6), name
    plain.zero_grad()
    checkpointed.zero_grad()
    bytes_plain = measured_peak_bytes(plain, 4, 64, "fp32")
    assert measured_peak_bytes(checkpointed, 4, 64, "fp32") < 0.8 * bytes_plain
    assert checkpoint_blocks(checkpointed).skipped
    record.undo()
    assert measured_peak_bytes(checkpointed, 4, 64, "fp32") == bytes_plain


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_a_fixed_batch(name):
    if name in LIBRARY:
        pytest.importorskip(LIBRARY[name])
    model = small_model(TOY, 300)
    model.train()
    rate = {"adafactor": 1e-2, "adalomo": 5e-2}.get(name, 3e-3 if "lion" not in name else 1e-3)
    optimizer = Efficient.get_optimizer(model, name, lr=rate)
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(40):
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_eight_bit_and_paged_optimizers_are_what_they_say():
    optimizer = Efficient.get_optimizer(Efficient.nano_llm(300), "paged_adam8bit", lr=1e-3)
    assert optimizer.is_paged and optimizer.args.optim_bits == 8
    assert not Efficient.get_optimizer(Efficient.nano_llm(300), "adam8bit", lr=1e-3).is_paged


@pytest.mark.parametrize("name", ["muon", "adalomo"])
def test_a_schedule_reaches_optimizers_made_of_parts(name):
    if name in LIBRARY:
        pytest.importorskip(LIBRARY[name])
    model = small_model(TOY, 300)
    optimizer = Efficient.get_optimizer(model, name, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    ids = torch.randint(300, (2, 16))
    for _ in range(2):  # AdaLomo takes a new rate over at the end of a step
        before = copy.deepcopy(model.state_dict())
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_muon_continues_from_its_saved_state():
    ids = torch.randint(300, (2, 16))

    def step(model, optimizer):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = small_model(TOY, 300)
    optimizer = Efficient.get_optimizer(model, "muon", lr=1e-2)
    step(model, optimizer)
    resumed = copy.deepcopy(model)
    restored = Efficient.get_optimizer(resumed, "muon", lr=1e-2)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(resumed, restored)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_unknown_optimizers_missing_libraries_and_frozen_models_are_explained(monkeypatch):
    model = small_model(TOY, 300)
    with pytest.raises(UserError, match="paged_adam8bit"):
        Efficient.get_optimizer(model, "adamw9000", lr=1e-3)
    for name, package in LIBRARY.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match="pip install"):
            Efficient.get_optimizer(model, name, lr=1e-3)
    with pytest.raises(UserError, match="without trainable"):
        Efficient.get_optimizer(model.requires_grad_(False), "adamw", lr=1e-3)


# mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_computes_in_16_bits_and_follows_float32(dtype):
    ids = torch.randint(300, (4, 32))
    losses = {}
    for key in (torch.float32, dtype):
        model = small_model(TOY, 300)
        amp = Efficient.mixed_precision(model, Efficient.get_optimizer(model, "adamw", lr=3e-3), dtype=key)
        seen = []
        hook = model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.dtype)
        )
        losses[key] = []
        for _ in range(15):
            with amp.autocast():
                loss = loss_of(model, ids)
            amp.step(loss)
            losses[key].append(loss.item())
        hook.remove()
        assert seen[0] == key and all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[dtype][-1] < 0.8 * losses[dtype][0]
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.05)


def test_fp16_overflow_skips_the_step_and_says_so():
    model = small_model(TOY, 300)
    amp = Efficient.mixed_precision(model, Efficient.get_optimizer(model, "adamw", lr=1e-2), dtype=torch.float16)
    before = copy.deepcopy(model.state_dict())
    loss = loss_of(model, torch.randint(300, (2, 8)))
    assert amp.step(loss * float("inf")) is False
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert amp.step(loss_of(model, torch.randint(300, (2, 8)))) is True


def test_accumulated_backward_equals_one_large_batch():
    ids = torch.randint(300, (4, 16))
    models = [small_model(TOY, 300) for _ in range(2)]
    amps = [Efficient.mixed_precision(m, torch.optim.SGD(m.parameters(), lr=0.1), dtype=torch.float32) for m in models]
    amps[0].step(loss_of(models[0], ids))
    for half in ids.split(2):
        amps[1].backward(loss_of(models[1], half) / 2)
    amps[1].update()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_mixed_precision_refuses_weights_that_could_not_learn():
    model = small_model(TOY, 300, "bf16")
    with pytest.raises(UserError, match="float32"):
        Efficient.mixed_precision(model, Efficient.get_optimizer(model, "adamw", lr=1e-3))


def test_mixed_precision_refuses_fp16_with_updates_in_backward():
    pytest.importorskip("lomo_optim")
    model = small_model(TOY, 300)
    with pytest.raises(UserError, match="AdaLomo"):
        Efficient.mixed_precision(model, Efficient.get_optimizer(model, "adalomo", lr=1e-3), dtype=torch.float16)


# quantisation

NUM_STEPS = 200


@pytest.fixture(scope="module")
def trained():
    """A model that has begun to learn the sums, and held-out text."""
    tokenizer = build_tokenizer()
    model = small_model(TOY, len(tokenizer))
    optimizer = Efficient.get_optimizer(model, "muon", lr=1e-2)
    rows, rng = generate_rows(2_000, 0, "train"), random.Random(0)
    model.train()
    for step in range(NUM_STEPS):
        ids = text_batch(tokenizer, rng.sample(rows, 32))
        loss_of(model, ids).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, NUM_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    held_out = text_batch(tokenizer, generate_rows(64, 0, "eval"))
    return model.eval(), held_out


# the loss may rise by this many nats per token; the linears may take this share of their float32 bytes
LOSSES = {"dynamic": (0.01, 0.27), "static 8": (0.005, 0.27), "static 4": (0.1, 0.15)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
def test_quantised_model_works_is_smaller_and_loses_little(trained, kind):
    model, held_out = trained
    quantise = {
        "dynamic": Efficient.quantize.dynamic,
        "static 8": lambda m: Efficient.quantize.static(m, bits=8),
        "static 4": lambda m: Efficient.quantize.static(m, bits=4),
    }[kind]
    with torch.no_grad():
        before = loss_of(model, held_out)
        embedding_bytes = model.get_input_embeddings().weight.nbytes
        linear_bytes = quantised_bytes(model) - embedding_bytes
        quantised = quantise(copy.deepcopy(model))
        after = loss_of(quantised, held_out)
    max_loss, max_frac = LOSSES[kind]
    assert before < 1.5  # 5.6 untrained; the digits of the questions cost 0.6
    assert 0 < abs(after - before) < max_loss
    assert quantised_bytes(quantised) - embedding_bytes < max_frac * linear_bytes


def test_dynamic_quantises_activations_and_static_does_not():
    """With int8 activations the error stays when the weights are integers already."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    layer[0].weight.data = torch.randint(-126, 127, (32, 64)).float()
    layer[0].weight.data[:, 0] = 127.0  # every row's scale is one
    x = torch.randn(16, 64).half().float()
    with torch.no_grad():
        expected = layer(x)
        static = Efficient.quantize.static(copy.deepcopy(layer), bits=8)(x)
        dynamic = Efficient.quantize.dynamic(copy.deepcopy(layer))(x)
    assert torch.allclose(static, expected, rtol=1e-5, atol=1e-2)
    error = (dynamic - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.03


def test_unknown_widths_and_models_without_linears_are_refused():
    with pytest.raises(UserError, match="bits=8 or bits=4"):
        Efficient.quantize.static(small_model(TOY, 300), bits=3)
    with pytest.raises(UserError, match="without linear layers"):
        Efficient.quantize.dynamic(nn.Sequential(nn.ReLU()))


# recommendations

CARDS_GB = (8, 12, 24, 40, 80)


def num_params(model: str) -> int:
    if model.endswith("_llm"):
        return Efficient.count_params(BUILDERS[model.removesuffix("_llm")](32_000, device="meta"))
    return load_shape(model).num_params


@pytest.mark.parametrize("training", ["scratch", "teacher", "none"])
def test_recommendations_fit_their_card_and_grow_with_it(training):
    found = [Efficient.recommend_config(vram_gb, training) for vram_gb in CARDS_GB]
    sizes = [num_params(one.model) for one in found]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    for vram_gb, one in zip(CARDS_GB, found, strict=True):
        assert one.predicted_gb <= 0.97 * vram_gb
        assert one.batch_size >= 1 and one.seq_len >= 1024 and one.optimizations and one.device == "cuda"
        assert "sdpa" in one.attention and one.precision


@pytest.mark.parametrize("training", ["scratch", "teacher", "none"])
def test_recommendations_never_fall_as_memory_grows(training):
    """Model, tokens per row and tokens per forward, in steps of 0.5 GB from 4 to 200 GB."""
    sizes: dict[str, int] = {}
    before = (0, 0, 0)
    for vram_gb in [half / 2 for half in range(8, 401)]:
        one = Efficient.recommend_config(vram_gb, training)
        if one.model not in sizes:
            sizes[one.model] = num_params(one.model)
        now = (sizes[one.model], one.seq_len, one.batch_size * one.seq_len)
        assert all(new >= old for new, old in zip(now, before, strict=True)), (vram_gb, before, one)
        assert one.predicted_gb <= 0.97 * vram_gb + 1e-6
        before = now
    assert len(sizes) >= 3


@pytest.mark.parametrize("training", ["scratch", "teacher", "none"])
def test_without_a_gpu_the_smallest_is_recommended_for_the_cpu(training):
    one = Efficient.recommend_config(0.0, training)
    smallest = Efficient.recommend_config(4, training)
    assert one.device == "cpu" and one.predicted_gb is None and one.attention.startswith("sdpa")
    if one.model == "tiny":
        assert one.use == "./launch_mono.sh teacher_rlt_tiny" and "teacher_rlt_tiny" in run_config_names()
    else:
        assert num_params(one.model) <= num_params(smallest.model)
    assert one.batch_size * one.seq_len <= smallest.batch_size * smallest.seq_len or training == "teacher"


def test_a_recommended_training_fits_and_twice_its_rows_do_not():
    one = Efficient.recommend_config(8, training=True)
    shape = shape_from_config("x", BUILDERS[one.model.removesuffix("_llm")](32_000, device="meta").config.to_dict())

    def plan_with(batch):
        return plan_full_training(
            FullTraining(
                shape=shape,
                batch=batch,
                length=one.seq_len,
                optimizer=one.optimizations[-1],
                checkpointing="checkpointing" in one.optimizations,
            )
        )

    assert plan_with(one.batch_size).fits(round(8e9))
    assert not plan_with(2 * one.batch_size).fits(round(8e9))


def test_a_recommended_teacher_run_exists_and_its_plan_fits():
    one = Efficient.recommend_config(12, "teacher")
    _, name, *overrides = one.use.split()
    assert name in run_config_names()
    config = load_run_config(compose_run_config(name, overrides))
    assert plan_run(config, round(12e9)).fits()
    assert config.model_name_or_path == one.model


@pytest.mark.parametrize("vram_gb", [0.2, 3.9, -1.0, float("nan")])
def test_a_card_that_holds_nothing_is_refused(vram_gb):
    for training in (True, "teacher", False):
        with pytest.raises(UserError, match="4 GB or more, or 0 for the CPU"):
            Efficient.recommend_config(vram_gb, training)


# the script


def test_example_trains_a_small_model(capsys):
    losses = train(parse(["--steps", "25", "--batch", "16"]))
    assert len(losses) == 25
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert "4-bit weights" in capsys.readouterr().out


@pytest.mark.slow
def test_example_learns_the_sums():
    losses = train(parse([]))
    assert losses[-1] < 0.75  # 0.6 where everything but the question's digits is known
