"""
onedial: train a GPT from text to report. One dial, --depth, sets the model; --minutes sets how long it may take.

    python train.py                                                # a laptop: five minutes, no GPU, no network
    python train.py --depth 12                                     # one GPU
    torchrun --standalone --nproc_per_node=8 train.py --depth 12   # eight

Every setting below is also a flag (--max-seq-len 1024); None is `auto`. Read on: it is one story.
"""

import time

process_start = time.time()  # --minutes counts from here, the slow imports included

import argparse
import difflib
import gc
import json
import math
import os
import re
import signal
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation near the limit

import torch
import torch.distributed as dist

import checkpoint
import dataloader
import report
from model import GPT, GPTConfig, attention_backend
from optim_muon import MuonAdamW, lr_multiplier, muon_momentum, weight_decay_multiplier

# -----------------------------------------------------------------------------
# Settings. None is auto: the value that is found is printed and saved

# run
run: str | None = None  # name of the run, a folder in out_dir (auto: d<depth>-<date>-<time>)
out_dir: str = "out"  # where runs are written
resume: bool = False  # continue the newest run, or --run NAME, from its newest valid checkpoint
wandb: bool = False  # log to Weights & Biases too
# device
device_type: str | None = None  # cuda, mps or cpu (auto: the first of them that is there)
dtype: str | None = None  # of activations: bfloat16 or float32 (auto: bfloat16 on GPUs that have it)
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
weight_decay: float = 0.28  # of the matrices
warmup_steps: int = 40  # of the learning rate, at most a tenth of the run
warmdown_ratio: float = 0.65  # share of the run over which the learning rate decays
final_lr_frac: float = 0.05  # what it decays to, as a share of the peak
# evaluation, log, checkpoints; -1 turns a periodic action off
eval_every: int | None = None  # steps between evaluations (auto: 250 on CUDA, else 100)
eval_tokens: int | None = None  # validation tokens used (auto: 10,485,760 on CUDA, else 32,768)
log_every: int | None = None  # steps between records (auto: each of the first 10, then about two a second)
sample_every: int = -1  # steps between samples; the end always has one
save_every: int = -1  # steps between checkpoints
save_minutes: float = 10.0  # minutes between checkpoints
keep_checkpoints: int = 2  # how many of the newest are kept
peak_tflops: float | None = None  # peak of one device, for the MFU (auto: as published, else measured)

# -----------------------------------------------------------------------------
# Flags, derived from the settings above

HORIZONS = ("num_iterations", "minutes", "target_flops", "target_param_data_ratio")
# settings of the machine or the call, not of the run: --resume finds them anew
NOT_RESUMED = "run out_dir resume wandb device_type dtype compile device_batch_size log_every peak_tflops".split()
SHARES = ("warmdown_ratio", "final_lr_frac")
LEAST = {"vocab_size": 257, "head_dim": 2, "max_seq_len": 2, "minutes": 0.05, "seed": 0, "warmup_steps": 0}
LEAST |= dict.fromkeys(("warmdown_ratio", "final_lr_frac", "weight_decay"), 0)
LEAST |= dict.fromkeys(("eval_every", "sample_every", "save_every", "save_minutes"), -1)
CHOICES = {"device_type": ("cuda", "mps", "cpu"), "dtype": ("bfloat16", "float32")}


def fail(message):
    """Bad settings, data or checkpoint: what is wrong and what to do, in two lines; exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def flag(name):
    return "--" + name.replace("_", "-")


def reader(type_name, optional):
    """-> a function that turns a flag's text into a value of that type."""

    def read(text):
        if optional and text == "auto":
            return None
        try:
            if type_name == "bool":
                return {"on": True, "true": True, "off": False, "false": False}[text.lower()]
            return {"int": int, "float": float, "str": str}[type_name](text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r} is not of type {type_name}") from None

    return read


