"""The worked examples of docs/quantisation.md; `python docs/quantisation_numbers.py` writes them into it.

Small numbers are computed as a reader would with pencil and paper, or by bitsandbytes itself; memory by `planner/`.
"""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from core.units import gb
from planner.activations import train_activation_bytes
from planner.components import kv_bytes_per_token, num_lora_params, optimizer_bytes_per_param, weight_bytes
from planner.shapes import ModelShape
from planner.teacher import TeacherSettings

NUM_PARAMS = 10e9
SHAPE_10B = ModelShape(
    name="10B",
    hidden=4096,
    intermediate=14336,
    num_layers=41,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied_embeddings=False,
    attention_bias=False,
    qk_norm=False,
    max_positions=8192,
)
LORA_R, ROW_LEN = 16, 4096
PAGED_FROM_VALUES = 100_000
"""bitsandbytes keeps the states of smaller tensors in ordinary memory."""
BUS_GB_PER_S = 25.0
"""Assumed: what PCIe 4.0 x16 gives of its 32."""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gib(num_bytes: float) -> float:
    return num_bytes / 2**30


# small numbers


def hand_table() -> str:
    weight = torch.tensor([1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4])
    factor = 127 / weight.abs().max()
    rows = []
    for value in weight:
        stored = (value * factor).round()
        back = stored / factor
        rows.append([f"{value:.1f}", f"{value * factor:.2f}", f"{stored:.0f}", f"{back:.3f}", f"{back - value:+.3f}"])
    rows.append(["half a step", "", "", "", f"{0.5 / factor:.3f}"])
    return table(["weight", f"x 127 / 5.4 = x {factor:.2f}", "int8", "back", "error"], rows)


def absmax_int8(weight: Tensor, block: int) -> Tensor:
    """Quantised and back, one scale max / 127 per block."""
    blocks = weight.reshape(-1, block)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).reshape(weight.shape)


OUTLIER_WEIGHT = torch.tensor([0.12, -0.31, 0.07, 0.25, -0.18, 6.00, 0.04, 0.29])
OUTLIER_AT = 5


def blocks_table() -> str:
    weight = OUTLIER_WEIGHT
    columns = [absmax_int8(weight, 8), absmax_int8(weight, 4)]
    rows = [[f"{value:.2f}", *[f"{back[i]:.4f}" for back in columns]] for i, value in enumerate(weight)]
    steps = [weight[:4].abs().max() / 127, weight.abs().max() / 127]
    rows.append(["one step", f"{steps[1]:.4f}", f"{steps[0]:.4f} and {steps[1]:.4f}"])
    for name, chosen in (("first four", slice(0, 4)), ("last four, the outlier left out", [4, 6, 7])):
        errors = [(back[chosen] - weight[chosen]).norm() / weight[chosen].norm() for back in columns]
        rows.append([f"error of the {name}, %", *[f"{100 * error:.1f}" for error in errors]])
    return table(["weight", "one scale of 6.00 / 127", "two blocks: 0.31 / 127 and 6.00 / 127"], rows)


