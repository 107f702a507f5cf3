"""Numbers, console, log, report and comparison: against calculations done differently, and real runs."""

import errno
import http.server
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import REPO, wait_for

import report

CONSOLE = report.Console()

# -----------------------------------------------------------------------------
# Measuring


def test_the_ema_is_the_weighted_mean_of_its_losses():
    losses, beta, smooth = [5.0, 3.0, 4.0, 1.0], 0.9, 0.0
    for count, loss in enumerate(losses, 1):
        smooth = report.update_ema(smooth, loss, beta)
        weights = [beta ** (count - i) for i in range(1, count + 1)]
        mean = sum(w * x for w, x in zip(weights, losses)) / sum(weights)
        assert report.debias(smooth, beta, count) == pytest.approx(mean, rel=1e-12)
        if count == 1:
            assert report.debias(smooth, beta, count) == pytest.approx(loss, rel=1e-12)
    assert math.isnan(report.debias(0.0, beta, 0))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_bits_per_byte_against_a_loop(rows):
    torch.manual_seed(0)
    table = torch.randn(7, 7)  # logits of the next token by the last one
    tokens, targets = torch.randint(7, (2, 6, 5))
    targets[:, 0] = -1  # padding: counts in neither nats nor bytes
    sizes = [1, 1, 2, 3, 1, 5, 4]  # bytes of each token
    loss_sum, count = 0.0, 0
    for token, target in zip(tokens.flatten().tolist(), targets.flatten().tolist()):
        if target >= 0:
            weights = [math.exp(x) for x in table[token].tolist()]
            loss_sum -= math.log(weights[target] / sum(weights))
            count += sizes[target]

    def model(tokens, targets):
        logits = table[tokens].flatten(0, 1)
        options = {"ignore_index": -1, "reduction": "sum"}
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), **options)

    batches = [
        (x, y, sum(sizes[t] for t in y.flatten().tolist() if t >= 0))
        for x, y in zip(tokens.split(rows), targets.split(rows))
    ]
    found = report.bits_per_byte(model, batches, torch.device("cpu"))
    assert found == pytest.approx(loss_sum / math.log(2) / count, rel=1e-6)


def stopped_clock(monkeypatch, start, readings):
    """A Clock that starts at `start` and then reads these times."""
    times = iter(readings)
    monkeypatch.setattr(report, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    return report.Clock(start)


def test_the_clock_counts_every_second_once(monkeypatch):
    clock = stopped_clock(monkeypatch, 10.0, [12.0, 15.5, 16.0])
    for name in ("setup", "training", "setup"):
        clock.lap(name)
    assert clock.spent == {"setup": 2.5, "training": 3.5}


def test_the_clock_includes_earlier_starts(monkeypatch):
    clock = stopped_clock(monkeypatch, 10.0, [12.0, 15.0, 15.5, 16.0, 16.5])
    clock.lap("setup")
    clock.add({"setup": 1.0, "corpus": 30.0, "training": 100.0})
    clock.lap("training")
    assert clock.spent == {"setup": 3.0, "corpus": 30.0, "training": 103.0}
    assert clock.elapsed() == 136.5  # with the half second since the last lap
    assert clock.elapsed("corpus") == 107.0
    assert clock.elapsed("an activity without a lap") == 137.5


# -----------------------------------------------------------------------------
# Console

RECORD = {
    **{"step": 120, "train_loss_ema": 4.231, "lrm": 1.0, "tok_per_sec": 512e3, "mfu": 0.461},
    **{"progress": 120 / 2840, "data_wait": 0.0, "val_bpb": 1.2931, "min_val_bpb": 1.2931},
}


def test_a_step_line_shows_progress_speed_and_kind_of_peak():
    line = report.step_line(RECORD, 2840, "published", 2760, 1.2931)
    assert line == (
        "step  120/2840   4.2%  loss 4.2310  val 1.2931  lrm 1.00   512k tok/s  mfu 46.1%  "
        "data  0%  eta 46m00s"
    )
    assert "mfu 71% of measured" in report.step_line(RECORD | {"mfu": 0.71}, 2840, "measured", 60, 1.3)


def test_a_step_line_of_a_timed_run_has_no_total():
    line = report.step_line(RECORD | {"step": 1234, "progress": 0.5}, None, "published", 150, 1.2931)
    assert line == (
        "step  1,234  50.0%  loss 4.2310  val 1.2931  lrm 1.00   512k tok/s  mfu 46.1%  data  0%  eta 2m30s"
    )


@pytest.mark.parametrize("total", [9999, 99_999, None])
def test_step_lines_are_aligned(total):
    lines = [
        report.step_line(RECORD | change, total, "measured", 60, 1.3)
        for change in (
            {},
            {"step": 1, "progress": 0.0},
            {"step": total or 99_999, "progress": 1.0},
            {"train_loss_ema": 10.8249},
            {"train_loss_ema": math.nan},
            {"tok_per_sec": 1.234e6},
            {"tok_per_sec": 999_999, "mfu": 0.02},
        )
    ]
    for name in ("%", "loss", "tok/s", "eta"):
        assert len({line.index(name) for line in lines}) == 1, name


@pytest.mark.parametrize("source", ["published", "measured", "given"])
@pytest.mark.parametrize("total", [1, 9999, 99_999, 1_234_567, 10**9, None])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.9999, 1.0, 999.6, 1e5, 1e12, math.nan, math.inf])
def test_a_line_has_at_most_120_columns(source, total, size):
    step = total or 10**9
    huge = {key: size for key in ("train_loss_ema", "tok_per_sec", "mfu", "val_bpb", "min_val_bpb")}
    record = RECORD | huge | {"step": step, "data_wait": 1.0, "progress": 1.0}
    assert len(report.step_line(record, total, source, 1e9, size)) <= 120
    usual = RECORD | {"step": step, "data_wait": 1.0, "progress": 1.0, "mfu": 0.71, "train_loss_ema": 10.82}
    line = report.step_line(usual, total, source, 3599, 3.4567)
    assert len(line) <= 120 and (line.endswith("eta 59m59s") or total == 10**9)  # nothing is cut off
    assert len(report.val_line(record)) <= 120


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (999_999, "1M")],
)
def test_short_numbers(number, text):
    assert report.short(number) == text
    assert report.short(2.5e15, " ") + "FLOP/s" == "2.5 PFLOP/s"


def test_plurals():
    texts = [report.plural(n, "minute") for n in (0.3, 1.0, 5.0, 2840, 1_234_567)]
    assert texts == ["0.3 minutes", "1 minute", "5 minutes", "2,840 minutes", "1,234,567 minutes"]


def test_durations():
    texts = ["0s", "59s", "1m00s", "59m59s", "1h00m", "100h00m"]
    assert [report.duration(s) for s in (-5, 59.4, 59.6, 3599, 3600, 360_000)] == texts


def test_only_a_terminal_gets_bold_text(terminal, monkeypatch, capsys):
    line = "val      1.2931 bits per byte at step 120, the lowest so far is 1.2931"
    report.Console().val(RECORD)
    assert capsys.readouterr().out == line + "\n"
    monkeypatch.setattr(sys, "stdout", terminal)
    report.Console().val(RECORD)
    monkeypatch.setenv("NO_COLOR", "1")
    report.Console().val(RECORD)
    assert terminal.rows == [f"\033[1m{line}\033[0m", line, ""]


def test_all_lines_fit_the_console(capsys):
    CONSOLE.print("device", "Intel(R) Xeon(R) with a name that does not end soon, " * 5)
    CONSOLE.print("error:", "--device-batch-size " * 9)
    CONSOLE.print("data", "folder/" * 40)
    CONSOLE.print("benchmark", "a long label")
    CONSOLE.samples([["a" * 200, "x = 1\n    indented\n" + "word " * 60], ["", "\n", "how it continues"]])
    rows = capsys.readouterr().out.splitlines()
    assert max(len(row) for row in rows if "folder/" not in row) <= 120
    assert any("folder/" * 40 in row for row in rows)  # a path can be copied
    labels = [row[:9].strip() for row in rows if row[:9].strip()]
    assert labels == ["device", "error:", "data", "benchmark", "sample", "sample"]
    assert "benchmark a long label" in rows
    assert "             indented" in rows
    assert not any(row.endswith("-") for row in rows)  # no flag is cut in two


def test_text_of_a_model_cannot_control_the_terminal(capsys):
    CONSOLE.samples([["a", "\x1b[2J\x07b\x9b2Jc"]])
    CONSOLE.print("run", "out/\x1b[2Ja")
    CONSOLE.show("a\rb")
    output = capsys.readouterr().out
    assert output == "sample   'a' ->\n         \\x1b[2J\\x07b\\x9b2Jc\nrun      out/\\x1b[2Ja\na\\rb\n"
    CONSOLE.samples([["a", "1\r2\x0b3\x0c4\x1c5\x856\u20287\u202e8\r\n9\n"]])
    output = capsys.readouterr().out
    assert output == "sample   'a' ->\n         1\\r2\\x0b3\\x0c4\\x1c5\\x856\\u20287\\u202e8\n         9\n"


