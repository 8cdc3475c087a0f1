"""Export of the trainer's quantised base, value for value, as a checkpoint that vLLM loads.

Forms of a linear layer with int8 values q [N out, K in] and LLM.int8 scales SCB [N] (weight = q * SCB / 127):

* `packed_int8` (CUDA): compressed-tensors `pack-quantized`, weight-only with 16-bit activations (W8A16): four int8 to
  an int32 along K, scales SCB / 127 in float32, which vLLM keeps in the activations' 16 bits
  (docs/measurements.md). NF4 bases are written the same way in groups of 64, the NF4 block: each of the 16
  NF4 levels (-1 .. 1) becomes round(127 * level), so a value is off by at most 0.4 % of its group's maximum. Where rows
  do not hold whole blocks (a width of 96) the groups are of 32, the least that vLLM's kernels take.
* `dequantized` (CPU, whose vLLM has no 8-bit weight-only kernel): the products, in the model's 16-bit dtype.

Embeddings, head, norms and biases are copied. Adapters of a peft model are left out.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import UserError
from core.locks import is_held
from core.log import log
from runs.run_folder import CONFIG_FILE, LOCK_FILE

EXPORT_FOLDER = "generator_base"
"""In the folder of a run: its teacher's base as vLLM reads it. Made anew by every process, removed at its end."""

ExportForm = Literal["packed_int8", "dequantized"]

_SHARD_BYTES = 2 * 1024**3
_GROUP_SIZES = (64, 32)
"""The NF4 block, and the least that vLLM's kernels (Marlin) take."""


def export_for_vllm(model: Any, tokenizer: Any, folder: Path, form: ExportForm) -> Path:
    """Write the base of `model` (a causal LM, possibly wrapped by peft) and its tokenizer to `folder`.

    An existing `folder` is replaced. The checkpoint appears whole or not at all: it is written beside `folder` and
    renamed. Host memory beyond the model: one shard (2 GiB) plus one layer.

    Raises:
        UserError: `packed_int8` of a base that is not quantised.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantisation = _quantisation_config(base) if form == "packed_int8" else None
    return write_checkpoint(base, tokenizer, folder, exported_tensors(base, form), quantisation)


def write_checkpoint(
    base: Any,
    tokenizer: Any,
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    quantisation: dict[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write `tensors` with the configuration of `base`, the tokenizer and more text files (name -> content).

    An existing `folder` is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        _write_shards(tensors, unfinished)
        _write_config(base, quantisation, unfinished)
        tokenizer.save_pretrained(unfinished)
        for name, text in (files or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    return folder


def remove_left_exports(output_dir: Path) -> None:
    """Remove what killed runs left of their exports: in the folder of this run, and beside it where no run is alive.

    A process that was killed removes nothing, and the same command need not come again.
    """
    parent = output_dir.parent
    for run in parent.iterdir() if os.access(parent, os.R_OK) else [output_dir]:
        left = [run / EXPORT_FOLDER, *run.glob(f".{EXPORT_FOLDER}-*")]
        if not (run / CONFIG_FILE).is_file() or not any(folder.is_dir() for folder in left):
            continue
        if not run.samefile(output_dir) and is_held(run / LOCK_FILE):
            continue
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        log.info("removed the export that a killed run left in %s", run)


def exported_tensors(base: nn.Module, form: ExportForm) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor on the CPU) of every weight of `base`; tied weights appear once."""
    dtype = base.get_input_embeddings().weight.dtype
    group_size = nf4_group_size(base)
    written: set[int] = set()
    for module_name, module in base.named_modules():
        parts = module_name.split(".")
        if any(part.startswith("lora_") for part in parts):
            continue
        prefix = ".".join(part for part in parts if part != "base_layer")
        for name, tensor in _own_tensors(module):
            if id(tensor) in written:
                continue
            written.add(id(tensor))
            if name == "weight" and isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
                for suffix, part in _quantised_weight(module, form, dtype, group_size):
                    yield f"{prefix}.{suffix}", part.cpu()
            else:
                yield f"{prefix}.{name}", tensor.detach().cpu()


