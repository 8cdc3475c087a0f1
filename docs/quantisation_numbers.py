"""The numbers and plots of docs/quantisation.md: `python docs/quantisation_numbers.py` writes them into it.

Quantised values are bitsandbytes' own, computed on the CPU. No hub is needed: the real weight is one of the embedded
model, which is made on this machine (a minute, once).
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import bitsandbytes.functional as bnb
import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from core.units import gb  # noqa: E402
from models.tiny import ensure_tiny_model  # noqa: E402
from optimization.nf4_cpu import fix_cpu_dequantization  # noqa: E402
from planner.components import weight_bytes  # noqa: E402
from planner.shapes import load_shape  # noqa: E402

PAGE = REPOSITORY / "docs" / "quantisation.md"
IMAGES = REPOSITORY / "docs" / "img"
NF4_OFFSET = 0.9677083
REAL_WEIGHT = "model.layers.1.mlp.up_proj.weight"
MODEL_7B = "Qwen/Qwen2.5-7B-Instruct"
OUTLIER_ONE_IN, OUTLIER_FACTOR = 1000, 10.0


def nf4_levels() -> Tensor:
    """The 16 levels that bitsandbytes uses."""
    return bnb.get_4bit_type("nf4", device="cpu")


def nf4_levels_by_formula(offset: float = NF4_OFFSET) -> Tensor:
    """Quantiles of the normal distribution: 8 above zero, 7 below, zero itself; divided by the largest."""
    quantile = NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    return torch.tensor(sorted([*negative, 0.0, *positive])) / positive[0]


# schemes: weight [N, K] -> what comes back


def int8_per_tensor(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / 127
    return (weight / scale).round() * scale


def int8_per_row(weight: Tensor) -> Tensor:
    """LLM.int8's weights: one scale SCB / 127 a row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


def linear_4bit(weight: Tensor, block: int) -> Tensor:
    """15 even steps, -7 to 7."""
    blocks = weight.reshape(-1, block)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape)


def blockwise_8bit(weight: Tensor, block: int) -> Tensor:
    """bitsandbytes' 8-bit optimizer states: dynamic map of 256 values."""
    return bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=block))


def four_bit(weight: Tensor, kind: str, block: int = 64, double_quant: bool = False) -> Tensor:
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double_quant)
    return bnb.dequantize_4bit(packed, state)


SCHEMES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # name: bits a weight (of a matrix 3584 wide), scheme
    "int8, one scale a matrix": (8.0, int8_per_tensor),
    "int8, one scale a row (LLM.int8)": (8 + 32 / 3584, int8_per_row),
    "8-bit dynamic map, blocks of 256": (8 + 32 / 256, lambda w: blockwise_8bit(w, 256)),
    "4-bit even steps, one scale a matrix": (4.0, lambda w: linear_4bit(w, w.numel())),
    "4-bit even steps, blocks of 64": (4 + 32 / 64, lambda w: linear_4bit(w, 64)),
    "FP4, blocks of 64": (4 + 32 / 64, lambda w: four_bit(w, "fp4")),
    "NF4, blocks of 4096": (4 + 32 / 4096, lambda w: four_bit(w, "nf4", 4096)),
    "NF4, blocks of 64": (4 + 32 / 64, lambda w: four_bit(w, "nf4")),
    "NF4, blocks of 64, double quantisation": (
        4 + 8 / 64 + 32 / (64 * 256),
        lambda w: four_bit(w, "nf4", double_quant=True),
    ),
}


def relative_error(weight: Tensor, scheme: Callable[[Tensor], Tensor]) -> float:
    """Root of the summed squared error over that of the weight."""
    return ((scheme(weight) - weight).norm() / weight.norm()).item()


def normal_weight() -> Tensor:
    return torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))


def with_outliers(weight: Tensor) -> Tensor:
    """One value in a thousand ten times as large, as trained models of some size have and the embedded one has not."""
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 1 / OUTLIER_ONE_IN
    return torch.where(chosen, OUTLIER_FACTOR * weight, weight)


