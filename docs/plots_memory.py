"""The plots of docs/memory.md, one per phase: `python docs/plots_memory.py` writes docs/img/memory_*.png.

Lines and bars are predicted by the planner, crosses are simulated on the meta device. Nothing was measured on a GPU.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from core.types import Phase  # noqa: E402
from core.units import gb  # noqa: E402
from planner.activations import forward_bytes, train_activation_bytes  # noqa: E402
from planner.components import num_lora_params, weight_bytes  # noqa: E402
from planner.plan import plan, plan_run, usable_bytes  # noqa: E402
from planner.shapes import load_shape  # noqa: E402
from planner.teacher import TeacherSettings, teacher_settings  # noqa: E402
from schemas.compose import compose_run_config  # noqa: E402
from schemas.run import load_run_config  # noqa: E402
from tests.helpers.memory_simulator import layer_count, simulate_scoring, simulate_training_step  # noqa: E402

IMAGES = REPOSITORY / "docs" / "img"
GPUS_GB = (24, 48, 85)
CONTEXTS = (2048, 4096, 8192, 12288, 16384)
COLORS = {"teacher": "#2b5c8a", "student": "#6c9fd0", "vLLM weights": "#8e44ad", "KV cache": "#17a2b8"}
SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B")


def settings_85gb() -> TeacherSettings:
    return teacher_settings(load_run_config(compose_run_config("teacher_rlt_mono_85gb")))


def with_context(settings: TeacherSettings, row_len: int, **changes: Any) -> TeacherSettings:
    return replace(settings, max_prompt_len=row_len // 2, max_completion_len=row_len // 2, **changes)


def simulated_step_gb(settings: TeacherSettings) -> float:
    """Peak of the whole model, extrapolated from two and three layers (exact: tests/test_planner_formula.py)."""
    two, three = (simulate_training_step(layer_count(settings, n)).peak_bytes for n in (2, 3))
    return gb(two + (settings.teacher.num_layers - 2) * (three - two))


def training_step_gb(settings: TeacherSettings) -> float:
    """Allocated bytes of the teacher alone, as the simulator counts them: base, adapter, states, activations."""
    components = plan(settings).components[Phase.TRAIN]
    states = sum(components[name] for name in ("teacher", "adapter", "gradients", "optimizer states"))
    return gb(states + train_activation_bytes(settings))


def plot_load(axes: plt.Axes) -> None:
    """Three bases and a generator on the GPU, by precision."""
    shape = load_shape("Qwen/Qwen2.5-7B-Instruct")
    labels, bottoms = ["bf16", "int8", "NF4 (vLLM: int8 in groups)"], [0.0, 0.0, 0.0]
    bases = [gb(weight_bytes(shape, precision)) for precision in ("bf16", "int8", "nf4")]
    exports = [gb(weight_bytes(shape, precision)) for precision in ("bf16", "int8", "int8_groups")]
    parts = [("teacher, and vLLM where it is quantised", bases, "#2b5c8a"), ("student", bases, "#6c9fd0")]
    parts.append(("vLLM in bf16, or generator_base: export", exports, "#8e44ad"))
    parts.append(("separate reference (optional)", bases, "#909090"))
    for name, sizes, color in parts:
        bars = axes.bar(labels, sizes, bottom=bottoms, label=name, color=color, width=0.6)
        axes.bar_label(bars, [f"{size:.1f}" for size in sizes], label_type="center", fontsize=8, color="white")
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    axes.set_ylim(0, 72)
    axes.set_xlabel("precision of the bases")
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    axes.set_title("LOAD: weights of a run with Qwen2.5 7B as teacher and student")


def plot_generate(axes: plt.Axes) -> None:
    """The KV cache by the number of prompt groups that are generated at once."""
    settings = settings_85gb()
    groups = range(1, 5)
    parts: dict[str, list[float]] = {}
    for n in groups:
        components = plan(replace(settings, aggregation_steps=n)).components[Phase.GENERATE]
        rest = sum(size for name, size in components.items() if name not in COLORS)
        for name in COLORS:
            parts.setdefault(name, []).append(gb(components[name]))
        parts.setdefault("rest", []).append(gb(rest))
    bottoms = [0.0] * len(groups)
    for name, sizes in parts.items():
        axes.bar(list(groups), sizes, bottom=bottoms, label=name, color=COLORS.get(name, "#b0b0b0"), width=0.6)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for x, top in zip(groups, bottoms, strict=True):
        axes.annotate(f"{top:.0f}", (x, top), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(list(groups), [f"{n} ({n * settings.num_generations} rows)" for n in groups])
    axes.set_xlabel("prompt groups generated at once (generation_aggregation_steps)")
    axes.set_ylim(0, 75)
    draw_usable(axes, (48,))
    axes.legend(fontsize=8, loc="upper left", ncols=2)
    axes.set_title("GENERATE: teacher_rlt_mono_85gb, 6144 + 6144 tokens")


def plot_score(axes: plt.Axes) -> None:
    """One model's weights and forward without gradients, by tokens of the batch."""
    settings = replace(settings_85gb(), micro_batch=1, attention="flash")
    for precision, color in (("bf16", "#c0392b"), ("int8", "#2b5c8a"), ("nf4", "#27ae60")):
        own: TeacherSettings = replace(settings, precision=precision)
        weights = weight_bytes(own.teacher, own.precision)
        predicted, simulated = [], []
        for row_len in CONTEXTS:
            point = with_context(own, row_len)
            predicted.append(gb(weights + forward_bytes(point, point.teacher, point.row_len, adapter=False)))
            traced = simulate_scoring(layer_count(point, 2))
            simulated.append(gb(weights + traced.peak_bytes - traced.static_bytes))
        axes.plot(CONTEXTS, predicted, color=color, label=f"{precision.replace('nf4', 'NF4')}, predicted")
        axes.plot(CONTEXTS, simulated, "x", color=color, markersize=7)
    axes.plot([], [], "x", color="black", label="simulated")
    axes.set_xticks(CONTEXTS)
    axes.set_xlabel("tokens of the scoring batch")
    axes.set_ylabel("GB")
    axes.set_ylim(0, 20)
    axes.legend(fontsize=8)
    axes.set_title("SCORE: weights and forward of one Qwen2.5 7B")


