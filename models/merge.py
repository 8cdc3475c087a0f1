"""Merge a run's adapter into its base: a plain 16-bit checkpoint that transformers and vLLM load without peft.

    python -m models.merge results/teacher_rlt_tiny merged

The base is the one that the run trained on: 8-bit and 4-bit values are dequantised to the weights that the trainer
multiplied with, for the adapter was learned on top of their rounding. The sum of base and adapter is made in float32
and rounded once, to the run's 16-bit dtype; never into 8 or 4 bits, which would round most of the update away.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig

from core.errors import UserError
from core.log import configure_logging, console, log
from core.units import format_gb
from data.formats import PromptFormat
from data.tags import TEACHER_PROMPT_FILE
from models.export import exported_tensors, quantised_or_plain_weight, write_checkpoint
from models.load import add_adapter, load_base, load_tokenizer, quiet_libraries
from models.trained import StoredModel, open_model, open_run
from optimization.gpu import pick_device
from schemas.run import ConfigError


def merge_run(run: str | Path, folder: Path) -> Path:
    """Write base and adapter of a run as one checkpoint, which samples as the run did unless told otherwise.

    Its tokenizer and the teacher's prompt go with it. `folder` appears whole or not at all.

    Raises:
        UserError: there is no trained adapter, it cannot be merged, or `folder` is in use.
        ConfigError: the run's configuration is not valid any more.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"`{folder}` is there already", expected="a new or an empty folder", remedy="remove it, or name another one"
        )
    trained = open_run(run, needs_adapter=True)
    config = trained.config
    quiet_libraries()
    tokenizer = load_tokenizer(config.model_name_or_path, config.model_args)
    generation_config = GenerationConfig(
        do_sample=True,
        temperature=config.grpo.temperature,
        top_p=config.grpo.top_p,
        top_k=config.grpo.top_k,
        max_new_tokens=config.grpo.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    files = {
        "generation_config.json": generation_config.to_json_string(),
        TEACHER_PROMPT_FILE: PromptFormat.from_config(config).teacher_prompt_template(tokenizer),
    }
    return write_merged(open_model(run, config.model_args), folder, pick_device(config.model_args.device_map), files)


def write_merged(
    stored: StoredModel, folder: Path, device: torch.device, files: Mapping[str, str] | None = None
) -> Path:
    """Write a stored model as one plain checkpoint with its tokenizer and more text files (name -> content).

    Raises:
        UserError: it cannot be loaded, or its adapter is not a plain LoRA of weight matrices.
    """
    base = load_base(stored.weights, stored.args, device)
    tensors = exported_tensors(base, "dequantized")
    if stored.adapter is not None:
        tensors = merged_tensors(add_adapter(base, stored.args))
    end_ids = base.generation_config.to_json_string()
    files = {"generation_config.json": end_ids} | dict(files or {})
    return write_checkpoint(base, load_tokenizer(stored.tokenizer, stored.args), folder, tensors, files=files)


@torch.no_grad()
def merged_tensors(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor on the CPU) of every weight of the base with the active adapter in it.

    Raises:
        UserError: the adapter is not a plain LoRA of weight matrices.
    """
    adapted = _adapted_layers(model)
    base = model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype
    for name, tensor in exported_tensors(base, "dequantized"):
        layer = adapted.pop(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
        if layer is not None:
            weight = quantised_or_plain_weight(layer.get_base_layer())
            delta = layer.get_delta_weight(model.active_adapter)
            tensor = (weight + delta.to(weight)).to(dtype).cpu()
        yield name, tensor


def _adapted_layers(model: PeftModel) -> dict[str, Any]:
    """Name in the checkpoint -> LoRA layer."""
    config: Any = model.peft_config[model.active_adapter]
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    others = [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), nn.Linear)]
    if getattr(config, "use_dora", False) or config.modules_to_save or config.bias != "none" or others:
        more = ", ".join(others) or "DoRA, biases or whole modules"
        raise UserError(
            f"an adapter with more than LoRA matrices of linear layers: {more}",
            expected="a LoRA adapter as this framework trains it",
            remedy="use it through peft (see the run's model card)",
        )
    return layers


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the merged checkpoint goes")
    arguments = parser.parse_args(words)
    configure_logging()
    try:
        folder = merge_run(arguments.run, arguments.folder)
    except (UserError, ConfigError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    log.info("the merged model is in %s, %s", folder, format_gb(num_bytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
