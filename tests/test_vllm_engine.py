"""In-process vLLM on the export of the trainer's base, for real: this file runs on vLLM's CPU build or on a GPU."""

import importlib.util
import json
import os
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import models.export as export
from core.errors import CanaryError
from core.types import Phase
from generation import Canary, SamplingSettings, make_generator
from generation.vllm_engine import BaseForVLLM, VLLMEngineConfig, VLLMGenerator
from models.memory_retries import MemoryRetries
from models.meter import PhaseMeter
from schemas.generation import GenerationConfig
from tests.helpers.planted_outliers import load_quantised, word_tokenizer, write_planted_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 6, 7, 8, 9], [20, 21]]
SETTINGS = SamplingSettings(temperature=0.7, max_new_tokens=12, stop_token_ids=tuple(range(0, 128, 16)))
PROBES = torch.randint(2, 128, (4, 65), generator=torch.Generator().manual_seed(5)).tolist()


def lora_teacher(checkpoint, bits):
    """A quantised base on the device under an adapter that does something."""
    torch.manual_seed(1)
    teacher = get_peft_model(
        load_quantised(checkpoint, bits, device=DEVICE), LoraConfig(r=4, target_modules="all-linear")
    )
    move_adapter(teacher, 0.02)
    return teacher.eval()


def move_adapter(teacher, scale):
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter += scale * torch.randn_like(parameter)


def trainer_logprobs(teacher, rows, temperature=1.0):
    """[len(row) - 1] log-probs of each row, one row at a time."""
    values = []
    for row in rows:
        token_ids = torch.tensor([row], device=DEVICE)
        with torch.no_grad():
            logprobs = (teacher(token_ids).logits[0, :-1].float() / temperature).log_softmax(-1)
        values.append(logprobs.gather(-1, token_ids[0, 1:, None]).squeeze(-1).tolist())
    return values


def mean_difference(left, right):
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def start(checkpoint, weights="under test"):
    config = VLLMEngineConfig(
        base=BaseForVLLM(checkpoint=str(checkpoint), weights=weights, shares_trainer_weights=True),
        dtype="bfloat16",
        on_gpu=DEVICE == "cuda",
        max_model_len=128,
        rows_per_call=16,
        max_lora_rank=8,
        kv_cache_bytes=64_000_000,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
    )
    return VLLMGenerator(config, SETTINGS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_planted_model(tmp_path_factory.mktemp("model"), outlier_scale=1.0)


@pytest.fixture(scope="module")
def teacher(checkpoint):
    return lora_teacher(checkpoint, bits=8)


@pytest.fixture(scope="module")
def generator(checkpoint, teacher, tmp_path_factory):
    """The one engine that most tests share, as the configuration makes it."""
    made = make_generator(
        GenerationConfig(generator="vllm", vllm_enforce_eager=True),
        model=teacher,
        tokenizer=word_tokenizer(),
        base_checkpoint=str(checkpoint),
        sampling=SETTINGS,
        num_generations=8,
        max_model_len=512,
        export_folder=tmp_path_factory.mktemp("export") / "base",
        planned_kv_cache_bytes=64_000_000,
        gpu_memory_utilization=0.3,
    )
    assert made.shares_trainer_weights
    yield made
    made.close()


def test_starting_leaves_random_generators_thread_settings_precision_and_preloads_alone(checkpoint):
    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.set_num_threads.__name__,
            torch.get_float32_matmul_precision(),
            os.environ.get("LD_PRELOAD"),
        )

    torch.manual_seed(77)
    random.seed(78)
    np.random.seed(79)
    torch.set_float32_matmul_precision("high")
    before = state()
    engine = start(checkpoint)
    try:
        assert state() == before
    finally:
        engine.close()
        torch.set_float32_matmul_precision("highest")
    assert not engine._adapter_folder.path.exists()


def test_logprobs_are_the_trainers_after_every_swap(generator, teacher):
    for _ in range(3):
        before = generator.logprobs(PROBES)
        move_adapter(teacher, 0.02)
        generator.sync_adapter(teacher)
        after, expected = generator.logprobs(PROBES), trainer_logprobs(teacher, PROBES)
        assert mean_difference(before, after) > 0.05
        assert mean_difference(after, expected) < 0.03


