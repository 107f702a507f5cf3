"""
Numbers of a run: measured without slowing it down, logged, printed and plotted.

log.jsonl, config.json and summary.json are the record. Console, report.md and wandb only display it.

    python report.py out           # list its runs, newest first
    python report.py out/a         # write out/a/report.md, also of a running or killed run
    python report.py out/a out/b   # write out/compare-a-b/compare.md; different seeds form one group
"""

import codecs
import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np  # torch is imported where it is used: reports and the upload to wandb start faster without

# -----------------------------------------------------------------------------
# Measuring


def versions():
    """Versions of Python, packages, system and code; the git commit and the settings edited since then."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {name: importlib.metadata.version(name) for name in ("numpy", "tiktoken", "rustbpe")}
    found |= {"system": platform.platform(), "git_commit": None, "edited_settings": ""}
    folder = Path(__file__).absolute().parent
    files = [file for file in sorted(folder.glob("[!.]*.py")) if file.is_file()]  # not Emacs' broken links
    code = "".join(file.read_text("utf-8", errors="replace") for file in files)
    code = re.sub(r"^\w+: .+ = .+", "", code, flags=re.MULTILINE)  # without settings: config.json has them
    found["code"] = hashlib.sha256(code.encode()).hexdigest()[:12]  # differs for two edits of one commit
    # GIT_DIR and others, as set in git's hooks, would name another repository
    keep = lambda name: name.startswith("GIT_CONFIG") or not name.startswith("GIT_")  # noqa: E731
    environment = {name: value for name, value in os.environ.items() if keep(name)}

    def git(arguments):
        """Output of a git command in the folder of this file."""
        command = ["git", "-C", folder, *arguments.split()]
        options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 5}
        return subprocess.check_output(command, env=environment, **options).decode(errors="replace")

    # git may not be installed; the files may have been copied into another project's repository
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files --error-unmatch train.py")
        found["git_commit"] = git("describe --always --abbrev=40 --dirty --exclude *").strip() or None
        changes = git("diff --no-color -U0 HEAD -- train.py")
        found["edited_settings"] = " ".join(re.findall(r"^\+(\w+): .+ = ", changes, re.MULTILINE))
    return found


def run_config(model, corpus, **facts):
    """The content of config.json: the given facts, those of a GPT and of a Corpus, and the versions."""
    return {
        **facts,
        "model": asdict(model.config),
        "num_params": model.num_params(),
        "num_flops_per_token": model.num_flops_per_token(),
        "num_flops_per_token_causal": model.num_flops_per_token(exact_causal=True),
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, **corpus.counts},
        "versions": versions(),
    }


def update_ema(smooth, loss, beta):
    """One step of an exponential moving average that starts at 0: beta · smooth + (1 - beta) · loss."""
    return beta * smooth + (1 - beta) * loss


def debias(smooth, beta, count):
    """Correct the EMA of `count` losses for its start at 0 (arXiv 1412.6980, section 3); nan if none."""
    return smooth / (1 - beta**count) if count else math.nan


def bits_per_byte(model, batches, device):
    """
    Loss in bits per byte over the batches, (tokens, targets, number of bytes), of all ranks; `batches` are
    this rank's. model(tokens, targets) returns the loss in nats, summed over the targets: a 0-D tensor. The
    result is loss_sum / (ln 2 · bytes), summed in float64 on the CPU after a single synchronization.
    """
    import torch
    import torch.distributed as dist

    losses, count = [], 0
    for tokens, targets, length in batches:
        losses.append(model(tokens, targets).detach())
        count += length
    loss_sum = math.fsum(torch.stack(losses).tolist()) if losses else 0.0
    if dist.is_available() and dist.is_initialized():
        totals = torch.tensor([loss_sum, count], dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        loss_sum, count = totals.tolist()
    return loss_sum / (math.log(2) * count)


class Clock:
    """
    Wall time in seconds per activity: lap(name) adds the time since the last lap to `name`. `start` is a
    time.monotonic(), which does not change when the system's clock is corrected.
    """

    def __init__(self, start):
        self.last, self.spent = start, Counter()

    def lap(self, name):
        now = time.monotonic()
        self.spent[name] += now - self.last
        self.last = now

    def add(self, spent):
        """Add the times of earlier starts of this run, {name: seconds}."""
        self.spent.update(spent)  # Counter.update adds

    def elapsed(self, without=None):
        """Seconds so far, earlier starts included, except those of the activity `without`."""
        return self.spent.total() - self.spent[without] + time.monotonic() - self.last


# -----------------------------------------------------------------------------
# The log of a run, and wandb


def finite(fields):
    """The fields with None for floats that JSON does not have: nan and infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


class Log:
    """Writes records to log.jsonl, one line each; they go on to wandb. Without a folder: writes nothing."""

    def __init__(self, folder, console, wandb=False):
        self.console = console
        self.file = open(folder / "log.jsonl", "ab", buffering=0) if folder else None
        self.numbers = {"step": 0}  # the newest value of each number
        self.unwritten = b""  # records that could not be written yet because the disk is full
        self.upload = None
        if folder and wandb:
            try:
                self.upload = Upload(folder, self.file.tell(), console)
            except (OSError, RuntimeError) as error:  # RuntimeError: no more threads are allowed
                console.print("wandb", f"turned off after an error: {error}")

    def write(self, kind, **fields):
        """Append a record. If it cannot be written now, it is kept in memory and written with a later one."""
        fields = finite(fields)
        self.numbers |= fields
        if self.file:
            warn = not self.unwritten
            self.unwritten += json.dumps({"kind": kind, **fields}, default=str).encode() + b"\n"
            self.flush(warn)

    def flush(self, warn=False):
        """Write what has not been written yet."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except Exception as error:
            if warn:
                self.console.print("log", f"cannot be written now, training continues: {error}")

    def fail(self, reason):
        """Write the event that an exception, or a reason in words, has ended the run."""
        if isinstance(reason, BaseException):
            reason = f"{type(reason).__name__}: {reason}"
        self.write("event", step=self.numbers["step"], event="failed", reason=reason)

    def saves(self, outcomes, step, problem="failed, the next save tries again"):
        """Log finished saves, [(folder, error or None)], print errors -> the last one's error or None."""
        error = None
        for folder, error in outcomes:
            if error:
                self.write("event", step=step, event="save_failed", error=str(error))
                self.console.print("save", f"{problem}: {error}")
            else:  # logged with the step of the checkpoint: training has continued during the save
                self.write("event", step=int(folder.split("_")[1]), event="saved", folder=folder)
        return error

    def close(self):
        """Close the log, and wait for wandb; its summary is summary.json."""
        if self.file:
            self.flush()
            self.file.close()
            self.file = None
        if self.upload:
            self.upload.close()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
UPLOAD_SECONDS = 20.0  # longest wait for wandb at the end; also until a line says that it does not answer


