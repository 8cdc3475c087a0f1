"""Seconds to hand the policy to vLLM: the adapter alone, against merging it and loading all weights.

    python -m benchmarks.sync [--repeats 5]

On the embedded model and on a random one of 0.1 billion parameters, both in bfloat16, LoRA of rank 16 on every linear.
`ours` is the generator's `sync_adapter`: one file in shared memory, one load by vLLM; `of which the file` is the part
that tensors handed over in memory would save. `merged` is what stock TRL does: merge into the base, push every tensor
into vLLM's model, unmerge; its engine has no adapters and is started after the other. CPU seconds of the process, the
least of the repeats.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.paired import paired_seconds
from core.log import configure_logging, console
from data.embedded.model import ensure_tiny_model
from generation import BaseForVLLM, SamplingSettings
from generation.adapter_folder import ADAPTER_FILE, AdapterFolder
from generation.vllm_engine import VLLMEngineConfig, VLLMGenerator
from tests.helpers.tiny_run import write_random_model

RANK = 16
_KV_CACHE_BYTES, _MAX_LEN = 64_000_000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    words = parser.parse_args()
    configure_logging("WARNING")
    with tempfile.TemporaryDirectory() as folder:
        large = write_random_model(Path(folder, "model"), hidden=768, num_layers=12)
        for name, model in {"embedded": ensure_tiny_model(), "0.1B": large}.items():
            measure(name, Path(model), words.repeats)


def measure(name: str, checkpoint: Path, repeats: int) -> None:
    teacher = policy_of(checkpoint)
    with our_engine(checkpoint) as generator:
        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda: generator.sync_adapter(teacher),
            "of which the file": through_file(teacher),
        }
        seconds = paired_seconds(sides, repeats)
    with stock_engine(checkpoint) as runner:
        seconds |= paired_seconds({"merged": lambda: push_merged(teacher, runner)}, repeats)
    num_parameters = sum(p.numel() for p in teacher.parameters())
    console.print(f"{name}: {num_parameters / 1e6:.1f} million parameters")
    for side, side_s in seconds.items():
        console.print(f"  {side}: {1e3 * side_s:.1f} ms, merged / {side}: {seconds['merged'] / side_s:.1f}")


def policy_of(checkpoint: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    teacher = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in (p for name, p in teacher.named_parameters() if "lora_B" in name):
            parameter.normal_(std=0.02)
    return teacher


@contextmanager
def our_engine(checkpoint: Path) -> Iterator[VLLMGenerator]:
    config = VLLMEngineConfig(
        base=BaseForVLLM(checkpoint=str(checkpoint), weights="16-bit", shares_trainer_weights=True),
        dtype="bfloat16",
        on_gpu=False,
        max_model_len=_MAX_LEN,
        rows_per_call=8,
        max_lora_rank=RANK,
        kv_cache_bytes=_KV_CACHE_BYTES,
        gpu_memory_utilization=0.3,
    )
    generator = VLLMGenerator(config, SamplingSettings(temperature=1.0, max_new_tokens=8, stop_token_ids=()))
    try:
        yield generator
    finally:
        generator.close()


def through_file(teacher: PeftModel) -> Callable[[], None]:
    """Writing the adapter to shared memory and reading it back: all that handing over its tensors could save."""
    folder = AdapterFolder()

    def write_and_read() -> None:
        state = get_peft_model_state_dict(teacher, save_embedding_layers=False)
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        load_file(folder.save(tensors) / ADAPTER_FILE)

    return write_and_read


@contextmanager
def stock_engine(checkpoint: Path) -> Iterator[Any]:
    """The owner of vLLM's model in an engine without adapters, as TRL starts it."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings: Mapping[str, Any] = {"max_model_len": _MAX_LEN, "max_num_seqs": 8, "enforce_eager": True}
    llm = LLM(
        model=str(checkpoint),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=_KV_CACHE_BYTES,
        **settings,
    )
    try:
        yield runner_of(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def push_merged(teacher: PeftModel, runner: Any) -> None:
    """As TRL does for an adapter model, with vLLM's own function for new weights of a model that has been laid out."""
    teacher.merge_adapter()
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.data
        for name, parameter in teacher.named_parameters()
        if "lora_" not in name
    }
    runner.reload_weights(weights_iterator=iter(plain.items()))
    teacher.unmerge_adapter()


if __name__ == "__main__":
    main()