def test_sampled_logprobs_are_the_trainers_at_the_sampling_temperature(generator, teacher):
    generator.sync_adapter(teacher)
    completions = generator.generate(PROMPTS, 8, range(16))
    rows = [PROMPTS[row // 8] + completion.token_ids for row, completion in enumerate(completions)]
    expected = trainer_logprobs(teacher, rows, SETTINGS.temperature)
    expected = [values[-len(c.token_ids) :] for values, c in zip(expected, completions, strict=True)]
    assert mean_difference([c.logprobs for c in completions], expected) < 0.05


def test_a_row_depends_on_its_prompt_and_seed_and_not_on_the_rest_of_the_batch(generator, teacher):
    generator.sync_adapter(teacher)
    seeds, random_state = list(range(100, 116)), torch.get_rng_state()
    together = generator.generate(PROMPTS, 8, seeds)
    again = generator.generate(PROMPTS, 8, seeds)
    second_prompt_alone = generator.generate(PROMPTS[1:], 4, seeds[8:12])
    assert together == again
    assert [c.token_ids for c in together[8:12]] == [c.token_ids for c in second_prompt_alone]
    assert len({tuple(c.token_ids) for c in together}) > 8
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_row_ends_with_the_first_stop_token_or_at_the_length_limit(generator):
    completions = generator.generate(PROMPTS, 16, range(32))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        stops = [token for token in completion.token_ids if token in SETTINGS.stop_token_ids]
        if completion.finish_reason == "stop":
            assert stops == completion.token_ids[-1:]
        else:
            assert not stops
            assert len(completion.token_ids) == SETTINGS.max_new_tokens
        assert len(completion.logprobs) == len(completion.token_ids)


def test_progress_is_reported_up_to_the_last_row(generator):
    reports = []
    generator.generate(PROMPTS * 3, 2, range(12), lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports)
    assert reports[-1] == (12, 12)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs compiled kernels")
def test_a_cpu_compiles_nothing_while_it_samples(generator):
    compiled = []

    @torch.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    def double(x):
        return 2 * x

    generator.generate(PROMPTS, 1, range(2), lambda *_: double(torch.ones(3)))
    assert not compiled


@pytest.mark.parametrize("where", ["_model_forward", "_sample"])
def test_rows_that_ran_out_of_memory_are_sampled_again_fewer_at_once(where, generator, teacher, monkeypatch):
    """Prompts of more than a block: vLLM has entered them among the cached prefixes before it computes them."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    drawn = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 128, (length,), generator=drawn).tolist() for length in (300, 200)]
    generator.sync_adapter(teacher)
    expected = generator.generate(prompts, 8, range(16))
    generator._llm.llm_engine.reset_prefix_cache()
    original, calls = getattr(GPUModelRunner, where), []

    def failing(self, *args, **keywords):
        calls.append(len(calls) + 1)
        if len(calls) in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args, **keywords)

    retries = MemoryRetries(PhaseMeter(torch.device(DEVICE)), max_retries=2)
    monkeypatch.setattr(GPUModelRunner, where, failing)
    monkeypatch.setattr(generator, "_retries", retries)
    found = generator.generate(prompts, 8, range(16))
    assert retries.limits == {Phase.GENERATE: 4}
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert mean_difference([c.logprobs for c in found], [c.logprobs for c in expected]) < 0.02


def test_a_prefix_cached_under_the_previous_adapter_is_not_served_to_the_next(generator, teacher):
    prompt = torch.randint(2, 128, (100,), generator=torch.Generator().manual_seed(6)).tolist()
    generator.sync_adapter(teacher)
    generator.generate([prompt], 1, [0])
    move_adapter(teacher, 0.05)
    generator.sync_adapter(teacher)
    completion = generator.generate([prompt], 1, [0])[0]
    expected = trainer_logprobs(teacher, [prompt + completion.token_ids], SETTINGS.temperature)[0]
    assert mean_difference([completion.logprobs], [expected[len(prompt) - 1 :]]) < 0.05


def test_the_canary_passes_swaps_and_wake_ups_and_stops_a_skipped_swap(generator, teacher):
    def logprobs(rows, adapter_on):
        if adapter_on:
            return trainer_logprobs(teacher, rows)
        with teacher.disable_adapter():
            return trainer_logprobs(teacher, rows)

    canary = Canary(generator, logprobs, PROBES, tolerance=0.15)
    for _ in range(3):
        move_adapter(teacher, 0.005)
        generator.sync_adapter(teacher)
        canary.check()
        generator.sleep()
        generator.wake()
        canary.check()
    move_adapter(teacher, 0.005)
    with pytest.raises(CanaryError, match="an earlier adapter"):
        canary.check()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: vLLM's CPU build does not sleep")
def test_sleep_gives_weights_and_cache_back_and_waking_restores_the_policy(generator, teacher):
    generator.sync_adapter(teacher)
    before, free_bytes = generator.logprobs(PROBES), torch.cuda.mem_get_info()[0]
    generator.sleep()
    assert torch.cuda.mem_get_info()[0] - free_bytes > 50_000_000
    generator.wake()
    assert mean_difference(generator.logprobs(PROBES), before) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: vLLM quantises to fp8 on a GPU only")
def test_an_fp8_base_serves_the_adapter_and_says_that_its_weights_differ(checkpoint, teacher, tmp_path):
    made = make_generator(
        GenerationConfig(generator="vllm", generator_weights="fp8", vllm_enforce_eager=True),
        model=teacher,
        tokenizer=word_tokenizer(),
        base_checkpoint=str(checkpoint),
        sampling=SETTINGS,
        num_generations=8,
        max_model_len=128,
        export_folder=tmp_path / "base",
        planned_kv_cache_bytes=64_000_000,
        gpu_memory_utilization=0.3,
    )
    assert not made.shares_trainer_weights
    made.sync_adapter(teacher)
    logprobs = made.logprobs(PROBES)
    made.close()
    assert mean_difference(logprobs, trainer_logprobs(teacher, PROBES)) < 0.3


def write_w8a8(source, folder):
    """The packed export's int8 values as a compressed-tensors checkpoint with per-token int8 activations."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = load_file(source / "model-00001.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        shape = torch.Size(tensors.pop(f"{module}.weight_shape").tolist())
        tensors[f"{module}.weight"] = unpack_from_int32(tensors.pop(name), 8, shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    quantisation = config["quantization_config"]
    group = quantisation["config_groups"]["group_0"]
    quantisation["format"] = group["format"] = "int-quantized"
    group["input_activations"] = group["weights"] | {"strategy": "token", "dynamic": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("outlier_scale", [60.0, 400.0])
@pytest.mark.parametrize(
    ("served", "least", "most"),
    [
        ("int8 values, 16-bit activations", 0.0, 0.08),
        ("int8 values, int8 activations", 3 * 0.08, 10.0),
        ("original bf16", 0.0, 10.0),  # for docs/measurements.md
    ],
)
def test_with_outlier_channels_the_exported_values_agree_with_the_trainer_and_w8a8_does_not(
    tmp_path, outlier_scale, served, least, most, monkeypatch
):
    import vllm

    checkpoint = write_planted_model(tmp_path / "model", outlier_scale)
    trainer = load_quantised(checkpoint, bits=8, device=DEVICE)
    expected = trainer_logprobs(trainer, PROBES)
    folder = checkpoint
    if served == "int8 values, 16-bit activations":
        form = "packed_int8" if DEVICE == "cuda" else "dequantized"
        folder = export.export_for_vllm(trainer, word_tokenizer(), tmp_path / "export", form)
    elif served == "int8 values, int8 activations":
        packed = export.export_for_vllm(trainer, word_tokenizer(), tmp_path / "export", "packed_int8")
        folder = write_w8a8(packed, tmp_path / "w8a8")
    # No adapter is in play, and on CPUs without AMX vLLM cannot put one on W8A8 layers (their weight is gone by then).
    make_engine = vllm.LLM
    monkeypatch.setattr(vllm, "LLM", lambda **settings: make_engine(**settings | {"enable_lora": False}))
    engine = start(folder, served)
    logprobs = engine.logprobs(PROBES)
    engine.close()
    difference = mean_difference(logprobs, expected)
    print(f"{served}, outliers x {outlier_scale:g}: {difference:.4f}")
    if served == "original bf16":
        bf16 = trainer_logprobs(load_quantised(checkpoint, bits=16, device=DEVICE), PROBES)
        print(f"bf16 against bf16, outliers x {outlier_scale:g}: {mean_difference(logprobs, bf16):.4f}")
    assert least <= difference <= most


def test_a_4_bit_base_agrees_with_its_trainer(checkpoint, tmp_path):
    trainer = lora_teacher(checkpoint, bits=4)
    form = "packed_int8" if DEVICE == "cuda" else "dequantized"
    engine = start(export.export_for_vllm(trainer, word_tokenizer(), tmp_path / "base", form))
    engine.sync_adapter(trainer)
    logprobs = engine.logprobs(PROBES)
    engine.close()
    assert mean_difference(logprobs, trainer_logprobs(trainer, PROBES)) < 0.05


def test_vllm_reads_the_packed_export_as_weight_only_8_bit(teacher, tmp_path):
    """vLLM's own reading of the configuration; the kernels behind it need a GPU."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    folder = export.export_for_vllm(teacher, word_tokenizer(), tmp_path / "packed", "packed_int8")
    config = CompressedTensorsConfig.from_config(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    scheme = config.target_scheme_map["Linear"]
    assert (scheme["weights"].num_bits, scheme["weights"].strategy, scheme["input_activations"]) == (8, "channel", None)
    assert config.quant_format == "pack-quantized"
    assert config.ignore == ["lm_head"]
