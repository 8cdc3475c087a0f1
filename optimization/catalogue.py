"""Models by family and size, as `--model` and `--size` name them."""

from core.errors import UserError

MODELS: dict[str, dict[str, str]] = {
    "qwen2.5": {size: f"Qwen/Qwen2.5-{size.upper()}-Instruct" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b")},
    "llama": {
        "1b": "meta-llama/Llama-3.2-1B-Instruct",
        "3b": "meta-llama/Llama-3.2-3B-Instruct",
        "8b": "meta-llama/Llama-3.1-8B-Instruct",
        "70b": "meta-llama/Llama-3.1-70B-Instruct",
    },
}
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
