"""
Honest numbers: measure them without disturbing the run, write them down, show them.

log.jsonl, config.json and summary.json are the record; the console line, report.md and wandb only show it.

    python report.py out           # its runs at a glance, newest first
    python report.py out/a         # out/a/report.md anew, also of a run still going or cut off
    python report.py out/a out/b   # out/compare-a-b/compare.md; runs that differ only in seed are one group
"""

import codecs
import contextlib
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
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# Measuring


def versions():
    """Versions of Python, packages, system and code, the git commit, and which settings were edited since."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {name: importlib.metadata.version(name) for name in ("numpy", "tiktoken", "rustbpe")}
    found |= {"system": platform.platform(), "git_commit": None, "edited_settings": ""}
    code = "".join(file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))
    code = re.sub(r"^\w+: .+ = .+", "", code, flags=re.MULTILINE)  # settings are compared by themselves
    found["code"] = hashlib.sha256(code.encode()).hexdigest()[:12]  # two edits of one commit are told apart

    def git(arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments.split()]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError):  # there may be no git
        found["git_commit"] = git("describe --always --abbrev=40 --dirty --exclude *") or None
        changes = git("diff --no-color -U0 HEAD -- train.py")
        found["edited_settings"] = " ".join(re.findall(r"^\+(\w+): .+ = ", changes, re.MULTILINE))
    return found


def update_ema(smooth, loss, beta):
    """One step of an exponential moving average that starts at 0: beta · smooth + (1 - beta) · loss."""
    return beta * smooth + (1 - beta) * loss


def debias(smooth, beta, count):
    """The average of `count` losses without its start at 0 (arXiv 1412.6980, section 3); nan for none."""
    return smooth / (1 - beta**count) if count else math.nan


def bits_per_byte(model, batches, device):
    """
    `model` (tokens, targets -> sum of nats, 0-D tensor) over this rank's (tokens, targets, bytes) batches:
    nats of all ranks / (ln 2 · bytes of all ranks), added in float64 on the host after one synchronization.
    """
    losses, count = [], 0
    for tokens, targets, length in batches:
        losses.append(model(tokens, targets).detach())
        count += length
    totals = [math.fsum(torch.stack(losses).tolist()) if losses else 0.0, float(count)]
    if dist.is_available() and dist.is_initialized():
        both = torch.tensor(totals, dtype=torch.float64, device=device)
        dist.all_reduce(both)
        totals = both.tolist()
    return totals[0] / (math.log(2) * totals[1])


class Clock:
    """
    Seconds by what they were spent on: `lap(name)` books the time since the last lap under that name. start
    is a time.monotonic(), which no correction of the system's clock moves.
    """

    def __init__(self, start):
        self.last, self.spent = start, Counter()

    def lap(self, name):
        now = time.monotonic()
        self.spent[name] += now - self.last
        self.last = now

    def add(self, spent):
        """Book what earlier starts have spent, {name: seconds}."""
        self.spent.update(spent)  # a Counter's adds

    def elapsed(self, without=None):
        """Seconds so far, those of earlier starts included, those booked under the name `without` not."""
        return self.spent.total() - self.spent[without] + time.monotonic() - self.last


# -----------------------------------------------------------------------------
# The log of a run, and wandb


def plain(fields):
    """The fields as JSON can hold them: a float that is not finite becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