def real_weight() -> Tensor:
    from safetensors.torch import load_file

    return load_file(ensure_tiny_model() / "model.safetensors")[REAL_WEIGHT].float().contiguous()


# tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def absmax_table() -> str:
    weight = torch.tensor([0.10, -0.32, 0.71, -1.20, 0.04, 0.55, -0.08, 0.26])
    scale = weight.abs().max() / 127
    levels, blockmax = nf4_levels(), weight.abs().max()
    nearest = (weight[:, None] / blockmax - levels).abs().argmin(dim=1)
    rows = []
    for value, index in zip(weight, nearest, strict=True):
        stored = (value / scale).round()
        back = levels[index] * blockmax
        rows.append(
            [f"{value:.2f}", f"{stored:.0f}", f"{stored * scale:.4f}", str(index.item()), f"{levels[index]:.4f}"]
            + [f"{back:.4f}"]
        )
    return table(["weight", "int8", "back", "NF4 index", "level", "back"], rows)


def levels_table() -> str:
    levels, formula = nf4_levels(), nf4_levels_by_formula()
    rows = [
        [str(i), f"{level:.7f}", f"{other:.7f}"]
        for i, (level, other) in enumerate(zip(levels.tolist(), formula.tolist(), strict=True))
    ]
    return table(["index", "bitsandbytes", "by formula"], rows)


def bits_table() -> str:
    shape = load_shape(MODEL_7B)
    linear = shape.num_linear_params
    rows = []
    for name, bits in (
        ("bf16", 16.0),
        ("int8, one float32 scale a row of 3,584", 8 + 32 / 3584),
        ("NF4, float32 scales", 4 + 32 / 64),
        ("NF4, double quantisation", 4 + 8 / 64 + 32 / (64 * 256)),
    ):
        rows.append([name, f"{bits:.3f}", f"{gb(bits / 8 * linear):.2f}"])
    rows.append(["saved by double quantisation", f"{32 / 64 - 8 / 64 - 32 / (64 * 256):.3f}"])
    rows[-1].append(f"{gb((32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8 * linear):.2f}")
    return table(["linear layers of a 7B", "bits a weight", "GB"], rows)


def whole_model_table() -> str:
    shape = load_shape(MODEL_7B)
    sizes: list[tuple[str, float]] = [
        ("bf16", weight_bytes(shape, "bf16")),
        ("int8", weight_bytes(shape, "int8")),
        ("NF4", weight_bytes(shape, "nf4", double_quant=False)),
        ("NF4, double quantisation", weight_bytes(shape, "nf4")),
    ]
    rows = [[name, f"{gb(size):.2f}", f"{8 * size / shape.num_params:.2f}"] for name, size in sizes]
    return table([f"whole {shape.name}", "GB", "bits a parameter"], rows)


def double_quantisation_table() -> str:
    weight = normal_weight()
    _, single = bnb.quantize_4bit(weight, quant_type="nf4")
    _, double = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    back = bnb.dequantize_blockwise(double.absmax, double.state2) + double.offset
    scale_error = ((back - single.absmax).norm() / single.absmax.norm()).item()
    rows = [
        ["weights a scale", str(double.blocksize)],
        ["scales a second-level scale", str(double.state2.blocksize)],
        ["mean of the scales, subtracted first", f"{double.offset.item():.4f}"],
        ["values of the 8-bit map", str(double.state2.code.numel())],
        ["relative error of the scales", f"{scale_error:.4f}"],
        ["relative error of the weights, before", f"{relative_error(weight, SCHEMES['NF4, blocks of 64'][1]):.4f}"],
        ["relative error of the weights, after"]
        + [f"{relative_error(weight, SCHEMES['NF4, blocks of 64, double quantisation'][1]):.4f}"],
    ]
    return table(["double quantisation of 524,288 normal weights", ""], rows)


def normal_error_table() -> str:
    weights = (normal_weight(), with_outliers(normal_weight()))
    rows = [
        [name, f"{bits:.3f}", *[f"{100 * relative_error(weight, scheme):.2f}" for weight in weights]]
        for name, (bits, scheme) in SCHEMES.items()
    ]
    return table(["error, % of the weight's norm", "bits a weight", "normal", "with outliers"], rows)


