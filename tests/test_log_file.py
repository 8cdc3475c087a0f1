"""The log file of a run holds what the console says, as plain text."""

import errno
import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from core.log import CopyingConsole, configure_logging


def console_on(stream: io.StringIO) -> CopyingConsole:
    return CopyingConsole(file=stream, width=160, force_terminal=True, color_system="truecolor")


def table() -> Table:
    table = Table("phase", "GB", title="memory")
    table.add_row("[bold red]train[/]", "37.7")
    return table


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def test_the_file_holds_the_consoles_lines_and_tables_without_colours(tmp_path):
    shown = io.StringIO()
    console = console_on(shown)
    console.print("[bold]before the folder is there[/]")
    console.copy_to(tmp_path / "logs/training.log")
    console.print(table())
    console.print("[x] as it is", markup=False)
    head, _, text = (tmp_path / "logs/training.log").read_text().partition("\n")
    assert re.fullmatch(r"--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", head)
    assert text.splitlines() == [line.rstrip() for line in without_escapes(shown.getvalue()).splitlines()]
    assert "\x1b" in shown.getvalue() and "│ train │ 37.7 │" in text


def test_a_resumed_run_appends_and_a_second_run_has_a_file_of_its_own(tmp_path):
    console = console_on(io.StringIO())
    for line in ("first", "resumed"):
        console.copy_to(tmp_path / "a.log")
        console.print(line)
    console.end_copy()
    console.print("between")
    console.copy_to(tmp_path / "b.log")
    console.copy("a traceback\n")
    lines = {name: (tmp_path / name).read_text().splitlines() for name in ("a.log", "b.log")}
    assert [line for line in lines["a.log"] if not line.startswith("---")] == ["first", "resumed"]
    assert lines["b.log"][1:] == ["between", "a traceback"]


def test_a_progress_bar_leaves_nothing_in_the_file(tmp_path):
    shown = io.StringIO()
    console = console_on(shown)
    console.copy_to(tmp_path / "log")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=2)
        console.print("one line")
        progress.update(task, completed=2, refresh=True)
    assert "steps" in shown.getvalue()
    assert (tmp_path / "log").read_text().split("\n")[1:] == ["one line", "", ""]


class Gone(io.StringIO):
    """What is left of a terminal that was closed, or of a pipe without a reader."""

    def __init__(self, error: int) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def hang_ups(monkeypatch):
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_stdout_that_is_gone_hangs_up_once_and_stderr_and_the_log_file_go_on(error, tmp_path, hang_ups, monkeypatch):
    console, stderr = console_on(Gone(error)), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    console.copy_to(tmp_path / "log")
    for line in ("first", "second"):
        console.print(line)
    assert hang_ups == [signal.SIGHUP] and console.is_lost
    assert (tmp_path / "log").read_text().splitlines()[1:] == [
        "stdout is gone: nobody reads what is shown there",
        "first",
        "second",
    ]
    assert "second" in stderr.getvalue()


def test_where_stderr_is_gone_too_the_log_file_goes_on_alone(tmp_path, hang_ups, monkeypatch):
    console = console_on(Gone(errno.EIO))
    monkeypatch.setattr(sys, "stderr", Gone(errno.EIO))
    console.copy_to(tmp_path / "log")
    for line in ("first", "second"):
        console.print(line)
    assert hang_ups == [signal.SIGHUP] and (tmp_path / "log").read_text().endswith("first\nsecond\n")


def test_outside_training_a_stdout_that_is_gone_ends_the_process(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        console_on(Gone(errno.EPIPE)).print("first")
    assert ended.value.code == 1


def test_a_log_file_on_a_full_disk_ends_and_the_console_says_so_once():
    shown = io.StringIO()
    console = console_on(shown)
    console.copy_to(Path("/dev/full"))
    for line in ("first", "second"):
        console.print(line)
    assert re.findall("/dev/full ends here: No space left on device", without_escapes(shown.getvalue())) == [
        "/dev/full ends here: No space left on device"
    ]
    assert "second" in shown.getvalue()


def test_what_a_console_cannot_say_is_escaped_and_closed_streams_go_nowhere(monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    configure_logging()
    print("folder ラン")
    print("nobody reads this", file=sys.stderr)
    sys.stdout.flush()
    assert said.getvalue() == b"folder \\u30e9\\u30f3\n" and sys.stderr is not None
