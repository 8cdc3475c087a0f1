"""Export what a run trained as a plain 16-bit checkpoint, which transformers and vLLM load without peft.

    python -m models.merge results/teacher_rlt_tiny merged [--push OWNER/NAME [--public]]

An adapter is merged into the base that the run trained on: 8-bit and 4-bit values are dequantised to the weights that
the trainer multiplied with, for the adapter was learned on top of their rounding. The sum of base and adapter is made
in float32 and rounded once, to the run's 16-bit dtype; never into 8 or 4 bits, which would round most of the update
away. A run of all weights is written in the same dtype. The checkpoint is then loaded, and refused where its log-probs
are not those of the model that was trained.
"""

import argparse
import gc
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from core.errors import UserError
from core.hub import check_push, push_folder
from core.log import configure_logging, console, log
from core.units import format_gb
from data.formats import PromptFormat
from data.tags import STUDENT_PROMPT_FILE, TEACHER_PROMPT_FILE
from models.export import exported_tensors, quantised_or_plain_weight, write_checkpoint
from models.load import add_adapter, load_base, load_tokenizer, quiet_libraries
from models.merge_check import LogprobCheck, Probe
from models.trained import StoredModel, open_model
from optimization.gpu import pick_device
from runs.model_card import MergedCard
from schemas.methods import as_kind
from schemas.model import ModelArgs
from schemas.run import ConfigError, RunConfig

_PROBE_ROWS = (("1+0+5+5+2", "=3"), ("What is 12 times 12?", "144"), ("7+4+7-2-9", "=7"), ("Solve 3x = 12.", "4"))


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A checkpoint that was written of a run."""

    folder: Path
    check: LogprobCheck


def merge_run(run: str | Path, folder: Path) -> MergedModel:
    """Write what a run trained as one checkpoint, with its tokenizer, its prompt and a model card.

    `folder` appears whole and checked, or not at all.

    Raises:
        UserError: there is no trained model, it cannot be merged or is not what was trained, or `folder` is in use.
        ConfigError: the run's configuration is not valid any more.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"`{folder}` is there already", expected="a new or an empty folder", remedy="remove it, or name another one"
        )
    stored = open_model(run, ModelArgs())
    if stored.config is None and stored.adapter is None:
        raise UserError(
            f"{stored.name!r} is no run, but a whole model",
            expected="the folder of a run, of one of its checkpoints, or of an adapter",
            remedy="use the model as it is",
        )
    args = stored.args if stored.config is None or stored.adapter is not None else stored.config.model_args
    stored, device = replace(stored, args=args), pick_device(args.device_map)
    quiet_libraries()
    tokenizer = load_tokenizer(stored.tokenizer, args)
    model = load_base(stored.weights, args, device)
    files = {"generation_config.json": _generation_config(stored, model, tokenizer).to_json_string()}
    files |= _prompt_file(stored, tokenizer)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        if stored.adapter is not None:
            model = add_adapter(model, args)
        probe = Probe.of(model, tokenizer, _probe_prompts(stored, tokenizer))
        _write(stored, model, tokenizer, unfinished, files)
        del model
        gc.collect()
        written = load_base(str(unfinished), _plain(args), device)
        check = probe.check(written)
        check.require()
        card = _card(stored, check)
        (unfinished / "README.md").write_text(card.markdown(), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return MergedModel(folder=folder, check=check)


def write_merged(stored: StoredModel, folder: Path, device: torch.device) -> Path:
    """Write a stored model as one plain checkpoint with its tokenizer, unchecked.

    Raises:
        UserError: it cannot be loaded, or its adapter is not a plain LoRA of weight matrices.
    """
    base = load_base(stored.weights, stored.args, device)
    files = {"generation_config.json": base.generation_config.to_json_string()}
    model = add_adapter(base, stored.args) if stored.adapter is not None else base
    return _write(stored, model, load_tokenizer(stored.tokenizer, stored.args), folder, files)


def _write(
    stored: StoredModel, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, files: Mapping[str, str]
) -> Path:
    if stored.adapter is None:
        return write_checkpoint(model, tokenizer, folder, exported_tensors(model, "dequantized"), files=files)
    return write_checkpoint(model.get_base_model(), tokenizer, folder, merged_tensors(model), files=files)


def _plain(args: ModelArgs) -> ModelArgs:
    """As the written checkpoint is loaded."""
    return replace(args, load_in_8bit=False, load_in_4bit=False, adapter_path=None)


def _generation_config(stored: StoredModel, base: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """As a teacher's run sampled; else what the base came with."""
    config = None if stored.config is None else as_kind(stored.config, RunConfig)
    if config is None:
        return base.generation_config
    return GenerationConfig(
        do_sample=True,
        temperature=config.grpo.temperature,
        top_p=config.grpo.top_p,
        top_k=config.grpo.top_k,
        max_new_tokens=config.grpo.max_completion_length,
        eos_token_id=base.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _prompt_file(stored: StoredModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Name and content of the prompt that the model was trained behind; of a model from elsewhere it is not known."""
    if stored.config is None:
        return {}
    prompt_format = PromptFormat.from_config(stored.config)
    if stored.config.learns_explanations:
        return {TEACHER_PROMPT_FILE: prompt_format.teacher_prompt_template(tokenizer)}
    return {STUDENT_PROMPT_FILE: prompt_format.student_head_text(tokenizer, "{question}")}


def _card(stored: StoredModel, check: LogprobCheck) -> MergedCard:
    prompt_file = None
    if stored.config is not None:
        prompt_file = TEACHER_PROMPT_FILE if stored.config.learns_explanations else STUDENT_PROMPT_FILE
    base = stored.weights if stored.adapter is not None or stored.config is None else stored.config.model_names[0]
    return MergedCard(
        config=stored.config,
        source=Path(stored.name).name,
        base=str(base),
        prompt_file=prompt_file,
        dtype=stored.args.torch_dtype,
        is_merged=stored.adapter is not None,
        check=str(check),
    )


def _probe_prompts(stored: StoredModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    files = list(_prompt_file(stored, tokenizer).values())
    template = files[0] if files else "{question}\n"
    return [template.replace("{question}", q).replace("{solution}", s) for q, s in _PROBE_ROWS]


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
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the checkpoint goes")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to this repository of the hub, a private one")
    parser.add_argument("--public", action="store_true", help="with --push: make a repository that all may read")
    arguments = parser.parse_args(words)
    if arguments.public and not arguments.push:
        parser.error("--public says how --push makes a repository; add --push OWNER/NAME")
    configure_logging()
    try:
        if arguments.push:
            check_push(arguments.push)
        merged = merge_run(arguments.run, arguments.folder)
        num_bytes = sum(file.stat().st_size for file in merged.folder.glob("*.safetensors"))
        log.info("against the model that was trained: %s", merged.check)
        log.info("the merged model is in %s, %s", merged.folder, format_gb(num_bytes))
        if arguments.push:
            log.info("it is uploaded: %s", push_folder(merged.folder, arguments.push, private=not arguments.public))
    except (UserError, ConfigError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
