"""
Honest numbers: measure them without disturbing the run, write them down, show them.

log.jsonl, config.json and summary.json are the record; the console line, report.md and wandb only show it.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# Measuring

# dense bf16 peaks in TFLOP/s, as published; the words must all stand in the device's name, as whole words
PUBLISHED_PEAKS = [
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIE", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
]
OTHER_CHIPS = {
    "LAPTOP",
    "MIG",
    "TI",
    "D",
    "SUPER",
}  # words that make a chip of the same number a slower or faster one


def published_peak(device_name):
    """Published dense bf16 FLOP/s of a GPU by its name, or None for one that the table does not know."""
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    for key, tflops in PUBLISHED_PEAKS:
        if set(key.split()) <= words and not OTHER_CHIPS & words:
            return tflops * 1e12
    return None


def measured_peak(device, dtype):
    """FLOP/s of a large product of random matrices on this device: the median of 5 or more, in under 2 s."""
    n = {"cuda": 8192, "mps": 4096}.get(device.type, 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    synchronize, times, start = synchronizer(device.type), [], time.perf_counter()
    while len(times) < 6 or (len(times) < 20 and time.perf_counter() - start < 1):
        synchronize()
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / statistics.median(times[1:])


def find_peak(device, device_name, dtype, given_tflops=None):
    """-> (peak FLOP/s of one device in the training dtype, "given", "published" or "measured")."""
    if given_tflops:
        return given_tflops * 1e12, "given"
    peak = published_peak(device_name) if device.type == "cuda" and dtype == torch.bfloat16 else None
    return (peak, "published") if peak else (measured_peak(device, dtype), "measured")


def synchronizer(device_type):
    """The function that waits until the device has done its work; on CPU work is already synchronous."""
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "cpu": lambda: None}[device_type]


def device_name(device):
    """The name of the GPU or of the CPU, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        name = os.popen("sysctl -n machdep.cpu.brand_string").read().strip() or name
    elif Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def peak_memory(device):
    """Bytes at the peak: CUDA's allocator; on MPS the driver's allocation now; on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def update_ema(smooth, loss, beta):
    """One step of an exponential moving average that starts at 0: beta · smooth + (1 - beta) · loss."""
    return beta * smooth + (1 - beta) * loss


def debias(smooth, beta, count):
    """The average of `count` losses without its start at 0 (arXiv 1412.6980, section 3); nan for none."""
    return smooth / (1 - beta**count) if count else math.nan


def bits_per_byte(model, batches, device):
    """
    `model` (tokens, targets -> sum of nats, a 0-D tensor) over this rank's (tokens, targets, bytes) batches:
    nats of all ranks / (ln 2 · bytes of all ranks), added in float64 on the host after one synchronization.
    Gradients stay enabled, so that a compiled model runs the very graph that trains: nothing compiles anew.
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
    """Wall time by what it was spent on: `lap(name)` books the time since the last lap under that name."""

    def __init__(self, start):
        self.last, self.spent = start, {}

    def lap(self, name):
        now = time.time()
        self.spent[name] = self.spent.get(name, 0.0) + now - self.last
        self.last = now


# -----------------------------------------------------------------------------
# Telling


def plain(value):
    """A float that JSON can hold: non-finite becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """log.jsonl, one flushed line per record, and wandb if asked for; silent without a folder."""

    def __init__(self, folder, wandb=False, config=None):
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8") if folder else None
        self.wandb = None
        if folder and wandb:
            try:
                import wandb as library

                self.wandb = library.init(
                    project="onedial", name=folder.name, id=folder.name, resume="allow", config=config
                )
                for axis in ("step", "total_training_time", "total_training_flops"):
                    self.wandb.define_metric(axis)
                self.wandb.define_metric("*", step_metric="step")
            except Exception as error:  # a logging service must never stop a run
                print(f"wandb is off: {type(error).__name__}: {error}")

    def write(self, kind, **fields):
        if self.file:
            self.file.write(json.dumps({"kind": kind, **{k: plain(v) for k, v in fields.items()}}) + "\n")
            self.file.flush()
        if self.wandb and kind != "event":
            try:
                self.wandb.log({k: v for k, v in fields.items() if plain(v) is not None})
            except Exception as error:
                print(f"wandb is off: {type(error).__name__}: {error}")
                self.wandb = None

    def close(self, summary=None):
        if self.file:
            self.file.close()
        if self.wandb:
            try:
                self.wandb.summary.update(summary or {})
                self.wandb.finish()
            except Exception as error:
                print(f"wandb: {type(error).__name__}: {error}")


def short(number):
    """1234567 -> '1.23M': three digits and a letter."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds):
    """90 -> '1m30s'; hours without seconds."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def val_line(record, num_iterations):
    """The console's line for a val record."""
    total = str(num_iterations)
    return (
        f"val  {record['step']:>{len(total)}}/{total}          {record['val_bpb']:.4f} bits per byte, "
        f"the lowest so far is {record['min_val_bpb']:.4f}"
    )