def int8_values_and_scales(linear: bnb.nn.Linear8bitLt) -> tuple[Tensor, Tensor]:
    """int8 values [N, K] of an LLM.int8 linear and their float32 scales [N]: weight = values * scales[:, None]."""
    # bitsandbytes moves the scales from the weight to the state on the first forward.
    scb = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return linear.weight.data, scb * (1.0 / 127.0)


def quantised_or_plain_weight(linear: nn.Module) -> Tensor:
    """The weight that a linear layer multiplies with, dequantised where it is quantised, in float32."""
    if isinstance(linear, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
        return _dequantised(linear, torch.float32)
    return linear.weight.detach().float()


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _quantised_weight(
    linear: nn.Module, form: ExportForm, dtype: torch.dtype, group_size: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint tensors (suffix, tensor) that stand for the weight of one quantised linear."""
    if form == "dequantized":
        yield "weight", _dequantised(linear, dtype)
        return
    if isinstance(linear, bnb.nn.Linear8bitLt):
        values, scales = int8_values_and_scales(linear)
        scales = scales[:, None]
    else:
        assert group_size is not None, "_quantisation_config refuses what does not split into groups"
        values, scales = _nf4_as_int8(linear, group_size)
    yield "weight_packed", packed_int32(values)
    yield "weight_scale", scales.contiguous()
    yield "weight_shape", torch.tensor(values.shape)


def nf4_group_size(base: nn.Module) -> int | None:
    """Weights of a row that share a scale in the packed export of a 4-bit base; None: no size divides every width."""
    widths = [m.in_features for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    return next((size for size in _GROUP_SIZES if not any(width % size for width in widths)), None)


def packed_int32(values_NK: Tensor) -> Tensor:
    """int8 values as compressed-tensors packs them, [N, K / 4] int32: value + 128 in a byte, four bytes little-endian.

    Runs where the values are (on a GPU in no time) and takes their size once more; K is a multiple of four.
    """
    return (values_NK.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)


def _dequantised(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    if isinstance(linear, bnb.nn.Linear8bitLt):
        values, scales = int8_values_and_scales(linear)
        return (values.float() * scales[:, None]).to(dtype)
    linear.state_dict()  # undoes the layout that bitsandbytes' CPU kernel gives 4-bit weights on their first forward
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)


def _nf4_as_int8(linear: bnb.nn.Linear4bit, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 values [N, K] and float32 scales [N, K / group_size] of an NF4 (or FP4) linear."""
    weight = _dequantised(linear, torch.float32)
    groups = weight.view(weight.shape[0], -1, group_size)
    scales = groups.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    values = (groups / scales).round_().to(torch.int8).view(weight.shape)
    return values, scales.squeeze(-1)


def _quantisation_config(base: nn.Module) -> dict[str, Any]:
    """compressed-tensors' description of a weight-only 8-bit checkpoint with the linears of `base`."""
    linears = {name.removesuffix(".base_layer"): m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    linears = {name: m for name, m in linears.items() if ".lora_" not in name}
    int8 = {name for name, m in linears.items() if isinstance(m, bnb.nn.Linear8bitLt)}
    nf4 = {name: m for name, m in linears.items() if isinstance(m, bnb.nn.Linear4bit)}
    if not int8 and not nf4:
        raise UserError(
            "an 8-bit export of a base whose linears are not quantised",
            expected="a base loaded with load_in_8bit or load_in_4bit",
            remedy="set model_args.load_in_8bit=true, or generator_weights=bf16",
        )
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    if nf4:
        if (group_size := nf4_group_size(base)) is None:
            raise UserError(
                f"a 4-bit base with input widths of {sorted({m.in_features for m in nf4.values()})}",
                expected=f"widths that are multiples of {_GROUP_SIZES[-1]}",
                remedy="set generator_weights=bf16 or generator=transformers",
            )
        weights |= {"strategy": "group", "group_size": group_size}
    else:
        weights |= {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": sorted(set(linears) - int8 - set(nf4)),
    }


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    shard_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        file_name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = tensor.contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_config(base: Any, quantisation: dict[str, Any] | None, folder: Path) -> None:
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = base.get_input_embeddings().weight.dtype
    if quantisation is not None:
        config.quantization_config = quantisation
    config.save_pretrained(folder)