def zero_point_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -128 to 127 over the whole range of values of the last dimension, and what comes back."""
    low, high = weight.amin(dim=-1, keepdim=True), weight.amax(dim=-1, keepdim=True)
    step = (high - low) / 255
    zero = -128 - (low / step).round()
    stored = ((weight / step).round() + zero).clamp(-128, 127)
    return stored, (stored - zero) * step


def zero_point_table() -> str:
    values = torch.tensor([0.0, 0.3, 0.9, 1.4, 2.2, 3.0])
    step = values.max() / 127
    stored, back = zero_point_int8(values)
    rows = [
        [f"{value:.1f}", f"{(value / step).round():.0f}", f"{(value / step).round() * step:.4f}"]
        + [f"{stored[i]:.0f}", f"{back[i]:.4f}"]
        for i, value in enumerate(values)
    ]
    rows.append(["one step", "", f"{step:.4f}", "", f"{values.max() / 255:.4f}"])
    return table(["value", "absmax", "back", "zero point", "back"], rows)


def constants_table() -> str:
    """Eight scales quantised as bitsandbytes does it: less their mean, then indices into its map of 256 values."""
    scales = torch.tensor([2.10, 2.35, 2.48, 2.52, 2.61, 2.77, 3.05, 3.90])
    mean = scales.mean()
    stored, state = bnb.quantize_blockwise(scales - mean, blocksize=256)
    back = bnb.dequantize_blockwise(stored, state) + mean
    rows = [
        [f"{scale:.2f}", f"{scale - mean:+.4f}", str(stored[i].item()), f"{back[i]:.4f}", f"{back[i] - scale:+.4f}"]
        for i, scale in enumerate(scales)
    ]
    return table(["scale", f"less the mean {mean:.4f}", "8-bit index", "back", "error"], rows)


def constant_bytes_table() -> str:
    """What bitsandbytes holds beside the 4-bit values of one matrix."""
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    _, single = bnb.quantize_4bit(weight, quant_type="nf4")
    _, double = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    second = double.state2.absmax
    columns = [
        ("scales", single.absmax.numel(), single.absmax.nbytes, double.absmax.numel(), double.absmax.nbytes),
        ("scales of the scales", 0, 0, second.numel(), second.nbytes),
        ("mean of the scales", 0, 0, 1, double.offset.nbytes),
    ]
    rows = [[name, *[f"{value:,}" for value in values]] for name, *values in columns]
    before, after = (sum(column[i] for column in columns) for i in (2, 4))
    rows.append(["sum", "", f"{before:,}", "", f"{after:,}"])
    rows.append(["bits per weight", "", f"{8 * before / weight.numel():.4f}", "", f"{8 * after / weight.numel():.4f}"])
    return table(["a matrix of 1,024 x 4,096", "single", "bytes", "double", "bytes"], rows)


def outlier_product_table() -> str:
    """One token through three output rows, in bitsandbytes' own LLM.int8."""
    token = torch.tensor([[0.15, -0.12, 42.0, 0.10]], dtype=torch.float16)
    weight = torch.tensor([[0.20, -0.10, 0.00, 0.30], [-0.40, 0.25, 0.40, 0.10], [0.15, 0.35, -0.05, -0.20]])
    exact = (token.float() @ weight.T)[0]
    stored, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    products, stored_tokens = [], []
    for threshold in (0.0, 6.0):
        token_int8, token_scale, columns = bnb.int8_vectorwise_quant(token.clone(), threshold=threshold)
        product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(token, token_int8, stored, token_scale, scale, columns)
        products.append(product[0].float())
        stored_tokens.append(f"`{token_int8[0].tolist()}`")
    rows = [
        [f"`{_plain(row.tolist())}`", f"{exact[i]:.3f}", *[f"{product[i]:.3f}" for product in products]]
        for i, row in enumerate(weight)
    ]
    rows.insert(0, ["the token in int8", "", *stored_tokens])
    header = f"weights, for the token `{_plain([round(x, 2) for x in token[0].tolist()])}`"
    return table([header, "exact", "all in int8 (threshold 0)", "42 in 16 bits (threshold 6)"], rows)


# memory

INT8, NF4_DOUBLE = "int8, one scale per row of 4,096", "NF4, double quantisation"
BITS = {
    "float32": 32.0,
    "float16, bfloat16": 16.0,
    INT8: 8 + 32 / 4096,
    "NF4, float32 scales": 4 + 32 / 64,
    NF4_DOUBLE: 4 + 8 / 64 + 32 / (64 * 256),
}


