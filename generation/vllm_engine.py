"""vLLM in the training process: the trainer's base once, its LoRA adapter swapped in before each generation phase.

Works with vLLM 0.26 to 0.32, CUDA and CPU builds. Letters: see `generation.base`.
"""

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft import get_peft_model_state_dict

from core.log import log, long_work
from core.types import UnmappedMemory
from core.units import format_gb
from generation.adapter_folder import AdapterFolder
from generation.base import ProgressCallback, RowsAtOnce, SamplingSettings, sample_in_calls
from models.memory_retries import MemoryRetries
from models.shared_base import SharedBase
from optimization.gpu import free_and_total_bytes
from planner.constants import VLLM_BATCHED_TOKENS
from rollout.types import Completion

_MIN_BATCHED_TOKENS_ON_CPU = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseForVLLM:
    """A checkpoint for vLLM, or the trainer's base itself, and what it holds."""

    checkpoint: str
    """Folder or hub id that vLLM loads."""
    weights: str
    """What those weights are, in words for the log."""
    shares_trainer_weights: bool
    shared_base: SharedBase | None = None
    """The trainer's base, which is served where it lies; of `checkpoint` the configuration alone is read then."""
    quantization: Literal["fp8"] | None = None
    """Quantise on the fly while loading; None loads the checkpoint as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMEngineConfig:
    """Settings of the engine."""

    base: BaseForVLLM
    dtype: str
    """Dtype of activations and unquantised weights."""
    on_gpu: bool
    """Whether this is vLLM's CUDA build and runs on the GPU."""
    max_model_len: int
    """Prompt and completion together, in tokens."""
    rows_per_call: int
    """Rows handed to the engine at once, and decoded at the same time where the KV cache holds them."""
    max_lora_rank: int | None
    """Slot of the adapter; None: the base alone is served, and never sleeps."""
    kv_cache_bytes: int
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    gpu_memory_utilization: float
    """Share of the GPU that the engine may take in all; `kv_cache_bytes` is to fit in it. Unused on a CPU."""
    enforce_eager: bool = False
    """No CUDA graphs. Always so on a CPU."""
    trust_remote_code: bool = False


