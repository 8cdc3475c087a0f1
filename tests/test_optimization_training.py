"""Batch sizes from the plan, optimizers in the real trainer, prefetching, and the settings of a run."""

import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader

from core.errors import UserError
from optimization import (
    AsyncDataLoader,
    apply_optimizations,
    configure_all_optimizations,
    get_optimal_batch_size_for_gpu,
    optimize_models,
    undo_all,
)
from optimization import training_optim as training_optim_module
from optimization.apply import optimized
from optimization.catalogue import MODELS
from optimization.training_optim import check_optimizer, planned_card
from planner.fit import divisors
from planner.plan import plan_run, usable_bytes
from planner.shapes import known_shapes
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_optimization_process import H100

RUN = "teacher_rlt_mono_85gb"


MORE_OPTIMIZERS = ("lion_8bit", "paged_lion_8bit", "ademamix_8bit", "adafactor")


def config_of(*words, run=RUN):
    return load_run_config(compose_run_config(run, words))


def test_without_a_gpu_the_batch_is_chosen_for_the_card_of_the_configuration():
    assert planned_card(config_of("card_gb=48.5"), None)[0] == int(48.5e9)
    assert planned_card(config_of("card_gb=48.5"), H100)[0] == H100.total_bytes


@pytest.mark.parametrize("gpu_gb", [48, 85, 141])
def test_the_batch_is_the_largest_that_the_plan_fits_and_keeps_the_step(gpu_gb):
    choice = get_optimal_batch_size_for_gpu("qwen2.5", "7b", gpu_gb=gpu_gb)
    step = config_of().train_batch_size
    assert choice.batch_size * choice.gradient_accumulation_steps == step
    assert choice.peak_bytes <= usable_bytes(int(gpu_gb * 1e9))
    larger = [d for d in divisors(step) if d > choice.batch_size][:1]
    for micro_batch in larger:
        words = ["model_name_or_path=Qwen/Qwen2.5-7B-Instruct", "student_model=null"]
        too_large = config_of(*words, f"per_device_train_batch_size={micro_batch}")
        assert not plan_run(too_large, int(gpu_gb * 1e9)).fits()


def test_a_smaller_model_or_a_larger_card_takes_more_at_once():
    sizes = [get_optimal_batch_size_for_gpu("qwen2.5", size, gpu_gb=48).batch_size for size in ("7b", "3b", "0.5b")]
    cards = [get_optimal_batch_size_for_gpu("llama", "8b", gpu_gb=gb).batch_size for gb in (48, 85, 141)]
    assert sizes == sorted(sizes) and cards == sorted(cards) and sizes[0] < sizes[-1] and cards[0] < cards[-1]


def test_every_model_of_the_catalogue_is_a_known_shape_of_about_its_size():
    for sizes in MODELS.values():
        num_params = [known_shapes()[hub_id.lower()].num_params for hub_id in sizes.values()]
        assert num_params == sorted(num_params)
        said = [1e9 * float(size.removesuffix("b")) for size in sizes]
        assert num_params == pytest.approx(said, rel=0.25)


def test_hub_ids_of_the_offered_models_are_listed_once():
    """In planner/known_shapes.json; a default, an example or a single run configuration may name one of them."""
    root = CONFIG_ROOT.parent
    sources = [path for name in ("optimization", "planner", "models") for path in (root / name).rglob("*.py")]
    ids = [hub_id for sizes in MODELS.values() for hub_id in sizes.values()]
    for path in sources:
        assert sum(hub_id in path.read_text() for hub_id in ids) <= 1, path


def test_unknown_models_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"qwen2.5 \(0.5b, 1.5b, 3b, 7b, 14b, 32b, 72b\); llama \(1b, 3b, 8b, 70b\)"):
        get_optimal_batch_size_for_gpu("gpt", "medium")


def test_a_model_that_cannot_fit_is_refused_with_what_it_needs():
    with pytest.raises(UserError, match="GB planned"):
        get_optimal_batch_size_for_gpu("qwen2.5", "32b", gpu_gb=8)


