"""A bidirectional model and a run that are small enough for a test."""

from pathlib import Path
from typing import Any

import torch

from data.samples import Sample
from models.llada import LladaConfig, LladaModel
from models.masked_diffusion import DiffusionBatch
from planner.plan import plan_run
from runs.run_folder import open_run_folder
from schemas.compose import compose_run_config
from schemas.llada import MaskedDiffusionRunConfig
from schemas.methods import as_kind
from schemas.run import load_run_config
from trainers.masked_diffusion import DiffusionCollator, MaskedDiffusionTrainer
from trainers.masked_diffusion_run import build_diffusion_trainer, load_diffusion_tokenizer

MASK = 11


def random_model(attn_implementation: str = "sdpa", seed: int = 0, **changes: Any) -> LladaModel:
    """Vocabulary of 12, the last of which is the mask; weights large enough for outputs to depend on the input."""
    torch.manual_seed(seed)
    shape = {"vocab_size": MASK + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | changes
    config = LladaConfig(
        **shape,
        num_attention_heads=2,
        num_key_value_heads=2,
        mask_token_id=shape["vocab_size"] - 1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LladaModel._from_config(config, attn_implementation=attn_implementation).eval()


def batch_of(*rows: list[Sample], fills_responses: bool = False) -> DiffusionBatch:
    return DiffusionBatch(**DiffusionCollator(filler_token_id=0, fills_responses=fills_responses)(rows))


def diffusion_values(output_dir: Path, *overrides: str) -> dict[str, Any]:
    words = ["max_steps=3", "num_eval_prompts=4", "num_likelihood_samples=4", "sampling_steps=4", *overrides]
    return compose_run_config("llada_tiny", [f"output_dir={output_dir}", *words])


def make_diffusion_trainer(output_dir: Path, samples: list[Sample], *overrides: str) -> MaskedDiffusionTrainer:
    """A trainer as a run builds it, on given samples."""
    values = diffusion_values(output_dir, *overrides)
    config = as_kind(load_run_config(values), MaskedDiffusionRunConfig)
    assert config is not None
    device = torch.device("cpu")
    return build_diffusion_trainer(
        config,
        plan_run(config, None),
        device,
        load_diffusion_tokenizer(config),
        [[sample] for sample in samples],
        samples[:2],
        open_run_folder(values, config.args.output_dir, config.resume),
    )
