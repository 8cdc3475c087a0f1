"""vLLM on the trainer's quantised base: a quantisation and a model loader that adopt tensors instead of loading any.

The only file that knows how vLLM builds a model; `tests/test_vllm_hooks.py` pins every hook that it uses. Works with
vLLM 0.26 to 0.32, in the trainer's process alone (VLLM_ENABLE_V1_MULTIPROCESSING=0): tensors are handed over in memory.

Never call the worker's `reset_weights` or `reload_weights`: they would write into the trainer's base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from models.int8_linear import int8_linear
from models.shared_base import CannotShareError, Int8Layer, NF4Layer, NF4Weight, SharedBase

NAME = "shared_base"
_offered: list[SharedBase] = []


@contextmanager
def offered(shared: SharedBase) -> Iterator[Mapping[str, str]]:
    """Within it an engine that is started with the yielded arguments adopts `shared`.

    Raises:
        CannotShareError: from the start of the engine: vLLM has layers that the trainer has not, or of other sizes.
    """
    _offered.append(shared)
    try:
        yield {"quantization": NAME, "load_format": NAME}
    finally:
        _offered.pop()


def _adopt(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter on the trainer's own storage."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.is_adopted = True
    layer.register_parameter(name, parameter)


class _Int8Linear(LinearMethodBase):
    def __init__(self, shared: Int8Layer, prefix: str) -> None:
        self._shared, self._prefix = shared, prefix

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], *_: Any, **__: Any
    ) -> None:
        _check_sizes(self._prefix, self._shared, input_size_per_partition, output_partition_sizes)
        _adopt(layer, "weight", self._shared.values)
        _adopt(layer, "scb", self._shared.scb)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_linear(x, layer.weight, layer.scb, bias)


class _NF4Linear(LinearMethodBase):
    """bitsandbytes' own product, part by part."""

    def __init__(self, shared: NF4Layer, prefix: str) -> None:
        self._shared, self._prefix = shared, prefix

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], *_: Any, **__: Any
    ) -> None:
        _check_sizes(self._prefix, self._shared, input_size_per_partition, output_partition_sizes)
        _adopt(layer, "weight", self._shared.weights[0].packed)  # vLLM's LoRA asks for its device
        for number, weight in enumerate(self._shared.weights):
            for name, tensor in weight.tensors.items():
                _adopt(layer, f"{name}_{number}", tensor)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = self._shared.weights
        biases = [None] * len(weights) if bias is None else bias.split([weight.shape[0] for weight in weights])
        products = [_nf4_product(layer, number, x, biases[number], weights[number]) for number in range(len(weights))]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _nf4_product(layer: nn.Module, number: int, x: Tensor, bias: Tensor | None, weight: NF4Weight) -> Tensor:
    """Tensors are taken from vLLM's layer, whose parameters are what it compiles for."""
    held = {name: getattr(layer, f"{name}_{number}") for name in weight.tensors}
    packed, absmax = held.pop("packed"), held.pop("absmax")
    return torch.ops.bitsandbytes.gemm_4bit(
        x, packed, weight.shape, absmax, weight.blocksize, weight.quant_type, bias=bias, **held
    )


def _check_sizes(prefix: str, shared: Int8Layer | NF4Layer, width: int, wanted: list[int]) -> None:
    sizes = [part.out_features for part in shared.parts]
    fits = sum(sizes) == sum(wanted) if len(sizes) == 1 else sizes == list(wanted)
    if not fits or shared.parts[0].in_features != width:
        raise CannotShareError(
            f"vLLM's {prefix} has {list(wanted)} outputs of {width} inputs, the trainer's {sizes} of "
            f"{shared.parts[0].in_features}"
        )


class _Table(UnquantizedEmbeddingMethod):
    """Embedding or head."""

    def __init__(self, rows: Tensor, prefix: str) -> None:
        self._rows, self._prefix = rows, prefix

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], *_: Any, **__: Any
    ) -> None:
        wanted = (sum(output_partition_sizes), input_size_per_partition)
        if tuple(self._rows.shape) != wanted:
            raise CannotShareError(f"vLLM's {self._prefix} is {wanted}, the trainer's {tuple(self._rows.shape)}")
        _adopt(layer, "weight", self._rows)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: vLLM's CPU build would pack a second copy of the head."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if current_platform.is_cpu():
            return nn.functional.linear(x, layer.weight, bias)
        return super().apply(layer, x, bias)


@register_quantization_config(NAME)
class SharedBaseQuantization(QuantizationConfig):
    """What vLLM asks for the method of each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        if not _offered:
            raise RuntimeError("no base is offered: the engine runs in the trainer's process, within `offered`")
        self._shared = _offered[-1]

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SharedBaseQuantization":
        return cls()

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, *_: Any, **__: Any) -> str | None:
        """Ours, where it was asked for, of a checkpoint that names its own quantisation."""
        return NAME if user_quant == NAME else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding):
            if prefix not in self._shared.tables:
                raise CannotShareError(f"vLLM's {prefix} is no table of the trainer's")
            return _Table(self._shared.tables[prefix][0], prefix)
        if isinstance(layer, LinearBase):
            shared = self._shared.layers.get(prefix)
            if shared is None:
                raise CannotShareError(f"vLLM's {prefix} is no quantised linear of the trainer's")
            return _Int8Linear(shared, prefix) if isinstance(shared, Int8Layer) else _NF4Linear(shared, prefix)
        return None  # attention, whose cache is not quantised by the checkpoint


@register_model_loader(NAME)
class SharedBaseLoader(BaseModelLoader):
    """Copies norms and biases; the rest has been adopted while the model was built."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        copied = _offered[-1].copied
        loaded = set(model.load_weights((name, tensor.detach()) for name, tensor in copied.items()))
        parameters = model.named_parameters()
        missing = [name for name, p in parameters if not hasattr(p, "is_adopted") and name not in loaded]
        if missing:
            raise CannotShareError(f"vLLM's {missing[0]} is no parameter of the trainer's")
