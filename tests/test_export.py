"""The export of the teacher's quantised base: what vLLM will load equals what the trainer multiplies with."""

import json
import time
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen2Config, Qwen2ForCausalLM

import models.export as export
from core.errors import UserError
from core.locks import try_lock
from generation import prepare_base
from tests.helpers.planted_outliers import load_quantised, word_tokenizer, write_planted_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=60.0)


@pytest.fixture(scope="module")
def int8_teacher(checkpoint):
    """An LLM.int8 base under a LoRA adapter, after a forward (which moves bitsandbytes' scales elsewhere)."""
    teacher = get_peft_model(load_quantised(checkpoint, bits=8), LoraConfig(r=4, target_modules="all-linear"))
    teacher(torch.arange(8)[None])
    return teacher


def write_random_qwen(folder, width):
    shape = Qwen2Config(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return folder


def exported(folder):
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def quantised_linears(teacher, kind):
    base = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
    found = {name.replace(".base_layer", ""): m for name, m in base.named_modules() if isinstance(m, kind)}
    assert len(found) == 3 * 7  # layers x linears
    return found


def unpacked(tensors, name):
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    return unpack_from_int32(tensors[f"{name}.weight_packed"], 8, shape)


def test_packed_int8_values_and_scales_are_bit_equal_to_the_trainers(int8_teacher, tmp_path):
    tensors = exported(export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "out", "packed_int8"))
    for name, linear in quantised_linears(int8_teacher, bnb.nn.Linear8bitLt).items():
        assert torch.equal(unpacked(tensors, name), linear.weight.data)
        assert torch.equal(tensors[f"{name}.weight_scale"], (linear.state.SCB * (1 / 127))[:, None])


def test_dequantized_values_are_bit_equal_to_the_weight_of_the_trainers_backward(int8_teacher, tmp_path):
    tensors = exported(export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "out", "dequantized"))
    for name, linear in quantised_linears(int8_teacher, bnb.nn.Linear8bitLt).items():
        identity = torch.eye(linear.out_features, dtype=torch.bfloat16)
        hidden = torch.zeros(linear.out_features, linear.in_features, dtype=torch.bfloat16, requires_grad=True)
        linear(hidden).backward(identity)
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
        assert torch.equal(tensors[f"{name}.weight"], hidden.grad)


@pytest.mark.parametrize("form", ["packed_int8", "dequantized"])
def test_what_is_not_quantised_is_copied_and_the_adapter_left_out(checkpoint, int8_teacher, tmp_path, form):
    original = exported(checkpoint)
    tensors = exported(export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "out", form))
    quantised = {f"{name}.weight" for name in quantised_linears(int8_teacher, bnb.nn.Linear8bitLt)}
    copied = set(original) - quantised
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"} <= copied
    assert all(torch.equal(tensors[name], original[name]) for name in copied)
    suffixes = ("weight_packed", "weight_scale", "weight_shape") if form == "packed_int8" else ("weight",)
    expected = copied | {f"{name.removesuffix('weight')}{suffix}" for name in quantised for suffix in suffixes}
    assert set(tensors) == expected


def test_an_independent_reader_of_the_packed_form_computes_with_the_same_weights(int8_teacher, tmp_path):
    packed = export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "packed", "packed_int8")
    plain = export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "plain", "dequantized")
    read = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    token_ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(token_ids).logits, expected(token_ids).logits, atol=0.05, rtol=0.05)


def test_a_4_bit_base_is_exported_exactly_dequantised_and_within_half_a_step_as_packed_int8(checkpoint, tmp_path):
    teacher = load_quantised(checkpoint, bits=4)
    with torch.no_grad():
        teacher(torch.arange(8)[None])  # bitsandbytes changes the layout of 4-bit weights on some CPUs
    plain = exported(export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "plain", "dequantized"))
    folder = export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "packed", "packed_int8")
    packed = exported(folder)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 64)
    for name, linear in quantised_linears(teacher, bnb.nn.Linear4bit).items():
        weight = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(plain[f"{name}.weight"], weight)
        scales = packed[f"{name}.weight_scale"].repeat_interleave(64, dim=1)
        error = (unpacked(packed, name) * scales - weight.float()).abs()
        assert (error <= 0.5001 * scales).all()


def test_the_packed_bytes_are_those_of_the_library():
    values = torch.randint(-128, 128, (33, 96), dtype=torch.int8)
    values[0, :4] = torch.tensor([-128, -1, 0, 127])
    assert torch.equal(export.packed_int32(values), pack_to_int32(values, num_bits=8))
    of_a_7b = torch.randint(-128, 128, (3584, 18944), dtype=torch.int8)
    marks_s = [time.perf_counter()]
    for pack in (export.packed_int32, lambda values: pack_to_int32(values, num_bits=8)):
        pack(of_a_7b)
        marks_s.append(time.perf_counter())
    print(f"one 7B down_proj: {marks_s[1] - marks_s[0]:.2f} s, {marks_s[2] - marks_s[1]:.2f} s by the library")
    columns = torch.randint(-128, 128, (64, 16), dtype=torch.int8).t()  # not contiguous
    assert torch.equal(export.packed_int32(columns), pack_to_int32(columns, num_bits=8))


