"""
onedial: train a GPT from text to report. One dial, --depth, sets the model; --minutes sets how long it takes.

    python train.py                                               # a laptop: five minutes, no GPU, no network
    python train.py --depth 12                                    # one GPU
    torchrun --standalone --nproc_per_node=8 train.py --depth 12  # eight

Every setting below is also a flag (--max-seq-len 1024); None is `auto`. Read on: it is one story.
"""

import time

process_start = time.time()  # --minutes counts from here, the slow imports included

import argparse
import contextlib
import ctypes
import difflib
import faulthandler
import gc
import json
import math
import os
import re
import shlex
import signal
import sys
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # threads that spin for long slow a shared CPU many times
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")  # for quick warm starts

import torch
import torch.distributed as dist

import checkpoint
import dataloader
import report
from model import GPT, GPTConfig, attention_backend
from optim_muon import MuonAdamW, lr_multiplier, muon_momentum, weight_decay_multiplier

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # "save": until there is something to save, it asks for nothing

# -----------------------------------------------------------------------------
# Settings. None is auto: the value that is found is printed and saved

# run
run: str | None = None  # name of the run, a folder in out_dir (auto: d<depth>-<date>-<time>)
out_dir: str = "out"  # where runs are written
resume: bool = False  # continue the newest run, or --run NAME, from its newest valid checkpoint
wandb: bool = False  # log to Weights & Biases too
# device
device_type: str | None = None  # cuda, mps or cpu (auto: the first of them that is there)
dtype: str | None = None  # of activations: bfloat16 or float32 (auto: bfloat16 where the hardware has it)
compile: bool | None = None  # torch.compile (auto: on CUDA and CPU, if it works)
seed: int = 42  # of weights, data order and samples
# data
data: str | None = None  # stdlib, fineweb, or a path to text (auto: fineweb on CUDA, else stdlib)
vocab_size: int | None = None  # of the BPE trained on the corpus (auto: about the root of its bytes)
# model
depth: int | None = None  # layers, the dial that sets all the rest (auto: 12 on CUDA, else 4)
aspect_ratio: int = 64  # width = depth × aspect_ratio, rounded up to whole heads
head_dim: int | None = None  # width of an attention head (auto: 128, below depth 8: 64)
max_seq_len: int | None = None  # T, tokens in a row (auto: 2048 on CUDA, else 512)
# horizon: at most one of these four (auto: compute-optimal on CUDA, else five minutes)
num_iterations: int | None = None  # steps
minutes: float | None = None  # wall time from start to report, without the preparation of a corpus
target_flops: float | None = None  # total training FLOPs
target_param_data_ratio: float | None = None  # tokens per matrix and head parameter (optimal: 12)
# batch
total_batch_size: int | None = None  # tokens per step over all devices (auto: from the horizon)
device_batch_size: int | None = None  # rows per forward pass of one device (auto: the largest that fits)
# optimizer: peak learning rates for a batch of 2^19 tokens at width 768; scaled to the batch and width in use
embedding_lr: float = 0.3  # token embedding; value embeddings get half
unembedding_lr: float = 0.008  # head
matrix_lr: float = 0.02  # matrices of the blocks
scalar_lr: float = 0.5  # residual scalars
weight_decay: float | None = None  # of the matrices (auto: 0.28, less in long runs)
warmup_steps: int = 40  # of the learning rate, at most a tenth of the run
warmdown_ratio: float = 0.65  # share of the run over which the learning rate decays
final_lr_frac: float = 0.05  # what it decays to, as a share of the peak
# evaluation, log, checkpoints; -1 turns a periodic action off
eval_every: int | None = None  # steps between evaluations (auto: 250 on CUDA, else 100)
eval_tokens: int | None = None  # validation tokens used (auto: 10,485,760 on CUDA, else 32,768)
log_every: int | None = None  # steps between records, 10 s at most (auto: the first 10, then two a second)
sample_every: int = -1  # steps between samples; the end always has one
save_every: int = -1  # steps between checkpoints
save_minutes: float = 10.0  # minutes between checkpoints
keep_checkpoints: int = 2  # how many of the newest are kept
peak_tflops: float | None = None  # peak of one device, for the MFU (auto: as published, else measured)

HORIZONS = ("num_iterations", "minutes", "target_flops", "target_param_data_ratio")
PERIODS = ("eval_every", "sample_every", "save_every", "save_minutes")
CALL = ("run", "out_dir", "resume")  # what belongs to the call and not to the run
# what belongs to the machine: --resume keeps what was given, and finds anew what was auto
MACHINE = ("device_type", "dtype", "compile", "device_batch_size", "log_every", "peak_tflops")
CHOICES = {"device_type": ("cuda", "mps", "cpu"), "dtype": ("bfloat16", "float32")}
BOUNDS = {  # of the numbers that are not simply positive
    **{"seed": (0, 2**31), "vocab_size": (257, 65_535), "head_dim": (2, 1024), "max_seq_len": (32, 2**20)},
    **{"minutes": (0.05, 1e6), "weight_decay": (0, 1e6), "warmup_steps": (0, 10**9)},
    **{"warmdown_ratio": (0, 1), "final_lr_frac": (0, 1)},
    **dict.fromkeys(PERIODS, (-1, 10**9)),
}
HANG_SECONDS = 600  # a window of steps or a collective that takes longer ends the run, with all stacks shown

