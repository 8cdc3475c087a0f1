"""Hardware checks before anything is downloaded or loaded: GPU, driver, packages, and the memory plan."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE

from core.errors import UserError
from core.gpu_software import compiler_obstacle, driver_obstacle, driver_version
from core.one_gpu import visible_gpus
from core.packages import is_installed
from core.units import format_gb
from optimization.cuda_optim import switch_cudnn_attention_off
from optimization.gpu import gpu_bytes, has_gpu, memory_of, num_gpus, pick_device
from planner.constants import MAX_CPU_AUTO_BYTES
from planner.fit import resolve_auto
from planner.plan import MemoryPlan, plan_run
from preflight.inputs import check_hub
from schemas.methods import as_training
from schemas.run import AnyRunConfig, load_run_config

_ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def load_for_this_machine(values: Mapping[str, Any]) -> AnyRunConfig:
    """Validate composed values, with `auto` resolved for the GPU of this machine.

    Raises:
        ConfigError: see `load_run_config`.
    """
    return load_run_config(resolve_auto(values, gpu_bytes()))


def check_hardware_and_plan(config: AnyRunConfig) -> tuple[MemoryPlan, torch.device]:
    """The memory plan and the device of the run. On a GPU cuDNN's attention is off from here on.

    Raises:
        UserError: there is no GPU for a run that needs one, or several, its driver is too old, there is no C compiler
            for vLLM, a setting needs a package, a GPU or the hub that is not there, or the plan exceeds the GPU.
    """
    _require_gpu_software(config)
    device = pick_device(config.model_args.device_map)
    num_devices = num_gpus()
    if device.type == "cuda" and (device.index or 0) >= num_devices:
        raise UserError(
            f"`model_args.device_map` is {config.model_args.device_map!r}, and torch sees {num_devices or 'no'} CUDA "
            f"device{'s' * (num_devices > 1)}",
            expected="an NVIDIA GPU, its driver and a CUDA build of torch",
            remedy="model_args.device_map=auto; nvidia-smi shows GPUs and driver; without a GPU run ./launch_mono.sh "
            "(the embedded model, on the CPU)",
        )
    if num_devices > 1 and device.type == "cuda" and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{num_devices} GPUs that this process sees",
            expected="one: transformers would multiply the batch by their number, and vLLM takes the first",
            remedy="set CUDA_VISIBLE_DEVICES to the one to use before torch is imported; train.py does so itself",
        )
    if device.type == "cuda":
        switch_cudnn_attention_off()
    _require_attention_package(config.model_args.attn_implementation)
    if (training := as_training(config)) is not None:
        _require_what_settings_need(training.arguments, device)
    if device.type == "cuda":
        check_hub(config)
    total_bytes = _gpu_bytes_to_plan_for(config, device)
    plan = plan_run(config, total_bytes, allow_download=device.type == "cuda")
    planned = f"{config.run_name} plans for {format_gb(plan.max_bytes)} ({plan.binding_phase} phase)"
    if device.type == "cpu":
        if config.model_args.device_map != "cpu" and plan.max_bytes > MAX_CPU_AUTO_BYTES:
            raise UserError(
                f"no CUDA device on this machine, and {planned} on a GPU of {format_gb(total_bytes)}",
                expected="an NVIDIA GPU that has as much free",
                remedy="run ./launch_mono.sh (the embedded model, minutes on a CPU); "
                "python test_config_85gb.py --all shows what each configuration needs",
            )
        check_hub(config)
        return plan, device
    if not plan.fits(total_bytes) and not config.allow_oversubscription:
        raise UserError(
            f"{planned}, and the GPU has {format_gb(total_bytes)}",
            expected="every phase within 97 % of the GPU",
            remedy=f"python test_config_85gb.py --config-name {config.run_name} shows what would fit; "
            "allow_oversubscription=true starts all the same",
        )
    return plan, device


def _require_gpu_software(config: AnyRunConfig) -> None:
    """A CUDA build of torch with a driver that it can use, and what Triton compiles with where the run uses Triton."""
    if torch.version.cuda is None or config.model_args.device_map == "cpu" or visible_gpus() == []:
        return
    uses_vllm = getattr(config, "generator", "transformers") != "transformers" and is_installed("vllm")
    obstacle = None
    if not has_gpu():
        obstacle = driver_obstacle(driver_version(), int(torch.version.cuda.partition(".")[0]))
    elif uses_vllm or config.compile_models:
        obstacle = compiler_obstacle()
    if obstacle is not None:
        raise obstacle


def _gpu_bytes_to_plan_for(config: AnyRunConfig, device: torch.device) -> int:
    """Memory of the GPU here; where there is none, of the one that the configuration is for."""
    if config.gpu_gb is not None:
        return int(config.gpu_gb * 1e9)
    if device.type == "cuda":
        return memory_of(device)
    card_bytes = int(config.card_gb * 1e9)
    return min(card_bytes, memory_of(device)) if config.model_args.device_map == "cpu" else card_bytes


def _require_attention_package(implementation: str) -> None:
    package = _ATTENTION_PACKAGES.get(implementation)
    if package is not None and not is_installed(package):
        raise UserError(
            f"`model_args.attn_implementation` is {implementation}, and it is not installed",
            expected=f"the Python package {package} in this environment",
            remedy="model_args.attn_implementation=sdpa; use_flash_attention=true takes what is installed",
        )


def _require_what_settings_need(arguments: Any, device: torch.device) -> None:
    """The library's own settings that would fail only once the models are loaded."""
    if arguments.use_liger_kernel and (device.type == "cpu" or not is_installed("liger_kernel")):
        obstacle = "the run is on a CPU" if is_installed("liger_kernel") else "it is not installed"
        raise UserError(
            f"`use_liger_kernel` is true, and {obstacle}",
            expected="an NVIDIA GPU, and the Python package liger_kernel in this environment",
            remedy="use_liger_kernel=false, or pip install liger-kernel on a machine with a GPU",
        )
    if arguments.fp16 and device.type == "cpu":
        raise UserError(
            "`fp16` is true on a CPU",
            expected="a GPU: the scaler of fp16 gradients needs one",
            remedy="fp16=false; bf16=true trains in 16 bits on a CPU too",
        )
    uploads = [key for key in ("push_to_hub", "log_completions_hub_repo") if getattr(arguments, key, None)]
    if uploads and (HF_HUB_OFFLINE or get_token() is None):
        raise UserError(
            f"`{uploads[0]}` is set, and " + ("HF_HUB_OFFLINE is on" if HF_HUB_OFFLINE else "there is no access token"),
            expected="a connection to the hub and a token that may write",
            remedy=f"`hf auth login` or HF_TOKEN in the environment; or leave {uploads[0]} out and upload afterwards",
        )
