"""A memory plan for people: one bar per phase against the GPU."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from core.types import Phase
from core.units import format_gb, gb
from planner.fit import Lever
from planner.plan import MemoryPlan, usable_bytes

_BAR_CHARS = 46
# Kind of component -> (style, what is in it); anything else counts as activations.
_KINDS = {
    "bases": ("blue", ("teacher", "student", "reference")),
    "vLLM": ("magenta", ("vLLM weights", "vLLM adapter", "vLLM activations", "vLLM residue")),
    "KV cache": ("cyan", ("KV cache",)),
    "adapter": ("green", ("adapter", "gradients", "optimizer states")),
    "activations": ("yellow", ("activations", "allocator", "canary")),
    "context": ("white", ("CUDA context",)),
}


def plan_table(plan: MemoryPlan, *, title: str) -> Table:
    """Phases as rows: a stacked bar, the peak, and the two largest parts. The binding phase is marked."""
    card = plan.gpu_bytes or plan.max_bytes
    usable = usable_bytes(card) if plan.gpu_bytes else card
    scale = _BAR_CHARS / max(card, plan.max_bytes)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for column, justify in (("phase", "left"), ("", "left"), ("GB", "right"), ("largest parts", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for phase in (phase for phase in Phase if plan.components[phase]):
        peak, binding = plan.peak_bytes(phase), phase == plan.binding_phase
        style = "bold red" if peak > usable else "bold" if binding else ""
        largest = sorted(plan.components[phase].items(), key=lambda item: -item[1])[:3]
        table.add_row(
            Text(f"{phase}{' *' if binding else ''}", style=style),
            _bar(plan, phase, scale, round(usable * scale)),
            Text(f"{gb(peak):.1f}", style=style),
            ", ".join(f"{name} {gb(size):.1f}" for name, size in largest),
        )
    legend = Text()
    for kind, (color, _) in _KINDS.items():
        legend.append("█ ", style=color).append(f"{kind}  ")
    table.add_row(
        "", legend, "", "* binding phase   │ usable (97 % of the GPU)" if plan.gpu_bytes else "* binding phase"
    )
    return table


def _bar(plan: MemoryPlan, phase: Phase, scale: float, limit: int) -> Text:
    bar, filled, total = Text(), 0, 0.0
    for color, names in _KINDS.values():
        total += sum(plan.components[phase].get(name, 0) for name in names)
        end = round(total * scale)
        bar.append("█" * (end - filled), style=color)
        filled = end
    if filled < limit:
        bar.append("·" * (limit - filled), style="dim").append("│")
    return bar


def summary_lines(plan: MemoryPlan) -> list[str]:
    """KV cache and host memory in words."""
    lines = []
    if plan.kv_cache_bytes:
        share = min(1.0, plan.kv_cache_bytes / plan.kv_needed_bytes)
        lines.append(
            f"KV cache {format_gb(plan.kv_cache_bytes)}: room for {share:.0%} of what one generation call wants "
            f"({format_gb(plan.kv_needed_bytes)}); less makes rows wait, it does not run out of memory"
        )
    if plan.host_bytes:
        parts = ", ".join(f"{name} {format_gb(size)}" for name, size in plan.host_components.items())
        lines.append(f"host RAM {format_gb(plan.host_bytes)}, pinned in blocks of powers of two: {parts}")
    return lines


def lever_lines(found: Sequence[Lever], limit: int = 5) -> list[str]:
    return [
        f"{lever.change}: -{gb(lever.saved_bytes):.1f} GB in {lever.phase} ({lever.words})" for lever in found[:limit]
    ]