# -----------------------------------------------------------------------------
# Flags, derived from the settings above

rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # set by torchrun
world_size = int(os.environ.get("WORLD_SIZE", 1))
say = report.tell if rank == 0 else (lambda line: None)


def fail(message):
    """Bad settings, data or checkpoint: what is wrong and what to do, in two lines; exit status 2."""
    if rank > 0:
        time.sleep(2)  # what is wrong on all ranks is told by rank 0, and torchrun ends the others
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def show_error(kind, error, trace):
    """What a person can mend is told in two lines; of anything else the trace is wanted."""
    if kind is KeyboardInterrupt:
        sys.exit(130)  # before the loop, which saves first
    if issubclass(kind, (dataloader.DataError, checkpoint.CheckpointError)):
        fail(error)
    if report.is_out_of_memory(error):
        fail("the device has too little memory.\nTry a smaller --depth or --device-batch-size.")
    sys.__excepthook__(kind, error, trace)


def flag(name):
    return "--" + name.replace("_", "-")


sys.excepthook = show_error
HELP = "`python train.py --help` lists all settings."
READERS = {"int": int, "float": float, "str": str, "bool": {"on": True, "off": False}.__getitem__}
settings, kinds = {}, {}
parser = argparse.ArgumentParser(usage="python train.py [--NAME VALUE ...]", allow_abbrev=False)
parser.error = lambda message: fail(f"{message}.\n{HELP}")
declaration = re.compile(r"^(\w+): (\w+)( \| None)? = .+?  # (.+)$", re.MULTILINE)
for name, kind, optional, comment in declaration.findall(Path(__file__).read_text(encoding="utf-8")):
    settings[name], kinds[name] = globals()[name], (kind, bool(optional))
    shown = "auto" if settings[name] is None else settings[name]
    options = {"help": f"{comment} [{shown}]".replace("%", "%%"), "metavar": kind.upper()}
    if kind == "bool":
        options |= {"metavar": "on|off", "nargs": "?", "const": "on"}
    parser.add_argument(flag(name), default=argparse.SUPPRESS, **options)
arguments = [f"--{a[5:]}=off" if a[:5] == "--no-" and a[5:] in settings else a for a in sys.argv[1:]]
given, unknown = parser.parse_known_args(arguments)
given = vars(given)
if unknown:
    near = difflib.get_close_matches(unknown[0].split("=")[0], map(flag, settings), n=1)
    fail(f"unknown setting {unknown[0]}.\n{f'Did you mean {near[0]}?' if near else HELP}")
for name, text in given.items():
    kind, optional = kinds[name]
    try:
        given[name] = None if optional and text == "auto" else READERS[kind](text)
    except (KeyError, ValueError):
        fail(f"{flag(name)} {text} is not of type {kind}.\n{HELP}")
settings |= given

if settings["run"] and (Path(settings["run"]).name != settings["run"] or settings["run"] == ".."):
    fail(f"--run {settings['run']} is no plain name.\nUse --out-dir for the folder that it shall be in.")
run_folder = Path(settings["out_dir"]) / settings["run"] if settings["run"] else None
given_before = {}  # the flags of the calls that a resumed run was made with
if settings["resume"]:
    known = sorted(Path(settings["out_dir"]).glob("*/config.json"), key=os.path.getmtime)
    if not run_folder and not known:
        fail(f"{settings['out_dir']} holds no run to resume.\nStart one.")
    run_folder = run_folder or known[-1].parent
    saved, given_before, source = checkpoint.saved_settings(run_folder)
    if source and source != "config.json":
        say(f"resume   config.json cannot be read: the settings are taken from {source}")
    fixed = HORIZONS if any(given.get(name) is not None for name in HORIZONS) else ()  # a new one, or none
    for name in [n for n in settings if n in saved and n not in CALL]:
        if name in MACHINE and name not in given_before:
            continue
        if name not in given and name not in fixed:
            settings[name] = saved[name]
        elif settings[name] != saved[name]:
            say(f"resume   {flag(name)} was {saved[name]}, is {settings[name]}")
elif run_folder and run_folder.exists():
    fail(f"the run {run_folder} exists.\nContinue it with --resume or choose another --run.")

for name, value in settings.items():
    if value is not None and kinds[name][0] in ("int", "float"):
        low, high = BOUNDS.get(name, (1 if kinds[name][0] == "int" else 1e-12, 1e30))
        if not low <= value <= high or (name in PERIODS and value == 0):
            fail(f"{flag(name)} {value} is out of range.\nGive a number from {low:,} to {high:,}.")
    if value is not None and value not in CHOICES.get(name, (value,)):
        fail(f"{flag(name)} {value} is unknown.\nChoose one of: {', '.join(CHOICES[name])}.")
