"""Constants of the memory model: every number that is not arithmetic, with how it is known, GPU and date.

`assumed` figures are to be replaced by measured ones: `make gpu` proposes them (part c of benchmarks/gpu).
"""

from dataclasses import dataclass
from typing import Literal

from core.errors import UserError

MAX_CPU_AUTO_BYTES = 4_000_000_000
"""`device_map: auto` falls back to the CPU only for runs that plan to stay below this: a 7B run there takes months."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    value: float
    label: Literal["measured", "simulated", "assumed", "from source"]
    card: str
    """GPU or library that the figure was taken from."""
    date: str
    note: str


USABLE_FRAC = Constant(
    value=0.97,
    label="assumed",
    card="any",
    date="2026-11",
    note="share of the bytes that the driver reports which a run may plan for",
)
CUDA_CONTEXT_BYTES = Constant(
    value=0.5e9,
    label="assumed",
    card="any",
    date="2026-11",
    note="CUDA context, cuBLAS handles and workspaces of the one process",
)
VLLM_ASLEEP_BYTES = Constant(
    value=0.4e9,
    label="assumed",
    card="any",
    date="2026-11",
    note="kept by a sleeping vLLM outside its pools (774 MiB with graphs, 1B model: NeMo-RL#223)",
)
CUDA_GRAPH_BYTES = Constant(
    value=0.6e9,
    label="assumed",
    card="any",
    date="2026-11",
    note="captured graphs and their pool; kept while asleep, absent with vllm_enforce_eager",
)
VLLM_BATCHED_TOKENS = Constant(
    value=8192,
    label="from source",
    card="generation/vllm_engine.py",
    date="2026-11",
    note="max_num_batched_tokens that the engine is given, the size of its profiling run",
)
INT8_CHUNK_BYTES = Constant(
    value=64 * 2**20,
    label="from source",
    card="models/int8_linear.py",
    date="2026-11",
    note="rows of an int8 matrix that the generator widens at once",
)
PARKING_SLAB_BYTES = Constant(
    value=64 * 2**20,
    label="from source",
    card="models/parking.py",
    date="2026-11",
    note="pinned blocks that a parked student lies in",
)
CANARY_TOKENS = Constant(
    value=256, label="from source", card="trainers/build.py", date="2026-11", note="tokens that the canary scores"
)
FRAGMENTATION_FRAC = Constant(
    value=0.20,
    label="simulated",
    card="allocator model",
    date="2026-11",
    note="reserved over allocated bytes of what comes and goes, default allocator, varying lengths",
)
EXPANDABLE_FRAGMENTATION_FRAC = Constant(
    value=0.06,
    label="simulated",
    card="allocator model",
    date="2026-11",
    note="the same with PYTORCH_ALLOC_CONF=expandable_segments:True",
)
SCORE_BATCH_TOKENS = Constant(
    value=16384,
    label="from source",
    card="rollout/logprobs.py",
    date="2026-11",
    note="padded tokens of a scoring batch",
)
HEAD_CHUNK_TOKENS = Constant(
    value=256, label="from source", card="rollout/logprobs.py", date="2026-11", note="tokens whose logits live at once"
)
HEAD_TILE_TOKENS = Constant(
    value=4096, label="from source", card="trl 1.16", date="2026-11", note="rows of the tile of logits of TRL's head"
)
HEAD_TILE_COLUMNS = Constant(
    value=32768, label="from source", card="trl 1.16", date="2026-11", note="columns of that tile"
)

ALL_CONSTANTS = {name.lower(): value for name, value in list(globals().items()) if isinstance(value, Constant)}


def usable_bytes(gpu_bytes: int) -> int:
    """Bytes that a run may plan for: 97 % of what the driver reports."""
    return int(gpu_bytes * USABLE_FRAC.value)


VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def lora_rank_slot(rank: int) -> int:
    """The smallest adapter slot that vLLM offers for this rank.

    Raises:
        UserError: no slot is large enough.
    """
    if rank > VLLM_LORA_RANKS[-1]:
        raise UserError(
            f"model_args.lora_r={rank} with generator=vllm",
            expected=f"a rank of at most {VLLM_LORA_RANKS[-1]}",
            remedy=f"set model_args.lora_r={VLLM_LORA_RANKS[-1]} or less, or generator=transformers",
        )
    return next(slot for slot in VLLM_LORA_RANKS if slot >= rank)