def test_a_report_shows_control_characters_of_a_text_escaped(make, config, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    bad = "\x1b]0;title\x07\r\x9b2J\u202e"
    config["corpus"]["name"] = config["settings"]["data"] = config["given"]["data"] = bad
    folders = [make(f"{name}{bad}\n", ending="failed", settings=config["settings"]) for name in "ab"]
    for folder in folders:
        log = report.Log(folder, CONSOLE)
        log.fail(ValueError(f"text: {bad}"))
        log.close()
        summary = json.loads((folder / "summary.json").read_text())
        summary["samples"] = [[bad, f"a\n{bad}", bad]]
        (folder / "summary.json").write_text(json.dumps(summary))
    pages = [report.write_report(folders[0], CONSOLE), report.compare(folders, CONSOLE)]
    texts = [page.read_bytes().decode() for page in pages]
    for text in texts:
        assert not report.CONTROL.search(text) and "\\x1b]0;title\\x07\\r\\x9b2J\\u202e" in text
    assert texts[0].splitlines()[0] == "# a\\x1b]0;title\\x07\\r\\x9b2J\\u202e\\n"


def test_only_rank_0_prints_except_with_print(capsys):
    console = report.Console(rank=1)
    console.print0("run", "a")
    console.show("a")
    console.samples(SAMPLES)
    console.val(RECORD)
    console.step(RECORD, 2840, "published", 60)
    console.end_live()
    with console.waiting("benchmark", "compiling"):
        pass
    assert capsys.readouterr().out == ""
    console.print("data", "prepared by this rank")
    assert capsys.readouterr().out == "data     prepared by this rank\n"


class Terminal:
    """A stdout that keeps the rows a terminal would show. It wraps rows again when it is resized."""

    def __init__(self, columns):
        self.rows, self.columns = [""], columns

    def write(self, text):
        for part in re.split(r"(\n|\r\033\[K|\033\[A\033\[K)", text):
            if part == "\n":
                self.rows.append("")
            elif part == "\r\033[K":
                self.rows[-1] = ""
            elif part == "\033[A\033[K":
                assert self.rows.pop() == ""
                self.rows[-1] = ""
            elif part:
                self.rows[-1] += part
                assert len(self.rows[-1]) < self.columns, "the row would wrap"

    def resize(self, columns):
        self.columns = columns
        pieces = ([row[i : i + columns] for i in range(0, len(row), columns)] or [""] for row in self.rows)
        self.rows = [piece for row in pieces for piece in row]

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    screen = Terminal(120)
    size = types.SimpleNamespace
    monkeypatch.setattr(report.shutil, "get_terminal_size", lambda: size(columns=screen.columns))
    return screen


def show_steps(console, count, first=1):
    for step in range(first, first + count):
        record = RECORD | {"step": step, "progress": step / 100}
        console.step(record, 100, "published", 100 - step)


def test_on_a_terminal_one_row_is_rewritten_below_the_lines_that_stay(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    console = report.Console()
    console.val_bpb = 1.2931
    console.show("plan     1) horizon")
    show_steps(console, 30)
    assert terminal.rows[0] == "plan     1) horizon" and len(terminal.rows) == 2
    assert re.match(r"█{9}·{21}   30.0%  step 30 of 100  loss 4.2310  val 1.2931  512k", terminal.rows[1])
    console.show("val      1.2 bits per byte")
    assert terminal.rows[1] == "val      1.2 bits per byte" and terminal.rows[2].startswith("█" * 9 + "·")
    terminal.resize(100)
    show_steps(console, 1, first=100)
    assert len(terminal.rows) == 3 and re.match(r"█{5,}  100.0%  loss 4.2310  val", terminal.rows[2])
    assert terminal.rows[2].endswith("eta 0s") and len(terminal.rows[2]) < 100
    console.end_live()
    console.show("---")
    assert terminal.rows[2].startswith("step 100/100 100.0%") and terminal.rows[3:] == ["---", ""]


@pytest.mark.parametrize("columns", [119, 80, 60, 58, 57, 30, 20])
def test_a_narrowed_terminal_keeps_no_old_fragment_of_the_live_row(terminal, monkeypatch, columns):
    monkeypatch.setattr(sys, "stdout", terminal)
    console = report.Console()
    console.show("plan")
    show_steps(console, 30)
    terminal.resize(columns)
    show_steps(console, 1, first=31)
    assert terminal.rows[0] == "plan" and len(terminal.rows) == 2 and "31.0%" in terminal.rows[1]


def test_the_live_row_and_the_last_step_line_show_the_newest_val_bpb(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    console = report.Console()
    console.val(RECORD | {"val_bpb": 2.5})
    show_steps(console, 100)
    assert "val 2.5000" in terminal.rows[-1]
    console.val(RECORD | {"val_bpb": 1.25})
    assert "val 1.2500" in terminal.rows[-1] and terminal.rows[-1].startswith("█")
    console.end_live()
    assert terminal.rows[-2].startswith("step 100/100") and "val 1.2500" in terminal.rows[-2]


def wait_until(condition):
    deadline = time.perf_counter() + 10
    while not condition():
        assert time.perf_counter() < deadline
        time.sleep(0.001)


def fast_pauses(monkeypatch):
    """Let the thread of Console.waiting pause for a millisecond -> the list of the pauses it asked for."""
    pauses = []

    class Event(threading.Event):
        def wait(self, seconds=None):
            pauses.append(seconds)
            return super().wait(0.001)

    monkeypatch.setattr(report, "threading", types.SimpleNamespace(**{**vars(threading), "Event": Event}))
    return pauses


def test_waiting_shows_the_seconds_in_the_live_row_of_a_terminal(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    pauses = fast_pauses(monkeypatch)
    console = report.Console()
    with console.waiting("benchmark", "compiling"):
        wait_until(lambda: terminal.rows == ["benchmark compiling: 0s"])
        console.print("data", "a line from another thread")
        assert terminal.rows == ["data     a line from another thread", "benchmark compiling: 0s"]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 75)
        wait_until(lambda: terminal.rows[1:] == ["benchmark compiling: 1m15s"])
    assert terminal.rows == ["data     a line from another thread", ""]
    assert {*pauses} == {1}
    assert not any(thread.name.endswith("(repeat)") for thread in threading.enumerate())


def test_waiting_prints_lines_elsewhere_and_raises_what_its_body_raises(monkeypatch, capsys):
    pauses = fast_pauses(monkeypatch)
    with pytest.raises(ZeroDivisionError), CONSOLE.waiting("benchmark", "compiling"):
        wait_until(lambda: len(pauses) > 3)
        raise ZeroDivisionError
    lines = capsys.readouterr().out.splitlines()
    assert {*lines} == {"benchmark compiling: 0s"} and pauses[:4] == [5, 10, 10, 10]
    with CONSOLE.waiting("benchmark", "compiling"):
        pass
    assert capsys.readouterr().out == ""  # a fast task prints nothing


def test_waiting_survives_a_console_that_was_closed(monkeypatch):
    pauses = fast_pauses(monkeypatch)
    monkeypatch.setattr(sys, "stdout", closed_stdout())
    with CONSOLE.waiting("benchmark", "compiling"):
        wait_until(lambda: len(pauses) > 3)


def closed_stdout(error=ValueError):
    """A stdout that raises in every method."""

    def fail(*arguments):
        raise error

    return types.SimpleNamespace(write=fail, flush=fail, isatty=fail)


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_elsewhere_ten_lines_are_printed_and_then_one_in_ten_seconds(terminal, monkeypatch, name, value):
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv(name, value)
    now, console = 0.0, report.Console()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for step in range(1, 101):
        now += 1.0
        show_steps(console, 1, first=step)
    console.end_live()
    steps = [int(re.match(r"step +(\d+)/100 ", row)[1]) for row in terminal.rows[:-1]]
    assert steps == [*range(1, 11), *range(20, 101, 10)]


def test_attempt_prints_an_error_and_continues(capsys):
    assert CONSOLE.attempt("counting", lambda *words: len(words), "a", "b") == 2
    assert capsys.readouterr().out == ""
    assert CONSOLE.attempt("counting", int, "two") is None
    message = "error:   counting failed: ValueError: invalid literal for int() with base 10: 'two'\n"
    assert capsys.readouterr().out == message

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # not an error
        CONSOLE.attempt("sampling", interrupted)


def test_a_shell_parses_a_command_line_into_the_same_words():
    settings = {
        **{"run_name": "my run", "resume": True, "compile": False, "depth": None, "matrix_lr": 0.02},
        **{"eval_every": -1, "data": "it's/$HOME", "seed": 0, "dtype": ""},
    }
    line = report.command_line("python 'a b.py'", settings)
    assert line.startswith("python 'a b.py' --run-name 'my run' --resume --no-compile --matrix-lr 0.02 ")
    assert shlex.split(line) == [
        *("python", "a b.py", "--run-name", "my run", "--resume", "--no-compile", "--matrix-lr", "0.02"),
        *("--eval-every", "-1", "--data", "it's/$HOME", "--seed", "0", "--dtype", ""),
    ]
    assert report.command_line("python train.py", {}) == "python train.py"


@pytest.mark.parametrize(
    "name",
    [
        b"b\xf6cher",
        b"$HOME `date`",
        "中文 'x'".encode(),
        b"a\nb\t",
        b"-x",
        b"it's\\\xff1",
        b"\x1b[2J",
    ],
)
def test_a_printed_command_can_be_pasted_whatever_a_name_contains(tmp_path, name):
    settings = {"run_name": os.fsdecode(name), "data": os.fsdecode(b"/data/" + name), "depth": 2}
    code = "import os, sys; sys.stdout.buffer.write(bytes(1).join(map(os.fsencode, sys.argv[1:])))"
    line = report.command_line(f"{sys.executable} -c {shlex.quote(code)}", settings)
    assert line.isprintable()
    words = subprocess.check_output(["bash", "-c", line]).split(bytes(1))
    joined = [b"--run-name=" + name] if name.startswith(b"-") else [b"--run-name", name]  # else it is a flag
    assert words == [*joined, b"--data", b"/data/" + name, b"--depth", b"2"]


# Real consoles: each in its own process; without torch, because importing it takes seconds
SETUP = """
import os, sys, types
sys.modules["torch"] = torch = types.ModuleType("torch")
torch.distributed = sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")
import report
report.open_console()
console = report.Console()
"""


def run_console(code, redirect="", encoding="utf-8"):
    """Run code after open_console() -> the finished process, its output as bytes."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": encoding}
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, SETUP + code]
    return subprocess.run(command, env=env, capture_output=True)


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("utf-8", "4 × 512 · a – b… █²→"),
        ("latin-1", "4 × 512 · a - b... #²\\u2192"),
        ("ascii", "4 x 512 - a - b... #2\\u2192"),
    ],
)
def test_a_console_with_any_encoding_accepts_any_text(encoding, text):
    code = """
for stream in (sys.stdout, sys.stderr):
    print("4 × 512 · a – b… █²→", file=stream)
console.print0("run", "out/" + os.fsdecode(b"caf\\xff"))  # the folder's name is not UTF-8
console.print0("plan", "4 × 512 · a – b… █²→")
"""
    done = run_console(code, encoding=encoding)
    assert done.returncode == 0 and done.stderr.decode(encoding) == text + "\n"
    lines = [text, "run      out/caf\\udcff", f"plan     {text}"]
    assert done.stdout.decode(encoding).splitlines() == lines


@pytest.mark.parametrize(
    "redirect, name",
    [
        *((">&-", "a"), ("2>&-", "a"), (">&- 2>&-", "a")),
        (">&-", "caf\\udcff"),
        ("2>&-", "caf\\udcff"),
        ("<&- >&-", "a"),
        ("<&- >&- 2>&-", "a"),
    ],
)
def test_a_closed_console_stops_nothing_and_no_file_gets_its_descriptor(redirect, name, tmp_path):
    code = f"""
console.print0("run", "4 × 512 · out/{name}")
print("error: out/{name} · " + report.val_line({RECORD}), file=sys.stderr)
with open({str(tmp_path / "file")!r}, "w") as file:
    os.write(1, b"from a library")
    os.write(2, b"from a library")
    file.write(str(file.fileno()))
"""
    done = run_console(code, redirect)
    assert done.returncode == 0
    number = (tmp_path / "file").read_text()
    assert number.isdigit() and int(number) > 2  # and no library has written into it
    assert (b"run      4" in done.stdout) == (redirect == "2>&-")
    assert (b"error: out" in done.stderr) == ("2>&-" not in redirect)


def test_a_console_that_was_closed_stops_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_stdout())
    CONSOLE.print("plan", "4 × 512")
    assert sys.stdout.name == os.devnull
    CONSOLE.print("plan", "4 × 512")


# -----------------------------------------------------------------------------
# Log


def test_a_record_is_written_at_once_and_has_no_nan(tmp_path):
    log = report.Log(tmp_path, CONSOLE)
    log.write("step", step=1, a=math.nan, b=-math.inf, c=2.5, d=[1], e="x")
    line = (tmp_path / "log.jsonl").read_text()
    fields = {"step": 1, "a": None, "b": None, "c": 2.5, "d": [1], "e": "x"}
    assert json.loads(line) == {"kind": "step", **fields}
    log.close()
    report.Log(None, CONSOLE).write("step", step=1)  # as on other ranks: nothing happens


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_does_not_stop_training(tmp_path, capsys):
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    log = report.Log(tmp_path, CONSOLE)
    log.write("step", step=1)
    assert "No space left" in capsys.readouterr().out


WRITE_ERRORS = [
    OSError(28, "No space left on device"),
    ValueError("No space left in this buffer"),
    RuntimeError("No space left: another error of a file system"),
]


@pytest.mark.parametrize("error", WRITE_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("free", [0, 9])  # bytes that can still be written
def test_records_that_a_full_disk_refused_are_written_later(tmp_path, capsys, error, free):
    log = report.Log(tmp_path, CONSOLE)
    file = log.file

    def full(content):
        nonlocal free
        if not free:
            raise error
        written, free = file.write(content[:free]), 0
        return written

    log.file = types.SimpleNamespace(write=full)
    log.write("step", step=1)
    log.write("step", step=2)
    log.file = file
    log.write("step", step=3)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert capsys.readouterr().out.count("No space left") == 1


def test_a_file_is_replaced_atomically_and_accepts_any_text(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    assert report.replace(path, "old\n") == path
    assert report.replace(path, "# caf\udcff × é\n") == path
    assert path.read_text(encoding="utf-8") == "# caf\\udcff × é\n"
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report.replace(path, "new\n")
    assert path.read_text(encoding="utf-8") == "# caf\\udcff × é\n"


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_that_cannot_sync_is_no_error(tmp_path, monkeypatch, number):
    """CIFS and shared folders of virtual machines answer EINVAL; an error of the disk is still an error."""

    def fail(number):
        def fsync(handle):
            raise OSError(getattr(errno, number), "as if")

        monkeypatch.setattr(os, "fsync", fsync)

    fail(number)
    assert report.replace(tmp_path / "config.json", "{}").read_text() == "{}"
    fail("EIO")
    with pytest.raises(OSError, match="as if"):
        report.replace(tmp_path / "config.json", "{1}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"


def test_two_processes_may_write_the_same_page(tmp_path):
    """The run that ends and `python report.py`: with one temporary name the slower one failed."""
    code = (
        "import pathlib, report; [report.replace(pathlib.Path('report.md'), 'page\\n') for n in range(500)]"
    )
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(REPO)}
    processes = [subprocess.Popen(command, cwd=tmp_path, env=env) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_waiting_needs_no_thread(monkeypatch, capsys):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with CONSOLE.waiting("measure", "compiling"):
        CONSOLE.print("run", "in the block")
    assert "in the block" in capsys.readouterr().out


def test_an_exception_that_ends_a_run_is_an_event(tmp_path):
    log = report.Log(tmp_path, CONSOLE)
    log.write("event", step=0, event="started")
    log.write("step", step=7)
    log.fail(OSError(5, "a damaged\nshard"))
    log.fail("rank 1 has failed")
    first, second = report.read_log(tmp_path)[2:]
    fields = {"kind": "event", "step": 7, "event": "failed"}
    assert first == fields | {"reason": "OSError: [Errno 5] a damaged\nshard"}
    assert second == fields | {"reason": "rank 1 has failed"}
    log.close()
    log.fail("too late")  # does nothing, as on other ranks
    report.Log(None, CONSOLE).fail("on another rank")
    assert len(report.read_log(tmp_path)) == 4


def test_saves_are_logged_with_the_step_of_the_checkpoint(tmp_path, capsys):
    log, error = report.Log(tmp_path, CONSOLE), OSError(5, "no disk")
    assert log.saves([("step_000010", None), ("step_000020", error)], 23) is error
    assert log.saves([], 30) is None
    saved, failed = report.read_log(tmp_path)
    assert saved == {"kind": "event", "step": 10, "event": "saved", "folder": "step_000010"}
    assert failed == {"kind": "event", "step": 23, "event": "save_failed", "error": "[Errno 5] no disk"}
    assert capsys.readouterr().out == "save     failed, the next save tries again: [Errno 5] no disk\n"


def test_a_log_is_read_without_a_broken_line_and_cut_after_a_step(tmp_path):
    records = [{"kind": "step", "step": n} for n in (1, 2, 3)]
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "log.jsonl").write_bytes(text.encode() + b'{"kind": "step", "st\xc3')
    assert report.read_log(tmp_path) == records
    report.cut_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(json.dumps(r) + "\n" for r in records[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


FAKE_WANDB = """
import json, os, sys, time, types
if os.environ.get("BROKEN") == "import":
    raise ImportError("no wandb here")
def call(name, /, *arguments, **options):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([name, arguments, options], default=str) + "\\n")
    if os.environ.get("BROKEN") == name:
        raise RuntimeError("no\\nnetwork")
    time.sleep(float(os.environ.get("SLOW_" + name.upper(), 0)))
class Run:
    url, offline, settings = "https://wandb/a", False, types.SimpleNamespace(sync_dir="wandb/run-a")
    summary = types.SimpleNamespace(update=lambda values: call("summary", values))
    def __getattr__(self, name):
        return lambda *arguments, **options: call(name, *arguments, **options)
def init(**options):
    call("init", **options)
    return Run()
Settings = lambda **options: types.SimpleNamespace(**options)
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """fake_wandb() -> the calls of wandb in other processes: {name: [(arguments, options), ...]}"""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{REPO}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def calls():
        found = {}
        path = tmp_path / "calls"
        for line in path.read_text().splitlines() if path.exists() else ():
            name, arguments, options = json.loads(line)
            found.setdefault(name, []).append((arguments, options))
        return found

    return calls


def log_with_wandb(folder, wait=False):
    """Write two steps to a run's log, with wandb."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"depth": 2}')
    (folder / "log.jsonl").write_text('{"kind": "step", "step": 0}\n')  # of an earlier start
    log = report.Log(folder, CONSOLE, wandb=True)
    log.write("event", step=0, event="started")
    for step in (1, 2):
        log.write("step", step=step, train_loss=2.0, mfu=math.nan)
    (folder / "summary.json").write_text('{"val_bpb": 1.5}')
    log.close()
    return log


def test_wandb_gets_the_same_names(fake_wandb, tmp_path, capsys):
    log_with_wandb(tmp_path / "a")
    calls = fake_wandb()
    axes = ["step", "total_training_time", "total_training_flops"]
    assert calls["define_metric"] == [*(([a], {}) for a in axes), (["*"], {"step_metric": "step"})]
    assert calls["log"] == [([{"step": step, "train_loss": 2.0}], {}) for step in (1, 2)]
    assert calls["summary"] == [([{"val_bpb": 1.5}], {})] and calls["finish"] == [([], {"exit_code": 0})]
    assert capsys.readouterr().out == "wandb    https://wandb/a\n"
    log_with_wandb(tmp_path / "a")  # a resumed run is the same run in wandb
    log_with_wandb(tmp_path / "elsewhere" / "a")
    first, second, other = (options for _, options in fake_wandb()["init"])
    assert first == second and first["resume"] == "allow" and first["config"] == {"depth": 2}
    assert other["name"] == first["name"] and other["id"] != first["id"]


@pytest.mark.parametrize("broken", ["import", "init", "define_metric", "log", "summary", "finish"])
def test_a_broken_wandb_stops_nothing(fake_wandb, monkeypatch, tmp_path, capsys, broken):
    monkeypatch.setenv("BROKEN", broken)
    log_with_wandb(tmp_path / "a")
    assert capsys.readouterr().out.count("turned off after an error: ") == 1
    assert len(report.read_log(tmp_path / "a")) == 4


def test_a_wandb_that_cannot_be_started_stops_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    log_with_wandb(tmp_path / "a")
    assert "wandb    turned off after an error: [Errno 2]" in capsys.readouterr().out


def test_a_late_wandb_gets_all_records_and_costs_the_run_no_time(fake_wandb, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "UPLOAD_SECONDS", 1.5)
    monkeypatch.setenv("SLOW_INIT", "2")
    (tmp_path / "config.json").write_text("{}")
    start = time.monotonic()
    log = report.Log(tmp_path, CONSOLE, wandb=True)
    for step in range(100):
        log.write("step", step=step)
    assert time.monotonic() - start < 0.5
    wait_until(lambda: "log" in fake_wandb())
    log.close()
    assert [record["step"] for (record,), _ in fake_wandb()["log"]] == [*range(100)]
    lines = capsys.readouterr().out.splitlines()
    late = "wandb    no answer yet; the run goes on, and all records are sent once it answers"
    assert lines == [late, "wandb    https://wandb/a"]


@pytest.mark.parametrize(
    "name, advice", [("init", ""), ("finish", "; to send the rest: wandb sync wandb/run-a")]
)
def test_a_wandb_that_hangs_is_left_after_a_limit(fake_wandb, monkeypatch, tmp_path, capsys, name, advice):
    monkeypatch.setattr(report, "UPLOAD_SECONDS", 1.0)
    monkeypatch.setenv("SLOW_" + name.upper(), "1000")
    start = time.monotonic()
    log = log_with_wandb(tmp_path / "a")
    assert 1 < time.monotonic() - start < 4 and log.upload.process.poll() is not None
    assert capsys.readouterr().out.splitlines()[-1] == f"wandb    not everything was sent within 1 s{advice}"


HANGING_RUN = """
import os, pathlib, signal, sys, time
import report
class Signals:  # as machine.py's: train.py looks at it during training only
    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
Signals()
report.UPLOAD_SECONDS = float(os.environ.get("LIMIT", 20))
folder = pathlib.Path(sys.argv[1])
(folder / "config.json").write_text("{}")
log = report.Log(folder, report.Console(), wandb=True)
log.write("step", step=1)
print("process", log.upload.process.pid, flush=True)
{end}
log.close()
print("closed", flush=True)
sys.exit(7)
"""


def start_hanging_run(tmp_path, end=""):
    """A run in a process of its own -> the process, and that of its upload."""
    tmp_path.joinpath("a").mkdir()
    command = [sys.executable, "-c", HANGING_RUN.replace("{end}", end), tmp_path / "a"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return process, int(process.stdout.readline().split()[1])


def is_alive(pid):
    """Whether a process runs; one that has ended may still be waited for by nobody (a zombie)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_wandb(fake_wandb, monkeypatch, tmp_path, number):
    monkeypatch.setenv("SLOW_FINISH", "1000")
    process, upload = start_hanging_run(tmp_path)
    wait_until(lambda: "finish" in fake_wandb())
    start = time.monotonic()
    os.killpg(process.pid, number)  # as Ctrl-C does, and batch systems
    output = process.communicate(timeout=10)[0]
    assert time.monotonic() - start < 2 and process.returncode == 7
    assert output.endswith("wandb    ended before everything was sent\nclosed\n") and not is_alive(upload)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc here")
@pytest.mark.parametrize("hangs", [False, True])
def test_the_upload_of_a_run_that_was_killed_ends(fake_wandb, monkeypatch, tmp_path, hangs):
    """It sends the records so far, marked as a failed run; if wandb hangs, it ends after the limit."""
    monkeypatch.setenv("LIMIT", "1")
    monkeypatch.setenv("SLOW_INIT", "1000" if hangs else "0.1")
    process, upload = start_hanging_run(tmp_path, "log.write('step', step=2); time.sleep(1000)")
    wait_until(lambda: "init" in fake_wandb())
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):  # batch systems send them to all processes
        os.kill(upload, number)
    process.kill()
    process.communicate()
    wait_until(lambda: not is_alive(upload))
    if not hangs:
        assert [record["step"] for (record,), _ in fake_wandb()["log"]] == [1, 2]
        assert fake_wandb()["finish"] == [([], {"exit_code": 1})]


WANDB_ANSWERS = {  # {query: what a server answers}; all others: nothing
    "UpsertBucket": {
        "upsertBucket": {
            "bucket": {
                **{"id": "id", "name": "a", "displayName": "a", "description": "", "config": "{}"},
                **{"sweepName": None, "historyLineCount": 0},
                "project": {"id": "p", "name": "onedial", "entity": {"id": "e", "name": "me"}},
            },
            "inserted": True,
        }
    },
    "CreateRunFiles": {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": []}},
}


class WandbServer(http.server.BaseHTTPRequestHandler):
    """As much of wandb's server as its client needs. It answers after half a second."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.path, body))
        time.sleep(0.5)
        data = WANDB_ANSWERS.get(body.get("operationName"), {})
        if body.get("operationName") == "CreateRunFiles":
            url = f"http://127.0.0.1:{self.server.server_port}/file"
            files = [{"name": name, "uploadUrl": url} for name in body["variables"]["files"]]
            data["createRunFiles"]["files"] = files
        self.answer(json.dumps({"data": data}).encode() if self.path == "/graphql" else b"{}")

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def use_wandb_server(monkeypatch, port):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")


@pytest.mark.slow
def test_the_real_wandb_sends_everything_to_a_slow_server(monkeypatch, tmp_path, capsys):
    pytest.importorskip("wandb")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.received = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_wandb_server(monkeypatch, server.server_port)
    log_with_wandb(tmp_path / "a")
    server.shutdown()
    server.server_close()
    output = capsys.readouterr().out
    assert f"wandb    http://127.0.0.1:{server.server_port}/me/onedial/runs/" in output
    assert "turned off" not in output and "not everything" not in output
    streams = [body for path, body in server.received if path.endswith("/file_stream")]
    sent = [body["files"] for body in streams if "files" in body]
    rows = [row for files in sent for row in files.get("wandb-history.jsonl", {"content": []})["content"]]
    rows = [json.loads(row) for row in rows]
    assert [(row["step"], row["train_loss"]) for row in rows] == [(1, 2.0), (2, 2.0)]
    summaries = [
        files["wandb-summary.json"]["content"][-1] for files in sent if "wandb-summary.json" in files
    ]
    assert json.loads(summaries[-1])["val_bpb"] == 1.5
    assert streams[-1]["complete"] is True and streams[-1]["exitcode"] == 0


@pytest.mark.slow
def test_the_real_wandb_with_a_server_that_never_answers_costs_no_time(monkeypatch, tmp_path, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setattr(report, "UPLOAD_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:  # connects, and nothing else
        use_wandb_server(monkeypatch, server.getsockname()[1])
        (tmp_path / "config.json").write_text("{}")
        start = time.monotonic()
        log = report.Log(tmp_path, CONSOLE, wandb=True)
        log.write("step", step=1)
        assert time.monotonic() - start < 0.5
        log.close()
        assert 3 < time.monotonic() - start < 6
    assert capsys.readouterr().out.endswith("wandb    not everything was sent within 3 s\n")
    assert log.upload.process.poll() is not None


def wandb_records(path):
    """The records that wandb wrote offline: LevelDB's log format, in a file below 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place = path.read_bytes(), 7  # after wandb's header
    while place < len(content):
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        assert kind == 1  # a complete record
        record = Record()
        record.ParseFromString(content[place + 7 : place + 7 + length])
        yield record
        place += 7 + length


@pytest.mark.slow
def test_the_real_wandb_without_a_login_does_not_prompt_on_a_terminal(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "config.json").write_text("{}")
    code = "import pathlib, report; log = report.Log(pathlib.Path('.'), report.Console(), True);"
    code += "log.close(); print('continued')"
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "TERM": "xterm", "PYTHONPATH": str(REPO)}
    here, there = os.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), there)
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, **terminal)
    assert run.wait(timeout=60) == 0
    shown = os.read(here, 10_000).decode()
    assert "turned off" in shown and "continued" in shown
    os.close(here), os.close(there)