def step_line(record, num_iterations, val_bpb, mfu_source, eta):
    """The console's line for a step record: at most 120 columns."""
    of = " of measured" if mfu_source == "measured" else ""
    total = str(num_iterations)
    return (
        f"step {record['step']:>{len(total)}}/{total} {record['step'] / num_iterations:6.1%}"
        f"   loss {record['train_loss_ema']:.4f}   val {val_bpb:.4f}   lr {record['lrm']:.2f}"
        f"   {short(record['tok_per_sec']):>5} tok/s   mfu {record['mfu']:5.1%}{of}"
        f"   data {record['data_wait']:.1%}   eta {duration(eta)}"
    )


def header(config, compiled, attention, peak, peak_source, plan):
    """The four lines that a run starts with, from its config.json and what only the machine knows."""
    model, params, corpus = config["model"], config["num_params"], config["corpus"]
    roles = ("matrix", "head", "embedding", "value_embedding")
    counts = " · ".join(f"{short(params[role])} {role.replace('_', ' ')}" for role in roles)
    speed = f"peak {short(peak)}FLOP/s ({peak_source})"
    processes = f"{config['world_size']} × " if config["world_size"] > 1 else ""
    return "\n".join(
        (
            f"onedial  depth {model['n_layer']}, width {model['n_embd']} · {counts} parameters · "
            f"{short(config['num_flops_per_token'])}FLOP per token",
            f"device   {processes}{config['device']} · {config['settings']['dtype']} · "
            f"{'compiled' if compiled else 'eager'} · {attention} attention · {speed}",
            f"data     {corpus['name']} · vocabulary of {model['vocab_size']:,} · "
            f"{short(corpus['train']['tokens'])} training tokens · fingerprint {corpus['fingerprint']}",
            f"plan     {plan}",
        )
    )


def show_samples(samples):
    """[[prompt, continuation], …] as indented text."""
    return "\n".join(f"sample   {prompt!r} ->\n{text}" for prompt, text in samples)


def versions():
    """Python, package and system versions, and the git commit of the code, for config.json."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {name: importlib.metadata.version(name) for name in ("numpy", "tiktoken", "rustbpe")}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {**found, "system": platform.platform(), "git_commit": commit or None}


# -----------------------------------------------------------------------------
# The record of a run, and the report made of it


def read_log(folder):
    """The records of a run's log.jsonl, in order; a line that a crash cut short is left out."""
    records = []
    path = Path(folder) / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def cut_log(folder, step):
    """Drop the records after `step`, so that no step stands twice once a run goes on from there."""
    path = Path(folder) / "log.jsonl"
    lines = [json.dumps(record) + "\n" for record in read_log(folder) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def finish(folder, summary):
    """Write summary.json and report.md, and print the numbers as `name: value` lines."""
    (folder / "summary.json").write_text(json.dumps({k: plain(v) for k, v in summary.items()}, indent=2))
    write_report(folder)
    print("---")
    for name, value in summary.items():
        if not isinstance(value, (list, dict)):
            print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"report: {folder / 'report.md'}", flush=True)


def table(header, rows):
    """A markdown table; cells are converted by str."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write_report(folder):
    """report.md from log.jsonl, config.json and, if the run came to its end, summary.json."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    records = read_log(folder)
    steps, vals = ([r for r in records if r["kind"] == kind] for kind in ("step", "val"))
    parts = [f"# {folder.name}\n"]
    numbers = {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
    parts.append(
        table(
            ["result", "value"], [[k, f"{v:.6g}" if isinstance(v, float) else v] for k, v in numbers.items()]
        )
    )
    chosen = steps[:: max(1, len(steps) // 20)] + steps[-1:] if steps else []
    by_step = {val["step"]: val["val_bpb"] for val in vals}
    rows = {
        r["step"]: [r["step"], f"{r['train_loss_ema']:.4f}", "", f"{r['lrm']:.3f}", short(r["tok_per_sec"])]
        for r in chosen
    }
    for step, bpb in by_step.items():
        rows.setdefault(step, [step, "", "", "", ""])[2] = f"{bpb:.4f}"
    parts.append("## Loss\n")
    parts.append(
        table(["step", "train loss (EMA, nats)", "val bpb", "lr", "tok/s"], [rows[s] for s in sorted(rows)])
    )
    parts.append("## Settings\n")
    parts.append(
        table(["setting", "value"], [[k, v] for k, v in config["settings"].items() if v is not None])
    )
    parts.append("## Hardware and versions\n")
    facts = {"device": config["device"], "world_size": config["world_size"], **config["versions"]}
    parts.append(table(["what", "value"], facts.items()))
    if summary.get("samples"):
        parts.append("## Samples\n")
        parts += [f"```\n{prompt}{text}\n```\n" for prompt, text in summary["samples"]]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    for run in sys.argv[1:]:
        write_report(run)
        print(f"{run}/report.md")