class VLLMGenerator:
    """A `Generator` on in-process vLLM. It owns the engine's KV cache, a folder with the adapter, and its base if it
    has one of its own."""

    name = "vllm"

    def __init__(
        self, config: VLLMEngineConfig, sampling: SamplingSettings, retries: MemoryRetries | None = None
    ) -> None:
        self.weights, self.shares_trainer_weights = config.base.weights, config.base.shares_trainer_weights
        self.sampling = sampling
        self._rows_per_call, self._retries = config.rows_per_call, retries
        self._on_gpu, self._dtype = config.on_gpu, getattr(torch, config.dtype)
        self._adapter_folder = AdapterFolder()
        self._reads_trainers_base = config.base.shared_base is not None
        self._adapter_request: Any = None
        self._num_swaps = self._num_requests = 0
        self._asleep = False
        self._unmapped = UnmappedMemory()
        where = "the GPU (weights, compiled kernels, graphs: minutes at first)" if config.on_gpu else "the CPU"
        with _process_state_preserved(), long_work(f"starting vLLM on {where}"):
            self._llm = _start_engine(config)
        self._count_unmapped()

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        num_generations: int,
        seeds: Sequence[int],
        on_progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`. A row's tokens depend on its prompt, its seed and the adapter.

        On a shared int8 base also on how many rows are decoded at once: few and many are rounded at other places.
        """
        num_done = 0

        def report(num_finished: int) -> None:
            if on_progress is not None:
                on_progress(num_done + num_finished, len(seeds))

        def sample(rows: RowsAtOnce) -> list[Completion]:
            nonlocal num_done
            prompts = [prompt for prompt in rows.prompts for _ in range(rows.num_generations)]
            outputs = self._run(prompts, [self._sampling_params(seed) for seed in rows.seeds], report)
            num_done += len(outputs)
            return [_completion(output, seed) for output, seed in zip(outputs, rows.seeds, strict=True)]

        return sample_in_calls(
            sample,
            prompt_token_ids,
            num_generations,
            seeds,
            rows_per_call=self._rows_per_call,
            retries=self._retries,
        )

    def sync_adapter(self, model: Any) -> None:
        """See `Generator.sync_adapter`. Costs one save to shared memory and one load by vLLM.

        In the engine's dtype, to which vLLM would round it; the base, which peft would collect too, is left out.
        """
        adapter_name = model.active_adapter
        own = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
        state = get_peft_model_state_dict(model, own, adapter_name=adapter_name, save_embedding_layers=False)
        state = {name: tensor.to(self._dtype).cpu().contiguous() for name, tensor in state.items()}
        model.peft_config[adapter_name].save_pretrained(self._adapter_folder.save(state))
        self._load_adapter()

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Generator.logprobs`."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._run(rows, [params] * len(rows))
        return [
            [position[token_id].logprob for token_id, position in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
            for row, output in zip(rows, outputs, strict=True)
        ]

    def sleep(self) -> None:
        """See `Generator.sleep`; on a CPU there is nothing to give back. Cached prefixes are dropped with the cache.

        An engine that reads the trainer's base gives its KV cache back and nothing else.
        """
        if self._on_gpu and not self._asleep:
            if self._reads_trainers_base:
                _release_kv_cache(self._llm)
            else:
                self._llm.sleep(level=1)
            self._asleep = True
            self._count_unmapped()

    def wake(self) -> None:
        """See `Generator.wake`. The adapter is loaded anew: its slot does not reliably survive a sleep."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
            self._count_unmapped()
            if self._adapter_request is not None:
                self._load_adapter()

    def unmapped_memory(self) -> UnmappedMemory:
        """See `Generator.unmapped_memory`; counted at each change, as reading the allocator takes milliseconds."""
        return self._unmapped

    def close(self) -> None:
        """See `Generator.close`.

        The engine is woken first: freeing what is unmapped leaves an error in CUDA that the next engine of the process
        takes for its own out-of-memory (vllm#36651). Where the GPU is too full for that, as after an out-of-memory of
        the trainer, the engine is left to the end of the process.
        """
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._adapter_folder.cleanup()
        if self._asleep:
            torch.cuda.empty_cache()
            needed_bytes, (free_bytes, _) = self._unmapped.reserved_bytes, free_and_total_bytes()
            if free_bytes < needed_bytes:
                needed, free = format_gb(needed_bytes), format_gb(free_bytes)
                log.warning("vLLM ends with this process: waking it to free it takes %s, and %s are free", needed, free)
                return
            self._llm.wake_up()
            self._asleep = False
        self._unmapped = UnmappedMemory()
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _count_unmapped(self) -> None:
        if self._on_gpu:
            from vllm.device_allocator.cumem import CuMemAllocator

            allocations = CuMemAllocator.get_instance().pointer_to_data
            self._unmapped = _unmapped_memory(torch.cuda.memory_snapshot(), allocations)

    def _load_adapter(self) -> None:
        """Put the saved adapter in the engine's one slot.

        Under a new id and name each time: vLLM keys both loaded adapters and cached prefixes by them, and would go on
        serving the old ones.
        """
        from vllm.lora.request import LoRARequest

        engine = self._llm.llm_engine
        if self._adapter_request is not None:
            engine.remove_lora(self._adapter_request.lora_int_id)
        self._num_swaps += 1
        self._adapter_request = LoRARequest(f"step-{self._num_swaps}", self._num_swaps, str(self._adapter_folder.path))
        if not engine.add_lora(self._adapter_request):
            raise RuntimeError(f"vLLM did not load adapter {self._num_swaps} from {self._adapter_folder.path}")

    def _sampling_params(self, seed: int) -> Any:
        from vllm import SamplingParams

        settings = self.sampling
        return SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=list(settings.stop_token_ids),
            ignore_eos=True,
            seed=seed,
            logprobs=0,
            detokenize=False,
        )

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Requests through the engine until all are done; outputs in the order of the prompts.

        After an error none of them is left in the engine, which can be used again. vLLM draws from torch's global
        generator even where every row has a seed; that is undone.
        """
        engine = self._llm.llm_engine
        first = self._num_requests
        self._num_requests += len(prompts)
        for offset, (token_ids, request_params) in enumerate(zip(prompts, params, strict=True)):
            prompt = {"prompt_token_ids": list(token_ids)}
            engine.add_request(str(first + offset), prompt, request_params, lora_request=self._adapter_request)
        outputs: dict[int, Any] = {}
        try:
            with torch.random.fork_rng(), _compiled_as_started(self._on_gpu):
                while engine.has_unfinished_requests():
                    finished = {int(output.request_id): output for output in engine.step() if output.finished}
                    outputs |= finished
                    if finished and on_finished is not None:
                        on_finished(len(outputs))
        except Exception:
            self._drop_requests([str(first + offset) for offset in range(len(prompts))])
            raise
        return [outputs[first + offset] for offset in range(len(prompts))]

    def _drop_requests(self, request_ids: list[str]) -> None:
        """Take requests out of the engine after an error.

        vLLM enters a prompt's blocks among the cached prefixes before they are computed: those are forgotten too.
        """
        engine = self._llm.llm_engine
        engine.abort_request(request_ids)
        engine.reset_prefix_cache()


def _unmapped_memory(segments: Sequence[Mapping[str, Any]], allocations: Mapping[int, Any]) -> UnmappedMemory:
    """Memory that torch counts in vLLM's pools although it is not on the GPU.

    vLLM unmaps behind torch's back: every allocation of a pool while it sleeps, and for good, dropping it from its own
    books, what was free in a pool when loading was done.

    Args:
        segments: `torch.cuda.memory_snapshot()`.
        allocations: `CuMemAllocator.pointer_to_data` of vLLM 0.26 to 0.32: address -> allocation with `is_asleep`.
    """
    pools = {segment["segment_pool_id"] for segment in segments if segment["address"] in allocations}
    unmapped = [
        segment
        for segment in segments
        if segment["segment_pool_id"] in pools
        and (segment["address"] not in allocations or allocations[segment["address"]].is_asleep)
    ]
    return UnmappedMemory(
        allocated_bytes=sum(segment["allocated_size"] for segment in unmapped),
        reserved_bytes=sum(segment["total_size"] for segment in unmapped),
    )


def _completion(output: Any, seed: int) -> Completion:
    sampled = output.outputs[0]
    token_ids = list(sampled.token_ids)
    logprobs = [position[token_id].logprob for token_id, position in zip(token_ids, sampled.logprobs, strict=True)]
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason=sampled.finish_reason, seed=seed)


def _start_engine(config: VLLMEngineConfig) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process; read when vLLM is imported
    # The variable counts once vLLM has set up its logger, the level until then.
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    # Pages of configuration and token ids at each error of a step, which is caught or has a traceback of its own.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    # vLLM switches expandable segments off for the memory that sleeps; 0.26 looks for them under the older name alone.
    if "PYTORCH_ALLOC_CONF" in os.environ:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"]
    from vllm import LLM

    gpu_memory_utilization = config.gpu_memory_utilization
    if config.on_gpu:
        # vLLM refuses to start where less than this share is free, although the cache's size is given in bytes.
        free_bytes, total_bytes = free_and_total_bytes()
        gpu_memory_utilization = min(gpu_memory_utilization, 0.99 * free_bytes / total_bytes)
    # A GPU: what the plan counts, since vLLM's own choice grows with the GPU. A CPU: vLLM rewinds the seeded generator
    # of a row whose prompt it reads in pieces, and a CPU generator cannot be rewound.
    batching: dict[str, Any] = {"max_num_batched_tokens": int(VLLM_BATCHED_TOKENS.value)}
    if not config.on_gpu:
        batching = {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_MIN_BATCHED_TOKENS_ON_CPU, config.max_model_len),
        }
    adapters: dict[str, Any] = {}
    if config.max_lora_rank is not None:
        adapters = {"enable_lora": True, "max_loras": 1, "max_lora_rank": config.max_lora_rank}
        adapters["enable_sleep_mode"] = config.on_gpu
    eager = config.enforce_eager or not config.on_gpu
    if not eager:
        batching["compilation_config"] = {"cudagraph_capture_sizes": graph_sizes(config.rows_per_call)}
    with _weights(config) as weights:
        return LLM(
            model=config.base.checkpoint,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=config.max_model_len,
            max_num_seqs=config.rows_per_call,
            kv_cache_memory_bytes=config.kv_cache_bytes,
            kv_cache_dtype=config.kv_cache_dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=eager,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **adapters,
            **batching,
            **weights,
        )