horizons = [name for name in HORIZONS if settings[name] is not None]
if len(horizons) > 1:
    fail(f"two horizons were given: {flag(horizons[0])} and {flag(horizons[1])}.\nGive at most one.")
if settings["head_dim"] and settings["head_dim"] % 2:
    fail(f"--head-dim {settings['head_dim']}: rotary positions turn pairs of channels.\nGive an even number.")
globals().update(settings)

# -----------------------------------------------------------------------------
# Device, precision

found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
device_type = device_type or found
if not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[device_type].is_available():
    fail(f"--device-type {device_type}: not to be had on this machine.\nHere there is {found}.")
if device_type == "mps" and world_size > 1:
    fail("several processes cannot share one MPS device.\nStart one, without torchrun.")
if device_type == "mps" and dtype == "bfloat16":
    fail("--dtype bfloat16: Metal's causal attention leaks later tokens in half precision.\nLeave it out.")
on_gpu = device_type == "cuda"
device = torch.device(device_type, local_rank) if on_gpu else torch.device(device_type)
if on_gpu:
    if local_rank >= torch.cuda.device_count():
        fail(f"there are more processes than GPUs.\nGive --nproc_per_node={torch.cuda.device_count()}.")
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
dtype = dtype or ("bfloat16" if report.has_fast_bf16(device) else "float32")
compute_dtype = getattr(torch, dtype)
if compile is None:
    compile = device_type != "mps"
if device_type == "cpu":  # else threads add up the gradients of an embedding in the order in which they come
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging only, and not free
    # glibc gives freed memory back to the system, and getting it again costs page faults: 10% of a step
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_trim_threshold, 2**30)
        mallopt(m_top_pad, 2**26)
        mallopt(m_mmap_threshold, 2**30)
device_name = report.device_name(device)
synchronize = report.synchronizer(device_type)

# -----------------------------------------------------------------------------
# Data: prepared before the process group exists, so that no collective waits for a tokenizer


def tell_data(line):
    """Print what the rank that prepares the corpus, whichever it is, says of it."""
    report.tell(f"data     {line}")


clock = report.Clock(process_start)
clock.lap("setup")
data = data or ("fineweb" if on_gpu else "stdlib")
max_seq_len = max_seq_len or (2048 if on_gpu else 512)
eval_tokens = eval_tokens or (10_485_760 if on_gpu else 32_768)
corpus = dataloader.prepare(data, vocab_size, tell_data)
clock.lap("corpus")
validation = dataloader.ValidationRows(corpus, max_seq_len, eval_tokens)
vocab_size = corpus.tokenizer.n_vocab
if device_type == "mps" and max(vocab_size, (device_batch_size or 1) * max_seq_len) > 32_000:
    fail("Metal sums more than 32,766 products wrongly.\nGive a smaller vocabulary or --device-batch-size.")