def whole_10b_bytes() -> dict[str, float]:
    """The model of `SHAPE_10B`, its embedding and head in 16 bits under quantised layers."""
    sizes = (
        weight_bytes(SHAPE_10B, "fp32"),
        weight_bytes(SHAPE_10B, "bf16"),
        weight_bytes(SHAPE_10B, "int8"),
        weight_bytes(SHAPE_10B, "nf4", double_quant=False),
        weight_bytes(SHAPE_10B, "nf4"),
    )
    return dict(zip(BITS, sizes, strict=True))


def inference_table() -> str:
    rows = []
    for name, whole in whole_10b_bytes().items():
        size = BITS[name] / 8 * NUM_PARAMS
        rows.append([name, f"{BITS[name]:.3f}", f"{gb(size):.2f}", f"{gib(size):.2f}", f"{gb(whole):.2f}"])
    kv = kv_bytes_per_token(SHAPE_10B) * 8192
    rows.append(["and the KV cache of one row of 8,192 tokens", "", "", "", f"{gb(kv):.2f}"])
    return table(["weights of 10 billion", "bits", "GB", "GiB", f"GB, model of {SHAPE_10B.num_params / 1e9:.2f}"], rows)


ADAM_8BIT = optimizer_bytes_per_param("adamw_8bit")
FLOAT32 = "AdamW, everything in float32"
MIXED = "AdamW, mixed: 16-bit weights and gradients, float32 copy of the weights"
FLOAT32_8BIT = "8-bit AdamW, weights and gradients in float32"
QLORA = "QLoRA: LoRA on NF4, double quantisation"


def adapter_bytes() -> tuple[float, float, float]:
    """Float32 weights, their gradients and 8-bit states of a LoRA adapter on all seven linears."""
    num = num_lora_params(SHAPE_10B, LORA_R)
    return 4.0 * num, 4.0 * num, ADAM_8BIT * num


def activation_bytes(precision: str) -> float:
    settings = TeacherSettings(
        teacher=SHAPE_10B,
        student=None,
        reference="none",
        precision=precision,
        lora_r=LORA_R,
        micro_batch=1,
        train_batch=1,
        num_generations=1,
        aggregation_steps=1,
        max_prompt_len=ROW_LEN // 2,
        max_completion_len=ROW_LEN // 2,
    )
    return train_activation_bytes(settings)


def training_rows() -> dict[str, tuple[float, float, float]]:
    """Bytes of weights, gradients and optimizer states."""
    full = {
        FLOAT32: (4, 4, 8),
        MIXED: (2 + 4, 2, 8),
        "AdamW, bfloat16 alone (small updates round to nothing)": (2, 2, 4),
        FLOAT32_8BIT: (4, 4, ADAM_8BIT),
        "8-bit AdamW, weights and gradients in bfloat16": (2, 2, ADAM_8BIT),
    }
    weight, gradient, states = adapter_bytes()
    whole = whole_10b_bytes()
    return {name: tuple(NUM_PARAMS * size for size in sizes) for name, sizes in full.items()} | {
        "LoRA on bfloat16": (whole["float16, bfloat16"] + weight, gradient, states),
        "LoRA on int8": (whole[INT8] + weight, gradient, states),
        QLORA: (whole[NF4_DOUBLE] + weight, gradient, states),
    }


def training_table() -> str:
    rows = [
        [name, *[f"{gb(size):.2f}" for size in sizes], f"{gb(sum(sizes)):.1f}", f"{sum(sizes) / NUM_PARAMS:.2f}"]
        for name, sizes in training_rows().items()
    ]
    rows.append([f"and activations: one row of {ROW_LEN:,} tokens, checkpointed, QLoRA", "", "", ""])
    rows[-1] += [f"{gb(activation_bytes('nf4')):.1f}", ""]
    return table(["training 10 billion", "weights", "gradients", "states", "GB", "bytes per parameter"], rows)


def adapter_states() -> tuple[int, int]:
    """Values of the adapter in tensors whose states are paged, and in the smaller ones whose are not."""
    tensors = [LORA_R * n for pair in SHAPE_10B.linears.values() for n in pair]
    paged = sum(num for num in tensors if num >= PAGED_FROM_VALUES)
    return SHAPE_10B.num_layers * paged, SHAPE_10B.num_layers * (sum(tensors) - paged)


