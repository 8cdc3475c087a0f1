"""Decimal units: a GB is 1e9 bytes wherever a user sees one. Bytes are what the code computes with."""

from collections.abc import Mapping

BYTES_PER_GB = 1e9


def gb(num_bytes: float) -> float:
    """Bytes as decimal GB."""
    return num_bytes / BYTES_PER_GB


def format_gb(num_bytes: float) -> str:
    return f"{gb(num_bytes):.1f} GB"


def sizes_line(sizes_gb: Mapping[str, float]) -> str:
    """Named decimal GB on one line, at least two digits of each: `model 0.54 GB, optimizer 1.1 GB`."""
    return ", ".join(f"{name} {size:.{2 if size >= 0.1 else 4}f} GB" for name, size in sizes_gb.items())


def format_duration(seconds: float) -> str:
    """`75` -> `1m15s`; hours appear only when there are some."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
