"""Start of a run's sampler: its generator, the canary that watches it, and what samples the policy through both."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from core.types import Phase
from generation.base import Generator, SamplingSettings
from generation.canary import Canary
from generation.choose import make_generator
from generation.policy import PolicySampler
from models.host import ModelHost
from models.load import resolve_model_path
from planner.plan import MemoryPlan
from schemas.sampled_run import SampledRunConfig

NUM_CANARY_ROWS, CANARY_ROW_LEN = 4, 64


def start_sampler(
    config: SampledRunConfig,
    host: ModelHost,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    plan: MemoryPlan,
    *,
    num_generations: int,
    export_folder: Path,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> PolicySampler:
    """The sampler of the host's teacher; the host closes its generator. The canary's tokens are ends of `prompts`."""
    with host.phase(Phase.LOAD):
        generator = _start_generator(config, host, tokenizer, plan, num_generations, export_folder)
    rows = [prompt_ids[-CANARY_ROW_LEN:] for prompt_ids in prompts[:NUM_CANARY_ROWS]]
    canary = Canary(generator, host.policy_logprobs, rows, config.canary_tolerance)
    return PolicySampler(host, generator, canary, seed=config.arguments.seed, on_progress=on_progress)


def _start_generator(
    config: SampledRunConfig,
    host: ModelHost,
    tokenizer: PreTrainedTokenizerBase,
    plan: MemoryPlan,
    num_generations: int,
    export_folder: Path,
) -> Generator:
    generator = make_generator(
        config,
        model=host.teacher,
        tokenizer=tokenizer,
        base_checkpoint=resolve_model_path(config.model_name_or_path),
        sampling=SamplingSettings.of_run(config, tokenizer, host.teacher),
        num_generations=num_generations,
        max_model_len=config.max_prompt_length + config.arguments.max_completion_length,
        export_folder=export_folder,
        planned_kv_cache_bytes=plan.kv_cache_bytes,
        gpu_memory_utilization=config.arguments.vllm_gpu_memory_utilization,
        trust_remote_code=config.model_args.trust_remote_code,
        retries=host.retries,
        share=host.share_base,
    )
    host.attach_engine(generator)
    return generator