@pytest.mark.parametrize("content", [b'{"settings": {', b"", bytes(100), b"[1]", b"null", b"\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is damaged") as error:
        report.write_report(tmp_path, CONSOLE)
    assert str(error.value).count("\n") == 1


@pytest.mark.slow
def test_the_advice_for_a_damaged_config_works(train):
    run = train("--num-iterations", 4, "--run-name", "$a b", run="$a b")
    assert run.code == 0, run.output
    (run.folder / "config.json").write_text('{"settings": {')
    command = [sys.executable, REPO / "report.py", run.folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 2, done.stderr
    advice = done.stderr.split("writes it again: python ")[1]
    env = {**os.environ, "ONEDIAL_HOME": str(train.home / "cache"), "PYTHONPATH": str(train.home / "hidden")}
    command_line = f"{shlex.quote(sys.executable)} {advice}"
    resumed = subprocess.run(["bash", "-c", command_line], env=env, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert json.loads((run.folder / "config.json").read_text())["settings"] == run.config["settings"]


@pytest.mark.slow
def test_wandb_offline_writes_the_same_axes_numbers_and_summary(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "config.json").write_text('{"depth": 2}')
    (tmp_path / "summary.json").write_text('{"val_bpb": 1.25, "mfu": 0.5}')
    code = (
        "import pathlib, report; log = report.Log(pathlib.Path('.'), report.Console(), True)\n"
        "log.write('step', step=1, train_loss=2.0, total_training_time=0.5)\n"
        "log.write('val', step=1, val_bpb=1.5); log.close()"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "turned off" not in run.stdout, run.stdout + run.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history_rows, summary, axes = [], {}, {}
    for record in wandb_records(written):
        history, update = (
            {(item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in items}
            for items in (record.history.item, record.summary.update)
        )
        history_rows.append({name: value for name, value in history.items() if name[0] != "_"})
        summary |= update
        if record.HasField("metric"):
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    assert list(filter(None, history_rows)) == [
        {"step": 1, "train_loss": 2.0, "total_training_time": 0.5},
        {"step": 1, "val_bpb": 1.5},
    ]
    assert axes["*"] == "step" and {"step", "total_training_time", "total_training_flops"} <= axes.keys()
    assert summary["val_bpb"] == 1.25 and summary["mfu"] == 0.5


# -----------------------------------------------------------------------------
# Report


SAMPLES = [["say `", "```\nhi"]]  # of an old run, without the original text
SAMPLES += [["def f(", "x):\n    return\n" + "z" * 100, "y):\n    pass\n1"]]


@pytest.fixture
def config():
    """The config.json of a run with --minutes on a CPU, as train.py writes it."""
    auto = {"device_type": "cpu", "dtype": "float32", "vocab_size": 512, "head_dim": 32, "max_seq_len": 64}
    return {
        "settings": {
            **{"wandb": False, "compile": False, **auto},
            **{"data": "my text", "depth": 2, "num_iterations": None, "minutes": 5.0, "target_flops": None},
            **{"total_batch_size": 512, "matrix_lr": 0.01, "weight_decay": 0.28, "eval_bytes": 1024},
            "seed": 42,
        },
        "given": {"minutes": 5.0, "compile": False, "matrix_lr": 0.01, "data": "my text"},
        "command": "python train.py --minutes 5.0 --data 'my text' --depth 2",
        "timed": True,
        "model": {"vocab_size": 512, "max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 64},
        "num_params": {"matrix": 1000, "head": 300, "embedding": 300, "value_embedding": 100, "smear": 26},
        "num_flops_per_token": 10_000,
        "num_flops_per_token_causal": 8_000.0,
        "corpus": {"name": "text", "fingerprint": "c0ffee", "train": {"tokens": 12_345}},
        "device": "a | CPU",
        "device_type": "cpu",
        "mfu_peak": 1e8,
        "mfu_peak_source": "measured",
        "world_size": 1,
        "versions": {"python": "3.11", "torch": "2.13.0", "git_commit": "0123abc"},
    }


@pytest.fixture
def make(tmp_path, config):
    """make(name, steps, ending=…, tail=…, **config changes) writes a run's folder: a record per 10 steps."""

    def folder(name, steps=100, ending="finished", tail="", **changes):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | changes))
        records = [{"kind": "event", "step": 0, "event": "started", "planned_iterations": 100}]
        for step in range(0, steps + 1, 10):
            sofar = {"total_training_flops": 5_120_000 * step, "total_training_time": 0.1 * step}
            sofar |= {"step": step, "grad_norm": 1.0 + step % 3}
            if step:
                speed = {"dt": 0.1, "tok_per_sec": 5120.0, "mfu": 0.5, "data_wait": 0.2}
                plan = {"lrm": 1.0, "muon_momentum": 0.9, "weight_decay": 0.1, "peak_memory": 10**8}
                loss = dict.fromkeys(("train_loss", "train_loss_ema"), 2 + 6 / step)
                counts = {"progress": step / 100, "tokens": 512 * step, "skipped_steps": 0}
                records.append({"kind": "step", **sofar, **speed, **plan, **loss, **counts})
            if step % 20 == 0:
                records.append({"kind": "val", **sofar, "val_bpb": 1 + 2 / (1 + step), "min_val_bpb": 1.0})
        if ending:
            records.append({"kind": "event", "step": steps, "event": ending})
            spent = {"setup": 1.0, "corpus": 2.0, "trial": 3.0, "training": 10.5, "evaluation": 4.0}
            summary = {"steps": steps, "val_bpb": 1.25, "wall_time": 20.5, "time": spent, "mfu": 0.5}
            summary |= {"progress": steps / 100, "tok_per_sec": 5120.0, "samples": SAMPLES}
            (path / "summary.json").write_text(json.dumps(summary))
        (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
        return path

    return folder


def tables(text):
    """Markdown -> {first cell of a row: its other cells}."""
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_report_of_a_run(make):
    folder = make("a")
    text = report.write_report(folder, CONSOLE).read_text()
    rows = tables(text)
    assert text.splitlines()[:3] == ["# a", "", "finished: 100 steps, 100.0% of the run"]
    assert rows["val_bpb"] == ["1.2500"] and rows["mfu, of the measured peak"] == ["50.0%"]
    assert rows["mfu_causal"] == ["40.0%"] and rows["flops_per_sec"] == ["51.2 MFLOP/s"]
    assert rows["slow_share"] == ["0.0%"]
    assert rows["peak_memory, resident set"] == ["100 MB"]
    assert rows["all parameters"] == ["1,726"] and rows["FLOPs per token, exact causal"] == ["8,000"]
    assert rows["matrix_lr"] == ["0.01"] and "weight_decay" not in rows  # only given settings
    assert rows["device"] == ["a \\| CPU"] and rows["torch"] == ["2.13.0"]
    order = ["| val_bpb", "curves.png", "## Set", "## Hard", "## Time", "## Param", "## Sample", "## How"]
    places = [text.index(mark) for mark in order]
    assert places == sorted(places)
    assert "    ```\n    hi" in text  # a sample cannot end its block
    beside = text.split("## Sample from 'def f('")[1].splitlines()
    assert beside[2] == "    Model:" + 52 * " " + "Original text:"
    assert beside[4] == "    x):" + 55 * " " + "y):" and beside[5] == "        return" + 48 * " " + "    pass"
    assert beside[6].split() == ["z" * 56, "1"] and beside[7].strip() == "z" * 44
    assert (folder / "curves.png").stat().st_size > 20_000


def test_an_edited_constant_is_in_the_report(make, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "train.py").write_text("seed: int = 42  # of all\neval_bytes: int | None = None  # used\n")
    for words in (["init"], ["add", "train.py"], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    clean = report.versions()
    assert len(clean["git_commit"]) == 40 and clean["edited_settings"] == ""
    (tmp_path / "train.py").write_text("seed: int = 42  # of all\neval_bytes: int | None = 1024  # used\n")
    edited = report.versions()
    assert edited["git_commit"] == clean["git_commit"] + "-dirty"
    rows = tables(report.write_report(make("a", versions=edited), CONSOLE).read_text())
    assert rows["eval_bytes"] == ["1024"] and "seed" not in rows
    assert edited["code"] == clean["code"]  # settings are compared separately, and the seed not at all


def commit_all(folder, *files):
    """Make a git repository of some files -> its commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["add", *files], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


def test_the_commit_is_that_of_this_code_or_unknown(tmp_path, monkeypatch):
    """GIT_DIR is set in git's hooks; the files may have been copied into a repository of something else."""
    foreign, own = tmp_path / "foreign", tmp_path / "own"
    for folder in (foreign / "copied", own):
        folder.mkdir(parents=True)
        (folder / "train.py").write_text("seed: int = 42\n")
    (foreign / "other.py").write_bytes(b"# caf\xe9")
    (foreign / "copied" / ".#train.py").symlink_to("somebody@a-host.1234")  # while Emacs edits the file
    foreign_commit, own_commit = commit_all(foreign, "other.py"), commit_all(own, "train.py")
    assert foreign_commit != own_commit

    def versions(folder):
        monkeypatch.setattr(report, "__file__", str(folder / "report.py"))
        return report.versions()

    assert versions(foreign / "copied")["git_commit"] is None
    (foreign / "copied" / "other.py").write_bytes(b"# caf\xe9")
    assert versions(foreign / "copied")["code"]
    monkeypatch.setenv("GIT_DIR", str(foreign / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(foreign))
    monkeypatch.setenv("GIT_INDEX_FILE", "none")
    assert versions(own)["git_commit"] == own_commit
    assert versions(foreign / "copied")["git_commit"] is None


def test_runs_of_edited_code_are_not_one_group(make, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    versions = {}
    for name, code in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):  # all of the same commit
        (tmp_path / "model.py").write_text(code)
        versions[name] = report.versions()
    folders = [make(name, versions=version) for name, version in versions.items()]
    rows = tables(report.compare(folders, CONSOLE).read_text())
    assert rows["result"] == ["a", "c"] and rows["code"] == [versions["a"]["code"], versions["c"]["code"]]


def test_the_time_adds_up(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    rows = tables(report.write_report(make("a"), CONSOLE).read_text())
    names = ["setup", "preparation of the corpus", "benchmark and compilation", "training", "evaluation"]
    seconds = [float(rows[name][0]) for name in [*names, "waiting for data"]]
    assert seconds == [1.0, 2.0, 3.0, 8.5, 4.0, 2.0]  # 0.2 of 100 steps of 0.1 s was waiting
    assert rows["total"][0] == "20.5"  # the wall time
    shares = [float(rows[name][1].rstrip("%")) for name in [*names, "waiting for data"]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_report_has_the_command_that_repeats_the_run(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")

    def end(name, **options):
        text = report.write_report(make(name, **options), CONSOLE).read_text()
        return text[text.index("## How to reproduce this run") :].splitlines()[2:]

    checkout, command, _, exactly = end("a")
    assert (checkout, command) == (
        *("    git checkout 0123abc", "    python train.py --minutes 5.0 --data 'my text' --depth 2"),
    )
    assert "It made 100 steps;" in exactly and "bit for bit" not in exactly
    command = "torchrun --standalone --nproc_per_node=8 train.py --num-iterations 100"
    versions = {"git_commit": "0123abc-dirty"}
    checkout, line, _, exactly = end("b", command=command, timed=False, versions=versions)
    assert checkout == "    git checkout 0123abc  # and apply the changes that were not committed"
    assert line == "    " + command
    assert "bit for bit" in exactly and "limited by time" not in exactly
    command, *_, unknown = end("c", versions={"git_commit": None})
    assert command.startswith("    python train.py") and unknown == "The commit of its code is not known."


def test_a_horizon_that_a_resume_has_changed_is_in_the_report(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folder = make("a", timed=False)
    for step, steps in (
        (40, 100),
        (60, 150),
        (60, 200),
    ):  # the third start began at the same step as the second
        with (folder / "log.jsonl").open("a") as log:
            event = {"kind": "event", "step": step, "event": "resumed", "planned_iterations": steps}
            log.write(json.dumps(event) + "\n")
    text = report.write_report(folder, CONSOLE).read_text()
    assert "was planned at step 0 for 100 steps, at step 60 for 200 steps. To reproduce it" in text
    assert "was planned" not in report.write_report(make("b"), CONSOLE).read_text()


def test_a_killed_run_has_a_report(make):
    folder = make("a", steps=90, ending=None, tail='{"kind": "step", "step": 100, "train_lo')
    text = report.write_report(folder, CONSOLE).read_text()
    rows = tables(text)
    assert "\nstill running, or killed: 90 steps, 90.0% of the run\n" in text
    assert rows["tokens"] == ["46.1k"] and rows["total_training_flops"] == ["4.61e+08"]  # of step 90
    assert rows["val_bpb"] == ["1.0247"] and rows["wall_time"] == ["–"]  # of step 80
    assert rows["training"][0] == "7.2" and rows["total"][0] == "9.0"
    assert "It made 90 steps;" in text


def test_an_exception_that_ended_a_run_is_in_its_report(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folder = make("a", steps=90, ending=None)
    log = report.Log(folder, CONSOLE)
    log.write("event", step=90, event="resumed", planned_iterations=100)
    log.fail(RuntimeError("shard_00003\nis damaged"))
    lines = report.write_report(folder, CONSOLE).read_text().splitlines()
    assert lines[2] == "failed: 90 steps, 90.0% of the run"
    assert lines[4] == "Reason: RuntimeError: shard_00003 is damaged"
    log.write("event", step=90, event="resumed", planned_iterations=100)
    text = report.write_report(folder, CONSOLE).read_text()
    assert "still running, or killed: 90 steps" in text and "Reason" not in text


def test_a_report_without_given_settings_says_so(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    text = report.write_report(make("a", given={}), CONSOLE).read_text()
    assert "## Settings that were given or edited\n\nNone: all have defaults.\n\n## Hardware" in text


def test_tokens_are_those_of_the_log_or_follow_from_the_flops(make, config):
    """Older val records have no tokens; step × batch is wrong after a resume with another batch."""
    folder = make("a", settings=config["settings"] | {"total_batch_size": 999})
    run = report.Run(folder)
    vals = [record for record in run.records if record["kind"] == "val"]
    assert (
        [r["tokens"] for r in vals] == [512 * r["step"] for r in vals] == [512 * n for n in range(0, 101, 20)]
    )
    assert run.numbers["tokens"] == 51_200
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(vals[-1] | {"tokens": 77}) + "\n")
    assert report.Run(folder).records[-1]["tokens"] == 77


def test_a_summary_written_before_a_resume_is_ignored(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folder = make("a")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 50}))
    assert tables(report.write_report(folder, CONSOLE).read_text())["val_bpb"] == ["1.0198"]


def test_values_that_are_not_finite_leave_a_gap(make):
    folder = make("a", ending="failed")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{k: None if "loss" in k or "norm" in k else v for k, v in r.items()} for r in lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    text = report.write_report(folder, CONSOLE).read_text()
    assert "failed: 100" in text and tables(text)["train_loss_ema"] == ["–"] and "curves.png" in text


@pytest.mark.parametrize("steps, log", [(0, True), (0, False)])
def test_an_empty_run_says_so(make, steps, log):
    folder = make("a", steps=steps, ending=None)
    if not log:
        (folder / "log.jsonl").unlink()
    text = report.write_report(folder, CONSOLE).read_text()
    assert "The log has no step yet." in text and "all parameters" in text
    assert "\nstill running, or killed: 0 steps, 0.0% of the run\n" in text


def test_without_matplotlib_the_curves_are_text(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = report.write_report(make("a"), CONSOLE).read_text()
    assert "curves.png" not in text
    (curve,) = re.findall(r"^    val_bpb +3 +([▁-█]+) 1.02  a$", text, re.MULTILINE)
    assert curve[0] == "█" and curve[-1] == "▁" and sorted(curve, reverse=True) == list(curve)


@pytest.mark.parametrize("error, lines", [(ImportError("no"), 0), (ValueError("a bug"), 1)])
def test_an_error_in_a_picture_is_printed(make, monkeypatch, capsys, error, lines):
    def draw(*arguments):
        raise error

    monkeypatch.setattr(report, "draw", draw)
    assert "\n    val_bpb " in report.write_report(make("a"), CONSOLE).read_text()
    assert capsys.readouterr().out.count("curves.png cannot be drawn: ValueError: a bug") == lines


def test_a_sparkline_keeps_the_ends_and_the_width():
    line = report.sparkline([float(n) for n in range(1000)] + [None])
    first, bars, last = line.split()
    assert (first, last) == ("0", "999") and len(bars) == 60 and bars[0] == "▁" and bars[-1] == "█"
    assert report.sparkline([2.0]).split() == ["2", "▁", "2"]


def test_a_comparison_shows_what_differs(make, config):
    other = config["settings"] | {"matrix_lr": 0.02}
    folders = [make("a"), make("b", steps=80, settings=other, device="another CPU")]
    path = report.compare(folders, CONSOLE)
    assert path == folders[0].parent / "compare-a-b" / "compare.md"
    text = path.read_text()
    rows = tables(text)
    assert rows["steps"] == ["100", "80 (-20.0%)"] and rows["val_bpb"] == ["1.2500", "1.2500 (+0.0%)"]
    differing = tables(text[text.index("## Settings") :])
    assert differing == {
        **{"setting": ["a", "b"], "---": ["---", "---"]},
        **{"matrix_lr": ["0.01", "0.02"], "device": ["a \\| CPU", "another CPU"]},
    }
    assert (path.parent / "curves.png").stat().st_size > 20_000


def bpb(folder, value, mfu_peak=1e8):
    """Give a run's summary this val_bpb and peak."""
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"val_bpb": value, "mfu_peak": mfu_peak}))
    return folder


def test_runs_that_differ_only_in_seed_are_one_group(make, config):
    def one(name, seed, value, rate=0.01):
        settings = config["settings"] | {"seed": seed, "matrix_lr": rate, "total_batch_size": 512 * seed}
        return bpb(make(name, settings=settings, given={"seed": seed, "matrix_lr": rate}), value)

    folders = [one("slow-1", 1, 1.10), one("fast-1", 1, 1.00, 0.02), one("slow-2", 2, 1.12)]
    folders += [one("fast-2", 2, 1.02, 0.02), one("slow-3", 3, 1.14), one("same", 4, 1.13, 0.03)]
    path = report.compare(folders, CONSOLE)
    assert path.parent.name == "compare-slow-fast-same"
    text = path.read_text()
    rows = tables(text)
    assert rows["result"] == ["slow", "fast", "same"]
    # slow: 1.12 ± 0.02; by hand for fast: pooled variance (0.0008 + 0.0002) / 3, t of 3 is 3.182
    half = 3.182 * math.sqrt(0.001 / 3 * (1 / 3 + 1 / 2)) / 1.12
    change = 1.01 / 1.12 - 1
    assert rows["val_bpb"] == [
        "1.1200 ± 0.0200, n = 3",
        f"1.0100 ± 0.0141, n = 2 ({change:+.1%} ± {half:.1%})",
        f"1.1300 (+0.9% ± {4.303 * 0.02 * math.sqrt(4 / 3) / 1.12:.1%}, noise)",
    ]
    differing = tables(text[text.index("## Settings") :])
    assert differing["matrix_lr"] == ["0.01", "0.02", "0.03"]
    assert differing["seed"] == ["1, 2, 3", "1, 2", "4"]
    assert (path.parent / "curves.png").stat().st_size > 20_000


# -----------------------------------------------------------------------------
# At equal cost, and over sizes


@pytest.fixture
def by_law(make, config):
    """by_law(name, val_bpb of a step, …) -> the folder of a run with an evaluation in 100 steps."""

    def folder(name, law, steps=1000, seconds=0.1, flops=1e6, depth=2):
        changes = {"settings": config["settings"] | {"depth": depth}, "given": {"depth": depth}}
        path = make(name, steps=0, ending=None, model=config["model"] | {"n_layer": depth}, **changes)
        records = []
        for step in range(0, steps + 1, 100):
            costs = {"total_training_flops": flops * step, "total_training_time": seconds * step}
            records.append({"kind": "val", "step": step, **costs, "val_bpb": law(step) if step else 9.0})
        records.append({"kind": "event", "step": steps, "event": "finished"})
        (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return folder


def compared(*folders):
    return tables(report.compare(folders, CONSOLE).read_text())


def test_costs_at_equal_loss_are_those_of_the_known_laws(by_law):
    """a: 3 · step^-0.1 in 1,000 steps of 0.1 s; b: a tenth above it, in 2,000 steps of 0.02 s."""
    a = by_law("a", lambda step: 3 * step**-0.1)
    b = by_law("b", lambda step: 3.3 * step**-0.1, 2000, 0.02, depth=3)
    found = compared(a, b)
    steps, tokens, flops, seconds = found["val_bpb of a, b"]
    at_1000 = f"{3 * 1000**-0.1:.4f}, {3.3 * 1000**-0.1:.4f} (+10.0%)"
    assert steps == tokens == flops == at_1000
    at_40_seconds = 3 * 400**-0.1, 3.3 * 2000**-0.1
    change = at_40_seconds[1] / at_40_seconds[0] - 1
    assert seconds == f"{at_40_seconds[0]:.4f}, {at_40_seconds[1]:.4f} ({change:+.1%})"
    needed = 1000 * 1.1**10  # steps that b needs for a's final val_bpb: more than it made
    assert needed > 2000 and found[f"cost of b to reach a's {3 * 1000**-0.1:.4f}"] == ["never"] * 4
    needed = 2000 / 1.1**10  # steps that a needs for b's final val_bpb
    *shares, seconds = found[f"cost of a to reach b's {3.3 * 2000**-0.1:.4f}"]
    assert shares == [f"{needed / 2000:.2f}"] * 3 and seconds == f"{needed * 0.1 / 40:.2f}"


def test_equal_runs_cost_the_same_and_groups_are_compared_by_their_means(by_law):
    a, b = (by_law(name, lambda step: 2 * step**-0.2, depth=d) for name, d in (("a", 2), ("b", 3)))
    found = compared(a, b)
    last = f"{2 * 1000**-0.2:.4f}"
    assert found["val_bpb of a, b"] == [f"{last}, {last} (+0.0%)"] * 4
    assert found[f"cost of b to reach a's {last}"] == found[f"cost of a to reach b's {last}"] == ["1.00"] * 4
    seeds = [by_law(f"c-{i}", lambda step, i=i: (1.9 + i / 5) * step**-0.2, depth=4) for i in range(2)]
    assert compared(a, *seeds)["val_bpb of a, c"] == [f"{last}, {last} (+0.0%)"] * 4


def test_no_value_is_extrapolated_to_before_the_first_evaluation(by_law):
    a, b = by_law("a", lambda step: 2 * step**-0.2), by_law("b", lambda step: 3.0, 100, 0.01, depth=3)
    assert [cell[:6] for cell in compared(a, b)["val_bpb of a, b"]] == ["0.7962"] * 3 + ["not ev"]


def test_of_ten_groups_each_is_compared_with_the_best_one_only(by_law, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    runs = [by_law(f"r{n}", lambda step, n=n: (2 + n % 8) * step**-0.2, depth=n) for n in range(1, 11)]
    pairs = [name for name in compared(*runs) if name.startswith("val_bpb of ")]
    assert pairs == [f"val_bpb of r8, r{n}" for n in range(1, 11) if n != 8]


def test_groups_of_unnamed_runs_are_labelled_by_what_differs(by_law, config, make, monkeypatch):
    """The name of an unnamed run is its date."""
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    date = "20261128-1251{:02}".format
    one = [by_law(date(n), lambda step: 3 * step**-0.1, depth=2) for n in (1, 2)]
    two = by_law(date(3) + "-2", lambda step: 3 * step**-0.1, depth=3)
    named = by_law("mine", lambda step: 3 * step**-0.1, depth=4)
    path = report.compare([*one, two, named], CONSOLE)
    found = tables(path.read_text())
    assert found["result"] == ["depth=2", "depth=3", "mine"] and "val_bpb of depth=2, depth=3" in found
    assert path.parent.parent == two.parent
    # one of them has a flag that the other one has not: its default is shown
    settings = config["settings"] | {"matrix_lr": 0.02, "weight_decay": 0.1, "seed": 3}
    changes = {"settings": settings, "given": {"matrix_lr": 0.02, "weight_decay": 0.1, "seed": 3}}
    folders = [make(date(4)), make(date(5), **changes)]
    (header,) = re.findall(r"^\| result \| .*", report.compare(folders, CONSOLE).read_text(), re.MULTILINE)
    assert header == "| result | matrix_lr=0.01 weight_decay=0.28 | matrix_lr=0.02 weight_decay=0.1 |"
    # nothing that was given differs
    other = make(date(6), device="another CPU")
    assert tables(report.compare([folders[0], other], CONSOLE).read_text())["result"] == [date(4), date(6)]


def test_running_and_damaged_runs_are_compared_as_far_as_they_are_logged(by_law, make):
    a = by_law("a", lambda step: 3 * step**-0.1)
    b = by_law("b", lambda step: None if step == 300 else 3 * step**-0.1, 500, depth=3)
    with (b / "log.jsonl").open("a") as log:
        log.write('{"kind": "val", "step": 60')
    found = compared(a, b)
    assert found["val_bpb of a, b"] == [f"{3 * 500**-0.1:.4f}, {3 * 500**-0.1:.4f} (+0.0%)"] * 4
    assert found[f"cost of a to reach b's {3 * 500**-0.1:.4f}"] == ["1.00"] * 4
    assert found[f"cost of b to reach a's {3 * 1000**-0.1:.4f}"] == ["never"] * 4
    nothing = make("nothing", steps=0, ending=None, depth=4)
    assert not any("nothing" in name and "to reach" in name for name in compared(a, nothing))


def test_fingerprints_decide_whether_texts_are_the_same(make, config, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")

    def one(name, fingerprint, text, **changes):
        given = {**config["given"], "data": f"/data/{text}", **changes}
        settings = config["settings"] | given
        corpus = config["corpus"] | {"name": text, "fingerprint": fingerprint}
        return make(name, corpus=corpus, settings=settings, given=given)

    a, other_text = one("a", "c0ffee", "text"), bpb(one("b", "facade", "text"), 2.0)
    text = report.compare([a, other_text], CONSOLE).read_text()
    assert "cannot be compared: text (c0ffee), text (facade)." in text and "At equal cost" not in text
    rows = tables(text)
    assert rows["val_bpb"] == ["1.2500", "2.0000"] and rows["steps"] == ["100", "100 (+0.0%)"]
    same = bpb(one("c", "c0ffee", "copy", matrix_lr=0.03), 2.0)
    text = report.compare([a, same], CONSOLE).read_text()
    assert "cannot be compared" not in text and "At equal cost" in text
    assert tables(text)["val_bpb"] == ["1.2500", "2.0000 (+60.0%)"]
    seed = one("a-2", "c0ffee", "copy", seed=7)  # two places of one text do not separate seeds
    assert tables(report.compare([a, seed], CONSOLE).read_text())["steps"] == ["100 ± 0, n = 2"]


OLD_RUNS = sorted((REPO / "tests" / "old_runs").iterdir())


@pytest.mark.parametrize("version", [path.name for path in OLD_RUNS])
def test_a_run_of_an_older_version_has_a_report(tmp_path, version):
    folder = shutil.copytree(REPO / "tests" / "old_runs" / version, tmp_path / "a")
    text = report.write_report(folder, CONSOLE).read_text()
    rows, numbers = tables(text), json.loads((folder / "summary.json").read_text())
    assert text.splitlines()[2].startswith("finished: 40 steps")
    assert ", 0.0% of the run" not in text
    assert rows["val_bpb"] == [f"{numbers['val_bpb']:.4f}"] and rows["peak_memory, resident set"]
    assert f"\n    git checkout {version}" in text and "None" not in text.split("## How")[1]
    assert (folder / "curves.png").exists()
    (folder / "summary.json").write_text('{"steps": ')  # the power failed
    assert tables(report.write_report(folder, CONSOLE).read_text())["val_bpb"] == rows["val_bpb"]
    assert "40     3.0" in report.list_runs(tmp_path, CONSOLE)


@pytest.mark.parametrize("backwards", [False, True])
def test_runs_of_all_versions_can_be_compared(make, tmp_path, backwards):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in OLD_RUNS]
    folders = [*folders, make("now")][:: -1 if backwards else 1]
    rows = tables(report.compare(folders, CONSOLE).read_text())
    by_name = dict(zip(rows["setting"], rows["eval_bytes"]))
    assert by_name == {"5725d61": "–", "e41caad": "4096", "now": "1024"} and "run" not in rows
    by_name = dict(zip(rows["setting"], rows["eval_tokens"]))
    assert by_name == {"5725d61": "32768", "e41caad": "–", "now": "–"}


def test_what_a_version_did_not_write_is_a_dash(make):
    """Without any fact, or any number of the log but steps and val_bpb."""
    bare, full = make("bare"), make("full")
    (bare / "config.json").write_text('{"settings": {}}')
    (bare / "summary.json").unlink()
    records = [json.loads(line) for line in (bare / "log.jsonl").read_text().splitlines()]
    keep = ("kind", "step", "val_bpb", "event")
    records = [{name: value for name, value in record.items() if name in keep} for record in records]
    (bare / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = tables(report.write_report(bare, CONSOLE).read_text())
    assert rows["val_bpb"] == ["1.0198"] and rows["tokens"] == rows["mfu"] == rows["mfu_causal"] == ["–"]
    assert rows["all parameters"] == rows["FLOPs per token, exact causal"] == ["–"] and rows["device"] == [
        "–"
    ]
    rows = tables(report.compare([bare, full], CONSOLE).read_text())
    assert rows["tokens"] == ["–", "51.2k"] and rows["matrix_lr"] == ["–", "0.01"]
    assert re.search(r"bare +– +100 ", report.list_runs(bare.parent, CONSOLE))


def test_the_frontier_is_the_lowest_value_at_each_cost():
    nothing = np.zeros((2, 0))  # a run that has not been evaluated yet
    curves = [(np.array([1.0, 4.0]), np.array([3.0, 2.0])), nothing]
    curves.append((np.array([2.0, 8.0]), np.array([2.5, 2.2])))
    costs, lowest = report.frontier(curves)
    assert costs.tolist() == [1, 2, 4, 8] and lowest.tolist() == [3.0, 2.5, 2.0, 2.0]


@pytest.mark.parametrize("E, a, b", [(0.0, 1.3, 0.12), (0.6, 0.5, 0.3), (0.55, 0.9, 0.08)])
def test_a_power_law_is_found_again(E, a, b):
    flops = np.geomspace(1e12, 1e15, 7)
    losses = E + a * (flops / 3.2e13) ** -b
    fit = report.power_law(flops, losses, irreducible=bool(E))
    assert fit[0] == pytest.approx(E, abs=0.01) and fit[2] == pytest.approx(b, rel=0.05)
    predicted = fit[0] + fit[1] * (1e16 / fit[3]) ** -fit[2]
    assert predicted == pytest.approx(E + a * (1e16 / 3.2e13) ** -b, rel=0.003)


def sizes(by_law, count, seeds=1):
    """Runs of models with 1, 2, … layers, whose final val_bpb is 1.2 · (FLOPs / 1e12)^-0.1."""
    random = np.random.RandomState(1)
    for layers in range(1, count + 1):
        for seed in range(seeds):
            noise = 1 + 0.002 * random.randn() if seeds > 1 else 1.0
            law = lambda step, layers=layers, noise=noise: noise * 1.2 * (layers**2) ** -0.1  # noqa: E731
            yield by_law(f"d{layers}-{seed}", law, flops=1e9 * layers**2, depth=layers)


def test_a_scaling_law_over_sizes_has_residuals_and_a_forecast(by_law):
    folders = list(sizes(by_law, 4))
    text = report.compare(folders, CONSOLE).read_text()
    assert (
        "^-0.1000. Fewer than five sizes: fitted without an irreducible loss." in text
        and "bootstrap" not in text
    )
    law = tables(text.split("## Scaling law")[1])
    assert law["d3-0"][:3] == ["9e+12", *[f"{1.2 * 9**-0.1:.4f}"] * 2] and float(law["d3-0"][3][:-1]) == 0
    assert law["forecast for 10 times the FLOPs"][2] == f"{1.2 * 160**-0.1:.4f}"
    assert "Scaling law" not in report.compare(folders[:2], CONSOLE).read_text()
    same_flops = [by_law(f"s{n}", lambda step: 1.0, depth=n) for n in (1, 2, 3)]
    assert "Scaling law" not in report.compare(same_flops, CONSOLE).read_text()
    picture = folders[0].parent / "compare-d1-0-d2-0-d3-0-d4-0" / "scaling.png"
    assert picture.exists() and "![scaling law](scaling.png)" in text


def test_with_seeds_the_exponent_has_an_interval_that_contains_the_truth(by_law):
    text = report.compare(list(sizes(by_law, 5, seeds=3)), CONSOLE).read_text()
    exponent = float(re.search(r"\^-(\d\.\d+)", text)[1])
    low, high = map(float, re.search(r"Exponent (\S+) to (\S+) by bootstrap", text).groups())
    assert "val_bpb = 0." in text and low <= exponent <= high and low < 0.1 < high


def test_the_list_of_runs(make):
    a = make("a")
    make("b", ending=None)
    make("broken")
    (a.parent / "broken" / "config.json").write_text("{")
    os.utime(a / "log.jsonl", (2e9, 2e9))
    *_, head, first, second = report.report_on([str(a.parent)], CONSOLE).splitlines()
    assert head.split() == ["last", "change", "run", "depth", "steps", "val_bpb", "state"]
    assert re.match(r"2033-05-18 \d\d:33  a    2      100    1.2500   finished$", first)
    assert re.search(r"  b    2      100    1.0198   still running, or killed$", second)


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (4, 2.776), (5, 2.571), (8, 2.306), (30, 2.042)])
def test_students_t(freedom, t):
    assert report.t_quantile(freedom) == pytest.approx(t, rel=1e-3)


def test_an_interval_of_95_percent_contains_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    draws = [[rng.normal(2.0, 0.02, n).tolist() for n in (3, 4)] for _ in range(2000)]
    right = sum(report.difference(base, values).endswith("noise") for base, values in draws)
    assert 0.935 < right / 2000 < 0.965


def test_a_group_is_drawn_as_its_mean_where_all_runs_have_data():
    records = [{"step": s, "x": s, "y": s + 1.0} for s in range(5)]
    other = [{"step": s, "x": s, "y": s + 3.0 if s else None} for s in (0, 1, 3)] + [{"step": 3, "z": 1.0}]
    runs = [types.SimpleNamespace(records=r) for r in (records, other)]
    x, mean, spread = report.mean_curve(runs, "x", "y", 0)
    assert [*x] == [1, 2, 3] and [*mean] == [3, 4, 5] and spread == pytest.approx([2**0.5] * 3)
    assert report.mean_curve(runs[:1], "x", "y", 2)[2].tolist() == [0.0, 0.0]
    assert report.mean_curve(runs, "x", "nothing", 0).shape == (3, 0)
    assert report.mean_curve(runs[:1], "x", "y", -1)[0].tolist() == [
        1,
        2,
        3,
        4,
    ]  # not 0: the axis may be logarithmic


def test_interruptions_are_counted_and_the_final_peak_is_used(make):
    folder = bpb(make("a"), 1.25, mfu_peak=2e8)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in lines:  # the last 10 steps took 10 times as long as the others
        if record["kind"] == "step" and record["step"] == 100:
            record |= {"dt": 1.0, "total_training_time": 9.0 + 10.0}
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    run = report.Run(folder)
    assert run.numbers["slow_share"] == pytest.approx(10 / 18)
    assert [r["mfu"] for r in run.steps] == [0.25] * 10  # half of what was logged
    assert tables(report.write_report(folder, CONSOLE).read_text())["slow_share"] == ["55.6%"]
    assert report.slow_share([]) == report.slow_share(run.steps[:1]) == 0.0


def test_the_report_says_where_the_lowest_val_bpb_was(make, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folder = make("a")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in lines:
        if record["kind"] == "val":
            record["val_bpb"] = 2.0 + abs(record["step"] - 40) / 100
        record["epoch"] = record["step"] / 16
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    sentence = "val_bpb was lowest at step 40, after 2.5 epochs: 2.0000. It has risen to 2.6000 since."
    assert f"\n{sentence}\n" in report.write_report(folder, CONSOLE).read_text()
    assert report.val_bpb_rise(report.Run(make("b"))) == []  # it falls to the end
    assert report.val_bpb_rise(report.Run(make("c", steps=0, ending=None))) == []


def test_runs_with_the_same_name_are_shown_with_their_folders(make, tmp_path):
    (tmp_path / "x").mkdir()
    folders = [make("a"), make("x/a", world_size=2), make("empty", steps=0, ending=None)]
    text = report.compare(folders, CONSOLE).read_text()
    assert str(folders[0]) in text and str(folders[1]) in text


@pytest.fixture
def legends(monkeypatch):
    """The legends of pictures, as [(text, font families)]; a warning of matplotlib's is an error."""
    from matplotlib.figure import Figure

    shown, savefig = [], Figure.savefig

    def save(figure, *arguments, **options):
        with warnings.catch_warnings(action="error"):
            savefig(figure, *arguments, **options)
        for legend in figure.legends:
            assert not any(text.get_parse_math() for text in legend.get_texts())
            shown.extend((text.get_text(), text.get_fontfamily()) for text in legend.get_texts())

    monkeypatch.setattr(Figure, "savefig", save)
    return shown


ODD_NAMES = ["$a$b", "_x_", "-y", "a b", "$\\frac{", "^", "ä|`*<b>"]


def test_pictures_show_names_as_they_are(make, config, legends):
    settings = [config["settings"] | {"matrix_lr": float(n)} for n in range(len(ODD_NAMES))]
    given = [{"matrix_lr": float(n)} for n in range(len(ODD_NAMES))]
    folders = [make(n, 10, settings=s, given=g) for n, s, g in zip(ODD_NAMES, settings, given)]
    page = report.compare(folders, CONSOLE)
    assert (page.parent / "curves.png").exists() and [name for name, _ in legends] == ODD_NAMES
    assert page.parent.parent == folders[0].parent


def test_a_page_shows_names_as_they_are(make, monkeypatch):
    """GitHub takes $ for mathematics, * and _ around a word for emphasis, < for HTML."""
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folders = [make("$a$ <b>", device="x"), make("_c_d_"), make("e|`*", device="y")]
    text = report.compare(folders, CONSOLE).read_text()
    assert text.splitlines()[0] == r"# \$a\$ \<b>, \_c_d\_, e\|\`\*"
    assert r"| result | \$a\$ \<b> | \_c_d\_ | e\|\`\* |" in text and "| val_bpb |" in text
    assert report.write_report(folders[1], CONSOLE).read_text().startswith("# \\_c_d\\_\n")


@pytest.mark.slow
def test_letters_that_no_font_has_are_escaped_in_pictures(make, legends, monkeypatch, tmp_path):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    usual = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu", "Last"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    report.write_report(make("运行-中é"), CONSOLE)
    report.write_report(make("x\x01\ny"), CONSOLE)
    if sys.platform != "darwin":
        report.write_report(make("caf\udcff"), CONSOLE)
    names = [name for name, _ in legends]
    assert names == ["\\u8fd0\\u884c-\\u4e2dé", "x\\x01\\ny", "caf\\udcff"][: len(names)] and len(names) > 1
    legends.clear()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "run", "line", "middle"])
    builder.setupCharacterMap({ord("运"): "run", ord("行"): "line", ord("中"): "middle"})
    pen = TTGlyphPen(None)
    for call, place in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 700)), (pen.lineTo, (700, 0))):
        call(place)
    pen.closePath()
    builder.setupGlyf(dict.fromkeys([".notdef", "run", "line", "middle"], pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", "run", "line", "middle"], (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "A Chinese Font", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800)
    builder.setupPost()
    builder.save(tmp_path / "chinese.ttf")
    font_manager.fontManager.addfont(tmp_path / "chinese.ttf")
    report.write_report(make("运行"), CONSOLE)
    assert legends == [("运行", [*legends[0][1][:-1], "A Chinese Font"])]


def test_a_comparison_of_long_names_has_a_folder_of_its_own(make, config, monkeypatch):
    """78 Chinese letters are 234 bytes; a file name can have 255."""
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folders = [make(78 * "中" + name, device=name) for name in "abc"]
    pages = {report.compare(pair, CONSOLE) for pair in (folders[:2], folders[1:])}
    assert len(pages) == 2 and all(len(os.fsencode(page.parent.name)) <= 120 for page in pages)


def test_two_seeds_of_ten_steps_have_curves(make, config, capsys):
    """Seconds of training leave out the first ten steps, so they are all 0: an empty logarithmic axis."""
    folders = [make(f"a-{seed}", 10, settings=config["settings"] | {"seed": seed}) for seed in (1, 2)]
    for folder in folders:
        records = [json.loads(line) | {"total_training_time": 0.0} for line in (folder / "log.jsonl").open()]
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = report.compare(folders, CONSOLE)
    assert (page.parent / "curves.png").exists() and capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform == "darwin", reason="all names are UTF-8 there")
def test_a_folder_whose_name_is_not_utf8_has_its_report(make):
    text = report.write_report(make("caf\udcff"), CONSOLE).read_text(encoding="utf-8")
    assert text.startswith("# caf\\udcff\n") and "1.2500" in text


@pytest.fixture
def ended(make):
    """(folder, summary) of a finished run, before summary.json and report.md are written."""
    folder = make("a")
    summary = json.loads((folder / "summary.json").read_text()) | {"train_loss_ema": math.nan}
    (folder / "summary.json").unlink()
    return folder, summary


def test_finish_writes_and_prints_summary_and_report(ended, monkeypatch, capsys):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    folder, summary = ended
    assert report.finish(folder, summary, CONSOLE) is True
    assert json.loads((folder / "summary.json").read_text()) == summary | {"train_loss_ema": None}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "---" and lines[-1] == f"report: {folder / 'report.md'}"
    shown = dict(line.split(": ") for line in lines[1:-1])
    assert shown["val_bpb"] == "1.25" and shown["steps"] == "100" and shown["train_loss_ema"] == "nan"
    assert not {"time", "samples"} & shown.keys()  # too long for a line
    assert tables((folder / "report.md").read_text())["wall_time"] == ["20s"]  # read from summary.json


def test_the_summary_is_written_before_anything_is_printed(ended, monkeypatch):
    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.Console, "write", broken)
    folder, summary = ended
    with pytest.raises(KeyboardInterrupt):
        report.finish(folder, summary, CONSOLE)
    assert json.loads((folder / "summary.json").read_text())["val_bpb"] == 1.25


def test_summary_and_report_are_written_when_the_console_was_closed(ended, monkeypatch):
    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    monkeypatch.setattr(sys, "stdout", closed_stdout(BrokenPipeError))
    folder, summary = ended
    assert report.finish(folder, summary, CONSOLE) is True
    assert (folder / "summary.json").exists() and (folder / "report.md").exists()


@pytest.mark.parametrize("name", ["summary.json", "report.md"])
def test_finish_prints_what_could_not_be_written(ended, monkeypatch, capsys, name):
    replace = report.replace

    def full(path, text):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return replace(path, text)

    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    monkeypatch.setattr(report, "replace", full)
    folder, summary = ended
    assert report.finish(folder, summary, CONSOLE) is False
    what = {"summary.json": "writing summary.json", "report.md": "writing the report"}[name]
    assert f"error:   {what} failed: OSError: [Errno 28] No space left" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "log.jsonl", "summary.json", "report.md"),
    } - {name}


def test_the_summary_is_written_when_the_report_fails(ended, monkeypatch, capsys):
    def broken(folder, console):
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(report, "write_report", broken)
    folder, summary = ended
    assert report.finish(folder, summary, CONSOLE) is False
    assert json.loads((folder / "summary.json").read_text())["val_bpb"] == 1.25
    output = capsys.readouterr().out
    assert "val_bpb: 1.25\n" in output
    assert "error:   writing the report failed: ZeroDivisionError: a mistake\n" in output


@pytest.mark.parametrize("name", ["Run", "val_bpb_rise", "write_report", "replace"])
def test_finish_survives_any_error(ended, monkeypatch, capsys, name):
    def broken(*arguments):
        raise MemoryError("too little memory")

    monkeypatch.setattr(report, "curves", lambda groups, folder, console: "")
    monkeypatch.setattr(report, name, broken)
    folder, summary = ended
    assert report.finish(folder, summary, CONSOLE) is False
    assert (folder / "summary.json").exists() == (name != "replace")
    output = capsys.readouterr().out
    assert "val_bpb: 1.25\n" in output and "failed: MemoryError: too little memory" in output


def test_the_command_line(make, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        runpy.run_path(str(REPO / "report.py"), run_name="__main__")
        return capsys.readouterr().out.strip()

    a, b = make("a", steps=0, ending=None), make("b", steps=0, ending=None, world_size=2)
    assert call(a) == str(a / "report.md")
    assert call(a, b) == str(a.parent / "compare-a-b" / "compare.md")
    (a.parent / "notes").mkdir()
    every = sorted(a.parent.iterdir())  # out/*, the comparison included
    assert len(every) == 4
    assert call(*every).splitlines() == [
        f"skipped  {a.parent / 'notes'}, which is not a run",  # no message about the comparison
        str(a.parent / "compare-a-b" / "compare.md"),
    ]
    assert call(a, a.parent / "notes").endswith(str(a / "report.md"))
    for wrong in ([a.parent / "nothing"], [a.parent / "nothing"] * 2, []):
        with pytest.raises(SystemExit) as end:
            call(*wrong)
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 2


# -----------------------------------------------------------------------------
# Real runs

COUNTING = """
import runpy, sys
sys.path.insert(0, {repo!r})
import machine, report
waits, write = 0, report.Log.write
def wait():
    global waits
    waits += 1
def counting(log, kind, **fields):
    write(log, kind, **fields, waits=waits)
machine.synchronizer, report.Log.write = (lambda device: wait), counting
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_synchronizes_once_per_record_and_its_time_adds_up(train, tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(repo=str(REPO), train=str(REPO / "train.py")))
    run = train("--num-iterations", 40, "--log-every", 5, "--eval-every", 1000, script=script, draw=True)
    assert run.code == 0, run.output
    steps = [r for r in run.log if r["kind"] == "step"]
    waits = [r["waits"] for r in steps]
    assert [b - a for a, b in zip(waits, waits[1:])] == [1] * (len(steps) - 1) and len(steps) < 12
    assert sum(run.summary["time"].values()) == pytest.approx(run.summary["wall_time"], abs=0.1)
    assert max(map(len, run.output[: run.output.index("---")].splitlines())) <= 120
    text = (run.folder / "report.md").read_text()
    assert "\nfinished: 40 steps, 100.0% of the run\n" in text and tables(text)["steps"] == ["40"]
    assert f"\n    {run.config['command']}\n" in text and "--num-iterations 40" in run.config["command"]
    assert (run.folder / "curves.png").exists()


@pytest.mark.slow
def test_a_wandb_that_never_answers_takes_no_training_time(train, monkeypatch):
    """wandb itself waits for 90 s."""
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:  # connects, and nothing else
        use_wandb_server(monkeypatch, server.getsockname()[1])
        process = train.start("--num-iterations", 20, "--wandb")
        wait_for(process, "wandb    sending the last records")
        process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        run = train.finish(process)
    assert time.monotonic() - signalled < 3 and run.code == 0, run.output
    assert run.summary["steps"] == 20 and run.summary["wall_time"] < 60
    assert (run.folder / "report.md").exists()
    assert run.output.endswith("wandb    ended before everything was sent\n")


@pytest.mark.slow
def test_a_run_that_was_killed_has_a_report(train, tmp_path):
    process = train.start("--num-iterations", 100_000, "--eval-every", 1000)
    log = tmp_path / "out" / "a" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count('"step", "step"') > 20):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    run = train.finish(process)
    assert run.code == -signal.SIGKILL and run.summary is None
    with log.open("a") as file:
        file.write('{"kind": "step", "step": 9')
    text = report.write_report(run.folder, CONSOLE).read_text()
    assert "still running, or killed" in text and "curves.png" in text