class Log:
    """log.jsonl, one flushed line per record, and wandb if asked for; silent without a folder."""

    def __init__(self, folder, wandb=False, config=None):
        self.file = open(folder / "log.jsonl", "ab", buffering=0) if folder else None
        self.waiting = b""  # what a full disk has not taken yet
        self.wandb = None
        if folder and wandb:
            self.tell_wandb(self.start_wandb, folder, config)

    def start_wandb(self, folder, config):
        import wandb

        identity = folder / "wandb.id"  # not the name: two machines may both have a run of that name
        if not identity.exists():
            identity.write_text(os.urandom(6).hex())
        options = {"name": folder.name, "id": identity.read_text(), "resume": "allow", "dir": folder}
        terminal = sys.stdin
        with open(os.devnull) as sys.stdin:  # without a login it would ask for one, and wait for ever
            try:
                self.wandb = wandb.init(project="onedial", config=config, **options)
            finally:
                sys.stdin = terminal
        for axis in ("step", "total_training_time", "total_training_flops"):
            self.wandb.define_metric(axis)
        self.wandb.define_metric("*", step_metric="step")

    def tell_wandb(self, action, *arguments):
        """A logging service must never stop a run: at its first error it is left alone."""
        try:
            action(*arguments)
        except Exception as error:
            tell("wandb", f"is off: {type(error).__name__}: {error}")
            self.wandb = None

    def write(self, kind, **fields):
        """Append a record; what cannot be written now, whatever the reason, is kept for the next time."""
        fields = plain(fields)
        if self.file:
            told_before = bool(self.waiting)
            self.waiting += json.dumps({"kind": kind, **fields}, default=str).encode() + b"\n"
            self.write_waiting(told_before)
        if self.wandb and kind != "event":
            self.tell_wandb(self.wandb.log, {k: v for k, v in fields.items() if v is not None})

    def saves(self, outcomes, step, trouble="failed, the next one tries again"):
        """Log and tell how saves have ended, [(folder, error or None)] -> the error of the last one."""
        error = None
        for folder, error in outcomes:
            if error:
                self.write("event", step=step, event="save_failed", error=str(error))
                tell("save", f"{trouble}: {error}")
            else:  # under its own step: the loop has gone on meanwhile
                self.write("event", step=int(folder.split("_")[1]), event="saved", folder=folder)
        return error

    def write_waiting(self, told_before=True):
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except Exception as error:
            if not told_before:
                tell("log", f"kept until it can be written, training goes on: {error}")

    def close(self, summary=None):
        if self.file:
            self.write_waiting()
            self.file.close()
        if self.wandb:
            self.tell_wandb(self.wandb.summary.update, summary or {})
        if self.wandb:
            self.tell_wandb(self.wandb.finish)


def read_log(folder):
    """The records of a run's log.jsonl, in order; a line that a crash cut short is left out."""
    path, records = Path(folder) / "log.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def cut_log(folder, step):
    """Drop the records after `step`, so that no step stands twice once a run goes on from there."""
    lines = [json.dumps(record) + "\n" for record in read_log(folder) if record["step"] <= step]
    replace(Path(folder) / "log.jsonl", "".join(lines))


def replace(path, text):
    """Write a file in one go, so that whoever reads it sees the old text or the new one -> its path."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(path.with_suffix(".tmp"), path)
    return path


# -----------------------------------------------------------------------------
# The console


SIMILAR = str.maketrans({"×": "x", "·": "-", "–": "-", "…": "...", "²": "2", "█": "#"})


def similar(error):
    """For codecs: where an encoding lacks a letter, a similar one, or its number."""
    missing = error.object[error.start : error.end].translate(SIMILAR)
    return missing.encode("ascii", "backslashreplace").decode(), error.end


def open_console():
    """Have standard output and error take any text, also where they are ASCII or closed."""
    codecs.register_error("similar", similar)
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:  # what is closed is no descriptor of a later file
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="similar"))
        elif hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="similar")


class Live:
    """What the console knows of the line that tells how far a run is."""

    row = ""  # what a terminal shows of it now, below all other lines
    waiting = ""  # the whole line, where it has not been printed
    count, printed = 0, -math.inf  # how often it has been printed, and when


def put(text):
    """Print text, above the live row. That nobody reads it (a closed pipe, a full disk) stops no run."""
    try:
        erase = "\r\033[K" if is_lively() else ""  # the live row, which is written anew
        print(f"{erase}{text}{Live.row}", end="", flush=True)
    except Exception:
        sys.stdout = open(os.devnull, "w")


def show(line):
    """Print a line that stays."""
    put(f"{line}\n")


def is_lively():
    """Whether standard output can rewrite a line, and may: NO_COLOR (no-color.org) asks for plain text."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show_step(record, total, val_bpb, mfu_source, eta):
    """
    Tell how far a run is, by its newest step record: on a terminal in one row that rewrites itself; elsewhere
    in a line for each of the first ten records, and then one about every ten seconds.
    """
    Live.waiting = step_line(record, total, val_bpb, mfu_source, eta)
    if is_lively():
        Live.row = bar_line(record, total, val_bpb, eta, shutil.get_terminal_size().columns)
        put("")
    elif Live.count < 10 or time.monotonic() - Live.printed >= 10:
        Live.count, Live.printed = Live.count + 1, time.monotonic()
        end_live()


def end_live():
    """Print the line of the newest step record for good, if it has not been."""
    line, Live.waiting, Live.row = Live.waiting, "", ""
    if line:
        show(line)


def tell(label, text):
    """Print a line of the story, "label    text", in rows; a path is never broken."""
    show(wrap(f"{label:<9}{text}", break_long_words=False))


def wrap(line, **options):
    """A line on as many rows as it needs, of 120 columns or those of a narrower terminal."""
    columns = max(40, min(120, shutil.get_terminal_size().columns)) if is_lively() else 120
    return textwrap.fill(line, columns, subsequent_indent=" " * 9, break_on_hyphens=False, **options)


