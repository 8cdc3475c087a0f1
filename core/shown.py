"""Results that a notebook shows as tables and a console as text."""

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType

from core.log import console

_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'
_NOTEBOOK_WIDTH = 120


class Shown:
    """Base of results with tables: `repr` and `print` give them as text, a notebook as HTML."""

    def tables(self) -> Sequence[RenderableType]:
        """Tables to show, from top to bottom; a plain string is a line of text."""
        raise NotImplementedError(f"{type(self).__name__} shows nothing")

    def __repr__(self) -> str:
        recorder = Console(file=io.StringIO(), width=console.width, color_system=None, force_jupyter=False)
        with recorder.capture() as captured:
            self._print_on(recorder)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        recorder = Console(file=io.StringIO(), width=_NOTEBOOK_WIDTH, record=True, force_jupyter=False)
        self._print_on(recorder)
        return recorder.export_html(inline_styles=True, code_format=_HTML)

    def _print_on(self, target: Console) -> None:
        for table in self.tables():
            target.print(table, markup=False, highlight=False, soft_wrap=isinstance(table, str))