def real_error_table() -> str:
    weights = (real_weight(), with_outliers(real_weight()))
    rows = [
        [name, *[f"{100 * relative_error(weight, scheme):.1f}" for weight in weights]]
        for name, (_, scheme) in SCHEMES.items()
    ]
    return table(["error, % of the weight's norm", "as trained", "with outliers"], rows)


TABLES = {
    "absmax": absmax_table,
    "levels": levels_table,
    "bits": bits_table,
    "model": whole_model_table,
    "double": double_quantisation_table,
    "normal": normal_error_table,
}
"""Equal on every machine."""
REAL_TABLE = "real"
"""Of a weight that is trained on this machine: equal to a few per cent."""


def tables_in(page: str) -> dict[str, str]:
    """Name -> the table between its markers."""
    return dict(re.findall(r"<!-- numbers: (\w+) -->\n(.*?)\n<!-- end -->", page, flags=re.DOTALL))


def with_tables(page: str, tables: dict[str, str]) -> str:
    for name, text in tables.items():
        pattern = rf"(<!-- numbers: {name} -->\n).*?(\n?<!-- end -->)"
        page = re.sub(pattern, lambda match, text=text: f"{match[1]}{text}\n<!-- end -->", page, flags=re.DOTALL)
    return page


# plots


def plot_levels(path: Path) -> None:
    levels = nf4_levels()
    grid = torch.linspace(-1.15, 1.15, 400)
    normal = NormalDist(sigma=1 / NormalDist().inv_cdf(NF4_OFFSET))  # the levels are its quantiles
    figure, axes = plt.subplots(figsize=(8, 3.2))
    axes.fill_between(grid, [normal.pdf(x) for x in grid.tolist()], color="#d7e3ef", label="normal distribution")
    axes.vlines(levels, 0, 0.8, color="#2b5c8a", linewidth=1.6, label="16 levels of NF4")
    even = torch.arange(-7, 8) / 7
    axes.vlines(even, -0.16, -0.03, color="#c0392b", linewidth=1.6, label="15 levels of even 4-bit steps")
    for i, level in enumerate(levels):
        axes.text(level, 0.825, str(i), ha="center", fontsize=7)
    axes.set(xlabel="weight / largest magnitude of its block", yticks=[], ylim=(-0.2, 1.15), xlim=(-1.1, 1.1))
    axes.set_title("NF4: 7 levels below zero, zero, 8 above", fontsize=10)
    axes.legend(fontsize=7, loc="upper center", ncols=3, frameon=False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_errors(path: Path) -> None:
    columns = {
        "embedded model": real_weight(),
        f"the same, 1 in {OUTLIER_ONE_IN} weights x{OUTLIER_FACTOR:.0f}": with_outliers(real_weight()),
    }
    figure, axes = plt.subplots(figsize=(8, 3.8))
    for offset, (name, weight), color in zip((-0.2, 0.2), columns.items(), ("#2b5c8a", "#c0392b"), strict=True):
        errors = [100 * relative_error(weight, scheme) for _, scheme in SCHEMES.values()]
        heights = [i + offset for i in range(len(errors))]
        axes.barh(heights, errors, height=0.38, color=color, label=name)
        for height, error in zip(heights, errors, strict=True):
            axes.text(error * 1.06, height, f"{error:.1f}", va="center", fontsize=7)
    names = [f"{name}  ({bits:.2f} bits)" for name, (bits, _) in SCHEMES.items()]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(0.2, 200), xlabel="relative error, % of the weight's norm")
    axes.set_title(f"Quantisation error of {REAL_WEIGHT}", fontsize=10)
    axes.legend(fontsize=8, loc="upper right", frameon=False)
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    fix_cpu_dequantization()
    made = {name: make() for name, make in TABLES.items()} | {REAL_TABLE: real_error_table()}
    PAGE.write_text(with_tables(PAGE.read_text(), made))
    plot_levels(IMAGES / "nf4_levels.png")
    plot_errors(IMAGES / "quantisation_error.png")


if __name__ == "__main__":
    main()