settings = {}
parser = argparse.ArgumentParser(usage="python train.py [--NAME VALUE ...]", allow_abbrev=False)
parser.error = lambda message: fail(f"{message}.\n`python train.py --help` lists all settings.")
declaration = re.compile(r"^(\w+): (\w+)( \| None)? = .+?  # (.+)$", re.MULTILINE)
for name, type_name, optional, comment in declaration.findall(Path(__file__).read_text(encoding="utf-8")):
    settings[name] = value = globals()[name]
    shown = "auto" if value is None else {True: "on", False: "off"}[value] if type_name == "bool" else value
    options = {"help": f"{comment} [{shown}]".replace("%", "%%"), "default": argparse.SUPPRESS, "dest": name}
    options |= {"type": reader(type_name, optional), "metavar": type_name.upper()}
    if type_name == "bool":
        options |= {"nargs": "?", "const": True, "metavar": "on|off"}
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(*dict.fromkeys((flag(name), f"--{name}")), **options)
given, unknown = parser.parse_known_args()
given = vars(given)
if unknown:
    near = difflib.get_close_matches(unknown[0].split("=")[0], map(flag, settings), n=1)
    hint = f"Did you mean {near[0]}?" if near else "`python train.py --help` lists all settings."
    fail(f"unknown setting {unknown[0]}.\n{hint}")
settings |= given

run_folder = Path(settings["out_dir"]) / settings["run"] if settings["run"] else None
if settings["resume"] and not run_folder:
    known = sorted(Path(settings["out_dir"]).glob("*/config.json"), key=os.path.getmtime)
    run_folder = known[-1].parent if known else fail(f"--resume: no run in {settings['out_dir']}.\nStart one without it.")
if settings["resume"] and (run_folder / "config.json").exists():
    saved = json.loads((run_folder / "config.json").read_text())["settings"]
    if any(given.get(name) is not None for name in HORIZONS):
        saved = {name: value for name, value in saved.items() if name not in HORIZONS}
    for name, value in saved.items():
        if name in settings and name not in NOT_RESUMED and name not in given:
            settings[name] = value
        elif name in given and given[name] != value and name not in NOT_RESUMED:
            print(f"resume   {name} {value} -> {given[name]}")
elif run_folder and run_folder.exists() and not settings["resume"]:
    fail(f"the run {run_folder} exists.\nContinue it with --resume or choose another --run.")

for name, value in settings.items():
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not LEAST.get(name, 1e-9 if isinstance(value, float) else 1) <= value < math.inf:
            fail(f"{flag(name)} {value} is out of range.\nGive at least {LEAST.get(name, 'more than 0')}.")
    if value is not None and value not in CHOICES.get(name, (value,)):
        fail(f"{flag(name)} {value} is unknown.\nChoose one of: {', '.join(CHOICES[name])}.")
    if name in SHARES and value > 1:
        fail(f"{flag(name)} {value} is a share of the whole.\nGive at most 1.")
horizons = [name for name in HORIZONS if settings[name] is not None]
if len(horizons) > 1:
    fail(f"two horizons were given: {flag(horizons[0])} and {flag(horizons[1])}.\nGive at most one.")
if (settings["vocab_size"] or 0) > 65535:
    fail(f"--vocab-size {settings['vocab_size']}: tokens are stored in 16 bits.\nGive at most 65535.")
if (settings["head_dim"] or 2) % 2:
    fail(f"--head-dim {settings['head_dim']}: rotary positions turn pairs of channels.\nGive an even number.")
globals().update(settings)

# -----------------------------------------------------------------------------
# Device, precision, process group

found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
device_type = device_type or found
if not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[device_type].is_available():
    fail(f"--device-type {device_type}: this machine or this build of torch has none.\nLeave it out to use {found}.")
rank, local_rank, world_size = (int(os.environ.get(key, n)) for key, n in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), "001"))
if device_type == "cuda":
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    device_name, has_bf16 = torch.cuda.get_device_name(), torch.cuda.get_device_capability() >= (8, 0)
else:
    device, device_name, has_bf16 = torch.device(device_type), report.processor_name(), False
