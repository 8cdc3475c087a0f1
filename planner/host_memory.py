"""Host RAM of a run on a GPU: the pinned memory that torch takes for what leaves the GPU for a while.

torch's host allocator rounds every block up to a power of two, keeps it for the next block of that size, and gives none
back to the system (`ATen/core/CachingHostAllocator.h`, torch 2.11 to 2.13).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.components import LINEAR_BYTES, NF4_BLOCK, rope_values
from planner.constants import PARKING_SLAB_BYTES
from planner.settings import PlanSettings

if TYPE_CHECKING:
    from planner.teacher import TeacherSettings

_MIB = 1 << 20
_SMALL_TENSOR, _SMALL_SEGMENT = 1 * _MIB, 2 * _MIB
_MEDIUM_TENSOR, _MEDIUM_SEGMENT = 10 * _MIB, 20 * _MIB
_ROUNDED_TO = 2 * _MIB
"""How torch's allocator of the GPU lays tensors into segments; vLLM copies whole segments when it falls asleep."""


def pinned_bytes(num_bytes: float) -> int:
    """The block that torch's host allocator takes for a request: the next power of two."""
    return 1 << (max(1, round(num_bytes)) - 1).bit_length()


def host_components(settings: PlanSettings) -> dict[str, float]:
    """Bytes by what the training step of any method puts into pinned host memory."""
    if settings.checkpointing != "layers_offloaded":
        return {}
    return {"offloaded layer inputs": _offloaded_bytes(settings)}


def sleeping_vllm_bytes(settings: "TeacherSettings") -> float:
    """vLLM's weights and adapter slot, one block for each segment that they lie in."""
    small = medium = pinned = 0.0
    for count, size in vllm_tensors(settings):
        if size <= _SMALL_TENSOR:
            small += count * size
        elif size < _MEDIUM_TENSOR:
            medium += count * size
        else:
            pinned += count * pinned_bytes(-(-size // _ROUNDED_TO) * _ROUNDED_TO)
    for total, segment in ((small, _SMALL_SEGMENT), (medium, _MEDIUM_SEGMENT)):
        pinned += -(-total // segment) * pinned_bytes(segment)
    return pinned


def vllm_tensors(settings: "TeacherSettings") -> Iterator[tuple[int, float]]:
    """Number and bytes of vLLM's tensors: it joins q, k, v and gate, up; scales, norms, and one LoRA slot.

    Of a base that it shares with the trainer none is vLLM's own.
    """
    shape, precision = settings.teacher, settings.generator_precision
    widths = {name: n_out for name, (_, n_out) in shape.linears.items()}
    joined = [
        (shape.hidden, widths["q_proj"] + widths["k_proj"] + widths["v_proj"]),
        (shape.q_dim, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    ]
    for n_in, n_out in () if settings.shares_base else joined:
        yield shape.num_layers, n_in * n_out * LINEAR_BYTES[precision]
        if precision == "int8_groups":
            yield shape.num_layers, 2 * n_in * n_out / NF4_BLOCK
        elif precision in ("int8", "fp8"):
            yield shape.num_layers, 4.0 * n_out
    width = 4 if precision == "fp32" else 2
    if settings.shares_base:
        yield 1, float(width * rope_values(shape))
    else:
        yield 1 if shape.tied_embeddings else 2, float(width * shape.vocab * shape.hidden)
    yield 1, float(width * shape.num_small_params)
    for name in settings.lora_targets or tuple(shape.linears):
        for side in shape.linears[name]:
            yield shape.num_layers, 2.0 * settings.lora_r * side


def parked_bytes(num_bytes: float) -> float:
    """A parked student, in blocks that are powers of two already."""
    return -(-num_bytes // PARKING_SLAB_BYTES.value) * PARKING_SLAB_BYTES.value


def _offloaded_bytes(settings: PlanSettings) -> float:
    """One layer's input for each layer, and the final norm's in float32.

    Twice that, because rows of other lengths come along: each halving of the size takes blocks of its own, all of them
    together as much as the largest.
    """
    num_values = settings.teacher.hidden * settings.micro_batch * settings.row_len
    layers = settings.teacher.num_layers * pinned_bytes(settings.layer_input_width * num_values)
    return 2.0 * (layers + pinned_bytes(4 * num_values))
