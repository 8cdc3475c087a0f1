"""ParkedModel: a frozen model in host memory, copied to the GPU whole or block by block for as long as it is used.

Its tensors lie in the host's bytes as they will lie on the GPU, one behind the other, so that a copy is a handful of
large ones whatever the model is made of. Nothing is ever copied back: the weights are frozen, and the host keeps them.
On a GPU the host's bytes are pinned and a stream of its own copies; on a CPU the same code copies within memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from core.log import log
from core.units import format_gb
from planner.constants import PARKING_SLAB_BYTES

_SLAB_BYTES = int(PARKING_SLAB_BYTES.value)
_ALIGNED_TO = 512
"""As torch's allocator aligns tensors on the GPU."""


@dataclass(frozen=True, slots=True)
class _Parked:
    """A tensor, which others hold too, and where its values lie in its unit."""

    tensor: Tensor
    start: int
    num_bytes: int
    shape: torch.Size

    def values_in(self, unit_bytes: Tensor) -> Tensor:
        return unit_bytes[self.start : self.start + self.num_bytes].view(self.tensor.dtype).view(self.shape)


class _Unit:
    """Tensors that travel together. Tensors that share their memory, as tied ones do, go on sharing it."""

    def __init__(self, tensors: Sequence[Tensor], host_start: int) -> None:
        self.host_start, self.num_bytes, self.parked = host_start, 0, list[_Parked]()
        starts: dict[tuple[int, torch.Size, torch.dtype], int] = {}
        for tensor in tensors:
            key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
            if key not in starts:
                starts[key] = self.num_bytes
                self.num_bytes += -(-tensor.nbytes // _ALIGNED_TO) * _ALIGNED_TO
            self.parked.append(_Parked(tensor, starts[key], tensor.nbytes, tensor.shape))

    def appear(self, unit_bytes: Tensor) -> None:
        for parked in self.parked:
            parked.tensor.data = parked.values_in(unit_bytes)

    def vanish(self) -> None:
        for parked in self.parked:
            parked.tensor.data = torch.empty(0, dtype=parked.tensor.dtype, device=parked.tensor.device)


class _HostBytes:
    """Bytes in host memory, pinned for a GPU, in blocks of a size that torch's allocator does not round up."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        num_slabs = -(-num_bytes // _SLAB_BYTES)
        self._slabs = [torch.empty(_SLAB_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(num_slabs)]

    def write(self, start: int, source: Tensor) -> None:
        for slab, piece in self._pieces(start, source):
            slab.copy_(piece)

    def read(self, start: int, target: Tensor) -> None:
        """On a GPU without waiting for it."""
        for slab, piece in self._pieces(start, target):
            piece.copy_(slab, non_blocking=True)

    def _pieces(self, start: int, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        while done < len(other):
            slab, inside = divmod(start + done, _SLAB_BYTES)
            length = min(len(other) - done, _SLAB_BYTES - inside)
            yield self._slabs[slab][inside : inside + length], other[done : done + length]
            done += length


class ParkedModel:
    """A frozen model that is in host memory from now on; `fetch` and `wait` before it is used, `leave` afterwards.

    Args:
        model: on `device`, frozen; nobody else may move it or hold views of its tensors.
        streamed: only embedding, head and norm come whole; each block comes while the block before it computes, and
            goes once it is done: two blocks on the GPU instead of all, for one copy of all in each forward.
    """

    def __init__(self, model: Any, device: torch.device, *, streamed: bool) -> None:
        self._device, self._streamed = device, streamed
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        blocks = list(model.get_decoder().layers) if streamed else []
        of_blocks = [_tensors_of(block) for block in blocks]
        in_blocks = {id(tensor) for tensors in of_blocks for tensor in tensors}
        whole = [tensor for tensor in _tensors_of(model) if id(tensor) not in in_blocks]
        self._units, start = list[_Unit](), 0
        for tensors in (whole, *of_blocks):
            self._units.append(_Unit(tensors, start))
            start += self._units[-1].num_bytes
        self.num_bytes = start
        self._host = _HostBytes(start, pinned=device.type == "cuda")
        self._ring: list[Tensor] = []
        self._arrived: dict[int, Any] = {}
        self._is_here = False
        for unit in self._units:
            self._store(unit)
        self.leave()
        self._hooks = [
            hook
            for index, block in enumerate(blocks, start=1)
            for hook in (
                block.register_forward_pre_hook(lambda *_, index=index: self._block_begins(index)),
                block.register_forward_hook(lambda *_, index=index: self._units[index].vanish()),
            )
        ]
        how = f"streamed in {len(blocks)} blocks" if streamed else "copied whole"
        log.info("parked in host memory: %s, %s to %s for each use", format_gb(self.num_bytes), how, device)

    @property
    def is_here(self) -> bool:
        """On the GPU, or on its way."""
        return self._is_here

    def fetch(self) -> None:
        """Begin to copy what is used as a whole; nothing waits for it. A second call does nothing."""
        if self._is_here:
            return
        self._is_here = True
        whole = self._units[0]
        target = self._empty(whole.num_bytes)
        self._copy(0, target)
        whole.appear(target)
        if self._streamed:
            largest = max(unit.num_bytes for unit in self._units[1:])
            self._ring = [self._empty(largest) for _ in range(2)]

    def wait(self) -> None:
        """What is launched from now on sees the values; `fetch` first."""
        self._wait(0)

    def leave(self) -> None:
        """Off the GPU; what is launched already still sees the values."""
        for index in list(self._arrived):  # nobody used it: its memory is not taken again before the copy is done
            self._wait(index)
        for unit in self._units:
            unit.vanish()
        self._ring, self._arrived, self._is_here = [], {}, False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of the host's bytes; the model is empty from now on."""
        self.leave()
        for hook in self._hooks:
            hook.remove()
        self._units, self._host = [], _HostBytes(0, pinned=False)

    def _block_begins(self, index: int) -> None:
        """Use the block that was asked for while the one before it computed, and ask for the next one."""
        if index == 1:
            self._copy(1, self._place(1))
        self._wait(index)
        self._units[index].appear(self._place(index))
        if index + 1 < len(self._units):
            self._copy(index + 1, self._place(index + 1))

    def _place(self, index: int) -> Tensor:
        return self._ring[index % 2][: self._units[index].num_bytes]

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _store(self, unit: _Unit) -> None:
        for parked in unit.parked:
            values = parked.tensor.detach().contiguous().view(-1).view(torch.uint8)
            self._host.write(unit.host_start + parked.start, values)

    def _copy(self, index: int, target: Tensor) -> None:
        """After everything that is launched already: it may still read what lay at the target before."""
        unit = self._units[index]
        if self._stream is None:
            self._host.read(unit.host_start, target)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._host.read(unit.host_start, target)
            self._arrived[index] = self._stream.record_event()

    def _wait(self, index: int) -> None:
        if self._stream is not None and index in self._arrived:
            torch.cuda.current_stream(self._device).wait_event(self._arrived.pop(index))


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Every tensor of the weights, bitsandbytes' included.

    Tables of a few values stay where they are: bitsandbytes gives the same one to every model.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt) and module.weight.CB is not None:
            module.init_8bit_state()  # as its first forward does: the scales then stay in one place
        state, quant_state = getattr(module, "state", None), getattr(module, "quant_state", None)
        held = [
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
            *(getattr(state, name, None) for name in ("CB", "SCB")),
            getattr(quant_state, "absmax", None),
            getattr(getattr(quant_state, "state2", None), "absmax", None),
        ]
        found |= {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}
    return list(found.values())