class Upload:
    """
    Sends the records of log.jsonl to Weights & Biases, from byte `start` on. This is a process of its own,
    which reads that file: a service that fails, is slow or never answers takes no training time, and cannot
    keep the run from ending. What it prints is shown with the label wandb.
    """

    def __init__(self, folder, start, console):
        self.console, pipe = console, subprocess.PIPE
        command = [sys.executable, __file__, "--upload", folder.absolute(), str(start), str(UPLOAD_SECONDS)]
        options = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.STDOUT, "bufsize": 0}
        # in a session of its own it gets no Ctrl-C; a batch system signals all processes, so they are blocked
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGUSR1})
        try:
            self.process = subprocess.Popen(command, start_new_session=True, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.thread = threading.Thread(target=self.show, daemon=True)
        self.thread.start()

    def show(self):
        """Print the lines of the process, until it ends."""
        for line in self.process.stdout:
            self.console.print("wandb", line.decode(errors="replace").removeprefix("wandb: ").rstrip())

    def close(self):
        """Wait until everything is sent, for UPLOAD_SECONDS at most and only until a signal arrives."""
        arrived, old = [], {}
        for number in STOP_SIGNALS:
            if callable(signal.getsignal(number)):  # else it is ignored, or ends this process
                old[number] = signal.signal(number, lambda number, frame: arrived.append(number))
        with contextlib.suppress(OSError):  # the process may have ended
            self.process.stdin.write(b"finished")
        self.process.stdin.close()
        end = time.monotonic() + UPLOAD_SECONDS + 5  # it ends by itself in time, but may be suspended
        with self.console.waiting("wandb", "sending the last records, Ctrl-C ends this"):
            while self.process.poll() is None and not arrived and time.monotonic() < end:
                time.sleep(0.05)
        if self.process.poll() is None:
            self.console.print("wandb", "ended before everything was sent")
            self.process.kill()  # the service that wandb has started ends when it notices this
            self.process.wait()
        self.thread.join(1.0)  # prints the last line
        for number, handler in old.items():
            signal.signal(number, handler)


def upload(folder, start, seconds):
    """
    The process of an Upload. It sends the rest when stdin is closed, which happens however the run ends, and
    ends after at most these seconds.
    """
    ended = []  # what was read from stdin, once it is closed
    run = None

    def say(text):
        with contextlib.suppress(OSError):  # the run may have been killed
            os.write(1, f"{text}\n".encode())

    def sync():
        """The command that sends a run from the folder in which wandb keeps it."""
        return f"wandb sync {quoted(getattr(run.settings, 'sync_dir', folder / 'wandb'))}"

    def wait_for_end():
        ended.append(os.read(0, 100))
        time.sleep(seconds)
        say(f"not everything was sent within {seconds:.0f} s{f'; to send the rest: {sync()}' if run else ''}")
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
    late = "no answer yet; the run goes on, and all records are sent once it answers"
    late = threading.Timer(seconds, say, [late])
    late.daemon = True
    try:
        late.start()
        import wandb

        id_file = folder / "wandb.id"  # random, because runs on two machines can have the same name
        if not id_file.exists():
            id_file.write_text(os.urandom(6).hex())
        settings = wandb.Settings(silent=True, console="off", init_timeout=1e6)
        if hasattr(settings, "x_stats_pid"):  # the process whose memory it shows
            settings.x_stats_pid = os.getppid()
        config = json.loads((folder / "config.json").read_text())
        options = {"name": folder.name, "id": id_file.read_text(), "resume": "allow", "dir": folder}
        run = wandb.init(project="onedial", config=config, settings=settings, **options)
        late.cancel()
        say(f"offline; to send it: {sync()}" if run.offline else run.url or "disabled")
        for axis in ("step", "total_training_time", "total_training_flops"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        with open(folder / "log.jsonl", "rb") as log:
            log.seek(start)
            line, is_last = b"", False
            while not is_last:
                is_last = bool(ended)
                while (line := line + log.readline()).endswith(b"\n"):
                    record, line = json.loads(line), b""
                    if record.pop("kind") != "event":
                        run.log({name: value for name, value in record.items() if value is not None})
                time.sleep(0.2)
        finished = ended[0] != b""  # else the run was killed
        if finished and (folder / "summary.json").exists():
            run.summary.update(json.loads((folder / "summary.json").read_text()))
        run.finish(exit_code=0 if finished else 1)
        os._exit(0)  # everything is sent, but wandb would wait for its service
    except Exception as error:
        say(f"turned off after an error: {type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(1)


def read_log(folder):
    """The records of a run's log.jsonl, in order, without a last line that a crash has cut off."""
    path, records = Path(folder) / "log.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and {"kind", "step"} <= record.keys()]


def cut_log(folder, step):
    """
    Remove the records after `step`, so that no step is logged twice after a resume -> {number: its newest
    value} of the others.
    """
    records = [record for record in read_log(folder) if record["step"] <= step]
    replace(Path(folder) / "log.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return {name: value for record in records for name, value in record.items()}


def replace(path, text):
    """Write a file atomically: a reader sees the old text or the new text -> its path."""
    temporary = path.with_name(f"{path.stem}-{os.getpid()}.tmp")  # a run and report.py may both write
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            try:
                os.fsync(file.fileno())  # else a power failure can leave an empty file under the final name
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise  # with those four the file system says that it cannot sync
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# -----------------------------------------------------------------------------
# The console


SIMILAR = str.maketrans({"×": "x", "·": "-", "–": "-", "…": "...", "²": "2", "█": "#"})
# all control characters but tab and newline; those that change the direction of text; line separators
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def escaped(text):
    """Text of a corpus or a model for people: a control character is shown, as \\x1b, and not executed."""
    text = text.replace("\r\n", "\n")  # a line end
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def similar(error):
    """Codec error handler: replace what an encoding does not have with a similar character, or its number."""
    missing = error.object[error.start : error.end].translate(SIMILAR)
    return missing.encode("ascii", "backslashreplace").decode(), error.end


def open_console():
    """Let stdout and stderr accept any text, even if their encoding is ASCII or they are closed."""
    codecs.register_error("similar", similar)
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:  # else a file opened later could become stdout
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="similar"))
        elif hasattr(stream, "reconfigure"):  # a notebook's stream does not have it
            stream.reconfigure(errors="similar")


def is_lively():
    """Whether stdout is a terminal that can rewrite rows, and may: NO_COLOR asks for plain text."""
    with contextlib.suppress(Exception):  # stdout may be closed
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return False


class Console:
    """
    Prints everything that a run prints. On a terminal the last row is live: it shows the newest step, or how
    long a slow task has been running, and is rewritten below the lines that stay. Elsewhere (a file, a pipe)
    there are only lines. Printing never stops a run: if stdout fails, it is replaced by /dev/null.
    """

    def __init__(self, rank=0):
        self.rank = rank
        self.val_bpb = math.nan  # of the newest evaluation, shown with each step
        self.newest = None  # (record, total_steps, mfu_source, seconds_left) of a step not printed yet
        self.task = None  # the function that describes a slow task, while waiting() runs
        self.row = ""  # the live row, as it is on the screen
        self.step_lines, self.last_time = 0, -math.inf  # number of step lines printed, time of the last one
        self.lock = threading.RLock()  # waiting() writes from a thread

    def write(self, line=None, bold=False):
        """Print a line above the live row and redraw that row. Text of a model must not move the cursor."""
        with self.lock:
            try:
                columns, output = shutil.get_terminal_size().columns, ""
                if self.row:  # a narrowed terminal has wrapped it. \033[J would fill tmux's history
                    output = "\r\033[K" + "\033[A\033[K" * ((len(self.row) - 1) // columns)
                if line is not None:
                    line = escaped(line)
                    output += f"\033[1m{line}\033[0m\n" if bold and is_lively() else f"{line}\n"
                self.row = self.live_row(columns) if is_lively() else ""
                print(output + self.row, end="", flush=True)
            except Exception:
                sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")

    def live_row(self, columns):
        task, newest = self.task, self.newest  # the main thread may reset them meanwhile
        if task:
            return task()[: columns - 1]
        if newest:
            record, total_steps, _, seconds_left = newest
            return bar_line(record, total_steps, seconds_left, self.val_bpb, columns)
        return ""

    def show(self, text, bold=False):
        """Print text as it is, on rank 0 only."""
        if self.rank == 0:
            self.write(text, bold)

    def print0(self, label, text):
        """print() on rank 0 only."""
        if self.rank == 0:
            self.print(label, text)

    def print(self, label, text):
        """Print "label    text" on any rank, wrapped to the width of the console. Paths are not broken."""
        self.write(wrap(f"{label:<8} {text}", break_long_words=False))

    def step(self, record, total_steps, mfu_source, seconds_left):
        """Show a step record: in the live row, or as a line: the first ten, then one in about ten seconds."""
        if self.rank > 0:
            return
        self.newest = (record, total_steps, mfu_source, seconds_left)
        if is_lively():
            self.write()
        elif self.step_lines < 10 or time.monotonic() - self.last_time >= 10:
            self.step_lines, self.last_time = self.step_lines + 1, time.monotonic()
            self.end_live()

    def end_live(self):
        """Remove the live row, and print the line of the newest step if it has not been printed."""
        newest, self.newest = self.newest, None
        if newest:
            self.write(step_line(*newest, self.val_bpb))

    def val(self, record):
        """Print a val record, on a terminal in bold."""
        self.val_bpb = record["val_bpb"]
        self.show(val_line(record), bold=True)

    def samples(self, samples):
        """Print [[prompt, continuation, ...], ...], indented."""
        for prompt, text, *_ in samples:
            self.show(wrap(f"sample   {prompt!r} ->"))
            for line in escaped(text).splitlines():
                self.show(wrap(" " * 9 + line))

    def attempt(self, what, action, *arguments):
        """action(*arguments) -> its result. An error is printed, and the result is None."""
        try:
            return action(*arguments)
        except Exception as error:
            self.print("error:", f"{what} failed: {type(error).__name__}: {error}")
            return None

    @contextlib.contextmanager
    def waiting(self, label, text):
        """Show the seconds of a with block: in the live row, or as a line after 5 s and every 10 s."""
        if self.rank > 0:
            yield
            return
        start, done = time.monotonic(), threading.Event()

        def repeat():
            pauses = itertools.chain([5], itertools.repeat(10))
            while not done.wait(1 if is_lively() else next(pauses)):
                self.write(None if is_lively() else self.task())

        self.task = lambda: f"{label:<8} {text}: {duration(time.monotonic() - start)}"
        thread = threading.Thread(target=repeat, daemon=True)
        with contextlib.suppress(RuntimeError):  # at the limit of processes nothing is shown
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident:  # it was started
                thread.join()
            self.task = None
            self.write()


def wrap(line, **options):
    """Break a line into rows of at most 120 columns, fewer on a narrower terminal."""
    columns = max(40, min(120, shutil.get_terminal_size().columns)) if is_lively() else 120
    line = escaped(line)  # here, because textwrap turns some control characters into spaces
    return textwrap.fill(line, columns, subsequent_indent=" " * 9, break_on_hyphens=False, **options)


def short(number, gap=""):
    """1234567 -> '1.23M': three digits and a letter, with `gap` between them."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or letter == "P":
            return f"{number:.3g}{gap}{letter}"
        number /= 1000


def plural(number, noun):
    """1, "step" -> '1 step'; 2840.0, "step" -> '2,840 steps'."""
    return f"{number:,.10g} {noun}{'' if number == 1 else 's'}"


def duration(seconds):
    """90 -> '1m30s'; hours without seconds."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def step_line(record, total_steps, mfu_source, seconds_left, val_bpb):
    """A step record as a line of at most 120 columns. total_steps: None if unknown."""
    step, loss = record["step"], record["train_loss_ema"]
    steps = f"{step}/{total_steps}".rjust(2 * len(str(total_steps)) + 1) if total_steps else f"{step:6,}"
    loss = f"{loss:6.4f}" if loss < 10 else f"{loss:6.3f}"
    mfu = f"{record['mfu']:3.0%} of measured" if mfu_source == "measured" else f"{record['mfu']:5.1%}"
    return (
        f"step {steps} {record['progress']:6.1%}  loss {loss}  val {val_bpb:.4f}  lrm {record['lrm']:.2f}  "
        f"{short(record['tok_per_sec']):>5} tok/s  mfu {mfu}  data {record['data_wait']:3.0%}  "
        f"eta {duration(seconds_left)}"
    )[:120]


def bar_line(record, total_steps, seconds_left, val_bpb, columns):
    """A step record as a row for a terminal of this width, with a bar of up to 30 columns."""
    speed, eta = short(record["tok_per_sec"]), duration(seconds_left)
    facts = [f"{record['progress']:6.1%}", f"loss {record['train_loss_ema']:.4f}", f"val {val_bpb:.4f}"]
    facts += [f"{speed} tok/s", f"mfu {record['mfu']:.0%}", f"eta {eta}"]
    if columns >= 110:
        facts.insert(1, f"step {record['step']:,}" + (f" of {total_steps:,}" if total_steps else ""))
    free = columns - len("  ".join(facts)) - 3  # without the last column: a full row would wrap
    width = max(0, min(30, free))
    done = round(width * record["progress"])
    return f"{'█' * done}{'·' * (width - done)}  {'  '.join(facts)}".strip()[: columns - 1]


def val_line(record):
    """A val record as a line."""
    line = f"val      {record['val_bpb']:.4f} bits per byte at step {record['step']:,}, "
    return line + f"the lowest so far is {record['min_val_bpb']:.4f}"


def horizon_line(minutes, steps, tokens, flops, seconds, ends_early):
    """The first line of the plan, for a run by the clock or (minutes None) by steps."""
    line = f"1) horizon: {plural(minutes, 'minute')}, about " if minutes else "1) horizon: "
    line += f"{plural(steps, 'step')}, {short(tokens)} tokens, {flops:.2g} FLOPs"
    if ends_early:
        return f"{line}; ends early, so that it does not memorize a small text"
    return line if minutes else f"{line}, about {duration(seconds)}"


def parameter_counts(num_params):
    """{role: count} -> '393k matrix, 524k head, 1.05M embedding parameters'"""
    embeddings = num_params["embedding"] + num_params["value_embedding"]
    matrix, head, embeddings = map(short, (num_params["matrix"], num_params["head"], embeddings))
    return f"{matrix} matrix, {head} head, {embeddings} embedding parameters"


def quoted(value):
    """
    A value as a word of a shell command. Bytes that are not UTF-8 (a file name can contain any) and control
    characters are written as $'\\366', which can be copied from a terminal, unlike themselves.
    """
    text = str(value)
    if text.isprintable():
        return shlex.quote(text)

    def octal(char):
        return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))

    return "$'" + "".join(c if c.isprintable() and c not in "'\\" else octal(c) for c in text) + "'"


def command_line(start, settings):
    """A shell command: `start`, then a flag for each setting that is not None."""
    words = [start]
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            is_like_a_flag = isinstance(value, str) and value.startswith("-")
            words.append(f"--{name}{'=' if is_like_a_flag else ' '}{quoted(value)}")
    return " ".join(words)


def summarize(numbers, config, progress, tok_per_sec, mfu_peak, wall_time, peak_memory, time, samples):
    """The content of summary.json: from a Log's numbers, from run_config(), and what is known at the end."""
    flops_per_sec, world_size = config["num_flops_per_token"] * tok_per_sec, config["world_size"]
    return {
        **{name: numbers.get(name) for name in ("val_bpb", "min_val_bpb", "train_loss_ema")},
        "steps": numbers["step"],
        "progress": progress,
        **{name: numbers.get(name) for name in ("tokens", "total_training_flops", "total_training_time")},
        "wall_time": wall_time,
        "tok_per_sec": tok_per_sec,
        "mfu": flops_per_sec / (mfu_peak * world_size),
        "mfu_peak": mfu_peak,
        "mfu_peak_source": config["mfu_peak_source"],
        "peak_memory": peak_memory,
        "num_params": sum(config["num_params"].values()),
        "num_flops_per_token": config["num_flops_per_token"],
        "depth": config["settings"]["depth"],
        "device": config["device"],
        "world_size": world_size,
        "skipped_steps": numbers.get("skipped_steps", 0),
        "time": time,
        "samples": samples,
    }


def finish(folder, summary, console):
    """Write summary.json, print its numbers, write report.md -> whether both were written. Never raises."""
    run = console.attempt("reading the log", Run, folder)
    summary["slow_share"] = run.numbers.get("slow_share") if run else None

    def write_summary():
        return replace(folder / "summary.json", json.dumps(finite(summary), indent=2, default=str))

    written = console.attempt("writing summary.json", write_summary)
    for sentence in (run and console.attempt("reading the log", val_bpb_rise, run)) or ():
        console.print("val", sentence)
    console.show("---")
    for name, value in summary.items():
        if not isinstance(value, (list, dict)):
            console.show(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    page = console.attempt("writing the report", write_report, folder, console)
    if page:
        console.show(f"report: {page}")
    return bool(written and page)


# -----------------------------------------------------------------------------
# What reports and comparisons show: a run, a group of runs that differ only in seed, their results and curves


# what config.json of an older version does not contain; a number that is None is shown as –
NO_CONFIG = {
    **dict.fromkeys(("settings", "given", "model", "num_params", "corpus", "versions"), {}),
    **dict.fromkeys(("num_flops_per_token", "num_flops_per_token_causal", "mfu_peak", "mfu_peak_source")),
    **{"device": "–", "device_type": None, "world_size": 1, "timed": False, "command": None},
}
NOT_COMPARED = ("run", "run_name", "out_dir", "resume")  # settings of older versions that belong to one call


class Run:
    """A run read from its folder: config, records, and the final or newest value of each number."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).resolve().name.replace("\n", "\\n")
        self.config = self.read_config()
        self.records = read_log(folder)
        self.steps = [record for record in self.records if record["kind"] == "step"]
        flops, causal = self.config["num_flops_per_token"], self.config["num_flops_per_token_causal"]
        self.numbers, event = {}, {}
        for record in self.records:
            if "total_training_flops" in record and flops:  # val records of older versions have no tokens
                record.setdefault("tokens", round(record["total_training_flops"] / flops))
            event = record if record["kind"] == "event" else event
            self.numbers |= record
        self.numbers["steps"] = max((record["step"] for record in self.records), default=0)
        with contextlib.suppress(OSError, ValueError):  # it may be missing or damaged
            summary = json.loads((self.folder / "summary.json").read_text())
            if summary.get("steps") == self.numbers["steps"]:  # else the run was resumed after it was written
                self.numbers |= summary
        speed, mfu = self.numbers.get("tok_per_sec"), self.numbers.get("mfu")
        if self.config["mfu_peak"]:  # a measured peak is measured again at the end of the run
            peak = self.config["mfu_peak"] / self.numbers.get("mfu_peak", self.config["mfu_peak"])
            for record in self.steps:
                record["mfu"] = record["mfu"] * peak if record.get("mfu") is not None else None
        self.numbers["flops_per_sec"] = flops * speed if flops and speed else None
        self.numbers["mfu_causal"] = mfu * causal / flops if mfu and flops and causal else None
        self.numbers["slow_share"] = slow_share(self.steps) if self.steps else None
        versions, given = self.config["versions"], self.config["given"]
        self.facts = {"device": self.config["device"], "processes": self.config["world_size"]}
        self.facts |= {"corpus": self.config["corpus"].get("fingerprint"), **versions}
        self.all_facts = self.config["settings"] | self.facts
        names = (*given, *versions.get("edited_settings", "").split())
        self.chosen = {n: self.config["settings"].get(n) for n in names if n not in NOT_COMPARED}
        ended = event.get("event") in ("finished", "interrupted", "failed")
        self.state = event["event"] if ended else "still running, or killed"
        self.reason = " ".join(str(event.get("reason", "")).split())  # why the run failed
        # equal if only the seed differs, or the path of the same text
        key = [self.state == "finished", {**self.chosen, **self.facts, "seed": None, "data": None}]
        self.group_key = json.dumps(key, sort_keys=True)

    def read_config(self):
        """config.json as a dict, with NO_CONFIG for what it does not contain. ValueError if it is damaged."""
        path = self.folder / "config.json"
        if not path.exists():
            raise ValueError(
                f"{self.folder} has no config.json.\nGive the folder of a run, such as out/NAME."
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return NO_CONFIG | {name: value for name, value in config.items() if value is not None}
        except (ValueError, AttributeError) as error:
            folder = self.folder.resolve()
            call = {"out_dir": folder.parent, "run_name": folder.name, "resume": True}
            command = command_line(f"python {quoted(Path(__file__).absolute().with_name('train.py'))}", call)
            what = f"{path} is damaged: {error}"
            raise ValueError(f"{what}.\nResuming the run writes it again: {command}") from None


def slow_share(steps):
    """Share of training time in log intervals whose steps took more than twice the median: interruptions."""
    steps = [record for record in steps if {"dt", "total_training_time"} <= record.keys()]
    seconds = np.diff([record["total_training_time"] for record in steps])
    timed = seconds > 0  # the first 10 steps of each start are not in total_training_time
    if not timed.any():
        return 0.0
    dt = np.array([record["dt"] for record in steps[1:]])
    return float(seconds[dt > 2 * np.median(dt[timed])].sum() / seconds.sum())


class Group:
    """Runs that differ only in seed: mean and standard deviation of each number."""

    def __init__(self, runs):
        self.runs, self.config, self.corpus = runs, runs[0].config, runs[0].facts["corpus"]
        common = os.path.commonprefix([run.name for run in runs]).rstrip("-_.")
        self.name = common if common and len(runs) > 1 else runs[0].name

    def values(self, name):
        """The runs' values of a number, without None."""
        return [run.numbers[name] for run in self.runs if run.numbers.get(name) is not None]

    def text(self, name, write):
        """A number as text: its value, or mean, standard deviation and count. write(value) -> text."""
        values = self.values(name)
        if len(values) < 2:
            return write(*values) if values else "–"
        return f"{write(statistics.mean(values))} ± {write(statistics.stdev(values))}, n = {len(values)}"

    def fact(self, name):
        """A setting or fact as text; all its values, if the runs have different ones."""
        return ", ".join(dict.fromkeys(str(run.all_facts.get(name, "–")) for run in self.runs))


def label_groups(groups):
    """Name groups of unnamed runs, whose names are dates, by what differs: 'depth=2 matrix_lr=0.01'."""
    chosen = dict.fromkeys(name for group in groups for name in group.runs[0].chosen if name != "seed")
    differing = [name for name in chosen if len({group.fact(name) for group in groups}) > 1]
    for group in groups:
        if all(re.fullmatch(r"\d{8}-\d{6}(-\d+)?", run.name) for run in group.runs):
            facts = [f"{name}={group.fact(name)}" for name in differing if group.fact(name) != "None"]
            group.name = " ".join(facts) or group.name
    if len({group.name for group in groups}) < len(groups):
        for group in groups:
            group.name = str(group.runs[0].folder)


def t_quantile(freedom):
    """Student's t for a two-sided interval of 95%: a table, then a series (Abramowitz, Stegun 26.7.5)."""
    if freedom <= 4:
        return (12.706, 4.303, 3.182, 2.776)[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2 + 2.556 / freedom**3 + 1.59 / freedom**4


def difference(base, values):
    """
    The relative difference between the means of `values` and of `base`, as text: '-3.2% ± 1.1%' with a 95%
    interval by Student's t with pooled variance, and 'noise' if it contains 0. Single values: no interval.
    """
    if not base or not values or not statistics.mean(base):
        return ""
    mean = statistics.mean(base)
    change, freedom = statistics.mean(values) / mean - 1, len(base) + len(values) - 2
    if not freedom:
        return f"{change:+.1%}"
    squares = sum((x - statistics.mean(group)) ** 2 for group in (base, values) for x in group)
    error = math.sqrt(squares / freedom * (1 / len(base) + 1 / len(values)))
    half = t_quantile(freedom) * error / abs(mean)
    return f"{change:+.1%} ± {half:.1%}{', noise' if half >= abs(change) else ''}"


def plain(text):
    """Text on one line of a markdown page, shown as it is: neither emphasis nor mathematics nor HTML."""
    text = escaped(str(text)).replace("\n", "\\n")
    return re.sub(r"([`*$<\[|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def table(header, rows):
    """A markdown table; cells are converted by str."""
    lines = [[plain(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# {name in summary.json: how it is written}
NUMBERS = {
    "val_bpb": "{:.4f}".format, "min_val_bpb": "{:.4f}".format, "train_loss_ema": "{:.4f}".format,
    "steps": "{:,.0f}".format, "tokens": short, "total_training_flops": "{:.3g}".format,
    "total_training_time": duration, "wall_time": duration, "tok_per_sec": short,
    "flops_per_sec": lambda flops: short(flops, " ") + "FLOP/s", "mfu": "{:.1%}".format,
    "mfu_causal": "{:.1%}".format, "peak_memory": lambda size: short(size, " ") + "B",
    "slow_share": "{:.1%}".format, "skipped_steps": "{:,.0f}".format,
}  # fmt: skip
OF_THE_TEXT = ("val_bpb", "min_val_bpb", "train_loss_ema")  # can be compared on the same text only
ABOUT_RESULTS = """\
Runs that differ only in seed form one column: mean ± standard deviation, n = number of runs. In brackets: the
difference from the mean of the first column, ± its 95% interval by Student's t. If the interval contains 0,
the difference is marked as noise."""
MEMORY = {"cuda": "CUDA allocator", "mps": "driver, at the end", "cpu": "resident set"}  # where it is read
ACTIVITIES = {"corpus": "preparation of the corpus", "trial": "benchmark and compilation"}


def results(groups):
    """A table of the final numbers of each group, with the differences from the first one."""
    first, *others = groups
    source, device_type = (first.config[name] for name in ("mfu_peak_source", "device_type"))
    device_type = device_type or first.config["settings"].get("device_type")  # as of older versions
    notes = {"mfu": f"mfu, of the {source} peak"} if source else {}
    if device_type in MEMORY:
        notes["peak_memory"] = f"peak_memory, {MEMORY[device_type]}"
    rows = []
    for name, write in NUMBERS.items():
        cells = [first.text(name, write)]
        for group in others:
            same = group.corpus == first.corpus or name not in OF_THE_TEXT
            change = difference(first.values(name), group.values(name)) if same else ""
            cells.append(group.text(name, write) + (f" ({change})" if change else ""))
        rows.append([notes.get(name, name), *cells])
    return table(["result", *(group.name for group in groups)], rows)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, one per group
LINES = {"train_loss": {"alpha": 0.3}, "val_bpb": {"marker": "o", "markersize": 3}}
LINES |= {"muon_momentum": {"linestyle": "--"}, "weight_decay": {"linestyle": ":"}}
PANELS = (  # title, x, the y values, options of the axes
    ("train loss in nats per token: per step (faint), average", "step", "train_loss train_loss_ema", {}),
    ("val_bpb over steps", "step", "val_bpb", {}),
    ("val_bpb over training FLOPs", "total_training_flops", "val_bpb", {"xscale": "log"}),
    ("val_bpb over seconds of training", "total_training_time", "val_bpb", {"xscale": "log"}),
    ("lrm ──, momentum – –, weight decay ···· over steps", "step", "lrm muon_momentum weight_decay", {}),
    ("gradient norm over steps", "step", "grad_norm", {"yscale": "log"}),
    ("tokens per second over steps", "step", "tok_per_sec", {"ylim": (0, None)}),
    ("MFU over steps", "step", "mfu", {"ylim": (0, None)}),
)


def mean_curve(runs, x, y, after):
    """-> (x, mean of y, its standard deviation), where all runs have data, `after` a step and x > 0."""
    logs = [[r for r in run.records if r.get(y) is not None and r["step"] > after] for run in runs]
    curves = [[(r[x], r[y]) for r in log if r.get(x, 0) > 0] for log in logs]
    curves = [np.array(points).T for points in curves if points]
    if not curves:
        return np.zeros((3, 0))
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    places = np.array([place for place in curves[0][0] if low <= place <= high])
    values = np.array([np.interp(places, xs, ys) for xs, ys in curves])
    return places, values.mean(axis=0), values.std(axis=0, ddof=len(curves) > 1)


def style_axes(axes, title):
    """Title and frame of a panel. A log axis may span less than a decade: it gets labels at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:.3g}")
            axis.set_minor_formatter(NullFormatter())


def draw(groups, path):
    """Draw PANELS: a colour per group; the mean of its runs, and a band of ± one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 13), layout="constrained")
    for axes, (title, x, names, options) in zip(figure.subplots(4, 2).flat, PANELS):
        for group, colour in zip(groups, itertools.cycle(COLOURS)):
            # without the first 3% of a loss, which are so high that the rest would look flat
            hidden = 0.03 if "val_bpb" in names or "train_loss" in names else 0.0
            for name in names.split():
                after = hidden * group.runs[0].numbers["steps"]
                xs, ys, spread = mean_curve(group.runs, x, name, after)
                axes.plot(xs, ys, color=colour, **LINES.get(name, {}))
                if len(group.runs) > 1 and len(xs):  # an empty band cannot have a logarithmic axis
                    axes.fill_between(xs, ys - spread, ys + spread, color=colour, alpha=0.2, linewidth=0)
        if names == "val_bpb" and x != "step" and len(groups) > 1:
            lowest = frontier([val_curve(group, x) for group in groups])
            axes.plot(*lowest, "k:", drawstyle="steps-post", label="lowest val_bpb at this cost")
            axes.legend(frameon=False)
        axes.set(**options)
        style_axes(axes, title)
    names = [drawable(group.name) for group in groups]
    columns = 3 if max(len(name) for name, _ in names) <= 40 else 1
    labels = ["-"] * len(groups)  # matplotlib may leave out a label that begins with "_"
    legend = figure.legend(axes.lines, labels, loc="outside upper left", ncols=columns, frameon=False)
    for text, (name, families) in zip(legend.get_texts(), names):
        text.set(text=name, parse_math=False, fontfamily=families)
    figure.savefig(path, dpi=110)


def drawable(name):
    """-> (a name as it is drawn, font families for it). Letters that no font has are escaped: \\u4e2d."""
    from matplotlib import font_manager, rcParams

    letters, families = set(map(ord, name)), rcParams["font.family"]
    default = font_manager.findfont(font_manager.FontProperties(family=families))
    missing = letters - font_manager.get_font(default).get_charmap().keys()
    if not missing:
        return name, families
    for font in font_manager.fontManager.ttflist:
        with contextlib.suppress(Exception):  # a font file may have been removed, or be of an unknown kind
            is_real = not font.name.startswith("Last Resort")  # that one has a box for every letter
            if is_real and missing <= font_manager.get_font(font.fname).get_charmap().keys():
                return name, [*families, font.name]
    return "".join(ascii(c)[1:-1] if ord(c) in missing else c for c in name), families


# -----------------------------------------------------------------------------
# Comparison at equal cost, and a scaling law. Curves are interpolated linearly in log(cost), log(val_bpb)

COSTS = {"steps": "step", "tokens": "tokens"}  # {column: key of the log}
COSTS |= {"FLOPs": "total_training_flops", "seconds": "total_training_time"}
ABOUT_COSTS = """\
The group with the lowest final val_bpb against each other group. First row: val_bpb of both at the largest
cost that both have reached. Other rows: the cost at which one group reaches the final val_bpb of the other,
as a fraction of the other's total cost."""


def val_curve(group, cost):
    """-> (costs, mean val_bpb at each), without the evaluation at cost 0."""
    return mean_curve(group.runs, cost, "val_bpb", 0)[:2]


def value_at(curve, cost):
    """val_bpb of a curve at a cost; nan before its first evaluation."""
    xs, ys = curve
    return math.exp(np.interp(math.log(cost), np.log(xs), np.log(ys), left=math.nan))


def cost_fraction(curve, other):
    """Cost at which a curve first reaches the other's final val_bpb / the other's total cost, as text."""
    (xs, ys), (other_xs, other_ys) = curve, other
    goal, reached = other_ys[-1], np.flatnonzero(ys <= other_ys[-1])
    if not len(reached):
        return "never"
    two = slice(max(0, reached[0] - 1), reached[0] + 1)  # the points before and after; maybe only the latter
    cost = math.exp(np.interp(-math.log(goal), -np.log(ys[two]), np.log(xs[two])))
    return f"{cost / other_xs[-1]:.2f}"


def frontier(curves):
    """-> (costs, the lowest val_bpb that any curve has reached at that cost or less)"""
    costs, values = np.hstack(curves)
    order = np.argsort(costs)
    return costs[order], np.minimum.accumulate(values[order])


def equal_costs(groups):
    """The table that ABOUT_COSTS describes; "" if fewer than two groups have been evaluated."""
    curves = {group.name: [val_curve(group, cost) for cost in COSTS.values()] for group in groups}
    curves = {name: found for name, found in curves.items() if all(len(xs) for xs, _ in found)}
    final = {name: found[0][1][-1] for name, found in curves.items()}  # val_bpb
    best, rows = min(final, key=final.get, default=None), []
    for name in final:
        if name == best:
            continue
        columns = []
        for one, other in zip(curves[best], curves[name]):
            both = min(one[0][-1], other[0][-1])
            first, second = value_at(one, both), value_at(other, both)
            values = f"{first:.4f}, {second:.4f} ({second / first - 1:+.1%})"
            values = "not evaluated" if math.isnan(first + second) else values  # one starts at a higher cost
            columns.append([values, cost_fraction(other, one), cost_fraction(one, other)])
        titles = [f"val_bpb of {best}, {name}", f"cost of {name} to reach {best}'s {final[best]:.4f}"]
        titles.append(f"cost of {best} to reach {name}'s {final[name]:.4f}")
        rows += zip(titles, *columns)
    return table(["at equal cost", *COSTS], rows) if rows else ""


class PowerLaw(NamedTuple):
    """loss = E + a · (flops / middle)^-b, where E is the irreducible loss."""

    E: float
    a: float
    b: float
    middle: float  # geometric mean of the measured FLOPs

    def __call__(self, flops):
        return self.E + self.a * (flops / self.middle) ** -self.b


def power_law(flops, losses, irreducible):
    """Fit a PowerLaw by least squares of log(loss) (arXiv 2001.08361), with or without E (2203.15556)."""
    middle = math.exp(np.log(flops).mean())
    x = np.log(np.asarray(flops) / middle)
    E = min(losses) * (np.linspace(0, 1, 4000, endpoint=False) if irreducible else np.zeros(1))  # candidates
    y = np.log(np.asarray(losses) - E[:, None])  # (candidates, sizes)
    b = -(y @ x) / (x @ x)
    log_a = y.mean(axis=1)
    fitted = E[:, None] + np.exp(log_a[:, None] - b[:, None] * x)
    best = np.argmin(np.square(np.log(fitted) - np.log(losses)).sum(axis=1))
    return PowerLaw(E[best], math.exp(log_a[best]), b[best], middle)


def scaling_law(groups, path):
    """Markdown of a power law and its picture; [] unless three or more sizes differ by 2x in FLOPs."""
    groups = [group for group in groups if group.runs[0].state == "finished" and group.values("val_bpb")]
    sizes = {tuple(group.config["model"].values()) for group in groups}
    if len(sizes) < 3 or len(sizes) < len(groups):
        return []
    flops = [statistics.mean(group.values("total_training_flops")) for group in groups]
    losses = [statistics.mean(group.values("val_bpb")) for group in groups]
    if max(flops) < 2 * min(flops):
        return []
    irreducible, beyond = len(groups) >= 5, 10 * max(flops)
    law = power_law(flops, losses, irreducible)
    text = f"val_bpb = {law.E:.4f} + " if irreducible else "val_bpb = "
    text += f"{law.a:.4f} · (FLOPs / {law.middle:.3g})^-{law.b:.4f}"
    text += "" if irreducible else ". Fewer than five sizes: fitted without an irreducible loss"
    forecast = f"{law(beyond):.4f}"
    if all(len(group.values("val_bpb")) > 1 for group in groups):
        random, laws = np.random.RandomState(0), []
        for _ in range(1000):
            drawn = [random.choice(group.values("val_bpb"), len(group.runs)).mean() for group in groups]
            laws.append(power_law(flops, drawn, irreducible))
        low, high = np.quantile([one.b for one in laws], [0.025, 0.975])
        text += f". Exponent {low:.4f} to {high:.4f} by bootstrap over seeds, 95%"
        low, high = np.quantile([one(beyond) for one in laws], [0.025, 0.975])
        forecast += f", {low:.4f} to {high:.4f}"
    rows = []
    for group, x, y in sorted(zip(groups, flops, losses), key=lambda row: row[1]):
        rows.append([group.name, f"{x:.3g}", f"{y:.4f}", f"{law(x):.4f}", f"{y / law(x) - 1:+.2%}"])
    rows.append(["forecast for 10 times the FLOPs", f"{beyond:.3g}", "", forecast, ""])
    parts = [f"{text}.", table(["group", "FLOPs", "val_bpb", "fitted", "residual"], rows)]
    with contextlib.suppress(Exception):  # matplotlib is an extra, and may not work
        draw_law(flops, losses, law, path)
        parts.append(f"![scaling law]({path.name})")
    return parts


def draw_law(flops, losses, law, path):
    """Draw each size as a point, the law as a line, and as a dashed line for ten times the FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    known, beyond = np.geomspace(min(flops), max(flops)), np.geomspace(max(flops), 10 * max(flops))
    axes.plot(known, law(known), color=COLOURS[0])
    axes.plot(beyond, law(beyond), "--", color=COLOURS[0])
    axes.plot(flops, losses, "o", color=COLOURS[1])
    axes.set(xscale="log")
    style_axes(axes, "val_bpb over training FLOPs: fitted (line), forecast (dashed)")
    figure.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# The pages: report.md of a run, compare.md of several runs


def sparkline(values):
    """'first ▇▅▃▂▁ last' with at most 60 bars; None values are left out."""
    values = [value for value in values if value is not None] or [0.0]
    low, high, count = min(values), max(values), min(60, len(values))
    chosen = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    bars = ("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low or 1))] for v in chosen)
    return f"{values[0]:<9.4g} {''.join(bars)} {values[-1]:.4g}"


def curves(groups, folder, console):
    """Draw curves.png -> the markdown that shows it. Without matplotlib, the curves as text."""
    try:
        draw(groups, folder / "curves.png")
        return "![curves](curves.png)"
    except Exception as error:
        if not isinstance(error, ImportError):  # matplotlib is an extra
            console.print("report", f"curves.png cannot be drawn: {type(error).__name__}: {error}")
        lines = []
        for name in ("val_bpb", "train_loss_ema", "lrm", "tok_per_sec", "grad_norm"):
            for run in itertools.chain.from_iterable(group.runs for group in groups):
                values = [record[name] for record in run.records if name in record]
                lines.append(f"    {name:<15} {sparkline(values)}  {run.name}")
        return "\n".join(lines)


def time_table(run):
    """The wall time per activity. The time that training waited for data is a row of its own."""
    starts = [0, *(r["step"] for r in run.steps)]
    intervals = [r.get("dt", 0.0) * (r["step"] - start) for r, start in zip(run.steps, starts)]  # seconds
    waiting = sum(interval * r.get("data_wait", 0.0) for interval, r in zip(intervals, run.steps))
    laps = {**run.numbers.get("time", {"training": sum(intervals)}), "waiting for data": waiting}
    laps["training"] -= waiting
    total = sum(laps.values())
    share = lambda t: f"{t / total:.1%}" if total else "–"  # noqa: E731
    rows = [[ACTIVITIES.get(name, name), f"{t:.1f}", share(t)] for name, t in laps.items()]
    return table(["activity", "seconds", "share"], [*rows, ["total", f"{total:.1f}", ""]])


def val_bpb_rise(run):
    """[a sentence] if the final val_bpb is more than half a percent above the lowest one, else []."""
    vals = [r for r in run.records if r["kind"] == "val" and r.get("val_bpb") is not None]
    lowest = min(vals, key=lambda r: r["val_bpb"], default=None)
    if not lowest or vals[-1]["val_bpb"] <= 1.005 * lowest["val_bpb"]:
        return []
    epoch = next((r.get("epoch", 0.0) for r in run.steps if r["step"] >= lowest["step"]), 0.0)
    line = f"val_bpb was lowest at step {lowest['step']:,}, after {epoch:.1f} epochs: {lowest['val_bpb']:.4f}"
    return [f"{line}. It has risen to {vals[-1]['val_bpb']:.4f} since."]


def side_by_side(texts, width=56):
    """{title: text} as an indented block of columns, each `width` characters wide."""
    columns = []
    for title, text in texts.items():
        rows = (textwrap.wrap(line, width) or [""] for line in escaped(text).splitlines())
        columns.append([title, "", *itertools.chain.from_iterable(rows)])
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(("    " + "  ".join(f"{cell:<{width}}" for cell in row)).rstrip() for row in rows)


def how_to_reproduce(run):
    """The shell commands that repeat a run, and how exact the repetition is."""
    commit, _, dirty = (run.config["versions"].get("git_commit") or "").partition("-")
    note = "  # and apply the changes that were not committed" if dirty else ""
    commands = [f"    git checkout {commit}{note}"] if commit else []
    notes = ["The same machine and versions give the same run; on a CPU it is the same bit for bit."]
    if run.config["timed"]:
        steps = plural(run.numbers["steps"], "step")
        notes = [f"This run was limited by time. It made {steps}; on another day it may make more or fewer."]
        notes[0] += " A run can be reproduced exactly with --num-iterations instead of --minutes."
    planned = {r["step"]: r["planned_iterations"] for r in run.records if "planned_iterations" in r}
    changes = [next(same) for _, same in itertools.groupby(planned.items(), key=lambda item: item[1])]
    if len(changes) > 1:
        horizons = ", ".join(f"at step {step:,} for {plural(steps, 'step')}" for step, steps in changes)
        notes.append(f"This is the command of the last start. The run was planned {horizons}. To reproduce ")
        notes[-1] += "it, start with the first horizon, stop at the step of the next one, --resume with that."
    if not commit:
        notes.append("The commit of its code is not known.")
    if run.config["command"]:
        commands.append(f"    {run.config['command']}")
    else:
        notes.insert(0, "The version that made this run did not save its command: see its settings above.")
    return "\n\n".join(["\n".join(commands)] * bool(commands) + notes)


def write_report(folder, console):
    """Write report.md from log.jsonl, config.json and, if it exists, summary.json -> its path."""
    run = Run(folder)
    config, numbers, params = run.config, run.numbers, run.config["num_params"]
    counts = {**params, "all parameters": sum(params.values()) if params else None}
    counts["FLOPs per token, PaLM convention"] = config["num_flops_per_token"]
    counts["FLOPs per token, exact causal"] = config["num_flops_per_token_causal"]
    counts = [[name, "–" if count is None else f"{count:,.0f}"] for name, count in counts.items()]
    state = f"{run.state}: {plural(numbers['steps'], 'step')}"
    if "progress" in numbers or not run.steps:  # older versions did not log it
        state += f", {numbers.get('progress', 0):.1%} of the run"
    parts = [f"# {plain(run.name)}", state]
    parts += [f"Reason: {plain(run.reason)}"] if run.reason else []
    parts += val_bpb_rise(run)
    alone = [Group([run])]
    if run.steps:
        parts += [results(alone), curves(alone, run.folder, console)]
    else:
        parts += ["The log has no step yet."]
    parts += ["## Settings that were given or edited"]
    parts += [table(["setting", "value"], run.chosen.items()) if run.chosen else "None: all have defaults."]
    parts += ["## Hardware and versions", table(["what", "value"], run.facts.items())]
    parts += ["## Time", time_table(run)] if run.steps else []
    parts += ["## Parameters and FLOPs", table(["what", "count"], counts)]
    for prompt, text, *real in numbers.get("samples", []):
        texts = {"Model:": text} | ({"Original text:": real[0]} if real else {})
        parts += [f"## Sample from {plain(repr(prompt))}", side_by_side(texts)]
    parts += ["## How to reproduce this run", how_to_reproduce(run)]
    return replace(run.folder / "report.md", escaped("\n\n".join(parts) + "\n"))


def compare(folders, console):
    """Write compare.md and its pictures into a folder beside the first run -> the path of compare.md."""
    runs, by_key = [Run(folder) for folder in folders], {}
    for run in runs:
        by_key.setdefault(run.group_key, []).append(run)
    groups = [Group(same) for same in by_key.values()]
    name = "compare-" + "-".join(group.name for group in groups)
    if len(os.fsencode(name)) > 120:  # a file name can have 255 bytes
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
        name = os.fsencode(name)[:110].decode(errors="ignore") + "-" + digest
    target = runs[0].folder.parent / name
    target.mkdir(exist_ok=True)
    label_groups(groups)
    names = [group.name for group in groups]
    keys = dict.fromkeys(key for run in runs for key in run.all_facts if key not in NOT_COMPARED)
    rows = [[key, *(group.fact(key) for group in groups)] for key in keys]
    differing = [row for row in rows if any(cell != row[1] for cell in row[1:])]
    parts = ["# " + plain(", ".join(names)), ABOUT_RESULTS, results(groups), curves(groups, target, console)]
    texts = {
        run.facts["corpus"]: run.config["corpus"].get("name", "–") for run in runs
    }  # {fingerprint: name}
    if len(texts) > 1:
        texts = ", ".join(f"{name} ({fingerprint})" for fingerprint, name in texts.items())
        warning = "The fingerprints of the texts differ, so val_bpb and losses cannot be compared"
        parts.insert(1, f"{warning}: {plain(texts)}.")
    else:
        equal, law = equal_costs(groups), scaling_law(groups, target / "scaling.png")
        parts += ["## At equal cost", ABOUT_COSTS, equal] if equal else []
        parts += ["## Scaling law", *law] if law else []
    parts += ["## Settings that differ", table(["setting", *names], differing)]
    return replace(target / "compare.md", escaped("\n\n".join(parts) + "\n"))


def list_runs(folder, console):
    """The runs in a folder as a table of plain text, newest first."""

    def row(path):
        run, changed = Run(path), max(file.stat().st_mtime for file in path.glob("*.json*"))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
        val = f"{run.numbers['val_bpb']:.4f}" if run.numbers.get("val_bpb") else ""
        depth = str(run.config["settings"].get("depth", "–"))
        return [when, run.name, depth, f"{run.numbers['steps']:,}", val, run.state]

    paths = [path for path in Path(folder).iterdir() if (path / "config.json").exists()]
    rows = filter(None, [console.attempt(f"reading {path}", row, path) for path in paths])
    rows = [["last change", "run", "depth", "steps", "val_bpb", "state"], *sorted(rows, reverse=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def report_on(folders, console):
    """-> the list of the runs in a folder, or the path of a run's report or of several runs' comparison."""
    if len(folders) == 1 and list(Path(folders[0]).glob("*/config.json")):
        return list_runs(folders[0], console)
    runs = [folder for folder in folders if (Path(folder) / "config.json").exists()]
    for folder in sorted({*folders} - {*runs}) if runs else ():
        if not (Path(folder) / "compare.md").exists():
            console.print("skipped", f"{folder}, which is not a run")
    return compare(runs, console) if len(runs) > 1 else write_report((runs or folders)[0], console)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--upload"]:  # see Upload
            sys.exit(upload(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__.strip())
            sys.exit()
        if len(sys.argv) < 2:
            raise ValueError("no run was given.\nUsage: python report.py out/RUN [out/RUN ...]")
        open_console()
        console = Console()
        console.show(str(report_on(sys.argv[1:], console)))
    except (OSError, ValueError) as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr)
        sys.exit(2)
