"""One base in memory against an export of it: memory, start, speed of decoding; and the int8 product on its own.

    python benchmarks/shared_base.py [--part memory|decode|products] [--layers 16 --hidden 2048]

`memory`: a random int8 model (1.1 billion parameters unless told otherwise) with its LoRA adapter: what the trainer
alone, with an engine on its base, and with an engine on an export holds, and seconds from the trainer to the running
engine. On a CPU anonymous resident memory after `malloc_trim`, on a GPU what the driver reports.
`decode`: tokens a second of both engines by rows at once; on a CPU seconds of its clock (all threads), so that other
work on the machine counts little. `products`: on a GPU milliseconds of the Triton kernel and of widening by rows, for
the shapes of a 7B: the crossover belongs into `models.int8_linear.CUDA_FEW_ROWS`.

Each way runs in a process of its own, one after the other.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py sets it, before torch is loaded

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.log import configure_logging, log
from core.types import Role
from generation import SamplingSettings, make_generator
from models.host import ModelHost
from models.int8_linear import widened_product
from optimization.gpu import find_card, has_gpu
from schemas.generation import GenerationConfig
from schemas.model import ModelArgs, ModelConfig

WAYS = ("alone", "shared", "export")
NUM_NEW_TOKENS = 16
SHAPES_OF_A_7B = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "decode", "products"), default="memory")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--way", choices=WAYS, help="one way, in this process, on the model in --folder")
    parser.add_argument("--folder", type=Path)
    words = parser.parse_args()
    configure_logging("INFO" if words.way is None else "WARNING")
    if words.part == "products":
        time_products()
    elif words.way is not None:
        sys.stdout.write(json.dumps(measure(words.way, words.folder, words.part)) + "\n")
    else:
        compare(words)


def compare(words: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), words.hidden, words.layers)
        found = {}
        for way in WAYS if words.part == "memory" else WAYS[1:]:
            command = [sys.executable, __file__, f"--part={words.part}", f"--way={way}", f"--folder={folder}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    if words.part == "memory":
        alone_gb = found["alone"]["gb"]
        for way, figures in found.items():
            log.info("%s: %.2f GB, %.2f x the trainer alone", way, figures["gb"], figures["gb"] / alone_gb)
        seconds = [found[way]["start_s"] for way in ("shared", "export")]
        log.info("trainer to engine: shared %.1f s, export %.1f s, ratio %.1f", *seconds, seconds[1] / seconds[0])
    else:
        for rows, shared in found["shared"]["tokens_per_s"].items():
            export = found["export"]["tokens_per_s"][rows]
            log.info("%s rows: shared %.1f, export %.1f tokens/s, ratio %.2f", rows, shared, export, shared / export)


def write_model(folder: Path, hidden: int, num_layers: int) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from data.embedded.tokenizer import build_tokenizer

    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    log.info("a random model of %.2f billion parameters", sum(p.numel() for p in model.parameters()) / 1e9)


def measure(way: str, folder: Path, part: str) -> dict[str, Any]:
    """One way: the trainer, and the engine beside it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as the engine's start sets it, before vLLM is imported
    for module in ("vllm.entrypoints.llm", "generation.vllm_shared"):  # libraries count for every way, and for no start
        importlib.import_module(module)
    rows_at_once = (1, 4, 8, 32) if not has_gpu() else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    model = ModelConfig(model_name_or_path=str(folder), model_args=ModelArgs(load_in_8bit=True, lora_r=16))
    host = ModelHost(model, roles=[Role.TEACHER], max_score_tokens=512)
    row = list(range(5, 37))
    host.policy_logprobs([row], True)
    generator, start_s = None, 0.0
    if way != "alone":
        started_s = time.perf_counter()
        generator = start(host, folder, way, max(rows_at_once))
        start_s = time.perf_counter() - started_s
        generator.sync_adapter(host.teacher)
        generator.logprobs([row])
    figures: dict[str, Any] = {"gb": held_gb(), "start_s": start_s}
    if part == "decode":
        figures["tokens_per_s"] = {rows: tokens_per_s(generator, rows) for rows in rows_at_once}
    if generator is not None:
        generator.close()
    host.close()
    return figures


def start(host: ModelHost, folder: Path, way: str, max_rows: int) -> Any:
    from models.load import load_tokenizer

    export_folder = folder / "export"
    return make_generator(
        GenerationConfig(generator="vllm", generator_base="shared" if way == "shared" else "export"),
        model=host.teacher,
        tokenizer=load_tokenizer(str(folder), ModelArgs()),
        base_checkpoint=str(folder),
        sampling=SamplingSettings(temperature=1.0, max_new_tokens=NUM_NEW_TOKENS, stop_token_ids=()),
        num_generations=max_rows,
        max_model_len=128,
        export_folder=export_folder,
        planned_kv_cache_bytes=64 * 1024**2 if not has_gpu() else 4 * 1024**3,
        gpu_memory_utilization=0.9,
        share=host.share_base,
    )


def held_gb() -> float:
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["RssAnon"].split()[0]) * 1024 / 1e9


def tokens_per_s(generator: Any, num_rows: int) -> float:
    clock = time.perf_counter if has_gpu() else time.process_time
    best = 0.0
    for repeat in range(3):
        started_s = clock()
        completions = generator.generate([[5 + repeat, 6, 7, 8]], num_rows, range(num_rows))
        best = max(best, sum(len(c.token_ids) for c in completions) / (clock() - started_s))
    return best


def time_products() -> None:
    if not has_gpu():
        log.info("the crossover between kernel and widening is that of a GPU; torch sees none")
        return
    from models.int8_triton import few_rows_product

    log.info("%s", find_card())
    weights = [(torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda"), shape) for shape in SHAPES_OF_A_7B]
    for num_rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        kernel_ms = widened_ms = 0.0
        for q, (num_outputs, width) in weights:
            scb = torch.rand(num_outputs, device="cuda")
            x = torch.randn(num_rows, width, dtype=torch.bfloat16, device="cuda")
            kernel_ms += milliseconds(lambda x=x, q=q, scb=scb: few_rows_product(x, q, scb, None))
            widened_ms += milliseconds(lambda x=x, q=q, scb=scb: widened_product(x, q, scb, None, 64 * 1024**2))
        log.info("%d rows, one layer: kernel %.3f ms, widened %.3f ms", num_rows, kernel_ms, widened_ms)


def milliseconds(call: Callable[[], Any]) -> float:
    """The least of ten, by the GPU's own clock."""
    call()
    best = float("inf")
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


if __name__ == "__main__":
    main()