on_gpu = device_type == "cuda"
dtype = dtype or ("bfloat16" if has_bf16 else "float32")
compute_dtype = getattr(torch, dtype)
synchronize = report.synchronizer(device_type)
say = print if rank == 0 else lambda *args, **kwargs: None

# -----------------------------------------------------------------------------
# Data: prepared before the process group exists, so that no collective waits for a tokenizer

data = data or ("fineweb" if on_gpu else "stdlib")
max_seq_len = max_seq_len or (2048 if on_gpu else 512)
eval_tokens = eval_tokens or (10_485_760 if on_gpu else 32_768)
clock = report.Clock(process_start)
clock.lap("setup")
try:
    corpus = dataloader.prepare(data, vocab_size, say=lambda line: say(f"data     {line}", flush=True))
    clock.lap("preparation of the corpus")
    validation = dataloader.ValidationRows(corpus, max_seq_len, eval_tokens)
except dataloader.DataError as error:
    fail(error)
vocab_size = corpus.tokenizer.n_vocab
if world_size > 1:
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)

# -----------------------------------------------------------------------------
# Model: everything follows from depth

depth = depth or (12 if on_gpu else 4)
head_dim = head_dim or (128 if depth >= 8 else 64)
n_head = math.ceil(depth * aspect_ratio / head_dim)
config = GPTConfig(vocab_size, max_seq_len, n_layer=depth, n_head=n_head, n_embd=n_head * head_dim)
with torch.device("meta"):
    raw_model = GPT(config, compute_dtype)
raw_model.init_weights(device, seed)
num_params = raw_model.num_params()
num_scaling_params = num_params["matrix"] + num_params["head"]
num_flops_per_token = raw_model.num_flops_per_token()
if compile is None:
    compile = device_type != "mps" and sys.platform != "win32"
model = torch.compile(raw_model, dynamic=False) if compile else raw_model

# -----------------------------------------------------------------------------
# Optimizer: one table, role -> settings


def build_optimizer(tokens_per_step):
    """MuonAdamW over all roles, with learning rates for this batch size and width."""
    batch_scale = (tokens_per_step / 2**19) ** LR_BATCH_POWER
    width_scale = batch_scale * (config.n_embd / 768) ** -0.5
    table = {
        "matrix": dict(kind="muon", lr=matrix_lr * batch_scale, momentum=0.85, weight_decay=weight_decay),
        "head": dict(lr=unembedding_lr * width_scale, betas=(0.8, 0.96), weight_decay=0.01),
        "embedding": dict(lr=embedding_lr * width_scale, betas=(0.8, 0.995), weight_decay=0.001),
        "value_embedding": dict(lr=0.5 * embedding_lr * width_scale, betas=(0.8, 0.995), weight_decay=0.01),
        "resid_scalar": dict(lr=0.01 * scalar_lr * batch_scale, betas=(0.8, 0.95), weight_decay=0.05),
        "x0_scalar": dict(lr=scalar_lr * batch_scale, betas=(0.96, 0.95)),
        "smear": dict(lr=0.4 * scalar_lr * batch_scale, betas=(0.8, 0.95)),
    }
    groups = [{"kind": "adamw", **table[role], "params": params} for role, params in raw_model.parameter_roles().items()]
    return MuonAdamW(groups, orthogonalize_dtype=torch.bfloat16 if on_gpu else torch.float32, compile=compile and on_gpu)


LR_BATCH_POWER = 0.2  # √batch is the rule at GPU scale; at 2,048 tokens it is 5 times too timid: measured, see README
optimizer = build_optimizer(total_batch_size or 2**19)


def forward_backward(rows, micro_rows):
    """Accumulate the gradients of this rank's rows (R, T + 1) -> their sum of nats, a 0-D tensor."""
    nats = torch.zeros((), device=device)
    for micro in rows.split(micro_rows):
        loss = model(micro[:, :-1], micro[:, 1:])
        (loss / (rows.size(0) * max_seq_len)).backward()  # the mean over this rank; the optimizer averages ranks
        nats += loss.detach()
    return nats


