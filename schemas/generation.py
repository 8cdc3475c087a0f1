"""Settings of the generator. Sampling itself (temperature, top_p, max_completion_length, ...) is declared by TRL."""

from dataclasses import dataclass
from typing import Literal

from schemas.values import Gigabytes, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine that samples, of any method that samples."""

    generator: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto`: vLLM in this process where it is installed and runs on this machine, else transformers."""
    generation_aggregation_steps: PositiveInt = 4
    """Prompt groups handed to the generator at once; the last call of a step may be smaller."""
    kv_cache_gb: Gigabytes | Literal["auto"] = "auto"
    """vLLM's KV cache in decimal GB; `auto`: what the batch needs, capped by `vllm_gpu_memory_utilization`."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Keys and values of vLLM's cache: the activations' dtype, or fp8 (half the bytes; Ada, Hopper and later)."""
    vllm_enforce_eager: bool = False
    """Run vLLM without CUDA graphs (about 1 GB less, slower decoding). Always so on a CPU."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(EngineConfig):
    """A teacher's generator beside its trainer."""

    generator_weights: Literal["auto", "int8", "bf16", "fp8", "nf4"] = "auto"
    """Base weights of vLLM: `auto` are the trainer's own values; others differ from the policy that is trained."""
    generator_base: Literal["auto", "shared", "export"] = "auto"
    """`shared`: vLLM reads the weights where the trainer has them; `export`: a copy; `auto`: shared on a GPU."""
    importance_sampling_correction: bool | Literal["auto"] = "auto"
    """Weight tokens by p_trainer / p_generator; `auto`: only where the generator's weights differ."""
    canary_tolerance: PositiveFloat = 0.15
    """Largest mean |log p(generator) - log p(trainer)| over the canary's tokens before the run stops."""
    use_vllm_server: bool = False
    """Generate on a running `trl vllm-serve` (bf16 bases only) instead of in this process."""
    use_ray: bool = False
    """Refused: one process owns the GPU. Kept so that configurations of the published code get a clear answer."""


def generator_base_of(
    config: GenerationConfig,
    device_kind: Literal["cuda", "cpu"],
    quantisation: Literal["int8", "nf4"] | None,
) -> Literal["shared", "export"]:
    """Whether a vLLM in this process reads the trainer's quantised base (`shared`) or has a base of its own (`export`).

    The one answer that plan and run ask for. `quantisation` is that of the trainer's linears; only quantised ones are
    shared, and only where vLLM serves the trainer's own values. `auto` exports on a CPU, where products with vLLM's
    packed 16-bit copy are the faster ones from four rows on.

    Raises:
        ValueError: `shared` is set and there is nothing to share.
    """
    serves_own_values = quantisation is not None and config.generator_weights in ("auto", quantisation)
    if config.generator_base == "shared" and not serves_own_values:
        raise ValueError(
            f"`generator_base` is shared with a teacher in {quantisation or '16 bits'} and `generator_weights` "
            f"{config.generator_weights}; what is shared are the quantised values of the trainer. Set "
            "generator_base=auto, or model_args.load_in_8bit=true (or load_in_4bit) and generator_weights=auto."
        )
    if config.generator_base != "auto":
        return config.generator_base
    return "shared" if serves_own_values and device_kind == "cuda" else "export"