def attempt(what, action, *arguments):
    """
    action(*arguments) -> what it returns. Its errors are told, and None is returned: whatever only shows
    something must not stop a run.
    """
    try:
        return action(*arguments)
    except Exception as error:
        tell("error:", f"{what} failed: {type(error).__name__}: {error}")
        return None


def short(number, gap=""):
    """1234567 -> '1.23M': three digits and a letter, `gap` between the two."""
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


def step_line(record, total, val_bpb, mfu_source, eta):
    """The console's line for a step record, at most 120 columns; total: steps in all, None if unknown."""
    step, loss = record["step"], record["train_loss_ema"]
    places = f"{step}/{total}".rjust(2 * len(str(total)) + 1) if total else f"{step:6,}"
    loss = f"{loss:6.4f}" if loss < 10 else f"{loss:6.3f}"
    mfu = f"{record['mfu']:3.0%} of measured" if mfu_source == "measured" else f"{record['mfu']:5.1%}"
    return (
        f"step {places} {record['progress']:6.1%}  loss {loss}  val {val_bpb:.4f}  lr {record['lrm']:.2f}  "
        f"{short(record['tok_per_sec']):>5} tok/s  mfu {mfu}  data {record['data_wait']:3.0%}  "
        f"eta {duration(eta)}"
    )[:120]


def bar_line(record, total, val_bpb, eta, columns):
    """A step record as a row of a terminal of so many columns, with a bar as long as there is room for it."""
    facts = [f"{record['progress']:6.1%}", f"loss {record['train_loss_ema']:.4f}", f"val {val_bpb:.4f}"]
    facts += [f"{short(record['tok_per_sec'])} tok/s", f"mfu {record['mfu']:.0%}", f"eta {duration(eta)}"]
    if columns >= 110:
        facts.insert(1, f"step {record['step']:,}" + (f" of {total:,}" if total else ""))
    room = columns - len("  ".join(facts)) - 3  # the last column stays free: a full row would wrap
    width = max(0, min(30, room))
    done = round(width * record["progress"])
    return f"{'█' * done}{'·' * (width - done)}  {'  '.join(facts)}".strip()[: columns - 1]


def val_line(record):
    """The console's line for a val record, bold on a terminal unless NO_COLOR (no-color.org) is set."""
    line = f"val      {record['val_bpb']:.4f} bits per byte at step {record['step']:,}, "
    line += f"the lowest so far is {record['min_val_bpb']:.4f}"
    return f"\033[1m{line}\033[0m" if is_lively() else line


def quoted(value):
    """A value as a shell takes it."""
    return shlex.quote(str(value))


def command_line(start, settings):
    """A shell command: how it starts, then each setting that is not None as a flag."""
    words = [start]
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name} {quoted(value)}")
    return " ".join(words)


def show_samples(samples):
    """[[prompt, continuation, …], …] as indented text."""
    lines = []
    for prompt, text, *_ in samples:
        lines += [f"sample   {prompt!r} ->", *(" " * 9 + line for line in text.splitlines())]
    return "\n".join(map(wrap, lines))


