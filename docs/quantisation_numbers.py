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
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "docs")]

import quantisation_examples as examples  # noqa: E402
from quantisation_examples import NUM_PARAMS, OUTLIER_WEIGHT, table  # noqa: E402

from core.units import gb  # noqa: E402
from data.embedded.model import ensure_tiny_model  # noqa: E402
from optimization.bitsandbytes_patches import fix_cpu_dequantization  # noqa: E402
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
    """LLM.int8's weights: one scale SCB / 127 per row."""
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
    # name: bits per weight (of a matrix 3584 wide), scheme
    "int8, one scale per matrix": (8.0, int8_per_tensor),
    "int8, one scale per row (LLM.int8)": (8 + 32 / 3584, int8_per_row),
    "8-bit dynamic map, blocks of 256": (8 + 32 / 256, lambda w: blockwise_8bit(w, 256)),
    "4-bit even steps, one scale per matrix": (4.0, lambda w: linear_4bit(w, w.numel())),
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
        ("int8, one float32 scale per row of 3,584", 8 + 32 / 3584),
        ("NF4, float32 scales", 4 + 32 / 64),
        ("NF4, double quantisation", 4 + 8 / 64 + 32 / (64 * 256)),
    ):
        rows.append([name, f"{bits:.3f}", f"{gb(bits / 8 * linear):.2f}"])
    rows.append(["saved by double quantisation", f"{32 / 64 - 8 / 64 - 32 / (64 * 256):.3f}"])
    rows[-1].append(f"{gb((32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8 * linear):.2f}")
    return table(["linear layers of a 7B", "bits per weight", "GB"], rows)


def whole_model_table() -> str:
    shape = load_shape(MODEL_7B)
    sizes: list[tuple[str, float]] = [
        ("bf16", weight_bytes(shape, "bf16")),
        ("int8", weight_bytes(shape, "int8")),
        ("NF4", weight_bytes(shape, "nf4", double_quant=False)),
        ("NF4, double quantisation", weight_bytes(shape, "nf4")),
    ]
    rows = [[name, f"{gb(size):.2f}", f"{8 * size / shape.num_params:.2f}"] for name, size in sizes]
    return table([f"whole {shape.name}", "GB", "bits per parameter"], rows)


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
    return table(["error, % of the weight's norm", "bits per weight", "normal", "with outliers"], rows)


def real_error_table() -> str:
    weights = (real_weight(), with_outliers(real_weight()))
    rows = [
        [name, *[f"{100 * relative_error(weight, scheme):.1f}" for weight in weights]]
        for name, (_, scheme) in SCHEMES.items()
    ]
    return table(["error, % of the weight's norm", "as trained", "with outliers"], rows)