@pytest.mark.gpu
def test_on_a_gpu_packing_stays_there_and_gives_the_same_bytes():
    values = torch.randint(-128, 128, (3584, 18944), dtype=torch.int8)
    started = time.perf_counter()
    on_cpu = pack_to_int32(values, num_bits=8)
    cpu_s = time.perf_counter() - started
    on_gpu = export.packed_int32(values.cuda())
    torch.cuda.synchronize()
    started = time.perf_counter()
    packed = export.packed_int32(on_gpu.view(torch.int8))
    torch.cuda.synchronize()
    print(f"one 7B down_proj: {cpu_s:.2f} s by the library on the CPU, {time.perf_counter() - started:.4f} s here")
    assert packed.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize(("width", "group_size"), [(96, 32), (128, 64)])
def test_a_4_bit_base_is_packed_in_groups_that_divide_its_widths(width, group_size, tmp_path):
    """96 is the width of the embedded model, in whose rows NF4's blocks of 64 do not fit."""
    teacher = load_quantised(write_random_qwen(tmp_path / "model", width), bits=4)
    assert export.nf4_group_size(teacher) == group_size
    folder = export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "packed", "packed_int8")
    plain = exported(export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "plain", "dequantized"))
    packed = exported(folder)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == group_size
    name = "model.layers.0.mlp.gate_proj"
    scales = packed[f"{name}.weight_scale"].repeat_interleave(group_size, dim=1)
    error = (unpacked(packed, name) * scales - plain[f"{name}.weight"].float()).abs()
    assert scales.shape == error.shape and (error <= 0.5001 * scales + 2**-9 * scales * 127).all()
    read = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    assert torch.allclose(read.get_submodule(name).weight, unpacked(packed, name) * scales)


def test_a_4_bit_base_of_other_widths_goes_to_a_gpu_dequantised(tmp_path, monkeypatch):
    teacher = load_quantised(write_random_qwen(tmp_path / "model", 80), bits=4)
    assert export.nf4_group_size(teacher) is None
    with pytest.raises(UserError, match="multiples of 32"):
        export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "packed", "packed_int8")
    on_gpu = mock.Mock(wraps=teacher, device=torch.device("cuda"), modules=teacher.modules, spec=teacher)
    forms = []
    monkeypatch.setattr("generation.choose.export_for_vllm", lambda *words: forms.append(words[-1]) or tmp_path)
    assert "dequantised" in prepare_base("auto", on_gpu, word_tokenizer(), "unused", tmp_path / "export").weights
    assert forms == ["dequantized"]


@pytest.mark.parametrize("outlier_scale", [60.0, 400.0])
def test_bf16_scales_as_vllm_stores_them_move_log_probs_by_a_hundredth_of_a_nat(outlier_scale, tmp_path):
    folder = write_planted_model(tmp_path / "model", outlier_scale)
    trainer = load_quantised(folder, bits=8)
    token_ids = torch.randint(2, 128, (4, 65), generator=torch.Generator().manual_seed(5))

    def logprobs_with(scales_dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for name, linear in quantised_linears(trainer, bnb.nn.Linear8bitLt).items():
            values, scales = export.int8_values_and_scales(linear)
            model.get_submodule(name).weight.data = (values * scales.to(scales_dtype).float()[:, None]).bfloat16()
        with torch.no_grad():
            logits = model(token_ids).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])

    difference = (logprobs_with(torch.float32) - logprobs_with(torch.bfloat16)).abs().mean().item()
    print(f"outliers x {outlier_scale:g}: {difference:.4f}")
    assert 0.005 < difference < 0.02


def test_several_shards_hold_the_same_tensors_as_one(int8_teacher, tmp_path, monkeypatch):
    whole = exported(export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "whole", "dequantized"))
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)
    folder = export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "sharded", "dequantized")
    assert len(list(folder.glob("*.safetensors"))) > 3
    sharded = exported(folder)
    assert set(sharded) == set(whole)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, whole["lm_head.weight"])


def test_an_interrupted_export_leaves_nothing_and_keeps_the_previous_one(int8_teacher, tmp_path, monkeypatch):
    folder = export.export_for_vllm(int8_teacher, word_tokenizer(), tmp_path / "out", "dequantized")
    before = exported(folder)

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write_config", fail)
    with pytest.raises(KeyboardInterrupt):
        export.export_for_vllm(int8_teacher, word_tokenizer(), folder, "packed_int8")
    assert list(tmp_path.iterdir()) == [folder]
    assert set(exported(folder)) == set(before)


def test_exports_of_killed_runs_are_removed_whoever_starts_and_those_of_living_ones_kept(tmp_path):
    left = ("generator_base", ".generator_base-ab12")
    for name in ("own", "own.1", "living", "no_run"):
        for folder in left:
            (tmp_path / name / folder).mkdir(parents=True)
        if name != "no_run":
            (tmp_path / name / "config.yaml").touch()
            (tmp_path / name / "generator_base.md").touch()
    locks = [try_lock(tmp_path / name / ".lock") for name in ("own", "living")]
    export.remove_left_exports(tmp_path / "own")
    assert all(lock is not None for lock in locks)
    kept = {path.name for path in tmp_path.iterdir() if any((path / folder).exists() for folder in left)}
    assert kept == {"living", "no_run"}
    assert (tmp_path / "own.1" / "generator_base.md").exists()


def test_packing_a_base_that_is_not_quantised_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="load_in_8bit"):
        export.export_for_vllm(load_quantised(checkpoint, bits=16), word_tokenizer(), tmp_path / "out", "packed_int8")