def test_everything_at_once_answers_with_a_batch_and_can_be_undone(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    import os

    answer = configure_all_optimizations(use_fp8=True, prealloc_memory=True, optimize_batch=True, gpu_gb=85)
    step = config_of().train_batch_size
    assert answer["batch_size"] * answer["gradient_accumulation_steps"] == step
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    load_run_config(compose_run_config(RUN) | answer["settings"])
    undo_all(answer["applied"])
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    plain = configure_all_optimizations(optimize_batch=False)
    assert plain["batch_size"] == config_of().grpo.per_device_train_batch_size
    undo_all(plain["applied"])


@pytest.mark.parametrize(
    ("words", "name", "change"),
    [
        ("allow_tf32=true", "cuda", "float32 products"),
        ("sdpa_backend=auto", "cuda", "cuDNN's attention"),
        ("sdpa_backend=efficient", "cuda", "first attention kernel"),
        ("expandable_segments=true", "allocator", "PYTORCH_ALLOC_CONF"),
        ("use_fp8=true", "fp8", "chosen: kv_cache_dtype=fp8"),
        ("use_flash_attention=true", "flash attention", "chosen: model_args.attn_implementation=flash_attention_3"),
    ],
)
def test_a_knob_of_the_process_is_applied_and_undone_with_the_run(words, name, change, monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr("optimization.cuda_optim.is_installed", lambda package: True)
    monkeypatch.setattr("optimization.apply.find_card", lambda: H100)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    precision, order = torch.get_float32_matmul_precision(), torch._C._get_sdp_priority_order()
    config, records = apply_optimizations(config_of(words))
    undo_all(records)
    assert [r.name for r in records] == [name] and records[0].done()[0].startswith(change)
    assert records[0].applied != change.startswith("chosen")
    chosen = {"use_fp8=true": config.kv_cache_dtype == "fp8" and config.scoring_weights == "fp8"}
    chosen["use_flash_attention=true"] = config.model_args.attn_implementation == "flash_attention_3"
    assert chosen.get(words, True)
    with optimized(config_of(words)):
        pass
    assert (torch.get_float32_matmul_precision(), torch._C._get_sdp_priority_order()) == (precision, order)


def test_a_run_without_optimizations_gets_none():
    config = config_of("optimization_cfg=none")
    assert apply_optimizations(config, card=H100) == (config, [])
    assert optimize_models(config, torch.nn.Linear(1, 1), None, None) == []


@pytest.mark.parametrize(
    "word", ["expandable_segments=true", "offload_checkpoints=true", "mlp_tile_tokens=2048", "kv_cache_dtype=fp8"]
)
def test_the_plan_knows_what_a_memory_knob_saves(word):
    before, after = plan_run(config_of(), 85_000_000_000), plan_run(config_of(word), 85_000_000_000)
    assert min(after.peak_bytes(phase) - before.peak_bytes(phase) for phase in before.components) < -500_000_000


@pytest.mark.parametrize(
    "words",
    [
        ("optim=paged_adamw_8bit",),
        *(pytest.param((f"optim={name}",), marks=pytest.mark.slow) for name in MORE_OPTIMIZERS),
        ("optim=apollo_adamw", "optim_target_modules=[lora_A,lora_B]"),
    ],
    ids=lambda words: words[0],
)
def test_optimizers_of_transformers_and_their_libraries_train_the_adapter(words, tmp_path):
    if "apollo" in words[0]:
        pytest.importorskip("apollo_torch")
    trainer = make_trainer(
        write_random_model(tmp_path / "model"), tmp_path / "run", "max_steps=2", "num_eval_prompts=0", *words
    )
    before = {n: p.detach().clone() for n, p in trainer.host.teacher.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.host.teacher.named_parameters())
    assert all(after[n].isfinite().all() for n in before)
    assert sum(not torch.equal(before[n], after[n]) for n in before) > len(before) / 2


@pytest.mark.parametrize(
    ("word", "installed", "message"),
    [
        ("optim=galore_adamw", False, "the package galore_torch is not installed"),
        ("optim=adalomo", True, "updates inside backward"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_before_loading(word, installed, message, monkeypatch):
    monkeypatch.setattr(training_optim_module, "is_installed", lambda package: installed)
    with pytest.raises(UserError, match=message):
        check_optimizer(config_of(word))


class Slow:
    """Batches that take time to make."""

    def __init__(self, num_batches: int, seconds: float) -> None:
        self.num_batches, self.seconds, self.num_made = num_batches, seconds, 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        for i in range(self.num_batches):
            time.sleep(self.seconds)
            self.num_made += 1
            yield {"x": torch.full((2,), i), "y": [torch.tensor(i), f"row {i}"]}


def seconds_of(loader, use_s: float) -> float:
    started = time.perf_counter()
    for _ in loader:
        time.sleep(use_s)
    return time.perf_counter() - started


def test_making_a_batch_overlaps_with_using_the_last_one():
    plain_s = seconds_of(Slow(10, 0.03), use_s=0.03)
    prefetched_s = seconds_of(AsyncDataLoader(Slow(10, 0.03)), use_s=0.03)
    assert plain_s > 0.6 and prefetched_s < 0.75 * plain_s


def test_prefetched_batches_are_the_loaders_in_order_each_epoch():
    loader = AsyncDataLoader(DataLoader(range(7), batch_size=3), device="cpu")
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(loader) == 3


def test_tensors_go_to_the_device_wherever_they_are_in_a_batch():
    batch = next(iter(AsyncDataLoader(Slow(1, 0), device="meta")))
    assert batch["x"].is_meta and batch["y"][0].is_meta and batch["y"][1] == "row 0"


def test_no_more_than_the_allowed_number_of_batches_waits():
    loader = Slow(20, 0)
    batches = iter(AsyncDataLoader(loader, num_prefetched=2))
    next(batches)
    time.sleep(0.2)
    assert loader.num_made <= 1 + 2 + 1  # used, waiting, and one in the thread's hand
    batches.close()


def test_a_loaders_error_reaches_the_consumer():
    def broken():
        yield 1
        raise RuntimeError("row 2 is unreadable")

    batches = iter(AsyncDataLoader(broken()))
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="row 2"):
        next(batches)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    for _ in AsyncDataLoader(Slow(1000, 0.001)):
        break
    assert threading.active_count() == before


@pytest.mark.gpu
def test_copies_to_the_gpu_beside_the_computation_are_the_batches():
    """Which way is faster depends on the GPU and its bus: the times are printed, not asserted."""
    batches = [torch.randn(64, 1024, 1024) for _ in range(8)]
    weight = torch.randn(1024, 1024, device="cuda")

    def run(loader, move):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for batch in loader:
            x = batch.cuda() if move else batch
            for _ in range(4):
                x = x @ weight
        torch.cuda.synchronize()
        return time.perf_counter() - started

    run(batches, move=True)
    plain_s = run(batches, move=True)
    prefetched_s = run(AsyncDataLoader(batches, device="cuda"), move=False)
    print(f"{torch.cuda.get_device_name()}: {plain_s:.3f} s one after the other, {prefetched_s:.3f} s prefetched")
    for batch, copied in zip(batches, AsyncDataLoader(batches, device="cuda"), strict=True):
        assert torch.equal(batch, copied.cpu())