def plot_train(axes: plt.Axes) -> None:
    """A training step by length and rows of the micro-batch, with and without the int8 activations that stock keeps."""
    settings = replace(settings_85gb(), attention="flash", num_adapters=1)
    curves = [
        ("micro-batch 1", "#27ae60", "-", {"micro_batch": 1}),
        ("micro-batch 2", "#2b5c8a", "-", {"micro_batch": 2}),
        ("micro-batch 4", "#8e44ad", "-", {"micro_batch": 4}),
        (
            "micro-batch 2, stock bitsandbytes",
            "#c0392b",
            "--",
            {"micro_batch": 2, "int8_matmul": "llm_int8", "int8_inputs_released": False},
        ),
    ]
    for label, color, style, changes in curves:
        points = [with_context(settings, row_len, **changes) for row_len in CONTEXTS]
        axes.plot(CONTEXTS, [training_step_gb(point) for point in points], style, color=color, label=label)
        axes.plot(CONTEXTS, [simulated_step_gb(point) for point in points], "x", color=color, markersize=7)
    axes.plot([], [], "x", color="black", label="simulated")
    axes.set_xticks(CONTEXTS)
    axes.set_xlabel("prompt + completion tokens of a row")
    axes.set_ylabel("GB allocated")
    axes.set_ylim(0, 125)
    draw_usable(axes, GPUS_GB)
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("TRAIN: teacher alone (int8 Qwen2.5 7B, LoRA r=32)")


def plot_sync(axes: plt.Axes) -> None:
    """Bytes that travel to the generator after a step: the adapter, or all merged weights."""
    shapes = [load_shape(f"Qwen/Qwen2.5-{size}-Instruct") for size in SIZES]
    merged = [gb(weight_bytes(shape, "bf16")) for shape in shapes]
    adapters = [gb(4 * num_lora_params(shape, 32)) for shape in shapes]
    positions = range(len(SIZES))
    for offset, sizes, label, color in (
        (-0.2, merged, "merged bf16 weights", "#c0392b"),
        (0.2, adapters, "float32 adapter, r=32", "#2b5c8a"),
    ):
        bars = axes.bar([p + offset for p in positions], sizes, width=0.4, label=label, color=color)
        axes.bar_label(bars, [f"{size:.2g}" for size in sizes], fontsize=8)
    axes.set_xticks(list(positions), SIZES)
    axes.set_xlabel("Qwen2.5 model")
    axes.set_yscale("log")
    axes.set_ylim(0.02, 300)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("GB per step, predicted")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("SYNC: what travels to the generator after each step")


def plot_overview(axes: plt.Axes) -> None:
    """Every phase of the 85 GB run, by component."""
    memory_plan = plan_run(load_run_config(compose_run_config("teacher_rlt_mono_85gb")), int(85e9))
    names = list(dict.fromkeys(name for phase in Phase for name in memory_plan.components[phase]))
    colors = plt.colormaps["tab20"].colors  # type: ignore[attr-defined]
    bottoms = [0.0] * len(Phase)
    for name, color in zip(names, colors, strict=False):
        sizes = [gb(memory_plan.components[phase].get(name, 0)) for phase in Phase]
        axes.barh([phase.value for phase in Phase], sizes, left=bottoms, label=name, color=color)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for phase, total in zip(Phase, bottoms, strict=True):
        axes.annotate(f" {total:.1f}", (total, phase.value), va="center", fontsize=9)
    axes.axvline(gb(usable_bytes(int(85e9))), color="black", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlim(0, 86)
    axes.set_ylabel("phase")
    axes.set_xlabel("GB, predicted; dotted: usable on an 85 GB GPU")
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(0.57, 0.45))
    axes.set_title("teacher_rlt_mono_85gb by phase")


def draw_usable(axes: plt.Axes, gpus_gb: tuple[int, ...]) -> None:
    for gpu_gb in gpus_gb:
        usable = gb(usable_bytes(int(gpu_gb * 1e9)))
        axes.axhline(usable, color="black", linestyle=":", linewidth=1)
        right_of_axes = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center"}
        axes.annotate(f"usable\non {gpu_gb} GB", (1.01, usable), fontsize=7, **right_of_axes)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    plots = {
        "overview": plot_overview,
        "load": plot_load,
        "generate": plot_generate,
        "score": plot_score,
        "train": plot_train,
        "sync": plot_sync,
    }
    for name, draw in plots.items():
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        axes.set_ylabel("GB, predicted")
        draw(axes)
        figure.savefig(IMAGES / f"memory_{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
