"""In-process vLLM on the trainer's own quantised tensors, for real: vLLM's CPU build or a GPU."""

import gc
import importlib.util

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from core.errors import CanaryError, UserError
from core.types import Phase, Role
from data.embedded.model import ensure_tiny_model
from generation import Canary, SamplingSettings, make_generator
from models.host import ModelHost
from models.load import load_tokenizer
from schemas.generation import GenerationConfig
from schemas.model import ModelArgs, ModelConfig
from tests.helpers.planted_outliers import write_planted_model
from tests.test_shared_base import assert_same_step, step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBES = torch.randint(2, 100, (4, 65), generator=torch.Generator().manual_seed(5)).tolist()
SETTINGS = SamplingSettings(temperature=1.0, max_new_tokens=12, stop_token_ids=(1,))
MODELS = [("embedded", "int8"), ("outliers", "int8"), ("outliers, tied", "nf4")]


def load_host(checkpoint, kind):
    args = ModelArgs(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4", lora_r=4, lora_alpha=8)
    host = ModelHost(
        ModelConfig(model_name_or_path=str(checkpoint), model_args=args), roles=[Role.TEACHER], max_score_tokens=512
    )
    torch.manual_seed(1)
    move_adapter(host.teacher, 0.02)
    return host


def move_adapter(teacher, scale):
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter += scale * torch.randn_like(parameter)


def start(host, checkpoint, folder, **settings):
    generator = make_generator(
        GenerationConfig(generator="vllm", vllm_enforce_eager=True, **settings),
        model=host.teacher,
        tokenizer=load_tokenizer(str(checkpoint), ModelArgs()),
        base_checkpoint=str(checkpoint),
        sampling=SETTINGS,
        num_generations=8,
        max_model_len=128,
        export_folder=folder,
        planned_kv_cache_bytes=64_000_000,
        gpu_memory_utilization=0.3,
        share=host.share_base,
    )
    return generator


def vllm_model(generator):
    return generator._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def mean_difference(left, right):
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def bits(host):
    """What must not change by a bit: log-probs, and loss and gradients of a training step."""
    return host.policy_logprobs(PROBES, True), step(host.teacher)


def assert_same_bits(left, right):
    assert left[0] == right[0]
    assert_same_step(left[1], right[1])


class Served:
    """A trainer whose base vLLM served by an export first and reads in place now."""

    def __init__(self, name, kind, folder):
        self.kind, self.export_folder = kind, folder / "shared" / "base"
        self.checkpoint = ensure_tiny_model()
        if name != "embedded":
            planted = {"outlier_scale": 60.0, "bias_scale": 0.3, "num_rows": 100}
            self.checkpoint = write_planted_model(folder / "model", tied="tied" in name, **planted)
        self.host = load_host(self.checkpoint, kind)
        self.before = bits(self.host)
        exported = start(self.host, self.checkpoint, folder / "exported" / "base", generator_base="export")
        exported.sync_adapter(self.host.teacher)
        self.exported_difference = mean_difference(exported.logprobs(PROBES), self.before[0])
        exported.close()
        self.generator = start(self.host, self.checkpoint, self.export_folder, generator_base="shared")
        self.host.attach_engine(self.generator)

    def canary(self):
        return Canary(self.generator, self.host.policy_logprobs, PROBES, tolerance=0.15)


@pytest.fixture(scope="module", params=MODELS, ids=[" ".join(model) for model in MODELS])
def served(request, tmp_path_factory):
    made = Served(*request.param, tmp_path_factory.mktemp("served"))
    yield made
    base = made.host.teacher.get_base_model()
    tensors = (base.get_input_embeddings().weight, base.model.layers[0].mlp.up_proj.base_layer.weight)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
    del tensors, base
    made.host.close()
    made.generator = None
    gc.collect()
    assert all(storage.expired() for storage in storages), "a closed engine still holds the trainer's base"


def test_the_trainers_bits_are_the_same_while_an_engine_reads_its_base(served):
    assert_same_bits(bits(served.host), served.before)


def test_vllm_multiplies_with_the_trainers_own_memory_and_nothing_was_exported(served):
    base = served.host.teacher.get_base_model()
    linears = {name: m for name, m in base.named_modules() if name.endswith("_proj.base_layer")}
    of_trainer = {m.weight.untyped_storage().data_ptr() for m in linears.values()}
    of_trainer |= {base.get_input_embeddings().weight.untyped_storage().data_ptr()}
    of_trainer |= {base.get_output_embeddings().weight.untyped_storage().data_ptr()}
    held = dict(vllm_model(served.generator).named_parameters())
    weights = {name: p for name, p in held.items() if p.dim() > 1}
    assert {p.untyped_storage().data_ptr() for p in weights.values()} == of_trainer
    own_bytes = sum(p.nbytes for p in held.values() if not hasattr(p, "is_adopted"))
    adopted_bytes = sum(p.nbytes for p in held.values() if hasattr(p, "is_adopted"))
    print(f"{served.kind}: {adopted_bytes} bytes of the trainer's, {own_bytes} of vLLM's own")
    assert own_bytes < 0.05 * adopted_bytes
    assert not served.export_folder.exists() and served.generator.shares_trainer_weights


def test_generator_and_trainer_are_as_close_as_with_an_export(served):
    served.generator.sync_adapter(served.host.teacher)
    difference = mean_difference(served.generator.logprobs(PROBES), served.host.policy_logprobs(PROBES, True))
    print(f"{served.kind}: to the trainer {difference:.4f}, exported {served.exported_difference:.4f}")
    assert difference <= 1.1 * served.exported_difference + 1e-3
    assert difference < 0.08


def test_the_canary_passes_swaps_and_stops_a_skipped_one(served):
    canary = served.canary()
    for _ in range(2):
        move_adapter(served.host.teacher, 0.01)
        served.generator.sync_adapter(served.host.teacher)
        with served.host.phase(Phase.GENERATE):
            canary.check()
    move_adapter(served.host.teacher, 0.01)
    with pytest.raises(CanaryError, match="an earlier adapter"):
        canary.check()


def test_sampled_log_probs_are_the_trainers_and_sampling_leaves_its_base_alone(served):
    teacher = served.host.teacher
    served.generator.sync_adapter(teacher)
    before = bits(served.host)
    prompts = [row[:20] for row in PROBES]
    completions = served.generator.generate(prompts, 8, range(32))
    assert served.generator.generate(prompts, 8, range(32)) == completions
    rows = [prompts[row // 8] + list(c.token_ids) for row, c in enumerate(completions)]
    expected = served.host.policy_logprobs(rows, True)
    expected = [values[-len(c.token_ids) :] for values, c in zip(expected, completions, strict=True)]
    assert mean_difference([c.logprobs for c in completions], expected) < 0.08
    assert_same_bits(bits(served.host), before)
    served.host.check_shared_base()


@pytest.mark.gpu
def test_on_a_gpu_next_to_nothing_is_in_the_memory_that_sleeps_and_the_trainers_bits_survive_it(served):
    from vllm.device_allocator.cumem import CuMemAllocator

    allocations = CuMemAllocator.get_instance().pointer_to_data.values()
    weights_bytes = sum(allocation.handle[1] for allocation in allocations if allocation.tag == "weights")
    print(f"{served.kind}: {weights_bytes / 1e6:.0f} MB of weights in vLLM's pool")
    assert weights_bytes < 0.3e9
    served.generator.sync_adapter(served.host.teacher)
    before = bits(served.host)
    with served.host.phase(Phase.GENERATE):
        awake = served.generator.logprobs(PROBES)
    for _ in range(3):
        with served.host.phase(Phase.GENERATE):
            served.host.check_shared_base()
            assert mean_difference(served.generator.logprobs(PROBES), awake) < 1e-3
        assert_same_bits(bits(served.host), before)


def test_a_base_that_vllm_names_otherwise_is_refused_or_exported(served, tmp_path, monkeypatch):
    """And closing an engine leaves the trainer's bits alone."""
    before = bits(served.host)
    served.generator.close()
    served.host._engine = None
    assert_same_bits(bits(served.host), before)
    share = served.host.share_base

    def without_a_layer():
        shared = share()
        del shared.layers["model.layers.1.mlp.down_proj"]
        return shared

    monkeypatch.setattr(served.host, "share_base", without_a_layer)
    with pytest.raises(UserError, match=r"(?s)layers\.1\.mlp\.down_proj is no quantised.*generator_base=export"):
        start(served.host, served.checkpoint, tmp_path / "base", generator_base="shared")
    assert torch.get_default_dtype() == torch.float32
    if served.kind == "nf4":  # one engine more is enough
        monkeypatch.setattr("generation.choose.generator_base_of", lambda *_: "shared")
        generator = start(served.host, served.checkpoint, tmp_path / "base", generator_base="auto")
        assert (tmp_path / "base/config.json").exists()
        generator.sync_adapter(served.host.teacher)
        assert mean_difference(generator.logprobs(PROBES), served.host.policy_logprobs(PROBES, True)) < 0.08
        generator.close()