def graph_sizes(rows_per_call: int) -> list[int]:
    """Numbers of rows that vLLM captures CUDA graphs for: 1, 2, 4, multiples of 8 (above 256 of 16), and all of a call.

    Rows decode in the smallest graph that holds them. vLLM's own choice goes on to twice the rows of a call, which no
    step of decoding has, and ends at 512, above which there would be none.
    """
    sizes = {1, 2, 4, *range(8, min(rows_per_call, 256), 8), *range(256, rows_per_call, 16)}
    return sorted(size for size in sizes | {rows_per_call} if size <= rows_per_call)


@contextlib.contextmanager
def _weights(config: VLLMEngineConfig) -> Iterator[Mapping[str, Any]]:
    """vLLM's arguments that say where it gets its weights."""
    if config.base.shared_base is None:
        yield {"quantization": config.base.quantization}
        return
    from generation.vllm_shared import offered

    with offered(config.base.shared_base) as arguments:
        yield arguments


def _release_kv_cache(llm: Any) -> None:
    """Give the KV cache's memory back and leave the rest where it is; `llm.wake_up()` takes it again.

    vLLM 0.26 can only sleep, which moves the little that is its own to host memory: adapter slots, norms, buffers.
    """
    if hasattr(llm, "release_kv_cache_memory"):
        llm.sleep(level=0)  # takes no requests; nothing moves
        llm.release_kv_cache_memory()
    else:
        llm.sleep(level=1)


def forget_failed_start() -> None:
    """Free what an engine left behind that did not start, so that another one can."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _compiled_as_started(on_gpu: bool) -> contextlib.AbstractContextManager[Any]:
    """A CPU compiles nothing: vLLM's sampler would, at its first call, a function that counts the ranks of tokens."""
    return contextlib.nullcontext() if on_gpu else torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _process_state_preserved() -> Iterator[None]:
    """Put back what vLLM changes in the process that it starts in.

    It seeds Python's, numpy's and torch's global generators and sets the precision of float32 products to "highest"
    (no TF32); its CPU build also replaces `torch.set_num_threads` and sets LD_PRELOAD, which every later child process
    would inherit. Where a start fails 0.26 leaves its default dtype behind. That its CUDA build switches cuDNN's
    attention off stays so (`preflight.hardware` does it as well).
    """
    matmul_precision = torch.get_float32_matmul_precision()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    preload, default_dtype = os.environ.get("LD_PRELOAD"), torch.get_default_dtype()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(default_dtype)
        torch.set_float32_matmul_precision(matmul_precision)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
