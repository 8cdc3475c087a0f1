"""Imports of a run, done once in the process that all runs of a campaign are forked from; no thread is started here."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # two runs at a time on two cores
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # seconds of compiling for a few tokens
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import contextlib
import importlib
import io

with contextlib.redirect_stderr(io.StringIO()):  # what libraries say of their versions
    for _name in (
        *("hydra.main", "hydra._internal.utils", "preflight.inputs", "schemas.compose", "tests.campaign.child"),
        *(
            "trainers.start",
            "trainers.sweep",
            "trainers.teacher_run",
            "trainers.masked_diffusion_run",
            "trainers.sft_run",
        ),
        *("pandas", "pyarrow.parquet", "bitsandbytes", "tests.helpers.tiny_run", "generation.vllm_engine"),
    ):
        importlib.import_module(_name)
    with contextlib.suppress(ImportError):
        from vllm import LLM, SamplingParams  # noqa: F401
        from vllm.lora.request import LoRARequest  # noqa: F401

from schemas.compose import compose_run_config
from schemas.trl_fields import arguments_model

for _arguments in ("GRPOConfig", "TrainingArguments", "SFTConfig"):
    arguments_model(_arguments)
compose_run_config("teacher_rlt_tiny", ["output_dir=unused"])

gc.collect()
gc.freeze()  # a run's own collections leave alone what was imported here
