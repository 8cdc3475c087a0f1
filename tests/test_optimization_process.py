"""Optimizations of the process: each changes what it says, puts it back, and says why it does nothing."""

import gc
import os
import re
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import optimization
from core.errors import UserError
from optimization import (
    AppliedOptimization,
    Change,
    ChosenSettings,
    Obstacle,
    autoconfigure_environment,
    check_fp8_support,
    clean_memory,
    enable_flash_attention,
    optimize_attention_operations,
    optimize_memory_for_device,
    preallocate_cuda_memory,
    print_gpu_stats,
    recover_from_nan,
    setup_cuda_optimizations,
    undo_all,
)
from optimization import cuda_optim as cuda_optim_module
from optimization.gpu import Card
from optimization.record import records_table
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.optimization import TrainingOptimizationConfig
from schemas.run import ConfigError, load_run_config
from tests.helpers.console import shown

H100 = Card(name="H100", capability=(9, 0), total_bytes=85_000_000_000)
A100 = Card(name="A100", capability=(8, 0), total_bytes=42_000_000_000)
T4 = Card(name="T4", capability=(7, 5), total_bytes=16_000_000_000)
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch starts; a run on a GPU may have been before
    torch.set_float32_matmul_precision("highest")


def test_tf32_and_attention_without_cudnn_change_and_come_back():
    precision, order = torch.get_float32_matmul_precision(), torch._C._get_sdp_priority_order()
    record = setup_cuda_optimizations(sdpa_backend="auto", card=H100)
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert {change.what for change in record.changes} == {"float32 products", "cuDNN's attention"}
    record.undo()
    assert (torch.get_float32_matmul_precision(), torch._C._get_sdp_priority_order()) == (precision, order)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_record_does_not_claim_what_was_so_already():
    first = setup_cuda_optimizations(sdpa_backend="auto", card=H100)
    second = setup_cuda_optimizations(sdpa_backend="auto", card=H100)
    assert isinstance(second, Obstacle) and "off already" in second.skipped and "high already" in second.skipped
    second.undo()
    assert torch.get_float32_matmul_precision() == "high"
    first.undo()


def test_cleaning_a_second_time_claims_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    record = clean_memory()
    assert isinstance(record, Obstacle) and "no object is unreachable" in record.skipped


def test_cudnn_is_no_choice():
    with pytest.raises(UserError, match="pytorch#196678"):
        optimize_attention_operations("cudnn", card=H100)
    for run in ("teacher_rlt_tiny", "llada_tiny"):
        with pytest.raises(ConfigError, match="gradients of cuDNN's attention are NaN"):
            load_run_config(compose_run_config(run, ["sdpa_backend=cudnn"]))


def test_a_card_gets_what_it_can_do_and_a_reason_for_the_rest():
    older = setup_cuda_optimizations(sdpa_backend="auto", card=A100)
    assert [change.what for change in older.changes] == ["float32 products"] and "below compute 9.0" in older.skipped
    older.undo()
    oldest = setup_cuda_optimizations(sdpa_backend="auto", card=T4)
    assert not oldest.applied and "no TF32" in oldest.skipped


@pytest.mark.parametrize("backend", ["flash", "efficient"])
def test_the_chosen_kernel_is_first_and_the_others_stay_as_fall_backs(backend):
    record = optimize_attention_operations(backend, card=A100)
    order = torch._C._get_sdp_priority_order()
    enabled = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    cudnn_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    record.undo()
    assert not cudnn_enabled
    assert torch.nn.attention.SDPBackend(order[0]).name.lower().startswith(backend)
    assert enabled == (True, True)


def test_expandable_segments_join_what_is_set_and_leave_with_undo(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = optimize_memory_for_device(card=A100)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512,expandable_segments:True"
    record.undo()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"


def test_the_allocator_setting_of_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    record = optimize_memory_for_device(card=A100)
    assert not record.applied and "set outside" in record.skipped
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:False"


@pytest.mark.gpu
def test_the_live_allocator_has_expandable_segments_until_undone():
    record = optimize_memory_for_device()
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
    record.undo()
    assert not torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]


@pytest.mark.parametrize(
    ("card", "packages", "wanted"),
    [
        (H100, {"flash_attn_interface", "flash_attn"}, "flash_attention_3"),
        (H100, {"flash_attn"}, "flash_attention_2"),
        (A100, {"flash_attn_interface", "flash_attn"}, "flash_attention_2"),
        (A100, set(), None),
        (T4, {"flash_attn"}, None),
    ],
)
def test_flash_attention_follows_card_and_package(card, packages, wanted, monkeypatch):
    monkeypatch.setattr(cuda_optim_module, "is_installed", packages.__contains__)
    record = enable_flash_attention(card=card)
    assert not record.applied and bool(record.skipped) == (wanted is None)
    assert wanted is None or record.settings == {"model_args.attn_implementation": wanted}


def test_an_attention_kernel_of_the_configuration_is_kept():
    assert "was chosen" in enable_flash_attention(current="eager", card=H100).skipped


def test_environment_variables_are_set_unless_the_user_set_them():
    record = autoconfigure_environment(card=H100)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    record.undo()
    assert "TOKENIZERS_PARALLELISM" not in os.environ and "CUDA_DEVICE_ORDER" not in os.environ


def test_fp8_is_told_by_the_compute_level():
    ada = Card(name="4090", capability=(8, 9), total_bytes=25_000_000_000)
    assert check_fp8_support(card=H100).skipped is None and check_fp8_support(card=ada).skipped is None
    assert "not on this GPU" in check_fp8_support(card=A100).skipped


