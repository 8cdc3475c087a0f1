"""What a rich renderable looks like on a wide console."""

from typing import Any

from rich.console import Console


def shown(renderable: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - recorded, not written
    console.print(renderable)
    return console.export_text()
