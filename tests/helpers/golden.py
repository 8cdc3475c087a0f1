"""The golden reward cases: tokenizer, cases, and the two random models made again from their recipe."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from data.formats import PromptFormat
from data.tags import TAG_STYLES

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"


@cache
def golden_data() -> dict[str, Any]:
    return json.loads((GOLDEN_FOLDER / "rlt_reward_cases.json").read_text())


@cache
def golden_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(GOLDEN_FOLDER / "tokenizer")


@cache
def golden_format() -> PromptFormat:
    data = golden_data()
    return PromptFormat(
        tags=TAG_STYLES["bespoke"],
        teacher_system_prompt=data["teacher_system_prompt"],
        student_system_prompt=data["student_system_prompt"],
    )


@cache
def golden_model(role: str) -> Qwen2ForCausalLM:
    """`assets.weights` of the cases, checked against the recorded sha256. Eager attention, as when they were made."""
    assets = golden_data()["assets"]
    model = Qwen2ForCausalLM(Qwen2Config(**assets["model_config"], attn_implementation="eager")).eval()
    random = np.random.RandomState(assets["seeds"][role])
    state = model.state_dict()
    for name in sorted(state):
        if "norm" in name:
            state[name] = torch.ones_like(state[name])
            continue
        std = next((s for key, s in (("embed_tokens", 1.0), ("lm_head", 0.15), ("bias", 0.10)) if key in name), 0.16)
        values = random.standard_normal(tuple(state[name].shape)) * std
        state[name] = torch.tensor(values, dtype=torch.float32)
    file_bytes = safetensors.torch.save(state, metadata={"format": "pt"})
    assert hashlib.sha256(file_bytes).hexdigest() == assets["sha256"][f"{role}/model.safetensors"]
    model.load_state_dict(state)
    return model
