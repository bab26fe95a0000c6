"""Progress where somebody watches and where nobody does."""

import io
import sys

import pytest

from train import progress
from train.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_work_that_nobody_watches_writes_a_line_in_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(100, "report", "row") as bar:
        for _ in range(100):
            bar.update()
    assert log.getvalue() == ""
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 1)
    with progress_bar(100, "report", "row") as bar:
        bar.start_t -= 10  # as if it had begun ten seconds ago
        for _ in range(100):
            bar.update()
    lines = [line for line in log.getvalue().split("\r") if line.strip()]
    assert 1 <= len(lines) <= 2 and all("report" in line and "/100" in line for line in lines)


def test_a_terminal_sees_a_bar_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(3, "report", "row"):
        assert "report:   0%" in terminal.getvalue()