class _Cyclic:
    def __init__(self) -> None:
        self.itself = self


def test_cleaning_frees_what_only_refers_to_itself():
    gc.disable()
    try:
        alive = weakref.ref(_Cyclic())
        assert alive() is not None
        assert clean_memory().applied
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_cleaning_gives_the_allocators_blocks_back():
    block = torch.empty(200_000_000, dtype=torch.uint8, device="cuda")
    del block
    before = torch.cuda.memory_reserved()
    clean_memory()
    assert torch.cuda.memory_reserved() <= before - 200_000_000


@pytest.mark.gpu
def test_preallocation_keeps_or_gives_back_and_refuses_what_is_not_there():
    clean_memory()
    preallocate_cuda_memory(1_000_000_000, keep=False)
    assert torch.cuda.memory_reserved() < 1_000_000_000
    kept = preallocate_cuda_memory(1_000_000_000, keep=True)
    assert torch.cuda.memory_reserved() >= 1_000_000_000
    kept.undo()
    assert torch.cuda.memory_reserved() < 1_000_000_000
    with pytest.raises(UserError, match="to preallocate"):
        preallocate_cuda_memory(10**13)


@no_gpu_here
@pytest.mark.parametrize(
    "function",
    [
        setup_cuda_optimizations,
        optimize_attention_operations,
        optimize_memory_for_device,
        enable_flash_attention,
        check_fp8_support,
        lambda: preallocate_cuda_memory(1),
    ],
)
def test_without_a_gpu_nothing_fails_and_the_reason_is_said(function):
    record = function()
    assert not record.applied and "torch sees no CUDA device" in record.skipped
    record.undo()


@no_gpu_here
def test_stats_without_a_gpu_say_so(capsys):
    print_gpu_stats()
    assert "GPU: none" in capsys.readouterr().out


@pytest.mark.gpu
def test_stats_name_the_card_and_what_is_free(capsys):
    print_gpu_stats()
    text = capsys.readouterr().out
    assert torch.cuda.get_device_name() in text and "free: " in text


def test_recovery_settings_are_those_of_a_run_configuration():
    settings = recover_from_nan(max_recoveries=3, lr_backoff=0.25).settings
    config = load_run_config(compose_run_config("teacher_rlt_tiny") | settings)
    assert (config.recover_from_nan, config.max_recoveries, config.lr_backoff) == (True, 3, 0.25)


def test_undo_goes_backwards_once():
    seen: list[int] = []
    changes = (Change(what="x", before=1, after=2),)
    records = [
        AppliedOptimization(name=str(i), changes=changes, undo_steps=[lambda i=i: seen.append(i)]) for i in range(3)
    ]
    records.insert(1, Obstacle(name="between", skipped="nothing to undo"))
    undo_all(records)
    undo_all(records)
    assert seen == [2, 1, 0]


def test_the_table_says_what_changed_and_why_not():
    done = AppliedOptimization(name="one", changes=(Change(what="x", before=1, after=2),), effect="3 GB")
    chosen = ChosenSettings(name="three", settings={"use_fp8": True}, reason="it can")
    text = shown(records_table([done, Obstacle(name="two", skipped="no GPU"), chosen]))
    assert "x: 1 -> 2" in text and "3 GB" in text and "no GPU" in text
    assert "chosen: use_fp8=True" in text and "it can" in text
    assert str(chosen) == "three: chosen: use_fp8=True" and not chosen.applied


def test_a_record_of_a_change_has_a_change_and_a_choice_a_setting():
    with pytest.raises(ValueError, match="an Obstacle says why"):
        AppliedOptimization(name="one", changes=())
    with pytest.raises(ValueError, match="an Obstacle says why"):
        ChosenSettings(name="one", settings={}, reason="none")


OLD_SCRIPTS = (
    *("ada_fp8_utils.py", "install_ada_fp8.sh", "install_fp8_support.sh", "gpu_optimization.py"),
    *("gpu_optimization_advanced.py", "train_fp8.sh", "train_max_gpu.sh", "train_optimized.sh", "recover_from_nan.sh"),
)


def test_the_readme_names_every_function_and_every_setting():
    text = (Path(optimization.__file__).parent / "README.md").read_text()
    helpers = {"AppliedOptimization", "BatchChoice", "Change", "records_table", "optimized", "optimize_models"}
    helpers |= {"apply_optimizations", "preallocate_planned", "Recommendation", "Record"}
    for name in set(optimization.__all__) - helpers | {field.name for field in fields(TrainingOptimizationConfig)}:
        assert name in text, name


@pytest.mark.parametrize("script", OLD_SCRIPTS)
def test_the_old_names_are_mapped(script):
    rows = (CONFIG_ROOT.parent / "docs" / "optimizations.md").read_text().splitlines()
    assert any(script in row and "./optimize.sh --" in row for row in rows)


def test_one_place_asks_torch_what_the_gpu_is():
    asked = re.compile(r"torch\.cuda\.(is_available|get_device\w*|device_count|is_bf16_supported|mem_get_info)\b")
    folders = ("optimization", "generation", "rollout", "rewards", "scoring", "data")
    sources = [path for name in folders for path in (CONFIG_ROOT.parent / name).rglob("*.py")]
    assert [path.name for path in sources if asked.search(path.read_text())] == ["gpu.py"]
