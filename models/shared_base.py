"""One quantised base in memory for trainer and generator.

vLLM multiplies q, k and v in one product, and gate and up in another. For an int8 base `share_base` puts the rows of
each into one tensor and makes the trainer's linears views of it; an NF4 base stays as it is, since double quantisation
has one offset per linear and its scales cannot be joined by rows. Embedding and head are shared; norms and biases, a
few hundred kB, are what vLLM copies.

Run it before the engine starts: what is allocated while vLLM loads lies in the memory that vLLM unmaps when it sleeps.
"""

import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
VOCABULARY_MULTIPLE = 64
"""vLLM pads the rows of embedding and head to a multiple of it."""
_NESTED_BLOCK = 256
"""The block of double quantisation that bitsandbytes' product takes."""


class CannotShareError(ValueError):
    """A base that trainer and generator cannot both read where it lies."""


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """One linear of vLLM: weight = values * scb / 127 by rows, of which each of the trainer's `parts` reads a slice."""

    values: Tensor
    """[N out, K in] int8."""
    scb: Tensor
    """[N] float32."""
    parts: tuple[bnb.nn.Linear8bitLt, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.scb

    def is_intact(self) -> bool:
        start = 0
        for part in self.parts:
            rows = slice(start, start + part.out_features)
            read = [part.weight.data, *_held(part, "CB")]
            if any(not _same_memory(tensor, self.values[rows]) for tensor in read):
                return False
            if any(not _same_memory(tensor, self.scb[rows]) for tensor in _held(part, "SCB")):
                return False
            start += part.out_features
        return True


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """The tensors of one 4-bit linear as `bitsandbytes::gemm_4bit` takes them."""

    packed: Tensor
    shape: tuple[int, int]
    """[N out, K in] of the weight that is packed."""
    blocksize: int
    quant_type: str
    absmax: Tensor
    """float32, one value per block of weights, or per block of scales where these are quantised too."""
    absmax_8bit: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_offset: Tensor | None = None

    @classmethod
    def of(cls, linear: bnb.nn.Linear4bit) -> "NF4Weight":
        state = linear.weight.quant_state
        inner = {"absmax": state.absmax}
        if state.nested:
            inner = {
                "absmax": state.state2.absmax,
                "absmax_8bit": state.absmax,
                "absmax_code": state.state2.code,
                "absmax_offset": state.offset,
            }
        return cls(linear.weight.data, tuple(state.shape), state.blocksize, state.quant_type, **inner)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names of the arguments."""
        names = ("packed", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class NF4Layer:
    """One linear of vLLM: the products with the trainer's 4-bit `parts`, side by side."""

    weights: tuple[NF4Weight, ...]
    parts: tuple[bnb.nn.Linear4bit, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for weight in self.weights for tensor in weight.tensors.values())

    def is_intact(self) -> bool:
        now = [tensor for part in self.parts for tensor in NF4Weight.of(part).tensors.values()]
        return len(now) == len(self.tensors) and all(map(_same_memory, now, self.tensors))


@dataclass(slots=True, weakref_slot=True)
class SharedBase:
    """What trainer and generator both read. `ModelHost` makes it and frees it; neither side writes it."""

    layers: dict[str, Int8Layer | NF4Layer] = field(default_factory=dict)
    """The linears, by vLLM's module names."""
    tables: dict[str, tuple[Tensor, nn.Module]] = field(default_factory=dict)
    """Embedding and head: rows [padded vocabulary, hidden], and the trainer's module that reads them."""
    copied: dict[str, Tensor] = field(default_factory=dict)
    """Norms and biases, by the trainer's parameter names."""

    @property
    def nbytes(self) -> int:
        """Bytes that both sides read, each once."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer.tensors]
        tensors += [rows for rows, _ in self.tables.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the trainer reads other memory than the generator by now; says where.
        """
        broken = [name for name, layer in self.layers.items() if not layer.is_intact()]
        broken += [name for name, (rows, table) in self.tables.items() if not _same_start(table.weight, rows)]
        if broken:
            raise RuntimeError(
                f"the trainer does not read the base that the generator reads any more: {', '.join(broken[:3])}"
                + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            )

    def hold_in_place(self, model: Any) -> None:
        """Until this object is gone `model` (with or without peft) refuses to be moved, cast or merged."""
        base, owner = _base_of(model), weakref.ref(self)

        def apply_where_nothing_moves(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
            shared = owner()
            if shared is not None and any(not _same_memory(fn(probe), probe) for probe in shared._probes()):
                raise RuntimeError("the base is shared with a generator that is running: it is not moved or cast")
            return type(module)._apply(module, fn, recurse)

        base._apply = types.MethodType(apply_where_nothing_moves, base)
        if model is not base:
            for name in _MERGES:
                setattr(model.base_model, name, _refuse_to_merge)

    def _probes(self) -> list[Tensor]:
        """One small quantised tensor, and all that a cast would change."""
        smallest = min((layer.tensors[0] for layer in self.layers.values()), key=Tensor.numel)
        return [smallest, *(rows for rows, _ in self.tables.values())]


_MERGES = ("merge_adapter", "merge_and_unload")


def _refuse_to_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError("the base is shared with a generator that is running: no adapter is merged into it")


def share_base(model: Any) -> SharedBase:
    """Make the quantised base of `model` (a causal LM, with or without peft) one that a generator can read as well.

    int8 costs one fused layer of free memory on the way (136 MB on a 7B), and nothing afterwards. Log-probs and
    gradients stay bit-equal.

    Raises:
        CannotShareError: a linear is not quantised, spilled to another device, or belongs to experts. The model is as
            before.
    """
    base = _base_of(model)
    modules = {_without_peft(name): module for name, module in base.named_modules() if not _is_adapter(name)}
    _check_can_share(base, modules)
    shared = SharedBase()
    linears = {name: module for name, module in modules.items() if isinstance(module, _QUANTISED)}
    for layer_name, parts in _fused_linears(linears):
        shared.layers[layer_name] = _share_layer(parts)
        if len(parts) > 1 and parts[0].weight.is_cuda:
            torch.cuda.empty_cache()  # what the parts were in are segments too small for the next layer
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) or module is base.get_output_embeddings():
            shared.tables[name] = (_padded_rows(module, shared), module)
        else:
            quantised = isinstance(module, _QUANTISED)
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if not (quantised and parameter_name == "weight"):
                    shared.copied[f"{name}.{parameter_name}"] = parameter
    shared.check()
    return shared


_QUANTISED = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _without_peft(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _check_can_share(base: Any, modules: dict[str, nn.Module]) -> None:
    """Before anything is changed."""
    head, device = base.get_output_embeddings(), base.get_input_embeddings().weight.device
    if experts := [name for name in modules if "experts" in name.split(".")]:
        raise CannotShareError(f"{experts[0]}: vLLM multiplies experts in another way")
    for name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.device != device:
                raise CannotShareError(f"{name}.{parameter_name} is on {parameter.device}, the embedding on {device}")
            is_plain_matrix = parameter.dim() > 1 and not isinstance(module, (*_QUANTISED, nn.Embedding))
            if is_plain_matrix and module is not head:
                raise CannotShareError(f"{name} is not quantised")
        if isinstance(module, bnb.nn.Linear8bitLt) and module.weight.data.dtype != torch.int8:
            raise CannotShareError(f"{name} has not been quantised yet")
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            if state is None or (state.nested and state.state2.blocksize != _NESTED_BLOCK):
                raise CannotShareError(f"{name} has not been quantised yet, or its scales in other blocks")
    if not any(isinstance(module, _QUANTISED) for module in modules.values()):
        raise CannotShareError("no linear is quantised")


def _fused_linears(linears: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """vLLM's linears: name and the trainer's parts, in the order of their rows."""
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        fused, leaves = next(((fused, leaves) for fused, leaves in _FUSED.items() if leaf in leaves), ("", ()))
        names = [f"{parent}.{part}" for part in leaves]
        if not names or any(part not in linears for part in names):
            yield name, (linear,)
        elif leaf == leaves[0]:
            yield f"{parent}.{fused}", tuple(linears[part] for part in names)


def _share_layer(parts: tuple[Any, ...]) -> Int8Layer | NF4Layer:
    if isinstance(parts[0], bnb.nn.Linear4bit):
        return NF4Layer(tuple(NF4Weight.of(part) for part in parts), parts)
    if len(parts) == 1:
        return Int8Layer(parts[0].weight.data, _held(parts[0], "SCB")[0], parts)
    values = torch.cat([part.weight.data for part in parts])
    scb = torch.cat([_held(part, "SCB")[0] for part in parts])
    start = 0
    for part in parts:
        rows = slice(start, start + part.out_features)
        part.weight.data = values[rows]
        # Before the first forward bitsandbytes keeps both at the weight, afterwards at the linear's state.
        holder = part.weight if part.weight.SCB is not None else part.state
        holder.CB, holder.SCB = values[rows], scb[rows]
        start += part.out_features
    return Int8Layer(values, scb, parts)


def _held(linear: bnb.nn.Linear8bitLt, name: str) -> list[Tensor]:
    """What bitsandbytes holds under a name for a linear, wherever it keeps it by now."""
    held = (getattr(linear.weight, name, None), getattr(linear.state, name, None))
    return [tensor for tensor in held if tensor is not None]


def _padded_rows(table: nn.Module, shared: SharedBase) -> Tensor:
    """All rows that vLLM wants; where some are missing the table becomes a view of a tensor that has them."""
    weight = table.weight
    for rows, other in shared.tables.values():
        if other.weight is weight:
            return rows
    num_missing = -len(weight) % VOCABULARY_MULTIPLE
    if not num_missing:
        return weight.data
    rows = torch.cat([weight.data, weight.data.new_zeros(num_missing, weight.shape[1])])
    weight.data = rows[: len(weight)]
    return rows


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    return _same_start(tensor, other) and tensor.shape == other.shape


def _same_start(tensor: Tensor, other: Tensor) -> bool:
    same_kind = tensor.dtype == other.dtype and tensor.device == other.device
    return same_kind and tensor.data_ptr() == other.data_ptr()
