"""Test the output on a terminal, and the output to a file or pipe."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from bnrnn import progress
from bnrnn.runs.record import ACCURACY, BITS_PER_CHARACTER, ERROR, PERPLEXITY
from bnrnn.tasks.frames import FRAME_ERROR
from tests.test_cli import TINY, write_text

COMMAND = [str(Path(sys.executable).with_name("bnrnn"))]
COLUMNS = 100


def open_terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    return ours, theirs


def read_all(terminal: int) -> str:
    content = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the last process closed it
            part = b""
        if not part:
            return content.decode()
        content += part


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "BNRNN_CACHE_DIR": str(tmp_path / "cache")}


def settings(tmp_path: Path) -> list[str]:
    return ["task=text", f"task.path={write_text(tmp_path)}", *TINY]


@pytest.fixture
def on_terminal(tmp_path):
    ours, theirs = open_terminal()
    with subprocess.Popen(
        [*COMMAND, *settings(tmp_path)],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment(tmp_path),
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = read_all(ours)
    os.close(ours)
    assert process.returncode == 0, shown
    return shown


VALIDATION = r"step +\d+  epoch +[\d.]+ +[\d.]+ min  valid bpc +[\d.]+ population +[\d.]+ batch .*"


def test_a_bar_on_a_terminal_and_lines_above_it(on_terminal):
    drawn = [part for part in re.split(r"[\r\n]|\x1b\[A", on_terminal) if part.strip()]
    bars = [part for part in drawn if part.startswith("epoch ")]
    pattern = r"epoch 1/1  bpc +\d\.\d{4} +(\d+)%\|.*\| (\d)/6, +[\d.]+ steps/s, \d\d:\d\d left"
    found = [match for match in (re.fullmatch(pattern, bar) for bar in bars) if match]
    assert found, bars
    assert (found[-1][1], found[-1][2]) == ("100", "6")
    assert any(part.startswith("validation: ") for part in drawn)

    lines = [part for part in drawn if part.startswith("step ")]
    assert len(lines) == 2
    assert all(re.fullmatch(VALIDATION, line) for line in lines), lines
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, bars + lines)) <= COLUMNS


def test_only_lines_where_nobody_watches(tmp_path):
    done = subprocess.run(
        [*COMMAND, *settings(tmp_path)],
        capture_output=True, cwd=tmp_path, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = (done.stdout + done.stderr).decode()
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []
    assert "steps/s" not in printed
    assert len(re.findall(VALIDATION, printed)) == 2


def test_without_arguments_two_lines_come_first(tmp_path):
    with subprocess.Popen(
        COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env=environment(tmp_path),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        lines = [process.stderr.readline().rstrip("\n") for _ in range(2)]
        process.kill()
    assert re.fullmatch(
        r"Training BN-LSTM \(model=bnlstm\) on task=pydocs for 30 epochs, a few minutes "
        "on two cores",
        lines[0],
    ), lines
    assert "outputs/pydocs/bnlstm" in lines[1]
    assert "resume=auto" in lines[1]
    assert "bnrnn --help" in lines[1]
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize(
    "metric", [ACCURACY, BITS_PER_CHARACTER, ERROR, PERPLEXITY, FRAME_ERROR], ids=lambda m: m.name
)
@pytest.mark.parametrize("kinds", [("population",), ("population", "batch")], ids=len)
def test_validation_lines_have_one_width(metric, kinds):
    total = 999_999
    lines = [
        progress.validation_line(
            step, total, step / 1001, seconds, metric.name,
            {kind: value * (k + 1) for k, kind in enumerate(kinds)}, is_best,
        )
        for step, seconds in ((0, 0.0), (50, 61.0), (total, 599_990.0))
        for value in (0.00123, 0.9876, 1.3871, 99.99995, 999.99996, 43_210.9, 99_999.996, 1.5e9)
        for is_best in (True, False)
    ]  # fmt: skip
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= COLUMNS
    for word in ("step", "epoch", "min", "valid", *kinds):
        assert len({line.index(word) for line in lines}) == 1


def test_validation_lines_without_a_choice_of_the_best():
    line = progress.validation_line(7, 10, 0.5, 90.0, "bpc", {"population": 2.5}, None)
    assert line == "step      7  epoch   0.50     1.5 min  valid bpc   2.5000 population"


def test_the_bar_of_a_resumed_run(monkeypatch):
    ours, theirs = open_terminal()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.TrainingBar(64, 130, 65) as bar:
            assert str(bar).startswith("epoch 1/2   49%|")
            bar.update()
            assert str(bar).startswith("epoch 2/2   50%|")
            bar.measured("accuracy", 0.5)
            assert str(bar).startswith("epoch 2/2  accuracy   0.5000   50%|")
            bar.update(65)
            assert str(bar).startswith("epoch 2/2  accuracy   0.5000  100%|")
        with progress.TrainingBar(0, 10, 5, shown=False) as bar:
            bar.update()
            assert bar.disable
        assert list(progress.bar(range(3), "test", shown=False)) == [0, 1, 2]
    os.close(ours)