def slips_table() -> str:
    """What the usual worked examples say, and what the tables of the page say."""
    whole, training = examples.whole_10b_bytes(), examples.training_rows()
    names = (examples.FLOAT32, examples.FLOAT32_8BIT, examples.MIXED, examples.QLORA)
    full, eight_bit, mixed, qlora = (sum(training[name]) for name in names)
    states = training[examples.QLORA][2]
    saved = 32 / 64 - 8 / 64 - 32 / (64 * 256)
    back = examples.absmax_int8(OUTLIER_WEIGHT, 8)
    lost = 100 * ((back - OUTLIER_WEIGHT)[:4].norm() / OUTLIER_WEIGHT[:4].norm()).item()
    outlier, outlier_back = OUTLIER_WEIGHT[examples.OUTLIER_AT], back[examples.OUTLIER_AT]
    quantile = NormalDist().inv_cdf
    weight, one = normal_weight(), torch.tensor(1.0, dtype=torch.bfloat16)
    lines = {
        f"Double quantisation saves {saved:.2f} GB per billion parameters": f"{saved:.3f} bits, an eighth of that: "
        f"{gb(saved / 8 * 1e9):.3f} GB per billion, {gb(saved / 8 * NUM_PARAMS):.2f} GB of 10 billion",
        "Before double quantisation the scales cost a bit per weight": f"32 / 64 = {32 / 64:.3f}",
        "NF4's level i is the quantile at (i + 0.5) / 16": "those are symmetric, without a zero: the smallest would be "
        f"{quantile(8.5 / 16) / quantile(15.5 / 16):+.4f}; NF4 has an exact zero, then {nf4_levels()[8]:+.4f}",
        "10 billion parameters are 10 GB in 8 bits and 5 GB in 4": f"{gb(whole[examples.INT8]):.2f} and "
        f"{gb(whole[examples.NF4_DOUBLE]):.2f}: scales, and embedding and head in 16 bits",
        "40 GB of weights fill what `nvidia-smi` shows as 40": "it counts in MiB, and they are "
        f"{examples.gib(4 * NUM_PARAMS):.2f} GiB; a GPU sold as 24 GB has 24 GiB or {gb(24 * 2**30):.2f} GB",
        "An outlier is clipped by int8": f"absmax clips nothing: {outlier:.2f} comes back as {outlier_back:.2f}. "
        f"Its neighbours pay: {lost:.1f} % in the example",
        "LLM.int8 keeps outlier weights in 16 bits": "all its weights are int8. Activation columns are 16-bit, and the "
        "weights that meet them are dequantised for the product",
        "A zero point makes int8 weights twice as good": "it does where values have one sign. Of normal weights by row "
        f"the error is {100 * relative_error(weight, int8_per_row):.2f} % without and "
        f"{100 * relative_error(weight, lambda w: examples.zero_point_int8(w)[1]):.2f} % with one",
        "Mixed precision halves the memory of training": f"{full / NUM_PARAMS:.0f} bytes per parameter without and "
        f"{mixed / NUM_PARAMS:.0f} with it, for the float32 copy and the states stay",
        "16-bit weights can be trained as they are": f"in bfloat16 1 + 0.001 is {one + 0.001:g}, and the next number "
        f"is {1 + torch.finfo(torch.bfloat16).eps:g}: the updates of a small learning rate are lost",
        "8-bit Adam divides the memory of training by four": f"only the states: {gb(full):.0f} GB become "
        f"{gb(eight_bit):.0f}, {100 * (1 - eight_bit / full):.0f} % less",
        "LoRA trains under 1 % of the parameters, so it takes 1 % of the memory": f"QLoRA takes {gb(qlora):.1f} GB of "
        f"{gb(full):.0f}, {100 * qlora / full:.1f} %, nearly all of it the frozen base; activations come on top",
        "Paged optimizers let QLoRA run on a GPU that is too small": f"its states are {gb(states):.2f} GB, of which "
        f"{gb(2 * examples.adapter_states()[0]):.2f} can leave the GPU; weights, gradients and activations cannot",
        "The adapter can be merged into the 4-bit base": "that rounds again. For an adapter of 2 % of the weight's "
        f"norm the new error is {100 * merging_error(weight):.0f} % of the adapter's norm: nothing of it is left",
    }
    return "\n".join(["| often read | what holds |", "| --- | --- |", *[f"| {k} | {v} |" for k, v in lines.items()]])


def merging_error(weight: Tensor) -> float:
    """Error of NF4(base + B A) over the norm of B A, which is 2 % of that of the base, itself dequantised from NF4."""
    random = torch.Generator().manual_seed(2)
    base = four_bit(weight, "nf4")
    update = torch.randn(weight.shape[0], 16, generator=random) @ torch.randn(16, weight.shape[1], generator=random)
    update *= 0.02 * base.norm() / update.norm()
    return ((four_bit(base + update, "nf4") - base - update).norm() / update.norm()).item()


TABLES = {
    **examples.EXAMPLES,
    "slips": slips_table,
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
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), made))
    plot_levels(IMAGES / "nf4_levels.png")
    plot_errors(IMAGES / "quantisation_error.png")


if __name__ == "__main__":
    main()
