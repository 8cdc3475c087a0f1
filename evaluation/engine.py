"""The engine that answers for one model: vLLM or transformers on its plain weights, an adapter merged into them."""

import contextlib
import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from core.log import log
from core.types import Phase
from core.units import BYTES_PER_GB, format_gb
from generation import Generator, SamplingSettings
from generation.base import stop_token_ids
from generation.choose import choose_engine
from generation.transformers_engine import TransformersGenerator
from generation.vllm_engine import BaseForVLLM, VLLMEngineConfig, VLLMGenerator
from models.load import load_base, load_tokenizer, resolve_model_path
from models.memory_retries import MemoryRetries
from models.merge import write_merged
from models.meter import PhaseMeter
from models.trained import StoredModel
from planner.plan import MemoryPlan
from schemas.evaluate import EvaluateRunConfig
from schemas.model import ModelArgs

MERGED_FOLDER = ".merged"
"""In the folder of the run: weights with an adapter in them, for as long as they are sampled from."""


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A generator and the tokenizer that belongs to it."""

    generator: Generator
    tokenizer: PreTrainedTokenizerBase
    sampled: SamplingSettings
    greedy: SamplingSettings


@contextlib.contextmanager
def answerer(
    model: StoredModel,
    config: EvaluateRunConfig,
    *,
    plan: MemoryPlan,
    meter: PhaseMeter,
    retries: MemoryRetries,
    scratch: Path,
) -> Iterator[Answerer]:
    """Load a model, and free it with its engine at the end of the block.

    Raises:
        UserError: it cannot be loaded, or its adapter cannot be merged.
    """
    merged = scratch / MERGED_FOLDER
    generator: Generator | None = None
    try:
        with meter.phase(Phase.LOAD):
            weights, args = model.weights, model.args
            tokenizer = load_tokenizer(model.tokenizer, args)
            if model.adapter is not None:
                shutil.rmtree(merged, ignore_errors=True)  # what a killed process left
                weights = str(write_merged(model, merged, meter.device))
                args = replace(args, load_in_8bit=False, load_in_4bit=False, adapter_path=None)
            path = resolve_model_path(weights)
            sampled = _sampling(config, tokenizer, path)
            generator = _start(path, args, config, sampled, plan, meter.device, retries)
        greedy = replace(sampled, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        yield Answerer(generator=generator, tokenizer=tokenizer, sampled=sampled, greedy=greedy)
    finally:
        if generator is not None:
            generator.close()
        del generator
        gc.collect()
        if meter.device.type == "cuda":
            torch.cuda.empty_cache()
        shutil.rmtree(merged, ignore_errors=True)


def _start(
    path: str,
    args: ModelArgs,
    config: EvaluateRunConfig,
    sampling: SamplingSettings,
    plan: MemoryPlan,
    device: torch.device,
    retries: MemoryRetries,
) -> Generator:
    rows_per_call = config.generation_aggregation_steps * config.num_samples
    engine, reason = choose_engine(config.generator, device)
    if engine == "transformers":
        log.info("generator: transformers (%s)", reason)
        return TransformersGenerator(load_base(path, args, device), sampling, rows_per_call, retries)
    kv_cache_bytes = plan.kv_cache_bytes if config.kv_cache_gb == "auto" else int(config.kv_cache_gb * BYTES_PER_GB)
    base = BaseForVLLM(checkpoint=path, weights="16-bit weights", shares_trainer_weights=True)
    engine_config = VLLMEngineConfig(
        base=base,
        dtype=args.torch_dtype,
        on_gpu=device.type == "cuda",
        max_model_len=config.max_prompt_length + sampling.max_new_tokens,
        rows_per_call=rows_per_call,
        max_lora_rank=None,
        kv_cache_bytes=kv_cache_bytes,
        kv_cache_dtype=config.kv_cache_dtype,
        gpu_memory_utilization=config.sampling.vllm_gpu_memory_utilization,
        enforce_eager=config.vllm_enforce_eager,
        trust_remote_code=args.trust_remote_code,
    )
    log.info("generator: vllm, %s, KV cache %s (%s)", base.weights, format_gb(kv_cache_bytes), reason)
    return VLLMGenerator(engine_config, sampling, retries)


def _sampling(config: EvaluateRunConfig, tokenizer: Any, path: str) -> SamplingSettings:
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # it has none
        generation_config = GenerationConfig()
    settings = config.sampling
    return SamplingSettings(
        temperature=settings.temperature,
        max_new_tokens=settings.max_completion_length,
        stop_token_ids=stop_token_ids(tokenizer, generation_config),
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p or 0.0,
        repetition_penalty=settings.repetition_penalty,
    )