def paging_table() -> str:
    adapter, gradient, _ = adapter_bytes()
    paged, unpaged = adapter_states()
    norms = SHAPE_10B.num_layers * 2 * SHAPE_10B.hidden + SHAPE_10B.hidden
    base = whole_10b_bytes()[NF4_DOUBLE]
    columns = {
        "weights": (base + adapter, 4 * NUM_PARAMS, "never"),
        "gradients": (gradient, 4 * NUM_PARAMS, "never"),
        "activations": (activation_bytes("nf4"), None, "never"),
        "states of tensors of 100,000 values and more": (2 * paged, 2 * (NUM_PARAMS - norms), "yes"),
        "states of smaller tensors": (2 * unpaged, 2 * norms, "never"),
        "scales of the states": (8 / 256 * (paged + unpaged), 8 / 256 * NUM_PARAMS, "never"),
    }
    rows = [
        [name, f"{gb(qlora):.3f}", "-" if full is None else f"{gb(full):.3f}", pages]
        for name, (qlora, full, pages) in columns.items()
    ]
    can_page = columns["states of tensors of 100,000 values and more"][:2]
    seconds = [2 * gb(size) / BUS_GB_PER_S for size in can_page]
    rows.append(["seconds per step if all of it is out, to the GPU and back", *[f"{s:.3f}" for s in seconds], ""])
    return table(["GB", f"QLoRA, r = {LORA_R}", "8-bit AdamW on all weights", "pages out"], rows)


def lora_numbers_table() -> str:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    a, b, alpha, r = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.5], [-1.0]]), 2, 1
    x = torch.tensor([1.0, 1.0, 1.0])
    steps = {
        "W": weight,
        "A": a,
        "B": b,
        "B A": b @ a,
        "W + (alpha / r) B A": weight + alpha / r * (b @ a),
        "x": x,
        "W x": weight @ x,
        "A x": a @ x,
        "B (A x)": b @ (a @ x),
        "h = W x + (alpha / r) B (A x)": weight @ x + alpha / r * (b @ (a @ x)),
        "the merged matrix times x": (weight + alpha / r * (b @ a)) @ x,
    }
    rows = [[name, " x ".join(map(str, value.shape)), f"`{_plain(value.tolist())}`"] for name, value in steps.items()]
    return table([f"alpha = {alpha}, r = {r}", "shape", "value"], rows)


def _plain(value: float | list) -> str:
    return f"{value + 0.0:.4g}" if isinstance(value, float) else "[" + ", ".join(map(_plain, value)) + "]"


def lora_table() -> str:
    rows = []
    for name, (n_in, n_out) in SHAPE_10B.linears.items():
        num = LORA_R * (n_in + n_out)
        rows.append([name, f"{n_out:,} x {n_in:,}", f"{LORA_R} x {n_in:,}", f"{n_out:,} x {LORA_R}", f"{num:,}"])
        rows[-1].append(f"{100 * num / (n_in * n_out):.2f}")
    num = num_lora_params(SHAPE_10B, LORA_R)
    rows.append([f"all {SHAPE_10B.num_layers} layers", "", "", "", f"{num:,}"])
    rows[-1].append(f"{100 * num / SHAPE_10B.num_linear_params:.2f}")
    return table([f"r = {LORA_R}", "W", "A", "B", "parameters of A and B", "% of W"], rows)


EXAMPLES = {
    "hand": hand_table,
    "blocks": blocks_table,
    "zeropoint": zero_point_table,
    "constants": constants_table,
    "constantbytes": constant_bytes_table,
    "product": outlier_product_table,
    "inference": inference_table,
    "training": training_table,
    "paging": paging_table,
    "loranumbers": lora_numbers_table,
    "lora": lora_table,
}