# -----------------------------------------------------------------------------
# The trial: one short run on random rows compiles, finds the batch that fits, and measures the speed


def divide(rows_per_step, at_most):
    """-> (rows of one rank and step, the largest divisor of that which is ≤ at_most)."""
    if rows_per_step % world_size:
        below = max(world_size, rows_per_step - rows_per_step % world_size)
        fail(
            f"--total-batch-size {rows_per_step * max_seq_len} is {rows_per_step} rows of {max_seq_len}, not divisible by "
            f"{world_size} processes.\nNearest sizes that are: {below * max_seq_len} and {(below + world_size) * max_seq_len}."
        )
    rows = rows_per_step // world_size
    return rows, max(n for n in range(1, min(rows, at_most) + 1) if rows % n == 0)


micro_rows = device_batch_size or max(1, (65_536 if on_gpu else 2_048) // max_seq_len)
if total_batch_size:
    total_rows = max(1, round(total_batch_size / max_seq_len))
    micro_rows = divide(total_rows, micro_rows)[1]
say(f"trial    {'compiling and ' * compile}measuring a batch of {micro_rows} × {max_seq_len} tokens", flush=True)
timings = []
while len(timings) < 4:
    rows = torch.randint(vocab_size, (micro_rows, max_seq_len + 1), device=device)
    try:
        synchronize()
        start = time.perf_counter()
        nats = forward_backward(rows, micro_rows)
        synchronize()
        middle = time.perf_counter()
        optimizer.step(nats)
        synchronize()
        timings.append((middle - start, time.perf_counter() - middle))
    except torch.OutOfMemoryError:
        if device_batch_size or micro_rows == 1:
            fail(f"{micro_rows} rows of {max_seq_len} tokens do not fit on {device_name}.\nTry --device-batch-size {max(1, micro_rows // 2)} or less.")
        micro_rows, timings = max(n for n in range(1, micro_rows) if micro_rows % n == 0), []
    except Exception as error:
        if not compile or given.get("compile"):
            raise
        say(f"trial    torch.compile does not work here ({type(error).__name__}): eager mode, slower")
        model, compile, timings = raw_model, False, []
    optimizer.zero_grad(set_to_none=True)
micro_time, optimizer_time = (min(times) for times in zip(*timings[1:]))  # the first one compiled
if world_size > 1:  # every rank plans with rank 0's figures
    shared = torch.tensor([micro_time, optimizer_time], device=device)
    dist.broadcast(shared, 0)
    micro_time, optimizer_time = shared.tolist()
clock.lap("trial and compilation")

# -----------------------------------------------------------------------------
# Horizon and batch

if not horizons:
    minutes, target_param_data_ratio = (None, 12.0) if on_gpu else (5.0, None)
eval_every = eval_every or (250 if on_gpu else 100)
eval_batches = math.ceil(len(validation.places) / (micro_rows * world_size))
eval_time = eval_batches * micro_time / 2  # a forward pass is a third of a step; a guess until the first evaluation
closing_time = 5.0  # final checkpoint, sample, report


def time_left():
    """Seconds of the --minutes budget that are left for training."""
    spent = time.time() - process_start - clock.spent["preparation of the corpus"] + elapsed_before
    return 60 * minutes - spent - closing_time - eval_time


elapsed_before = 0.0  # wall time of the run before it was resumed
if minutes:
    tokens_ahead = max(1.0, time_left()) / micro_time * micro_rows * max_seq_len * world_size
elif target_flops:
    tokens_ahead = target_flops / num_flops_per_token
elif target_param_data_ratio:
    tokens_ahead = target_param_data_ratio * num_scaling_params
else:
    tokens_ahead = None
if total_batch_size is None:
    if tokens_ahead is None:
        total_batch_size = 2**19 if on_gpu else 2**12
    else:  # the best batch grows with tokens^0.383 (arXiv 2505.13738); short runs need at least some 400 steps
        best = min(2**19 * (tokens_ahead / 1.5e9) ** 0.383, tokens_ahead / 400)
        total_batch_size = max(2 ** math.floor(math.log2(best)), micro_rows * max_seq_len * world_size)
total_rows = max(1, round(total_batch_size / max_seq_len))
total_batch_size = total_rows * max_seq_len
rows_per_rank, micro_rows = divide(total_rows, micro_rows)
accumulation = rows_per_rank // micro_rows
step_time = accumulation * micro_time + optimizer_time
if minutes:
    num_iterations = max(1, int(time_left() / step_time))
elif num_iterations is None:
    num_iterations = max(1, round(tokens_ahead / total_batch_size))
horizon_is_final = minutes is None

try:
    loader = dataloader.DataLoader(corpus, max_seq_len, total_rows, seed, device, rank, world_size)
except dataloader.DataError as error:
    fail(error)
if loader.order.rows_per_epoch < total_rows:
    fail(
        f"the corpus has {loader.order.rows_per_epoch} training rows of {max_seq_len} tokens, one batch needs {total_rows}."
        "\nGive more text, a smaller --total-batch-size or a smaller --max-seq-len."
    )
raw_model.init_weights(device, seed)  # anew: the trial has left no trace
optimizer = build_optimizer(total_batch_size)

# -----------------------------------------------------------------------------
# The run's folder, and its state

step = 0  # updates done
smooth_train_loss, ema_beta, losses_seen = 0.0, 0.9, 0  # exponential moving average of the loss, and its debiasing
min_val_bpb = val_bpb = math.inf  # only falls
total_training_time = 0.0  # without the first 10 steps after a start, evaluation, sampling and saving
timed_steps = 0  # the steps in it
skipped_steps = 0  # non-finite loss or gradient: nothing changed
samples = []

run = run_folder.name if run_folder else run or f"d{depth}-{datetime.now():%Y%m%d-%H%M%S}"
if world_size > 1:
    names = [run]
    dist.broadcast_object_list(names, 0)  # one clock decides
    run = names[0]
run_folder = Path(out_dir) / run
checkpoints = run_folder / "checkpoints"
resumed_from = None
if resume:
    resumed_from, reasons = checkpoint.newest_valid(checkpoints)
    for reason in reasons:
        say(f"resume   passed over: {reason}")
    if resumed_from:
        state = checkpoint.load(resumed_from, "state")
        try:
            raw_model.load_state_dict(checkpoint.load(resumed_from, "model"))
            optimizer.load_state_dict(checkpoint.load(resumed_from, "optimizer"))
            loader.load_state_dict(state["data"])
        except (RuntimeError, ValueError) as error:
            fail(f"{resumed_from} does not fit these settings: {str(error).splitlines()[-1].strip()}")
        step, smooth_train_loss, losses_seen = state["step"], state["smooth_train_loss"], state["losses_seen"]
        min_val_bpb, val_bpb = state["min_val_bpb"], state["val_bpb"]
        total_training_time, timed_steps = state["total_training_time"], state["timed_steps"]
        skipped_steps, elapsed_before = state["skipped_steps"], state["elapsed"]
        if state["horizon_is_final"] and not any(given.get(name) is not None for name in HORIZONS):
            num_iterations, horizon_is_final = state["num_iterations"], True
        elif minutes:
            num_iterations = step + max(0, int(time_left() / step_time))
    else:
        say(f"resume   no checkpoint in {run_folder}: starting at step 0")

peak, peak_source = report.find_peak(device, device_name, compute_dtype) if not peak_tflops else (peak_tflops * 1e12, "given")
clock.lap("setup")
resolved = {name: globals()[name] for name in settings}
if horizons != ["num_iterations"]:
    resolved["num_iterations"] = None  # the horizon is what was asked for; state.json holds the steps
record = {
    "settings": resolved,
    "given": given,
    "model": asdict(config),
    "num_params": num_params,
    "num_flops_per_token": num_flops_per_token,
    "num_flops_per_token_causal": raw_model.num_flops_per_token(exact_causal=True),
    "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "split": corpus.split, **corpus.counts},
    "device": device_name,
    "world_size": world_size,
    "versions": report.versions(),
}
if rank == 0:
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        (run_folder / "config.json").write_text(json.dumps(record, indent=2))
        dataloader.save_tokenizer(corpus.tokenizer, run_folder / "tokenizer")
        if resume:
            report.cut_log(run_folder, step)
    except OSError as error:
        fail(f"the run cannot be written to {run_folder}: {error.strerror}.\nMake room there or choose another --out-dir.")
log = report.Log(run_folder if rank == 0 else None, wandb, record)
plan = (
    f"{num_iterations:,} steps × {total_batch_size:,} tokens ({accumulation} × {micro_rows} × {max_seq_len:,}) · "
    f"{num_iterations * total_batch_size * num_flops_per_token:.2g} FLOPs · "
    f"about {report.duration(num_iterations * step_time)}"
)
say(report.header(record, compute_dtype, compile, attention_backend(device), peak, peak_source, plan))
if resumed_from:
    say(f"resume   {resumed_from} at step {step}")
log.write("event", step=step, event="resumed" if resumed_from else "started")

# -----------------------------------------------------------------------------
# What happens between windows: evaluate, sample, save


def evaluate():
    """val_bpb on the fixed validation rows, over all ranks; the model in training uses the same compiled graph."""
    batches = validation.batches(micro_rows, device, rank, world_size)
    bpb = report.bits_per_byte(model, batches, device)
    return bpb


def sample():
    """What the model writes from nothing, and from the start of a validation document."""
    eos = corpus.bos
    prompts = [[corpus.bos], validation.prompt(32)]
    texts = []
    for number, prompt in enumerate(prompts):
        new = raw_model.generate(prompt, 96, temperature=0.8, top_k=50, seed=seed + number, bos=eos)
        texts.append([corpus.tokenizer.decode(prompt[1:]), corpus.tokenizer.decode(new)])
    return texts


def save():
    """Write a checkpoint of the whole state; a collective call, rank 0 writes."""
    tensors = {"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}
    state = {
        "step": step,
        "num_iterations": num_iterations,
        "horizon_is_final": horizon_is_final,
        "smooth_train_loss": smooth_train_loss,
        "losses_seen": losses_seen,
        "min_val_bpb": min_val_bpb,
        "val_bpb": val_bpb,
        "total_training_time": total_training_time,
        "timed_steps": timed_steps,
        "skipped_steps": skipped_steps,
        "elapsed": elapsed_before + time.time() - process_start - clock.spent["preparation of the corpus"],
        "data": loader.state_dict(),
    }
    if rank == 0:
        try:
            folder = checkpoint.save(checkpoints, step, tensors, state, keep_checkpoints)
            log.write("event", step=step, event="saved", folder=folder.name)
            return True
        except OSError as error:
            say(f"save     failed, training goes on: {error.strerror or error}", flush=True)
            return False
    return True


interruption = 0  # the signal that asked to stop
saving_asked = False


def on_signal(number, frame):
    global interruption, saving_asked
    if number == signal.SIGUSR1:
        saving_asked = True
    else:
        interruption = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, on_signal)

# -----------------------------------------------------------------------------
# The loop. Host and device meet only at the end of a window of steps

start_step = last_saved = step
last_save_time, next_length, skips_in_a_row, seconds_per_step = time.time(), 1, 0, step_time
clock.lap("setup")
while True:
    # evaluate, sample, save, stop: before the first step, and where a window was closed for it
    is_last = step >= num_iterations
    if step == 0 or is_last or (eval_every > 0 and step % eval_every == 0):
        begin = time.time()
        val_bpb = evaluate()
        min_val_bpb = min(min_val_bpb, val_bpb)
        eval_time = time.time() - begin
        totals = {"total_training_flops": num_flops_per_token * total_batch_size * step, "total_training_time": total_training_time}
        log.write("val", step=step, val_bpb=val_bpb, min_val_bpb=min_val_bpb, **totals)
        say(f"val  {step:>{len(str(num_iterations))}}/{num_iterations}   {val_bpb:.4f} bits per byte, lowest {min_val_bpb:.4f}", flush=True)
        clock.lap("evaluation")
    if rank == 0 and (is_last or (sample_every > 0 and step > start_step and step % sample_every == 0)):
        samples = sample()
        say(report.show_samples(samples), flush=True)
        clock.lap("sampling")
    if is_last or saving_asked or interruption or (save_every > 0 and step > last_saved and step % save_every == 0):
        saved = last_saved == step > start_step or save()
        last_saved, last_save_time, saving_asked = step, time.time(), False
        clock.lap("saving")
    if is_last or interruption:
        break

    # ---- a window of steps: nothing in it waits for the device
    window_end = min(step + next_length, num_iterations)
    if step < start_step + 10:
        window_end = min(window_end, start_step + 10)  # warm-up of caches and allocators: not in total_training_time
    for period in (eval_every, sample_every, save_every):
        if period > 0:
            window_end = min(window_end, step - step % period + period)
    if not horizon_is_final:  # close the window where the decay would begin: the horizon is corrected there
        window_end = min(window_end, max(step + 1, math.ceil((1 - warmdown_ratio) * num_iterations)))
    losses, norms, skips = [], [], []
    data_wait, window_start = -loader.wait_time, time.perf_counter()
    while step < window_end and not (interruption and world_size == 1):
        lrm = lr_multiplier(step, num_iterations, warmup_steps, warmdown_ratio, final_lr_frac)
        momentum = muon_momentum(step, num_iterations, warmdown_ratio)
        decay = weight_decay * weight_decay_multiplier(step, num_iterations, warmdown_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay
        try:
            rows = next(loader)
        except dataloader.DataError as error:
            fail(error)
        nats = forward_backward(rows, micro_rows)
        optimizer.step(nats)
        optimizer.zero_grad(set_to_none=True)
        losses.append(nats)
        norms.append(optimizer.grad_norm)
        skips.append(optimizer.skipped)
        step += 1

    # ---- its end: one transfer, one synchronization, one record
    if not losses:
        continue
    numbers = torch.stack([torch.stack(losses), torch.stack(norms), torch.stack(skips)])  # (3, steps of the window)
    if world_size > 1:
        dist.all_reduce(numbers[0])
    losses, norms, skips = numbers.tolist()
    synchronize()
    dt = (time.perf_counter() - window_start) / len(losses)
    data_wait += loader.wait_time
    for loss, skipped in zip(losses, skips):
        if skipped:  # counts in schedule and tokens, not in the loss
            skipped_steps += 1
            skips_in_a_row += 1
            train_loss = math.nan
        else:
            skips_in_a_row = 0
            losses_seen += 1
            train_loss = loss / total_batch_size  # nats, mean over the targets of the global batch
            smooth_train_loss = report.update_ema(smooth_train_loss, train_loss, ema_beta)
    debiased_smooth_loss = report.debias(smooth_train_loss, ema_beta, losses_seen)
    if step > start_step + 10:
        total_training_time += dt * len(losses)
        timed_steps += len(losses)
        seconds_per_step = total_training_time / timed_steps
    else:
        seconds_per_step = dt
    flops_so_far = num_flops_per_token * total_batch_size * step
    tok_per_sec = total_batch_size / dt
    record = {
        "step": step,
        "train_loss": train_loss,
        "train_loss_ema": debiased_smooth_loss,
        "lrm": lrm,
        "muon_momentum": momentum,
        "weight_decay": decay,
        "grad_norm": norms[-1],
        "dt": dt,
        "tok_per_sec": tok_per_sec,
        "mfu": num_flops_per_token * tok_per_sec / (peak * world_size),
        "data_wait": data_wait / (dt * len(losses)),
        "tokens": total_batch_size * step,
        "total_training_flops": flops_so_far,
        "total_training_time": total_training_time,
        "epoch": loader.epoch,
        "peak_memory": report.peak_memory(device),
        "skipped_steps": skipped_steps,
    }
    log.write("step", **record)
    if eval_every > 0:
        seconds_per_step += eval_time / eval_every
    say(report.step_line(record, num_iterations, val_bpb, peak_source, (num_iterations - step) * seconds_per_step), flush=True)

    # ---- rank 0 decides, all ranks hear of it
    if not horizon_is_final:
        num_iterations = max(step, step + int(time_left() / seconds_per_step))
        if step >= (1 - warmdown_ratio) * num_iterations:  # now the decay begins: it shall end in time
            num_iterations = max(step, int(step / (1 - warmdown_ratio))) if warmdown_ratio < 1 else num_iterations
            horizon_is_final = True
    next_length = log_every or (1 if step < start_step + 10 else min(10, max(1, int(0.5 / dt))))
    saving_asked |= save_minutes > 0 and time.time() - last_save_time > 60 * save_minutes
    if world_size > 1:
        decision = [num_iterations, horizon_is_final, next_length, saving_asked] if rank == 0 else [0] * 4
        decision += [interruption == number for number in (signal.SIGINT, signal.SIGTERM)]
        decision = torch.tensor(decision, dtype=torch.int64, device=device)
        dist.all_reduce(decision)
        num_iterations, horizon_is_final, next_length, saving_asked, interrupted, terminated = decision.tolist()
        interruption = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
    if sum(skips):
        log.write("event", step=step, event="skipped_step", skipped_steps=skipped_steps, cursor=loader.cursor)
    if skips_in_a_row >= 5:
        forward_backward(rows, micro_rows)  # once more, to name the culprit
        bad = [name for name, p in raw_model.named_parameters() if not torch.isfinite(p.grad).all()]
        say(
            f"error: loss or gradient not finite in {skips_in_a_row} steps in a row, first in {bad[0] if bad else 'another rank'}."
            f"\nThe last good checkpoint is {(checkpoint.complete(checkpoints) or ['none'])[0]}.",
            flush=True,
        )
        log.write("event", step=step, event="not_finite", parameters=bad)
        sys.exit(1)
    clock.lap("training")
    if step == start_step + 10:
        gc.collect()
        gc.freeze()  # what lives now lives to the end: no need to look at it again

# -----------------------------------------------------------------------------
# The end: summary, report

if interruption:
    log.write("event", step=step, event="interrupted", signal=int(interruption))
    say(f"stopped  by {signal.Signals(interruption).name} at step {step}\ncontinue with: python train.py --run {run} --resume")
else:
    log.write("event", step=step, event="finished")
wall_time = elapsed_before + time.time() - process_start
timed_tokens_per_sec = total_batch_size * timed_steps / total_training_time if timed_steps else tok_per_sec
summary = {
    "val_bpb": val_bpb,
    "min_val_bpb": min_val_bpb,
    "train_loss_ema": report.debias(smooth_train_loss, ema_beta, losses_seen),
    "steps": step,
    "tokens": total_batch_size * step,
    "total_training_flops": num_flops_per_token * total_batch_size * step,
    "total_training_time": total_training_time,
    "wall_time": wall_time,
    "tok_per_sec": timed_tokens_per_sec,
    "mfu": num_flops_per_token * timed_tokens_per_sec / (peak * world_size),
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
log.close(summary)
if rank == 0:
    report.finish(run_folder, summary)
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
sys.exit(128 + interruption if interruption else 0 if saved else 1)
