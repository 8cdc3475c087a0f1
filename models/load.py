"""Loading a base model in the run's precision, and putting a LoRA adapter on the teacher's."""

from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from core.errors import UserError
from core.hub import check_model_path, is_hub_id
from core.log import log
from data.embedded.model import ensure_tiny_model
from data.embedded.student import ensure_weak_student
from data.embedded.tokenizer import build_tokenizer
from optimization.bitsandbytes_patches import fix_cpu_dequantization, release_int8_activations
from optimization.fp8_optim import check_fp8_support, quantise_to_fp8
from optimization.int8_matmul import multiply_in_16_bits
from optimization.record import announce
from rollout.packed_attention import obstacle_to_packing, pack_sequences
from schemas.model import EMBEDDED_MODEL, ModelArgs, ModelConfig, embedded_student_seed, is_embedded


def resolve_model_path(name_or_path: str) -> str:
    """A hub id or an existing folder; the embedded models (`tiny`, `tiny_student_SEED`) are made now where missing.

    Raises:
        UserError: the name looks like a local folder and there is none.
    """
    if name_or_path == EMBEDDED_MODEL:
        return str(ensure_tiny_model())
    if (seed := embedded_student_seed(name_or_path)) is not None:
        return str(ensure_weak_student(seed))
    check_model_path(name_or_path)
    return name_or_path if is_hub_id(name_or_path) else str(Path(name_or_path).expanduser())


def load_tokenizer(name_or_path: str, args: ModelArgs) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left, with a pad token that is not the end-of-turn token."""
    if is_embedded(name_or_path):  # without making the model, so that mistakes in the data are found before
        return build_tokenizer()
    path = resolve_model_path(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unloadable(name_or_path, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizers(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """The teacher's tokenizer, and the student's where its vocabulary differs.

    With the same vocabulary the student reads the teacher's tokens and chat template, as in the published run.
    """
    tokenizer = load_tokenizer(config.model_name_or_path, config.model_args)
    if config.student_model is None or config.student_model == config.model_name_or_path:
        return tokenizer, None
    student_tokenizer = load_tokenizer(config.student_model, config.model_args)
    return tokenizer, None if student_tokenizer.get_vocab() == tokenizer.get_vocab() else student_tokenizer


def load_base(name_or_path: str, args: ModelArgs, device: torch.device) -> PreTrainedModel:
    """A frozen causal language model in the precision that `args` names, on `device`.

    Run it inside `models.evaluation.evaluation_mode`, which knows what bitsandbytes does in eval mode.

    Raises:
        UserError: the model cannot be found or read.
    """
    path = resolve_model_path(name_or_path)
    dtype = getattr(torch, args.torch_dtype)
    if args.load_in_8bit:
        release_int8_activations()
    if args.load_in_4bit:
        fix_cpu_dequantization()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_quantization_config(args, dtype),
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(name_or_path, error) from error
    if args.load_in_8bit and args.int8_matmul == "dequantize":
        announce(multiply_in_16_bits(model))
    _lay_out(model, args)
    return model.requires_grad_(False)


def max_positions(name_or_path: str, args: ModelArgs) -> int | None:
    """Tokens of the longest row that a model reads, by its configuration; None where that does not say.

    Raises:
        UserError: the model cannot be found or read.
    """
    path = resolve_model_path(name_or_path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unloadable(name_or_path, error) from error
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _lay_out(model: PreTrainedModel, args: ModelArgs) -> None:
    """
    Raises:
        UserError: `args.sequence_layout` names a packed one, and the model's attention cannot read it.
    """
    obstacle = obstacle_to_packing(model)
    if obstacle is None:
        pack_sequences(model, "shared_prefix" if args.sequence_layout == "auto" else args.sequence_layout)
    elif args.sequence_layout == "auto":
        log.info("%s: batches are padded, since %s", model.config.name_or_path, obstacle)
    elif args.sequence_layout != "padded":
        raise UserError(
            f"model_args.sequence_layout={args.sequence_layout}, and {obstacle} ({model.config.name_or_path})",
            expected="full or sliding-window attention by transformers' own sdpa",
            remedy="set model_args.sequence_layout=auto, which pads where packing cannot be had",
        )


def load_frozen(name_or_path: str, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """A frozen model with weights of its own, which only scores, in the precision of `config.scoring_weights`.

    fp8 is made on the CPU, so that the GPU never holds the 16-bit weights.

    Raises:
        UserError: the model cannot be found or read, or fp8 is asked of a GPU without it.
    """
    if config.scoring_weights == "auto":
        return load_base(name_or_path, config.model_args, device)
    if device.type == "cuda" and (reason := check_fp8_support().skipped):
        raise UserError(
            f"scoring_weights=fp8: {reason}",
            expected="an NVIDIA GPU that multiplies in fp8 (compute 8.9 and above)",
            remedy="set scoring_weights=auto, or use_fp8=true, which asks the GPU first",
        )
    args = replace(config.model_args, load_in_8bit=False, load_in_4bit=False)
    model = load_base(name_or_path, args, torch.device("cpu"))
    quantise_to_fp8(model)
    return model.to(device)


def check_adapter(args: ModelArgs) -> None:
    """Refuse a folder without an adapter.

    Raises:
        UserError: `args.adapter_path` names a folder without an adapter.
    """
    if args.adapter_path is not None and not (Path(args.adapter_path) / "adapter_config.json").is_file():
        raise UserError(
            f"`model_args.adapter_path` {args.adapter_path!r} holds no adapter",
            expected="a folder with adapter_config.json and adapter_model.safetensors",
            remedy="point it at the output folder or a checkpoint of an earlier run, or leave it out",
        )


def add_adapter(base: PreTrainedModel, args: ModelArgs) -> PeftModel:
    """The teacher: `base` with a trainable LoRA adapter in float32, new (a zero update) or from `args.adapter_path`.

    float32, because an update of a learning rate of 1e-6 is below bfloat16's resolution of a weight.
    """
    check_adapter(args)
    if args.adapter_path is not None:
        model = PeftModel.from_pretrained(base, args.adapter_path, is_trainable=True)
    else:
        lora = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _quantization_config(args: ModelArgs, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=args.llm_int8_threshold)
    if args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def _unloadable(name_or_path: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"{name_or_path!r} is a model that runs code from its own repository",
            expected="a model of transformers or of this project, or your consent",
            remedy="read that code, then set model_args.trust_remote_code=true",
        )
    given = f"{name_or_path!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
    if not is_hub_id(name_or_path):
        return UserError(
            given,
            expected="a whole folder as `save_pretrained` writes it: config.json, safetensors weights, tokenizer files",
            remedy="copy or write the folder again",
        )
    return UserError(
        given,
        expected="a model folder, or a hub id that is cached or reachable from this machine",
        remedy="check the name and the network (HF_TOKEN for gated models), or download it first: hf download "
        + name_or_path,
    )


def quiet_libraries() -> None:
    """Switch transformers' own progress bars and warnings off; ours take their place."""
    disable_progress_bar()
    set_verbosity_error()
