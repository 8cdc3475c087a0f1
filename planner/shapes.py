"""Shapes of dense decoder models: what the memory arithmetic needs to know of a config.json."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.hub import is_hub_id
from schemas.llada import PUBLISHED_SETTINGS
from schemas.model import EMBEDDED_MODEL, is_embedded


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder: RMS norms, grouped-query attention with rotary positions, gated MLP."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool
    attention_bias: bool
    """q, k and v projections have a bias (Qwen2)."""
    qk_norm: bool
    """Queries and keys are normalised per head (Qwen3)."""
    max_positions: int
    """Longest sequence that the rotary positions were trained for."""

    @property
    def short_name(self) -> str:
        """Without the owner and what marks a chat model."""
        return self.name.split("/")[-1].removesuffix("-Instruct")

    @property
    def q_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) features of the linear layers of one block."""
        return {
            "q_proj": (self.hidden, self.q_dim),
            "k_proj": (self.hidden, self.kv_dim),
            "v_proj": (self.hidden, self.kv_dim),
            "o_proj": (self.q_dim, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def num_linear_params(self) -> int:
        return self.num_layers * sum(n_in * n_out for n_in, n_out in self.linears.values())

    @property
    def num_embedding_params(self) -> int:
        """Input embedding and head; one matrix where they are tied."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def num_small_params(self) -> int:
        """Norms and biases, which no quantisation touches."""
        bias = (self.q_dim + 2 * self.kv_dim) if self.attention_bias else 0
        qk_norm = 2 * self.head_dim if self.qk_norm else 0
        return self.num_layers * (2 * self.hidden + bias + qk_norm) + self.hidden

    @property
    def num_params(self) -> int:
        return self.num_linear_params + self.num_embedding_params + self.num_small_params


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Read a transformers `config.json` (already parsed) of a dense decoder.

    Raises:
        UserError: a key is missing, or the architecture is not a dense decoder (mixture of experts, state space, ...).
    """
    model_type = config.get("model_type", "?")
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            f"{name}: model_type {model_type} with a mixture of experts",
            expected="a dense decoder (Qwen2, Qwen3, Llama, Mistral, ...)",
            remedy="choose a dense model; the memory of experts is not modelled",
        )
    if model_type == "llada":
        config = {PUBLISHED_SETTINGS.get(key, key): value for key, value in config.items()}
    try:
        hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
        return ModelShape(
            name=name,
            hidden=hidden,
            intermediate=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden // num_heads,
            vocab=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", model_type == "qwen2")),
            qk_norm=model_type in ("qwen3", "olmo2"),
            max_positions=config.get("max_position_embeddings", 32768),
        )
    except KeyError as error:
        raise UserError(
            f"{name}: config.json has no {error.args[0]!r}",
            expected="the configuration of a causal language model",
            remedy="check that the folder holds a model, not an adapter or a tokenizer",
        ) from error


def load_shape(name_or_path: str, *, allow_download: bool = False) -> ModelShape:
    """Shape of a model by local folder, built-in table, or hub id; in that order.

    A hub id that is not built in is read from the local hub cache, and from the hub only with `allow_download`.

    Raises:
        UserError: nothing of that name is at hand, or it is not a dense decoder.
    """
    folder = Path(name_or_path).expanduser()
    if is_embedded(name_or_path):
        return replace(known_shapes()[EMBEDDED_MODEL], name=name_or_path)
    if folder.is_dir():
        return _shape_from_folder(name_or_path, folder)
    if (known := known_shapes().get(name_or_path.lower())) is not None:
        return known
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(name_or_path, "config.json", local_files_only=not allow_download)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        download = f"hf download {name_or_path}"
        where = "in the hub's cache on this machine or on the hub" if allow_download else "in the hub's cache here"
        raise UserError(
            f"model {name_or_path!r}: no such folder, not a built-in shape, no config.json {where}",
            expected="a local folder with config.json, a hub id that was downloaded, or a common model",
            remedy="check the spelling" + (f", or download it first: {download}" if is_hub_id(name_or_path) else ""),
        ) from error
    return shape_from_config(name_or_path, _read_config(Path(path)))


def _shape_from_folder(name: str, folder: Path) -> ModelShape:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"model folder {folder} has no config.json",
            expected="a folder written by save_pretrained",
            remedy=f"check the path; the folder holds: {', '.join(sorted(os.listdir(folder))[:5]) or 'nothing'}",
        )
    return shape_from_config(name, _read_config(path))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(config, dict):
        raise _unreadable(path, "no object at its top")
    return config


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is no JSON: {reason}",
        expected="the configuration that save_pretrained writes",
        remedy="copy or download the model once more",
    )


@functools.cache
def _known_families() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "known_shapes.json").read_text(encoding="utf-8"))


@functools.cache
def model_sizes(family: str) -> Mapping[str, str]:
    """Sizes of a built-in family, the smallest first -> hub id of the model for chats: `7B` of `Qwen2.5`.

    The one list of models that are offered by their size; an entry's first id is the one for chats.
    """
    (models,) = (entry["models"] for entry in _known_families()["families"] if entry["family"] == family)
    return {model["size"]: model["ids"][0] for model in models}


@functools.cache
def known_shapes() -> Mapping[str, ModelShape]:
    """Lower-case hub id -> shape of the built-in families (planner/known_shapes.json)."""
    table = _known_families()
    shapes = {}
    for family in table["families"]:
        for model in family["models"]:
            for hub_id in model["ids"]:
                shapes[hub_id.lower()] = ModelShape(
                    name=hub_id,
                    **dict(zip(table["shape"], model["shape"], strict=True)),
                    tied_embeddings=model["tied"],
                    attention_bias=family["attention_bias"],
                    qk_norm=family["qk_norm"],
                    max_positions=family["max_positions"],
                )
    return shapes