if world_size > 1:
    backend, device_id = ("nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, device_id=device_id, timeout=timedelta(seconds=HANG_SECONDS))


def from_rank_0(value):
    """Rank 0's value on every rank, so that all plan with one clock. A collective call."""
    box = [value]
    if world_size > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


# -----------------------------------------------------------------------------
# Model: everything follows from depth

depth = depth or (12 if on_gpu else 4)
head_dim = head_dim or (128 if depth >= 8 else 64)
n_head = math.ceil(depth * aspect_ratio / head_dim)
config = GPTConfig(vocab_size, max_seq_len, n_layer=depth, n_head=n_head, n_embd=n_head * head_dim)
if config.n_embd < 32:
    fail(f"depth {depth} and the other settings make a width of {config.n_embd}.\nThe least is 32.")
with torch.device("meta"):
    # 1 GB of logits at once in bf16; on a CPU as many as its caches hold: head and loss take 30% less time
    raw_model = GPT(config, compute_dtype, max_logits=2**22 if device_type == "cpu" else 2**29)
raw_model.init_weights(device, seed)
model = torch.compile(raw_model, dynamic=False) if compile else raw_model
num_params = raw_model.num_params()
num_flops_per_token = raw_model.num_flops_per_token()

# -----------------------------------------------------------------------------
# The state of the loop, new or from a checkpoint

step = 0  # updates done, skipped ones included
min_val_bpb = val_bpb = math.inf  # the first only falls
smooth_train_loss, ema_beta = 0.0, 0.9  # exponential moving average of the train loss, starting at 0
total_training_time = 0.0  # without the first 10 steps after each start, evaluation, sampling and saving
dt = math.nan  # seconds per step in the last window
skipped_steps = 0  # loss or gradient was not finite, and nothing changed
horizon_is_final = False  # under --minutes it follows the measured speed until the decay begins
val_step = -1  # of the last evaluation
STATE = (
    "step num_iterations horizon_is_final min_val_bpb val_bpb val_step smooth_train_loss "
    "total_training_time skipped_steps dt"
).split()

run = run_folder.name if run_folder else from_rank_0(f"d{depth}-{datetime.now():%Y%m%d-%H%M%S}")
run_folder = Path(out_dir) / run
checkpoints = run_folder / "checkpoints"
lock, newest = None, (None, [])
if resume and rank == 0 and run_folder.exists():
    lock = checkpoint.lock(run_folder)
    newest = checkpoint.newest_valid(checkpoints)
resumed_from, passed_over = from_rank_0(newest)
for reason in passed_over:
    say(f"resume   passed over: {reason}")
if passed_over and not resumed_from:
    fail(f"no checkpoint in {checkpoints} is valid.\nPut a good one back, or start another --run.")
if resume and not resumed_from:
    say(f"resume   there is no checkpoint in {run_folder} yet: starting at step 0")
if resumed_from:
    say(f"resume   from {resumed_from}")
    state = checkpoint.load(resumed_from, "state")
    if missing := [name for name in STATE if name not in state]:
        fail(f"{resumed_from} has no {missing[0]}.\nResume it with the version that has written it.")
    globals().update({name: state[name] for name in STATE})
    for name, spent in state["spent"].items():
        clock.spent[name] = clock.spent.get(name, 0.0) + spent

# -----------------------------------------------------------------------------
# Optimizer: one table, role -> settings. Source of the numbers: nanochat, tuned at depth 12


def build_optimizer(batch_size):
    """MuonAdamW over every role, with the learning rates for this many tokens per step."""
    ratio = batch_size / 2**19
    # above the reference lr ∝ √batch (nanochat); below, that is far too timid: at 2,048 tokens and 549 steps
    # AdamW did best with half of its rates, Muon with three times its rate (figures: the commit message)
    batch_scale, muon_scale = (ratio**0.5, ratio**0.5) if ratio > 1 else (ratio**0.125, ratio**-0.2)
    width_scale = batch_scale * (config.n_embd / 768) ** -0.5
    table = {
        "matrix": dict(kind="muon", lr=matrix_lr * muon_scale),  # the loop sets momentum and weight decay
        "head": dict(lr=unembedding_lr * width_scale, betas=(0.8, 0.96), weight_decay=0.01),
        "embedding": dict(lr=embedding_lr * width_scale, betas=(0.8, 0.995), weight_decay=0.001),
        "value_embedding": dict(lr=0.5 * embedding_lr * width_scale, betas=(0.8, 0.995), weight_decay=0.01),
        "resid_scalar": dict(lr=0.01 * scalar_lr * batch_scale, betas=(0.8, 0.95), weight_decay=0.05),
        "x0_scalar": dict(lr=scalar_lr * batch_scale, betas=(0.96, 0.95)),
        "smear": dict(lr=0.4 * scalar_lr * batch_scale, betas=(0.8, 0.95)),
    }
    for role in ("resid_scalar", "x0_scalar", "smear"):  # their first gradients are rounding alone
        table[role]["eps"] = 1e-8
    roles = raw_model.parameter_roles()
    groups = [{"kind": "adamw", **table[role], "params": params} for role, params in roles.items()]
    # compiling the updates costs 25 s on a CPU and gains 4% of a step there
    return MuonAdamW(groups, orthogonalize_dtype=compute_dtype, compile=compile and on_gpu)


def forward_backward(rows):
    """Accumulate gradients over this rank's rows (R, T + 1), micro_rows at a time -> the sum of nats."""
    nats = torch.zeros((), device=device)
    for micro in rows.split(micro_rows):
        loss = model(micro[:, :-1], micro[:, 1:])
        (loss / (len(rows) * max_seq_len)).backward()  # the mean of this rank; the optimizer averages ranks
        nats += loss.detach()
    return nats


# -----------------------------------------------------------------------------
# The trial: a few steps on random rows compile, find the batch that fits, and measure the speed


def largest_divisor(number, limit):
    """The largest divisor of a number that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def rows_of(batch_size):
    """Tokens per step -> (whole rows per step, rows per rank, rows per micro-step)."""
    rows = max(1, round(batch_size / max_seq_len))
    if rows % world_size:
        below, above = (max(1, rows // world_size + n) * world_size * max_seq_len for n in (0, 1))
        fail(
            f"--total-batch-size {batch_size}: {world_size} processes cannot share {rows} rows."
            f"\nThe nearest sizes that they can share: {below} and {above}."
        )
    per_rank = rows // world_size
    return rows, per_rank, largest_divisor(per_rank, min(per_rank, micro_rows))


FITS, NO_COMPILER, TOO_LARGE = 2, 1, 0


def try_rows():
    """Forward and backward over micro_rows random rows -> (the sum of nats, how it went)."""
    try:
        nats = forward_backward(torch.randint(vocab_size, (micro_rows, max_seq_len + 1), device=device))
        synchronize()
    except Exception as error:
        if report.is_out_of_memory(error):
            return None, TOO_LARGE
        if not (compile and settings["compile"] is None):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        say(report.wrap(f"trial    going on without torch.compile, which does not work here: {reason}"))
        return None, NO_COMPILER
    crowded = on_gpu and torch.cuda.max_memory_reserved() > 0.95 * torch.cuda.mem_get_info()[1]
    return nats, TOO_LARGE if crowded and not device_batch_size else FITS


micro_rows = device_batch_size or max(1, (65_536 if on_gpu else 2_048) // max_seq_len)
if total_batch_size:
    micro_rows = rows_of(total_batch_size)[2]
optimizer = build_optimizer(total_batch_size or 2**19)
what = "compiling, which can take a minute the first time, and " if compile else ""
say(f"trial    {what}measuring steps of {micro_rows} × {max_seq_len} tokens")
timings = []
while len(timings) < 4:
    begin = time.perf_counter()
    nats, outcome = try_rows()
    middle = time.perf_counter()
    if world_size > 1:  # what one rank cannot do, none does
        outcome = torch.tensor(outcome, device=device)
        dist.all_reduce(outcome, dist.ReduceOp.MIN)
    if outcome == FITS:
        optimizer.step(nats)  # the gradients stay: training too has some in memory as it goes forward
        synchronize()
        timings.append((middle - begin, time.perf_counter() - middle))
        continue
    timings = []
    if outcome == NO_COMPILER:
        model, compile = raw_model, False
        optimizer = build_optimizer(total_batch_size or 2**19)
    elif micro_rows == 1:
        fail(f"not even one row of {max_seq_len} tokens fits.\nTry a smaller --depth or --max-seq-len.")
    else:
        smaller = largest_divisor(micro_rows, micro_rows - 1)
        if device_batch_size:
            fail(f"{micro_rows} rows of {max_seq_len} do not fit.\nTry --device-batch-size {smaller}.")
        micro_rows = smaller
        optimizer.zero_grad(set_to_none=True)
        gc.collect()  # what the failed attempt still holds
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
optimizer.zero_grad(set_to_none=True)
if on_gpu:
    torch.cuda.reset_peak_memory_stats()
micro_time, optimizer_time = from_rank_0([min(t) for t in zip(*timings[1:])])  # the first one compiled
clock.lap("trial")

# -----------------------------------------------------------------------------
# Horizon and batch

if not horizons:
    minutes, target_param_data_ratio = (None, 12.0) if on_gpu else (5.0, None)
eval_every = eval_every or (250 if on_gpu else 100)
# until the first evaluation has been timed: a forward pass is about a third of a step
eval_time = math.ceil(len(validation.places) / (micro_rows * world_size)) * micro_time / 2
closing_time = 4.0 + sum(num_params.values()) / 50e6  # the last checkpoint, sample and report


def time_left():
    """Seconds of --minutes left for training, on this rank's clock; what a resumed run took before counts."""
    elapsed = sum(clock.spent.values()) + time.time() - clock.last - clock.spent["corpus"]
    return max(0.0, 60 * minutes - elapsed - eval_time - closing_time)


tokens_ahead = None  # unknown where steps are given and the batch is not
if minutes:
    tokens_ahead = from_rank_0(time_left()) / micro_time * micro_rows * max_seq_len * world_size
elif target_flops:
    tokens_ahead = target_flops / num_flops_per_token
elif target_param_data_ratio:
    tokens_ahead = target_param_data_ratio * (num_params["matrix"] + num_params["head"])
if total_batch_size is None and tokens_ahead is None:
    total_batch_size = 2**19 if on_gpu else 2**12
elif total_batch_size is None:
    # the best batch grows with tokens^0.383 (arXiv 2505.13738); short runs need some 450 steps all the same
    best = min(2**19 * (tokens_ahead / 1.5e9) ** 0.383, tokens_ahead / 450)
    share = world_size * max_seq_len  # not every world size is a power of 2
    total_batch_size = max(2 ** round(math.log2(max(1, best))), micro_rows * share)
    total_batch_size = round(total_batch_size / share) * share
rows_per_step, rows_per_rank, micro_rows = rows_of(total_batch_size)
total_batch_size, device_batch_size = rows_per_step * max_seq_len, micro_rows
planned_seconds = rows_per_rank // micro_rows * micro_time + optimizer_time  # of a step, until one is timed
if not minutes:
    num_iterations = settings["num_iterations"] or max(1, round(tokens_ahead / total_batch_size))
    horizon_is_final = True
elif not horizon_is_final or minutes != state["settings"]["minutes"]:
    num_iterations = max(1, step + int(from_rank_0(time_left()) / planned_seconds))
    horizon_is_final = step > (1 - warmdown_ratio) * num_iterations
    # the horizon will still move a little, and nothing before the decay may depend on it
    warmup_steps = min(warmup_steps, num_iterations // 15)
if resumed_from:
    decay_start = (1 - warmdown_ratio) * state["num_iterations"]
    if step > decay_start and num_iterations > state["num_iterations"]:
        say(f"resume   the learning rate decays since step {decay_start:.0f}: it will rise once more")
if weight_decay is None:  # longer runs want less (arXiv 2405.13698): it adds up to the same over a run
    planned_tokens = num_iterations * total_batch_size
    weight_decay = 0.28 * min(1.0, (total_batch_size / 2**19) ** 0.5 * 1.5e9 / planned_tokens)

raw_model.init_weights(device, seed)  # anew: the trial leaves no trace
optimizer = build_optimizer(total_batch_size)

clock.lap("setup")
margin = 1.25 if minutes else 1.0  # a timed horizon may still grow
dataloader.fetch_more(corpus, int(margin * num_iterations * rows_per_step), max_seq_len, tell_data)
clock.lap("corpus")
loader = dataloader.DataLoader(corpus, max_seq_len, rows_per_step, seed, device, rank, world_size)
if resumed_from:
    try:
        raw_model.load_state_dict(checkpoint.load(resumed_from, "model"))
        optimizer.load_state_dict(checkpoint.load(resumed_from, "optimizer"))
        loader.load_state_dict(state["data"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        fail(f"{resumed_from} does not fit these settings: {reason}.\nResume with those of its run.")

# -----------------------------------------------------------------------------
# The run's folder

peak, peak_source = report.find_peak(device, device_name, compute_dtype, peak_tflops)
run_config = {
    # the horizon stays what was asked for: state.json and summary.json have the steps that came of it
    "settings": {n: globals()[n] if n != "num_iterations" or n in horizons else None for n in settings},
    "given": given_before | given,
    "model": asdict(config),
    "num_params": num_params,
    "num_flops_per_token": num_flops_per_token,
    "num_flops_per_token_causal": raw_model.num_flops_per_token(exact_causal=True),
    "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, **corpus.counts},
    "device": device_name,
    "mfu_peak": peak,
    "mfu_peak_source": peak_source,
    "world_size": world_size,
    "versions": report.versions(),
}
if rank == 0:
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = lock or checkpoint.lock(run_folder)  # held to the end, and let go by any end
        report.replace(run_folder / "config.json", json.dumps(run_config, indent=2))
        if not (run_folder / "tokenizer" / "tokenizer.json").exists():  # never touch a good one
            dataloader.save_tokenizer(corpus.tokenizer, run_folder / "tokenizer")
        report.cut_log(run_folder, step if resumed_from else -1)
    except OSError as error:
        fail(f"{run_folder} cannot be written: {error.strerror}.\nChoose another --out-dir or make room.")
log = report.Log(run_folder if rank == 0 else None, wandb, run_config)
attention = attention_backend(config, compute_dtype, device, compile)
say(report.header(run_config, compile, attention, num_iterations, planned_seconds, run_folder))
log.write("event", step=step, event="resumed" if resumed_from else "started", num_iterations=num_iterations)

# -----------------------------------------------------------------------------
# What the loop calls: sample, save, give up; and what signals ask of it


def sample():
    """What the model writes from nothing and from the start of a validation row: [[prompt, text], ...]."""
    texts = []
    for number, prompt in enumerate([[corpus.bos], validation.prompt(24)]):
        new = raw_model.generate(prompt, 128, seed=seed + number, bos=corpus.bos)
        texts.append([corpus.tokenizer.decode(prompt[1:]), corpus.tokenizer.decode(new)])
    return texts


def save():
    """Begin to write a checkpoint, if all weights are finite -> whether it began. A collective call."""
    if (strange := optimizer.different_rank()) is not None:
        give_up(f"the weights of rank {strange} differ from those of rank 0; nothing is saved.")
    if not all(p.isfinite().all() for p in raw_model.parameters()):
        say("save     left out: the weights are not finite")
        return False
    tensors = {"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}
    state = {name: globals()[name] for name in STATE}
    state |= {name: run_config[name] for name in ("settings", "given", "versions")}
    state |= {"spent": dict(clock.spent), "data": loader.state_dict()}
    if rank == 0:
        tell_saved(saver.save(step, tensors, state))
    return True


def give_up(reason):
    """The training has failed: say why, and which checkpoint is good; leave a report; exit status 1."""
    if rank == 0:
        tell_saved(saver.wait())
        log.write("event", step=step, event="failed", reason=reason)
        good, _ = checkpoint.newest_valid(checkpoints)
        say(f"error: {reason}\nThe last good checkpoint: {good or 'none'}.")
        log.close()
        with contextlib.suppress(OSError, ValueError):
            report.write_report(run_folder)
    sys.exit(1)


def tell_saved(outcome, last=False):
    """Log how a save ended -> whether it failed."""
    folder, error = outcome or (None, None)
    if folder:  # under its own step: the loop has gone on meanwhile
        log.write("event", step=int(folder.name.removeprefix("step_")), event="saved", folder=folder.name)
    if error:
        log.write("event", step=step, event="save_failed", error=str(error))
        trouble = "error: the last save failed" if last else "save     failed, the next one tries again"
        say(report.wrap(f"{trouble}: {error}"))
    return bool(error)


saver = checkpoint.Saver(checkpoints, keep_checkpoints, pin=on_gpu, synchronize=synchronize)
signal_seen, save_asked = 0, False  # by this rank; all ranks act together, at the end of a window


def on_signal(number, frame):
    global signal_seen, save_asked
    if number == signal.SIGUSR1:
        save_asked = True
    else:
        signal_seen = number
        if number == signal.SIGINT:  # a second Ctrl-C, SIGTERM by way of torchrun, stops at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def expect_progress():
    """From now on HANG_SECONDS may pass until the next call; then every rank shows its stacks and ends."""
    if world_size > 1:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has its way
        signal.signal(number, on_signal)

# -----------------------------------------------------------------------------
# The loop. Host and device meet only at the end of a window of steps

start_step, last_saved, last_save_time = step, step if resumed_from else -1, time.time()
time_before = total_training_time  # of earlier starts, perhaps on other machines
seconds_per_step = planned_seconds  # until steps of this start are timed
tokens = loader.cursor * max_seq_len
flops_so_far = num_flops_per_token * tokens
next_length, skips_in_a_row, samples = 1, 0, []
interruption, saving_is_due = 0, False  # the signal that stops the run; is a checkpoint due
clock.lap("setup")
while True:
    # between windows: evaluate, sample, save, stop
    at_end = step >= num_iterations
    evaluation_is_due = step == 0 or at_end or (eval_every > 0 and step % eval_every == 0)
    if evaluation_is_due and val_step != step and not interruption:
        expect_progress()
        begin = time.time()
        batches = validation.batches(micro_rows, device, rank, world_size)
        val_bpb = report.bits_per_byte(model, batches, device)
        min_val_bpb, val_step = min(min_val_bpb, val_bpb), step
        eval_time = time.time() - begin
        figures = {"step": step, "val_bpb": val_bpb, "min_val_bpb": min_val_bpb}
        figures |= {"total_training_flops": flops_so_far, "total_training_time": total_training_time}
        log.write("val", **figures)
        say(report.val_line(figures, num_iterations))
        clock.lap("evaluation")
    sample_is_due = at_end or (sample_every > 0 and step > start_step and step % sample_every == 0)
    if sample_is_due and rank == 0 and not interruption:
        samples = sample()
        say(report.show_samples(samples))
        clock.lap("sampling")
    saving_is_due |= at_end or interruption > 0 or (save_every > 0 and step > 0 and step % save_every == 0)
    if saving_is_due and last_saved != step:
        expect_progress()
        last_saved = step if save() else last_saved
        last_save_time = time.time()
        clock.lap("saving")
    saving_is_due = False
    if at_end or interruption:
        break

    # a window of steps: nothing in it waits for the device
    expect_progress()
    window_end = min(step + next_length, num_iterations)
    if step < start_step + 10:  # caches and allocators warm up: these steps are not in total_training_time
        window_end = min(window_end, start_step + 10)
    for period in (eval_every, sample_every, save_every):
        if period > 0:
            window_end = min(window_end, step - step % period + period)
    if not horizon_is_final:  # close it where the decay would begin: there the horizon is made final
        window_end = min(window_end, max(step + 1, math.ceil((1 - warmdown_ratio) * num_iterations)))
    losses, norms, skips = [], [], []
    wait_before, window_start = loader.wait_time, time.perf_counter()
    while step < window_end and not (signal_seen and world_size == 1):
        lrm = lr_multiplier(step, num_iterations, warmup_steps, warmdown_ratio, final_lr_frac)
        momentum = muon_momentum(step, num_iterations, warmdown_ratio)
        decay = weight_decay * weight_decay_multiplier(step, num_iterations, warmdown_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay
        rows = next(loader)
        nats = forward_backward(rows)
        optimizer.step(nats)
        optimizer.zero_grad(set_to_none=True)
        losses.append(nats)
        norms.append(optimizer.grad_norm)
        skips.append(optimizer.skipped)
        step += 1
    if not losses:  # a signal came between the windows
        interruption = signal_seen
        continue

    # its end: one transfer, one synchronization, one record
    numbers = torch.stack([torch.stack(losses), torch.stack(norms), torch.stack(skips)])  # (3, steps)
    if world_size > 1:
        dist.all_reduce(numbers[0])
    losses, norms, skips = numbers.tolist()
    synchronize()
    dt = (time.perf_counter() - window_start) / len(losses)
    for loss, skipped in zip(losses, skips):
        train_loss = math.nan if skipped else loss / total_batch_size  # mean over the global batch, in nats
        if skipped:
            skipped_steps, skips_in_a_row = skipped_steps + 1, skips_in_a_row + 1
        else:
            smooth_train_loss = report.update_ema(smooth_train_loss, train_loss, ema_beta)
            skips_in_a_row = 0
    debiased_smooth_loss = report.debias(smooth_train_loss, ema_beta, step - skipped_steps)
    if step > start_step + 10:
        total_training_time += dt * len(losses)
        seconds_per_step = (total_training_time - time_before) / (step - start_step - 10)
    tokens = loader.cursor * max_seq_len
    flops_so_far = num_flops_per_token * tokens
    figures = {
        "step": step,
        "train_loss": train_loss,
        "train_loss_ema": debiased_smooth_loss,
        "lrm": lrm,
        "muon_momentum": momentum,
        "weight_decay": decay,
        "grad_norm": norms[-1],
        "dt": dt,
        "tok_per_sec": total_batch_size / dt,
        "mfu": num_flops_per_token * total_batch_size / dt / (peak * world_size),
        "data_wait": (loader.wait_time - wait_before) / (dt * len(losses)),
        "tokens": tokens,
        "total_training_flops": flops_so_far,
        "total_training_time": total_training_time,
        "epoch": loader.epoch,
        "peak_memory": report.peak_memory(device),
        "skipped_steps": skipped_steps,
    }
    log.write("step", **figures)
    if any(skips):
        places = range(loader.cursor - len(skips) * rows_per_step, loader.cursor, rows_per_step)
        cursors = [place for place, skipped in zip(places, skips) if skipped]  # where those batches begin
        log.write("event", step=step, event="skipped_step", skipped_steps=skipped_steps, cursors=cursors)
    pace = seconds_per_step + (eval_time / eval_every if eval_every > 0 else 0.0)
    say(report.step_line(figures, num_iterations, val_bpb, peak_source, (num_iterations - step) * pace))
    if skips_in_a_row >= 5:
        forward_backward(rows)  # once more, to name the culprit
        culprit = optimizer.not_finite() or "the loss"
        log.write("event", step=step, event="not_finite", parameter=culprit)
        give_up(f"loss or gradient not finite {skips_in_a_row} times in a row, first in {culprit}.")

    # rank 0 decides, and all ranks hear of it
    tell_saved(saver.poll())
    if not horizon_is_final:
        num_iterations = step + int(time_left() / pace)
        if step >= (1 - warmdown_ratio) * num_iterations:  # the decay begins here, and it shall end in time
            horizon_is_final = True
            if warmdown_ratio < 1:  # exactly here, so that --num-iterations repeats the run
                num_iterations = max(step, int(step / (1 - warmdown_ratio)))
            log.write("event", step=step, event="horizon", num_iterations=num_iterations)
    next_length = log_every or (1 if step < start_step + 10 else min(10, max(1, int(0.5 / dt))))
    next_length = min(next_length, max(1, int(10 / dt)))  # signals and saves wait for a window's end
    saving_is_due |= save_asked or 0 < 60 * save_minutes < time.time() - last_save_time
    interruption, save_asked = signal_seen, False
    if world_size > 1:
        decision = [num_iterations, horizon_is_final, next_length, saving_is_due] if rank == 0 else [0] * 4
        decision = torch.tensor([*decision, signal_seen], dtype=torch.int64, device=device)  # of any rank
        dist.all_reduce(decision, dist.ReduceOp.MAX)
        num_iterations, horizon_is_final, next_length, saving_is_due, interruption = decision.tolist()
    if step == start_step + 10:
        gc.collect()
        gc.freeze()  # what lives now lives to the end
    clock.lap("training")

# -----------------------------------------------------------------------------
# The end

faulthandler.cancel_dump_traceback_later()
failed = tell_saved(saver.wait(), last=True) or last_saved != step
if interruption:
    say(f"stopped  by {signal.Signals(interruption).name} after step {step}")
    local = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node={local} train.py --" if world_size > 1 else "python train.py"
    where = f" --out-dir {shlex.quote(out_dir)}" if "out_dir" in given else ""
    say(f"continue with: {start}{where} --run {shlex.quote(run)} --resume")
event = "interrupted" if interruption else "finished"
log.write("event", step=step, event=event, num_iterations=num_iterations)
clock.lap("saving")
tok_per_sec = total_batch_size / (seconds_per_step if step > start_step + 10 else dt)
summary = {
    "val_bpb": val_bpb,
    "min_val_bpb": min_val_bpb,
    "train_loss_ema": report.debias(smooth_train_loss, ema_beta, step - skipped_steps),
    "steps": step,
    "tokens": tokens,
    "total_training_flops": flops_so_far,
    "total_training_time": total_training_time,
    "wall_time": sum(clock.spent.values()),
    "tok_per_sec": tok_per_sec,
    "mfu": num_flops_per_token * tok_per_sec / (peak * world_size),
    "mfu_peak": peak,
    "mfu_peak_source": peak_source,
    "peak_memory": report.peak_memory(device),
    "num_params": sum(num_params.values()),
    "num_flops_per_token": num_flops_per_token,
    "depth": depth,
    "device": device_name,
    "world_size": world_size,
    "skipped_steps": skipped_steps,
    "time": clock.spent,
    "samples": samples,
}
if rank == 0:
    try:
        report.finish(run_folder, summary)
    except (OSError, ValueError) as error:  # the folder is full, or has vanished
        failed = True
        say(report.wrap(f"error: the report failed: {error}"))
    log.close(summary)
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
sys.exit(1 if failed else 128 + interruption if interruption else 0)