def finish(folder, summary):
    """Complete and write summary.json, print its numbers, write report.md -> whether all of it worked."""
    run = attempt("the log", Run, folder)
    summary["slow_share"] = run.numbers.get("slow_share") if run else None
    text = json.dumps(plain(summary), indent=2, default=str)
    written = attempt("summary.json", replace, folder / "summary.json", text)
    for line in (run and attempt("the log", rise, run)) or ():
        tell("val", line)
    show("---")
    for name, value in summary.items():
        if not isinstance(value, (list, dict)):
            show(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    told = attempt("the report", write_report, folder)
    if told:
        show(f"report: {told}")
    return bool(written and told)


# -----------------------------------------------------------------------------
# A run as it is read, runs that differ only in seed as a group, and what both show: results and curves


class Run:
    """A run's folder, read: config, records, and of each number the final or, till then, the latest value."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).resolve().name
        if not (self.folder / "config.json").exists():
            raise ValueError(f"{folder} holds no config.json.\nGive the folder of a run, such as out/NAME.")
        try:
            self.config = json.loads((self.folder / "config.json").read_text())
        except ValueError as error:
            what = f"{self.folder / 'config.json'} is damaged: {error}"
            raise ValueError(f"{what}.\nCopy the settings of a checkpoint's state.json into it.") from None
        self.records = read_log(folder)
        self.steps = [record for record in self.records if record["kind"] == "step"]
        self.numbers = {"event": None, "progress": 0.0}
        for record in self.records:
            record["tokens"] = record["step"] * self.config["settings"]["total_batch_size"]
            self.numbers |= record
        self.numbers["steps"] = max((record["step"] for record in self.records), default=0)
        path = self.folder / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
        if summary.get("steps") == self.numbers["steps"]:  # else it is from before the run was resumed
            self.numbers |= summary
        if self.steps:
            peak = self.config["mfu_peak"] / self.numbers.get("mfu_peak", self.config["mfu_peak"])
            for record in self.steps:  # of the peak as the end of the run knows it
                record["mfu"] *= peak
            flops, causal = self.config["num_flops_per_token"], self.config["num_flops_per_token_causal"]
            self.numbers["flops_per_sec"] = flops * self.numbers["tok_per_sec"]
            self.numbers["mfu_causal"] = self.numbers["mfu"] * causal / flops
            self.numbers["slow_share"] = slow_share(self.steps)
        self.facts = {"device": self.config["device"], "processes": self.config["world_size"]}
        self.facts |= {"corpus": self.config["corpus"]["fingerprint"], **self.config["versions"]}
        self.all_facts = self.config["settings"] | self.facts
        edited = self.config["versions"].get("edited_settings", "").split()
        self.chosen = {name: self.config["settings"].get(name) for name in (*self.config["given"], *edited)}
        ended = self.numbers["event"] in ("finished", "interrupted", "failed")
        self.state = self.numbers["event"] if ended else "still going, or cut off"
        kind = [self.state == "finished", {**self.chosen, **self.facts, "seed": None}]
        self.kind = json.dumps(kind, sort_keys=True)  # equal if only the seed differs


def slow_share(steps):
    """Of step records: the share of training time in windows slower than twice the median, interruptions."""
    seconds = np.diff([record["total_training_time"] for record in steps])
    timed = seconds > 0  # all but the first windows of each start
    if not timed.any():
        return 0.0
    dt = np.array([record["dt"] for record in steps[1:]])
    return float(seconds[dt > 2 * np.median(dt[timed])].sum() / seconds.sum())


class Group:
    """Runs that differ only in seed: of each number a mean and a standard deviation."""

    def __init__(self, runs):
        self.runs, self.config = runs, runs[0].config
        self.name = os.path.commonprefix([run.name for run in runs]).rstrip("-_.") or runs[0].name

    def values(self, name):
        """The runs' values of a number; None is left out."""
        return [run.numbers[name] for run in self.runs if run.numbers.get(name) is not None]

    def write(self, name, write):
        """A number as text: of several runs its mean, standard deviation and count."""
        values = self.values(name)
        if len(values) < 2:
            return write(*values) if values else "–"
        return f"{write(statistics.mean(values))} ± {write(statistics.stdev(values))}, n = {len(values)}"

    def facts(self, name):
        """A setting's or fact's value in these runs, or their values."""
        return ", ".join(dict.fromkeys(str(run.all_facts.get(name)) for run in self.runs))


def t_quantile(freedom):
    """Student's t for a two-sided interval of 95%: a table, then a series (Abramowitz, Stegun 26.7.5)."""
    if freedom <= 4:
        return (12.706, 4.303, 3.182, 2.776)[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2 + 2.556 / freedom**3 + 1.59 / freedom**4


def difference(base, values):
    """
    The mean of some values against that of others, as text: '-3.2% ± 1.1%' is a 95% interval by Student's t
    with a pooled variance, 'noise' one that contains 0. Without any repetition there is no interval.
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


def table(header, rows):
    """A markdown table; cells are converted by str."""
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# results by their names in summary.json, and how they are written
NUMBERS = {
    "val_bpb": "{:.4f}".format, "min_val_bpb": "{:.4f}".format, "train_loss_ema": "{:.4f}".format,
    "steps": "{:,.0f}".format, "tokens": short, "total_training_flops": "{:.3g}".format,
    "total_training_time": duration, "wall_time": duration, "tok_per_sec": short,
    "flops_per_sec": lambda flops: short(flops, " ") + "FLOP/s", "mfu": "{:.1%}".format,
    "mfu_causal": "{:.1%}".format, "peak_memory": lambda size: short(size, " ") + "B",
    "slow_share": "{:.1%}".format, "skipped_steps": "{:,.0f}".format,
}  # fmt: skip
COMPARED = "Runs that differ only in seed form one column: mean ± standard deviation, n. In brackets the "
COMPARED += "difference of the means from the first column, ± the 95% interval of Student's t: where it "
COMPARED += "contains 0, the difference may be noise."
MEMORY = {"cuda": "CUDA's allocator", "mps": "the driver's, at the end", "cpu": "resident set"}
LAPS = {"corpus": "preparation of the corpus", "trial": "trial and compilation"}


def results(groups):
    """The final numbers of one group or several, with their differences from the first."""
    first, *others = groups
    notes = {"mfu": f"mfu, of the {first.config['mfu_peak_source']} peak"}
    notes["peak_memory"] = f"peak_memory, {MEMORY[first.config['device_type']]}"
    rows = []
    for name, write in NUMBERS.items():
        cells = [first.write(name, write)]
        for group in others:
            change = difference(first.values(name), group.values(name))
            cells.append(group.write(name, write) + (f" ({change})" if change else ""))
        rows.append([notes.get(name, name), *cells])
    return table(["result", *(group.name for group in groups)], rows)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe's and Ito's, one a group
LOOKS = {"train_loss": {"alpha": 0.3}, "val_bpb": {"marker": "o", "markersize": 3}}
LOOKS |= {"muon_momentum": {"linestyle": "--"}, "weight_decay": {"linestyle": ":"}}
PANELS = (  # title, x, what is drawn over it, options of the axes
    ("train loss of a step (faint) and on average, nats per token", "step", "train_loss train_loss_ema", {}),
    ("val_bpb over steps", "step", "val_bpb", {}),
    ("val_bpb over training FLOPs", "total_training_flops", "val_bpb", {"xscale": "log"}),
    ("val_bpb over seconds of training", "total_training_time", "val_bpb", {"xscale": "log"}),
    ("lrm ──, momentum – –, weight decay ···· over steps", "step", "lrm muon_momentum weight_decay", {}),
    ("gradient norm over steps", "step", "grad_norm", {"yscale": "log"}),
    ("tokens per second over steps", "step", "tok_per_sec", {"ylim": (0, None)}),
    ("MFU over steps", "step", "mfu", {"ylim": (0, None)}),
)


def mean_curve(runs, x, y, start):
    """
    -> (x, mean of y, its standard deviation) over runs: at the first one's points, as far as all reach, after
    the step `start` and where x is above 0.
    """
    curves = []
    for run in runs:
        records = [r for r in run.records if r.get(y) is not None and r["step"] > start and r[x] > 0]
        points = [(r[x], r[y]) for r in records]
        if points:
            curves.append(np.array(points).T)
    if not curves:
        return np.zeros((3, 0))
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    places = np.array([place for place in curves[0][0] if low <= place <= high])
    values = np.array([np.interp(places, xs, ys) for xs, ys in curves])
    return places, values.mean(axis=0), values.std(axis=0, ddof=len(curves) > 1)


def make_up(axes, title):
    """The title and frame of a panel; labels at each 1, 2, 5 of a logarithm, which may span less than 10."""
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
    """All PANELS: a colour for each group, a look for each number; a mean of several runs in its band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 13), layout="constrained")
    for axes, (title, x, names, options) in zip(figure.subplots(4, 2).flat, PANELS):
        for group, colour in zip(groups, itertools.cycle(COLOURS)):
            # the start of a loss would flatten all that follows
            hidden = 0.03 if "val_bpb" in names or "train_loss" in names else 0.0
            for name in names.split():
                start = hidden * group.runs[0].numbers["steps"]
                xs, ys, spread = mean_curve(group.runs, x, name, start)
                axes.plot(xs, ys, color=colour, **LOOKS.get(name, {}))
                if len(group.runs) > 1:
                    axes.fill_between(xs, ys - spread, ys + spread, color=colour, alpha=0.2, linewidth=0)
        if names == "val_bpb" and x != "step" and len(groups) > 1:
            lowest = frontier([val_curve(group, x) for group in groups])
            axes.plot(*lowest, "k:", drawstyle="steps-post", label="the lowest for so much")
            axes.legend(frameon=False)
        axes.set(**options)
        make_up(axes, title)
    names = [group.name for group in groups]
    figure.legend(axes.lines, names, loc="outside upper left", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# At equal cost, and over sizes. Between two points a curve is a power of the cost: straight in logarithms

COSTS = {"steps": "step", "tokens": "tokens"}
COSTS |= {"FLOPs": "total_training_flops", "seconds": "total_training_time"}
EQUAL = "The best group and each other one, at the largest cost that both have paid; then the share of one's "
EQUAL += "cost at which the other has come as low as it did in the end."


def val_curve(group, cost):
    """-> (what a group has paid, its mean val_bpb then), of the evaluations that have cost something."""
    return mean_curve(group.runs, cost, "val_bpb", 0)[:2]


def value_at(curve, cost):
    """val_bpb at a cost, nan where the curve has not begun."""
    xs, ys = curve
    return math.exp(np.interp(math.log(cost), np.log(xs), np.log(ys), left=math.nan))


def share_needed(curve, other):
    """At which share of the other's cost a curve first comes as low as the other did in the end, as text."""
    (xs, ys), (their_xs, their_ys) = curve, other
    goal, below = their_ys[-1], np.flatnonzero(ys <= their_ys[-1])
    if not len(below):
        return "never"
    two = slice(max(0, below[0] - 1), below[0] + 1)  # where it goes by the goal; it may begin below
    cost = math.exp(np.interp(-math.log(goal), -np.log(ys[two]), np.log(xs[two])))
    return f"{cost / their_xs[-1]:.2f}"


def frontier(curves):
    """-> (costs, the lowest val_bpb that any curve has reached for as much)"""
    costs, values = np.hstack(curves)
    order = np.argsort(costs)
    return costs[order], np.minimum.accumulate(values[order])


def equal_costs(groups):
    """A table: the best group and each other one at equal cost, and what one needs for the other's last."""
    curves = {group.name: [val_curve(group, cost) for cost in COSTS.values()] for group in groups}
    curves = {name: found for name, found in curves.items() if all(len(xs) for xs, _ in found)}
    last = {name: found[0][1][-1] for name, found in curves.items()}  # val_bpb
    best, rows = min(last, key=last.get, default=None), []
    for name in last:
        if name == best:
            continue
        columns = []
        for one, other in zip(curves[best], curves[name]):
            both = min(one[0][-1], other[0][-1])
            first, second = value_at(one, both), value_at(other, both)
            at_equal = f"{first:.4f}, {second:.4f} ({second / first - 1:+.1%})"
            at_equal = "not evaluated" if math.isnan(first + second) else at_equal  # by one of them so early
            columns.append([at_equal, share_needed(other, one), share_needed(one, other)])
        titles = [f"val_bpb of {best}, {name}", f"{name} comes to {best}'s {last[best]:.4f}"]
        titles.append(f"{best} comes to {name}'s {last[name]:.4f}")
        rows += zip(titles, *columns)
    return table(["at equal", *COSTS], rows) if rows else ""


class PowerLaw(NamedTuple):
    """What a loss is after so many FLOPs: E + a · (flops / middle)^-b, where E cannot be reduced."""

    E: float
    a: float
    b: float
    middle: float

    def __call__(self, flops):
        return self.E + self.a * (flops / self.middle) ** -self.b


def power_law(flops, losses, irreducible):
    """
    The PowerLaw of these losses, by least squares of logarithms (arXiv 2001.08361; E as in 2203.15556); E is
    0 unless `irreducible`, and middle the geometric mean of the flops.
    """
    middle = math.exp(np.log(flops).mean())
    x = np.log(np.asarray(flops) / middle)
    E = min(losses) * (np.linspace(0, 1, 4000, endpoint=False) if irreducible else np.zeros(1))
    y = np.log(np.asarray(losses) - E[:, None])  # (candidates of E, sizes)
    b = -(y @ x) / (x @ x)
    log_a = y.mean(axis=1)
    fitted = E[:, None] + np.exp(log_a[:, None] - b[:, None] * x)
    best = np.argmin(np.square(np.log(fitted) - np.log(losses)).sum(axis=1))
    return PowerLaw(E[best], math.exp(log_a[best]), b[best], middle)


def scaling_law(groups, path):
    """The markdown of a power law over models of at least three sizes, and its picture; else nothing."""
    groups = [group for group in groups if group.runs[0].state == "finished" and group.values("val_bpb")]
    sizes = {tuple(group.config["model"].values()) for group in groups}
    if len(sizes) < 3 or len(sizes) < len(groups):
        return []
    flops = [statistics.mean(group.values("total_training_flops")) for group in groups]
    losses = [statistics.mean(group.values("val_bpb")) for group in groups]
    irreducible, beyond = len(groups) >= 5, 10 * max(flops)
    law = power_law(flops, losses, irreducible)
    text = f"val_bpb = {law.E:.4f} + " if irreducible else "val_bpb = "
    text += f"{law.a:.4f} · (FLOPs / {law.middle:.3g})^-{law.b:.4f}"
    text += "" if irreducible else ": a plain power law, for an irreducible term takes five sizes"
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
    rows.append(["ten times as many FLOPs", f"{beyond:.3g}", "", forecast, ""])
    parts = [f"{text}.", table(["group", "FLOPs", "val_bpb", "the law", "residual"], rows)]
    with contextlib.suppress(Exception):  # no matplotlib, or a broken one
        draw_law(flops, losses, law, path)
        parts.append(f"![scaling law]({path.name})")
    return parts


def draw_law(flops, losses, law, path):
    """Each size as a point, the law through them as a line, dashed beyond them for a decade."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    known, beyond = np.geomspace(min(flops), max(flops)), np.geomspace(max(flops), 10 * max(flops))
    axes.plot(known, law(known), color=COLOURS[0])
    axes.plot(beyond, law(beyond), "--", color=COLOURS[0])
    axes.plot(flops, losses, "o", color=COLOURS[1])
    axes.set(xscale="log")
    make_up(axes, "val_bpb over training FLOPs: the sizes, their law, and a decade more")
    figure.savefig(path, dpi=110)


# -----------------------------------------------------------------------------
# The pages: report.md of a run, compare.md of several


def sparkline(values):
    """'first ▇▅▃▂▁ last' in at most 60 bars; None is left out."""
    values = [value for value in values if value is not None] or [0.0]
    low, high, count = min(values), max(values), min(60, len(values))
    chosen = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    bars = ("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low or 1))] for v in chosen)
    return f"{values[0]:<9.4g} {''.join(bars)} {values[-1]:.4g}"


def show_curves(groups, folder):
    """Draw curves.png -> the markdown that shows it; where matplotlib is missing, the curves as text."""
    try:
        draw(groups, folder / "curves.png")
        return "![curves](curves.png)"
    except Exception as error:
        if not isinstance(error, ImportError):  # it is an extra
            tell("report", f"the curves cannot be drawn: {type(error).__name__}: {error}")
        lines = []
        for name in ("val_bpb", "train_loss_ema", "lrm", "tok_per_sec", "grad_norm"):
            for run in itertools.chain.from_iterable(group.runs for group in groups):
                values = [record[name] for record in run.records if name in record]
                lines.append(f"    {name:<15} {sparkline(values)}  {run.name}")
        return "\n".join(lines)


def time_table(run):
    """Where the wall time went; what training waited for data stands apart."""
    starts = [0, *(r["step"] for r in run.steps)]
    windows = [r["dt"] * (r["step"] - start) for r, start in zip(run.steps, starts)]
    waiting = sum(window * r["data_wait"] for window, r in zip(windows, run.steps))
    laps = {**run.numbers.get("time", {"training": sum(windows)}), "waiting for data": waiting}
    laps["training"] -= waiting
    total = sum(laps.values())
    rows = [[LAPS.get(name, name), f"{spent:.1f}", f"{spent / total:.1%}"] for name, spent in laps.items()]
    return table(["where the time went", "seconds", "share"], [*rows, ["together", f"{total:.1f}", ""]])


def rise(run):
    """Where val_bpb was lowest, if it has risen since by more than half a percent: a list of one sentence."""
    vals = [r for r in run.records if r["kind"] == "val" and r["val_bpb"] is not None]
    lowest = min(vals, key=lambda r: r["val_bpb"], default=None)
    if not lowest or vals[-1]["val_bpb"] <= 1.005 * lowest["val_bpb"]:
        return []
    epoch = next((r["epoch"] for r in run.steps if r["step"] >= lowest["step"]), 0.0)
    line = f"val_bpb was lowest at step {lowest['step']:,}, after {epoch:.1f} epochs: {lowest['val_bpb']:.4f}"
    return [f"{line}. It has risen to {vals[-1]['val_bpb']:.4f} since."]


def side_by_side(texts, width=56):
    """{title: text} as an indented block of columns, each `width` letters wide."""
    columns = []
    for title, text in texts.items():
        rows = (textwrap.wrap(line, width) or [""] for line in text.splitlines())
        columns.append([title, "", *itertools.chain.from_iterable(rows)])
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(("    " + "  ".join(f"{cell:<{width}}" for cell in row)).rstrip() for row in rows)


def how_to_repeat(run):
    """The shell commands that repeat a run, and how exactly they do."""
    commit, _, changed = (run.config["versions"]["git_commit"] or "unknown").partition("-")
    note = "  # and the changes that were not committed" if changed else ""
    exactly = "The same machine and versions give the same run, on a CPU bit for bit."
    if run.config["timed"]:
        count = f"{run.numbers['steps']:,}"
        exactly = f"By the clock: another run takes as many steps as its machine makes, not these {count}. "
        exactly += "What can be repeated exactly is a run by steps, --num-iterations instead of --minutes."
    planned = {r["step"]: r["planned_iterations"] for r in run.records if "planned_iterations" in r}
    changes = [next(same) for _, same in itertools.groupby(planned.items(), key=lambda item: item[1])]
    if len(changes) > 1:
        horizons = ", ".join(f"at step {step:,} for {plural(steps, 'step')}" for step, steps in changes)
        exactly += f"\n\nThe command is the last start's. The run was planned {horizons}: to repeat it, "
        exactly += "begin with the first horizon, stop where the next one begins, and --resume with that."
    return f"    git checkout {commit}{note}\n    {run.config['command']}\n\n{exactly}"


def write_report(folder):
    """report.md, from log.jsonl, config.json and, if the run came to an end, summary.json -> its path."""
    run = Run(folder)
    config, numbers, params = run.config, run.numbers, run.config["num_params"]
    counts = {**params, "all parameters": sum(params.values())}
    counts["FLOPs per token, PaLM convention"] = config["num_flops_per_token"]
    counts["FLOPs per token, exact causal"] = config["num_flops_per_token_causal"]
    counts = [[name, f"{count:,.0f}"] for name, count in counts.items()]
    state = f"{run.state}: {plural(numbers['steps'], 'step')}, {numbers['progress']:.1%} of the run"
    parts = [f"# {run.name}", state]
    parts += rise(run)
    alone = [Group([run])]
    parts += [results(alone), show_curves(alone, run.folder)] if run.steps else ["The log holds no step yet."]
    parts += ["## Settings that were given or edited", table(["setting", "value"], run.chosen.items())]
    parts += ["## Hardware and versions", table(["what", "value"], run.facts.items())]
    parts += ["## Time", time_table(run)] if run.steps else []
    parts += ["## Parameters and FLOPs", table(["what", "count"], counts)]
    for prompt, text, *real in numbers.get("samples", []):
        texts = {"The model writes:": text} | ({"The text goes on:": real[0]} if real else {})
        parts += [f"## Sample from {prompt!r}", side_by_side(texts)]
    parts += ["## How to repeat it", how_to_repeat(run)]
    return replace(run.folder / "report.md", "\n\n".join(parts) + "\n")


def compare(folders):
    """compare.md and its picture, in a folder beside the first run -> its path."""
    runs, alike = [Run(folder) for folder in folders], {}
    for run in runs:
        alike.setdefault(run.kind, []).append(run)
    groups = [Group(same) for same in alike.values()]
    target = runs[0].folder.parent / ("compare-" + "-".join(group.name for group in groups))[:120]
    target.mkdir(exist_ok=True)
    if len({group.name for group in groups}) < len(groups):
        for group in groups:
            group.name = str(group.runs[0].folder)
    names = [group.name for group in groups]
    rows = [[key, *(group.facts(key) for group in groups)] for key in runs[0].all_facts]
    differing = [row for row in rows if any(cell != row[1] for cell in row[1:])]
    parts = ["# " + ", ".join(names), COMPARED, results(groups), show_curves(groups, target)]
    texts = dict.fromkeys(run.config["corpus"]["name"] for run in runs)
    if len(texts) > 1:
        parts.insert(1, f"Their texts differ, {', '.join(texts)}: val_bpb and losses cannot be compared.")
    else:
        equal, law = equal_costs(groups), scaling_law(groups, target / "scaling.png")
        parts += ["## At equal cost", EQUAL, equal] if equal else []
        parts += ["## Scaling law", *law] if law else []
    parts += ["## Settings that differ", table(["setting", *names], differing)]
    return replace(target / "compare.md", "\n\n".join(parts) + "\n")


def glance(folder):
    """The runs in a folder as a table of plain text, newest first."""
    rows = []
    for path in Path(folder).iterdir():
        if (path / "config.json").exists() and (run := attempt(f"reading {path}", Run, path)):
            changed = max(file.stat().st_mtime for file in path.glob("*.json*"))
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
            depth, steps = run.config["settings"]["depth"], run.numbers["steps"]
            val = f"{run.numbers['val_bpb']:.4f}" if run.numbers.get("val_bpb") else ""
            rows.append([when, run.name, str(depth), f"{steps:,}", val, run.state])
    rows = [["last change", "run", "depth", "steps", "val_bpb", "state"], *sorted(rows, reverse=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def report_on(folders):
    """-> what to show: the runs of a folder, or the path of a run's report or of several runs' comparison."""
    if len(folders) == 1 and list(Path(folders[0]).glob("*/config.json")):
        return glance(folders[0])
    runs = [folder for folder in folders if (Path(folder) / "config.json").exists()]
    for folder in sorted({*folders} - {*runs}) if runs else ():
        if not (Path(folder) / "compare.md").exists():
            tell("skipped", f"{folder}, which is no run")
    return compare(runs) if len(runs) > 1 else write_report((runs or folders)[0])


if __name__ == "__main__":
    try:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__.strip())
            sys.exit()
        if len(sys.argv) < 2:
            raise ValueError("no run is given.\nCall: python report.py out/RUN [out/RUN ...]")
        open_console()
        show(report_on(sys.argv[1:]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
