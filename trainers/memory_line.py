"""One line on memory while a run trains: what is in use now, and the peak of each phase beside the plan's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

from core.types import Phase
from core.units import gb


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    device: torch.device
    planned_bytes: int
    """Predicted peak of the run on a GPU."""
    peaks: Callable[[], Mapping[Phase, int]]
    """Peak bytes of each phase so far; must not touch the device, since the line is drawn beside the training."""

    def live(self) -> str:
        """`GPU 38.2 of 85.0 GB in use; peaks: generate 47.1, score 26.0, train 37.2, planned 48.0`."""
        peaks = ", ".join(f"{phase} {gb(size):.1f}" for phase, size in self.peaks().items() if size)
        if self.device.type != "cuda":
            return f"no GPU; this process holds {_resident_gb():.1f} GB; peaks: {peaks or 'none yet'}"
        free, total = torch.cuda.mem_get_info(self.device)
        now = f"GPU {gb(total - free):.1f} of {gb(total):.1f} GB in use"
        return f"{now}; peaks: {peaks or 'none yet'}, planned {gb(self.planned_bytes):.1f}"

    def short(self) -> str:
        """For the line of a logged step: `GB generate 47.1 score 26.0 train 37.2`; on a CPU `RAM 1.1 GB`."""
        if self.device.type != "cuda":
            return f"RAM {_resident_gb():.1f} GB"
        shown = (Phase.GENERATE, Phase.SCORE, Phase.TRAIN)
        peaks = self.peaks()
        return "GB " + " ".join(f"{phase} {gb(peaks[phase]):.1f}" for phase in shown if peaks.get(phase))


def _resident_gb() -> float:
    return gb(psutil.Process().memory_info().rss)
