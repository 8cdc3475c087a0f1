"""Models by family and size, as `--model` and `--size` name them."""

from core.errors import UserError
from planner.shapes import model_sizes

_FAMILIES = {"qwen2.5": "Qwen2.5", "llama": "Llama 3"}
MODELS: dict[str, dict[str, str]] = {
    name: {size.lower(): hub_id for size, hub_id in model_sizes(family).items()} for name, family in _FAMILIES.items()
}
"""Family -> size -> hub id of a teacher."""
LLADA_RUNS: dict[str, tuple[str, list[str]]] = {
    "nano": ("llada_tiny", []),
    "small": ("llada_pretrain", ["model_cfg=llada_small"]),
    "medium": ("llada_pretrain", ["model_cfg=llada_medium"]),
    "large": ("llada_sft", ["model_cfg=llada_large"]),
}
"""Masked-diffusion models: size -> run configuration and words."""
TEACHER_RUN = "teacher_rlt_mono_85gb"
"""Batch and lengths of a teacher that was chosen by family and size."""


def run_for_model(family: str, size: str) -> tuple[str, list[str]]:
    """The run configuration that trains this model, and the `key=value` words that put it there.

    A teacher comes by name, with its own base as the student (0 GB).

    Raises:
        UserError: unknown family or size, with the list of known ones.
    """
    family, size = family.lower(), size.lower()
    if family == "llada" and size in LLADA_RUNS:
        return LLADA_RUNS[size]
    if size not in MODELS.get(family, {}):
        sizes_of = {name: list(sizes) for name, sizes in MODELS.items()} | {"llada": list(LLADA_RUNS)}
        known = [f"{name} ({', '.join(sizes)})" for name, sizes in sizes_of.items()]
        raise UserError(
            f"model {family} of size {size}",
            expected="a known model: " + "; ".join(known),
            remedy="choose one of them, or name any hub id or folder with model_name_or_path=...",
        )
    return TEACHER_RUN, [f"model_name_or_path={MODELS[family][size]}", "student_model=null"]
