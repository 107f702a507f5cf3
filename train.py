"""
onedial: train a GPT from text to report. One dial, --depth, sets the model; --minutes sets how long it takes.

    python train.py                                               # a laptop: five minutes, no GPU, no network
    python train.py --depth 12                                    # one GPU
    torchrun --standalone --nproc_per_node=8 train.py --depth 12  # eight

On one H100 depth 12 trains on 485 thousand tokens a second. Every setting below is also a flag
(--max-seq-len 1024, --no-compile); None is `auto`: what is found instead is printed and saved.
"""

import time

process_start = time.monotonic()  # --minutes counts from here, the slow imports included

import machine  # before torch: it sets what torch reads from the environment

ranks = machine.Ranks()  # this process is one of those that torchrun has started, or alone
rank, world_size = ranks.rank, ranks.world_size

import argparse
import gc
import inspect
import json
import math
import re
import shutil
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import checkpoint
import dataloader
import optim_muon as rules
import report
from model import GPT, GPTConfig, attention_backend
from optim_muon import MuonAdamW, Timetable, lr_multiplier, muon_momentum, weight_decay_multiplier

# -----------------------------------------------------------------------------
# Settings: name: type = value  # comment. Edit them here, or give a flag

# run
run_name: str | None = None  # a folder in out_dir (auto: <date>-<time>)
out_dir: str = "out"  # where runs are written
resume: bool = False  # continue the newest run, or --run-name NAME, from its newest valid checkpoint
wandb: bool = False  # log to Weights & Biases too
# device
device_type: str | None = None  # cuda, mps or cpu (auto: the first of them that is there)
dtype: str | None = None  # of activations: bfloat16 or float32 (auto: bfloat16 where the hardware has it)
compile: bool | None = None  # torch.compile (auto: where the run is long enough to win the time back)
seed: int = 42  # of weights, data order and samples
# data
data: str | None = None  # a path, stdlib, fineweb, climbmix, tinystories, hf:OWNER/NAME (auto: by the device)
text_field: str | None = None  # field or column with the text (auto: text, content, story, … if a string)
document_separator: str | None = None  # what parts documents in a file (auto: <|endoftext|>, in .txt files)
vocab_size: int | None = None  # of the BPE trained on the corpus (auto: by its bytes and the time)
init_from: str | None = None  # a run, out/NAME, to begin with: its weights, shape and tokenizer (auto: none)
# model
depth: int | None = None  # layers, the dial for all the rest (auto: from the time; else 12, 4 without CUDA)
aspect_ratio: int | None = None  # width = depth × aspect_ratio, in whole heads (auto: 64, of one layer 128)
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
eval_every: int | None = None  # steps between evaluations (auto: about ten over the run)
eval_bytes: int | None = None  # bytes of held-out text used (auto: 50,000,000 on CUDA, else 131,072)
log_every: int | None = None  # steps between records, 10 s at most (auto: the first 10, then two a second)
sample_every: int = -1  # steps between samples; the end always has one
save_every: int = -1  # steps between checkpoints
save_minutes: float = 10.0  # minutes between checkpoints
keep_checkpoints: int = 2  # how many of the newest are kept
peak_tflops: float | None = None  # peak of one device, for the MFU (auto: as published, else measured)

HORIZONS = ("num_iterations", "minutes", "target_flops", "target_param_data_ratio")
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # what the dial tries
SHAPE = ("depth", "aspect_ratio", "head_dim")
CALL = ("run_name", "out_dir", "resume")  # what belongs to the call and not to the run
# what belongs to the machine: --resume keeps what was given, and finds anew what was auto
MACHINE = ("device_type", "dtype", "device_batch_size", "log_every", "peak_tflops")
LIMITS = {  # lowest and highest value; all other numbers need only be above 0
    **{"seed": (0, 2**31), "vocab_size": (257, 65_535), "max_seq_len": (32, 2**20), "minutes": (0.05, 1e6)},
    **dict.fromkeys(("weight_decay", "warmup_steps"), (0, 1e9)),
    **dict.fromkeys(("warmdown_ratio", "final_lr_frac"), (0, 1)),
    **dict.fromkeys(("eval_every", "sample_every", "save_every", "save_minutes"), (-1, 1e9)),
}

# -----------------------------------------------------------------------------
# Flags: one for each setting above, read as its type says

report.open_console()
tell, show, show_step = report.tell, report.show, report.show_step
if rank > 0:  # rank 0 alone prints
    tell = show = show_step = lambda *words: None
new_folder = None  # what this start has made, and takes away again if it ends before its first step


class SettingError(Exception):
    """A setting that cannot be; the message says which, and what to do, in two lines."""


def end_with_error(kind, error, trace):
    """What a person can mend is told in two lines, with status 2; anything else shows its trace, status 1."""
    report.end_live()
    mendable = (SettingError, machine.MachineError, dataloader.DataError, checkpoint.CheckpointError)
    if machine.is_out_of_memory(error):
        advice = "Try a smaller --depth or --device-batch-size."
        error = SettingError(f"the device has too little memory.\n{advice}")
    if new_folder and isinstance(error, (*mendable, KeyboardInterrupt)):
        shutil.rmtree(new_folder, ignore_errors=True)
    if kind is KeyboardInterrupt:  # before the loop, which saves first
        sys.exit(130)
    if not isinstance(error, mendable):
        return sys.__excepthook__(kind, error, trace)
    if rank > 0:
        time.sleep(2)  # what is wrong on all ranks is told by rank 0, and torchrun ends the others
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def refuse(message):
    """argparse's errors, told like all others."""
    raise SettingError(f"{message}.\n`python train.py --help` lists all settings.")


def or_auto(base):
    """The function that reads a flag of this type, `auto` as None."""

    def read(text):
        return None if text == "auto" else base(text)

    read.__name__ = base.__name__  # argparse's errors name it
    return read


sys.excepthook = end_with_error
kinds = inspect.get_annotations(sys.modules[__name__])  # {name of a setting: its type}
flag = {name: "--" + name.replace("_", "-") for name in kinds}
comments = dict(re.findall(r"^(\w+): .*?# *(.+)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
parser = argparse.ArgumentParser(usage="python train.py [--NAME VALUE ...]", allow_abbrev=False)
parser.error = refuse
for name, kind in kinds.items():
    base, *may_be_none = getattr(kind, "__args__", (kind,))  # the parts of int | None
    default = "auto" if globals()[name] is None else globals()[name]
    help_text = f"{comments.get(name, '')} [{default}]".replace("%", "%%")
    options = {"help": help_text, "default": argparse.SUPPRESS}
    if base is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": or_auto(base) if may_be_none else base, "metavar": base.__name__.upper()}
    parser.add_argument(flag[name], **options)
given = vars(parser.parse_args())

# -----------------------------------------------------------------------------
# The run: a new one, or what was saved of an old one. Its folder is claimed before anything slow

out, run_name = Path(given.get("out_dir", out_dir)).expanduser().absolute(), given.get("run_name", run_name)
if run_name and (Path(run_name).name != run_name or run_name == ".."):
    advice = "Use --out-dir for the folder that it shall be in."
    raise SettingError(f"--run-name {run_name} is no plain name.\n{advice}")
run_folder, saved, given_before, saved_device = None, {}, {}, None
if given.get("resume", resume):
    run_folder = checkpoint.find_run(out, run_name)
    saved, given_before, source = checkpoint.saved_settings(run_folder)
    if source and source != "config.json":
        tell("resume", f"config.json cannot be read: the settings are taken from {source}")
    if not source and (run_folder / "config.json").exists():
        tell("resume", f"{run_folder / 'config.json'} is damaged: nothing is taken from it")
    saved_device = saved.get("device_type")
    found_anew = [name for name in MACHINE if name not in given_before]
    if any(given.get(name) is not None for name in HORIZONS):  # a new horizon takes the place of the old one
        found_anew += [name for name in HORIZONS if name not in given]
        found_anew += [name for name in ("compile", "eval_every") if name not in given_before]
    saved = {name: value for name, value in saved.items() if name in kinds and name not in found_anew}
    for name, old in saved.items():
        if name in given and given[name] != old:
            tell("resume", f"{flag[name]} was {old}, is {given[name]}")
        elif name not in given | given_before and globals()[name] not in (None, old):  # edited since
            tell("resume", f"{flag[name]} stays {old}, as saved")
globals().update(saved | given)

for name in kinds:
    value, (low, high) = globals()[name], LIMITS.get(name, (0, math.inf))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        neither = low == -1 and -1 < value <= 0  # off nor positive
        if not low <= value <= high or neither or (name not in LIMITS and value in (0, math.inf)):
            allowed = f"from {low:,} to {high:,}" if name in LIMITS and low >= 0 else "above 0"
            allowed += ", or -1 for never" if low == -1 else ""
            raise SettingError(f"{flag[name]} {value} is out of range.\nGive a number {allowed}.")
horizons = [name for name in HORIZONS if globals()[name] is not None]
if len(horizons) > 1:
    both = f"{flag[horizons[0]]} and {flag[horizons[1]]}"
    raise SettingError(f"two horizons were given: {both}.\nGive at most one.")

if rank == 0:
    is_new = run_folder is None
    run_folder = run_folder or checkpoint.make_run(out, run_name)
    lock = checkpoint.lock(run_folder)  # held to the end, and let go by any end
    new_folder = run_folder if is_new else None
    tell("run", run_folder)

# -----------------------------------------------------------------------------
# The machine

clock = report.Clock(process_start)
device = machine.find_device(device_type, ranks.local_rank, world_size)
device_type, on_gpu = device.type, device.type == "cuda"
if saved_device not in (None, device_type) and "compile" not in given | given_before:
    compile = None  # what was found for another device
compute_dtype = machine.find_dtype(device, dtype)
dtype = str(compute_dtype).removeprefix("torch.")
device_name, synchronize = machine.device_name(device), machine.synchronizer(device)
tell("device", f"{world_size} × {device_name} · {dtype}" if world_size > 1 else f"{device_name} · {dtype}")
if on_gpu and compute_dtype == torch.float32 and not machine.has_fast_bf16(device):
    tell("device", "this GPU has no bf16: a step takes twice the memory, and several times as long")
clock.lap("setup")

# -----------------------------------------------------------------------------
# The data: prepared before the ranks are connected, so that no collective call waits for a tokenizer

data = data or ("fineweb" if on_gpu else "stdlib")
if data != "stdlib" and not dataloader.is_public(data):
    data = str(Path(data).expanduser().absolute())  # so that the run can be resumed from any folder
if not horizons:
    minutes, target_param_data_ratio = (None, 12.0) if on_gpu else (5.0, None)
largest_vocab = rules.largest_vocab(minutes) if minutes and not on_gpu else 2**15
tokenizer = None
if init_from:  # a run to begin with: its shape and tokenizer here, its weights below
    init_from = str(Path(init_from).expanduser().absolute())
    has_begun = bool(run_folder and [*(run_folder / "checkpoints").glob("step_*")])
    if not has_begun:
        origin, origin_config = checkpoint.origin(Path(init_from))
        for name in (*SHAPE, "vocab_size"):
            value, theirs = globals()[name], origin_config["settings"][name]
            if value not in (None, theirs):
                what = f"{flag[name]} {value}, and that of {init_from} is {theirs}"
                raise SettingError(f"{what}.\nLeave {flag[name]} or --init-from out.")
        depth, aspect_ratio, head_dim = (origin_config["settings"][name] for name in SHAPE)
        max_seq_len = max_seq_len or origin_config["settings"]["max_seq_len"]
        tell("init", f"from {origin}")
    tokenizer = dataloader.load_tokenizer(Path(run_folder if has_begun else init_from) / "tokenizer")
max_seq_len = max_seq_len or (2048 if on_gpu else 512)
eval_bytes = eval_bytes or (50_000_000 if on_gpu else 131_072)
tell_data = partial(report.tell, "data")  # whichever rank prepares the corpus tells of it
reading = {"text_field": text_field, "separator": document_separator}
corpus = dataloader.prepare(data, vocab_size, tell_data, largest_vocab, tokenizer, **reading)
for note in corpus.notes:
    tell("data", note)
vocab_size, data = corpus.tokenizer.n_vocab, corpus.data or data  # a data set of the hub by its commit
held_out = dataloader.validation_tokens(corpus, eval_bytes)
validation = dataloader.ValidationRows(corpus.tokenizer, held_out, max_seq_len)
clock.lap("corpus")
ranks.start(device)
peak, peak_source = machine.find_peak(device, compute_dtype, peak_tflops)
run_folder = Path(ranks.first(str(run_folder)))
checkpoints = run_folder / "checkpoints"
machine.use_instead_of_no_temporary_folder(run_folder)

# -----------------------------------------------------------------------------
# The model: everything follows from depth; and depth, where it is auto, from the time or the FLOPs


def build_model(depth):
    """The model of a depth, without weights yet."""
    try:
        config = GPTConfig.of_depth(depth, vocab_size, max_seq_len, aspect_ratio, head_dim)
    except ValueError as error:
        raise SettingError(error) from None
    with torch.device("meta"):
        # 1 GB of logits at once in bf16; on a CPU as many as its caches hold: twice as fast
        return GPT(config, compute_dtype, max_logits=2**20 if device_type == "cpu" else 2**29)


def fits(model, rows):
    """Whether training with so many rows at a time fits a GPU's memory, about; True where that is unknown."""
    counts = model.num_params()
    total = sum(counts.values())
    moments = 8 * total - 4 * counts["matrix"]  # bytes: AdamW has two in fp32, Muon one; ranks share them
    needed = 8 * total + moments / world_size + model.activation_bytes(rows * max_seq_len)
    return needed < 0.9 * memory  # libraries and what lies between the blocks take the rest


def refuse_depth():
    """Say that not even one row of this depth fits, and of which depth it does."""
    largest = max((d for d in DEPTHS if d < depth and fits(build_model(d), 1)), default=1)
    advice = f"Try --depth {largest}" if memory < math.inf else "Try a smaller --depth"
    raise SettingError(f"depth {depth}: not even one row of {max_seq_len} tokens fits.\n{advice}.")


def affordable_tokens():
    """How many tokens the model could be trained on in this run, about: by FLOPs, by the peak, or timed."""
    if target_flops:
        return target_flops / model.num_flops_per_token()
    seconds = 0.75 * (60 * minutes - clock.elapsed("corpus"))  # the rest: updates, evaluations, the end
    if on_gpu:
        flops = world_size * peak * rules.expected_mfu(model.config.n_embd)
        return seconds * flops / model.num_flops_per_token()
    model.init_weights(device, seed)
    rows, times = torch.randint(vocab_size, (4, max_seq_len + 1), device=device), []
    for _ in range(4):
        begin = time.perf_counter()
        model(rows[:, :-1], rows[:, 1:]).backward()
        synchronize()
        times.append(time.perf_counter() - begin)
    return seconds * world_size * 4 * max_seq_len / min(times)


memory = -ranks.agree(-machine.free_memory(device))[0]  # bytes, of the device that has the least
unique_tokens = corpus.counts["train"]["tokens"] if corpus.more is None else math.inf
from_budget = depth is None and bool(minutes or target_flops)
if from_budget:
    for candidate in DEPTHS:  # the deepest whose parameters see enough tokens
        depth, shallower = candidate, depth
        model = build_model(depth)
        needed = rules.needed_tokens(model.num_scaling_params(), unique_tokens)
        if shallower and (not fits(model, 1) or ranks.first(affordable_tokens()) < needed):
            depth = shallower
            break
depth = depth or (12 if on_gpu else 4)
model = build_model(depth)
if not fits(model, 1):
    refuse_depth()
model.init_weights(device, seed)
config = model.config
aspect_ratio, head_dim = aspect_ratio or config.n_embd // depth, config.head_dim
num_params = model.num_params()  # {role: count}
num_flops_per_token = model.num_flops_per_token()
embeddings = num_params["embedding"] + num_params["value_embedding"]
counts = [report.short(count) for count in (num_params["matrix"], num_params["head"], embeddings)]
parameters = "{} matrix, {} head, {} embedding parameters".format(*counts)
flops = f"{report.short(num_flops_per_token, ' ')}FLOP per token"
tell("onedial", f"depth {depth}, width {config.n_embd} · {parameters} · {flops}")
if from_budget:
    budget = report.plural(minutes, "minute") if minutes else f"{target_flops:.2g} FLOPs"
    again = f"--depth {depth} --vocab-size {vocab_size} --max-seq-len {max_seq_len}"
    tell("dial", f"the best depth for {budget}; the same shape: {again}")

# -----------------------------------------------------------------------------
# The state of the loop, new or resumed

step = 0  # updates done, skipped ones included
progress = 0.0  # of the whole run, from 0 to 1; all schedules are functions of it
min_val_bpb = val_bpb = math.inf  # bits per byte of the validation text: the lowest, the last
val_step = -1  # of the last evaluation
smooth_train_loss, ema_beta = 0.0, 0.9  # exponential moving average of the train loss, starting at 0
total_training_time = 0.0  # seconds of steps, without the first 10 after each start
mean_dt = None  # seconds per step on average
skipped_steps = 0  # steps whose loss or gradient was not finite: nothing changed
planned_iterations = None  # steps as planned before step 1: the warmup is a tenth of them at most
span = None  # of a timed run: seconds from its first step to its closing work

resumed_from = None
if resume:
    resumed_from, passed_over = ranks.first(checkpoint.to_resume(checkpoints) if rank == 0 else None)
    for reason in passed_over:
        tell("resume", f"passed over: {reason}")
    tell("resume", f"from {resumed_from}" if resumed_from else "no checkpoint yet: starting at step 0")
if resumed_from:
    saved_state = checkpoint.load(resumed_from, "state")
    dataloader.check_same(corpus, saved_state["data"]["fingerprint"])
    try:
        step, progress = saved_state["step"], saved_state["progress"]
        min_val_bpb, val_bpb = saved_state["min_val_bpb"], saved_state["val_bpb"]
        val_step, smooth_train_loss = saved_state["val_step"], saved_state["smooth_train_loss"]
        total_training_time = saved_state["total_training_time"]
        skipped_steps, data_place = saved_state["skipped_steps"], saved_state["data"]
        planned_iterations, span = saved_state["planned_iterations"], saved_state["span"]
        mean_dt = saved_state.get("mean_dt")
        saved_horizon = [saved_state["settings"][name] for name in HORIZONS]
        saved_model = saved_state["model"]
        if saved_state["settings"]["eval_bytes"] != eval_bytes:  # on other text nothing can be compared
            min_val_bpb, val_step = math.inf, -1
        clock.add(saved_state["spent"])
    except KeyError as missing:
        advice = "Resume it with the version that has written it."
        raise SettingError(f"{resumed_from} has no {missing.args[0]}.\n{advice}") from None
    if other := [f"{name} {value}" for name, value in saved_model.items() if value != vars(config).get(name)]:
        what = f"does not fit these settings: its model has {', '.join(other)}"
        raise SettingError(f"{resumed_from} {what}.\nResume with those of its run.")

# -----------------------------------------------------------------------------
# The optimizer: one table, role -> kind and settings. Source of the numbers: nanochat, tuned at depth 12. The
# plan scales its learning rates to the batch. A new role is named in GPT.parameter_roles and gets a line here

width_scale = (config.n_embd / 768) ** -0.5  # for head and embeddings: width 256 -> 1.73, 1536 -> 0.71
wide_lr = embedding_lr * width_scale
roles = {
    "matrix": dict(kind="muon", lr=matrix_lr),  # the loop sets momentum and weight decay
    "head": dict(kind="adamw", lr=unembedding_lr * width_scale, betas=(0.8, 0.96), weight_decay=0.01),
    "embedding": dict(kind="adamw", lr=wide_lr, betas=(0.8, 0.995), weight_decay=0.001),
    "value_embedding": dict(kind="adamw", lr=0.5 * wide_lr, betas=(0.8, 0.995), weight_decay=0.01),
    # eps 1e-8 and not 1e-10 for the scalars, whose first gradients are rounding alone
    "resid_scalar": dict(kind="adamw", lr=0.01 * scalar_lr, betas=(0.8, 0.95), weight_decay=0.05, eps=1e-8),
    "x0_scalar": dict(kind="adamw", lr=scalar_lr, betas=(0.96, 0.95), eps=1e-8),
    "smear": dict(kind="adamw", lr=0.4 * scalar_lr, betas=(0.8, 0.95), eps=1e-8),
}


def build_optimizer():
    """MuonAdamW over every role of the table, without any state."""
    groups = [{**roles[role], "params": params} for role, params in model.parameter_roles().items()]
    # compiling the updates costs 25 s on a CPU and gains 4% of a step there
    return MuonAdamW(groups, orthogonalize_dtype=compute_dtype, compile=compile and on_gpu)


# -----------------------------------------------------------------------------
# The plan, 1) horizon: how far to train, in tokens; a timed run knows it once its speed has been measured

new_horizon = bool(resumed_from) and saved_horizon != [globals()[name] for name in HORIZONS]
if num_iterations:
    total_batch_size = total_batch_size or rules.whole_rows(2**19 if on_gpu else 2**12, max_seq_len)
    planned_tokens = num_iterations * total_batch_size
elif target_flops:  # 1.5e18 FLOPs at depth 12, 1e9 a token -> 1.5e9 tokens
    planned_tokens = target_flops / num_flops_per_token
elif target_param_data_ratio:  # ratio 12 at depth 12, vocabulary 50,257: 12 × 124e6 -> 1.5e9 tokens
    planned_tokens = target_param_data_ratio * model.num_scaling_params()

# Is there time to compile? On two cores the parts of the model take 30 s and make a step 1.2 times as fast,
# the whole graph takes 70 s for 5% more. 2e13 and 1e14 FLOPs are 3 and 15 minutes there. On a GPU the whole
# graph of depth 12 takes a minute, and 20 s more than its parts, for 1.5%; 5e17 are 20 minutes of an H100
must_compile = given.get("compile") or given_before.get("compile")  # asked for: without it there is no run
if minutes:
    long_enough, very_long = minutes >= (2 if on_gpu else 3), minutes >= 20
else:
    planned_flops = num_flops_per_token * planned_tokens
    long_enough = planned_flops >= (2e16 if on_gpu else 2e13)
    very_long = planned_flops >= (5e17 if on_gpu else 1e14)
if compile is None:
    compile = long_enough and device_type != "mps"
if compile and very_long and world_size == 1:
    model.compile(dynamic=False)
elif compile:  # and ranks average a part's gradients meanwhile: the whole graph gives all at its end
    model.compile_parts(blocks=on_gpu)

# -----------------------------------------------------------------------------
# The trial: a few steps on random rows compile, find the batch that fits, and measure the speed


def passes():
    """Forward and backward over micro_rows random rows."""
    global trial_loss
    random_rows = torch.randint(vocab_size, (micro_rows, max_seq_len + 1), device=device)
    trial_loss = model(random_rows[:, :-1], random_rows[:, 1:])
    (trial_loss / (micro_rows * max_seq_len)).backward()


def update():
    """A step of the optimizer. The gradients stay: memory peaks in micro-steps that find some."""
    optimizer.step(trial_loss.detach())


# on an H100 depth 12 is 3% faster on 131,072 tokens at a time than on 65,536; eight ranks share 2^19
at_once = (131_072 if world_size <= 4 else 65_536) if on_gpu else 2_048
micro_rows = device_batch_size or rules.whole_rows(at_once, max_seq_len) // max_seq_len
if total_batch_size:
    *_, micro_rows = dataloader.split_batch(total_batch_size, max_seq_len, world_size, micro_rows)
while not (device_batch_size or micro_rows == 1 or fits(model, micro_rows)):
    micro_rows = dataloader.largest_divisor(micro_rows, micro_rows - 1)
optimizer = build_optimizer()
what = "compiling, which can take a minute the first time, and " if compile else ""
tell("trial", f"{what}measuring steps of {micro_rows} × {max_seq_len} tokens")
spare = 0.0 if device_batch_size else 0.05  # share of the memory
timings = []  # (seconds of the passes, seconds of the update); the first ones compile
while len(timings) < 4:
    room = spare if timings else 0.0  # the first ones hold what compiling tries out, too
    outcome, micro_seconds, error = machine.attempt(passes, device, ranks, room)
    if outcome == machine.FITS:
        outcome, update_seconds, error = machine.attempt(update, device, ranks, room, collective=True)
    if outcome == machine.FITS:
        if not timings:
            machine.forget_memory(device)
        timings.append((micro_seconds, update_seconds))
        continue
    smaller = dataloader.largest_divisor(micro_rows, max(1, micro_rows - 1))
    if outcome == machine.FAILS and (must_compile or not compile):
        raise error or RuntimeError("another rank failed")
    if outcome == machine.FAILS:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200] if error else "on another rank"
        tell("trial", f"going on without torch.compile, which does not work here: {reason}")
        torch.compiler.set_stance("force_eager")
        compile = False
    elif micro_rows == 1:
        refuse_depth()
    elif device_batch_size:
        advice = f"Try --device-batch-size {smaller}."
        raise SettingError(f"{micro_rows} rows of {max_seq_len} do not fit.\n{advice}")
    else:
        micro_rows = smaller
    timings, trial_loss, optimizer, error = [], None, None, None
    model.zero_grad(set_to_none=True)
    gc.collect()  # what the failed attempt still holds
    machine.forget_memory(device)
    optimizer = build_optimizer()
model.zero_grad(set_to_none=True)
micro_seconds, update_seconds = ranks.first([min(t) for t in zip(*timings[1:])])
clock.lap("trial")

# -----------------------------------------------------------------------------
# The plan, continued

weight_bytes = 4 * sum(num_params.values())
checkpoint_bytes = weight_bytes + optimizer.state_bytes()
# of an evaluation, until one has been timed: a forward pass is a third of both passes, say a half
eval_seconds = math.ceil(len(validation) / (micro_rows * world_size)) * micro_seconds / 2
if minutes:
    # closing work beside an evaluation: samples of 128 tokens, a checkpoint at 250 MB/s, peak, report
    for _ in range(2):  # the first call loads kernels
        begin = time.perf_counter()
        list(model.generate([[corpus.bos] * 24] * 4, corpus.bos, 8))
    closing_seconds = 16 * (time.perf_counter() - begin) + checkpoint_bytes / 250e6 + 6.0
    seconds_left = ranks.first(60 * minutes - clock.elapsed("corpus") - eval_seconds - closing_seconds)
    planned_tokens = max(1.0, seconds_left) / micro_seconds * micro_rows * max_seq_len * world_size

# a small text is soon learnt by heart: a timed run ends before
most_tokens = rules.MOST_EPOCHS * unique_tokens if minutes else math.inf
planned_tokens = min(planned_tokens, most_tokens)

# 2) batch: 1.5e9 tokens -> 2^19; five minutes of a CPU, 4e6 -> 2^12
total_batch_size = total_batch_size or rules.whole_rows(rules.best_batch_size(planned_tokens), max_seq_len)
rows_per_step, rows_per_rank, device_batch_size = dataloader.split_batch(
    total_batch_size, max_seq_len, world_size, micro_rows
)
total_batch_size, micro_steps = rows_per_step * max_seq_len, rows_per_rank // device_batch_size
machine.check_sums(device, max(vocab_size, device_batch_size * max_seq_len))
planned_dt = micro_steps * micro_seconds * device_batch_size / micro_rows + update_seconds
if not minutes:
    num_iterations = num_iterations or max(1, round(planned_tokens / total_batch_size))
if not planned_iterations or new_horizon:
    planned_iterations = num_iterations or step + max(1, int(seconds_left / planned_dt))
last_step = num_iterations or math.inf  # known of a timed run where it is the text that ends it
if most_tokens < math.inf:
    last_step = max(1, int(most_tokens / total_batch_size))
    planned_iterations = min(planned_iterations, max(step + 1, last_step))
ends_early = minutes and planned_iterations >= last_step
planned_tokens = planned_iterations * total_batch_size
horizon = f"{report.plural(minutes, 'minute')}, about " if minutes else ""
horizon += f"{report.plural(planned_iterations, 'step')}, {report.short(planned_tokens)} tokens, "
horizon += f"{num_flops_per_token * planned_tokens:.2g} FLOPs"
horizon += f", about {report.duration(planned_iterations * planned_dt)}" if not minutes else ""
horizon += f"; it ends early, after reading the text {rules.MOST_EPOCHS} times" if ends_early else ""
tell("plan", f"1) horizon: {horizon}")
shape = f"{micro_steps} × {device_batch_size} × {max_seq_len:,}"
tell("plan", f"2) batch: {total_batch_size:,} tokens ({shape})")

# 3) learning rates: 2^19 tokens a step -> × 1; 2^20 -> × 1.41; 2^12 -> AdamW × 0.55, Muon × 2.6
adamw_scale, muon_scale = rules.lr_scales(total_batch_size)
for entry in roles.values():
    entry["lr"] *= muon_scale if entry["kind"] == "muon" else adamw_scale
warmup = min(warmup_steps, planned_iterations / 10)
scales = f"AdamW × {adamw_scale:.3g}, Muon × {muon_scale:.3g}"
tell("plan", f"3) learning rates: {scales}, {report.plural(round(warmup), 'step')} of warmup")

# 4) weight decay: 2,840 steps × 2^19 tokens -> 0.28; four times as many -> 0.07
if weight_decay is None:
    weight_decay = rules.best_weight_decay(total_batch_size, planned_tokens)
tell("plan", f"4) weight decay: {weight_decay:.3g}")

# 5) evaluations: about ten, in a timed run for at most 5% of its time
if eval_every is None:
    training_seconds = planned_dt * (planned_iterations - step)
    evaluations = min(10.0, 0.05 * training_seconds / eval_seconds) if minutes else 10.0
    eval_every = math.ceil(planned_iterations / evaluations) if evaluations >= 1 else -1
between = f", and every {report.plural(eval_every, 'step')}" if eval_every > 0 else ""
tell("plan", f"5) evaluations: at the start and the end{between}")

if resumed_from:
    by_steps = sum(clock.spent.get(name, 0.0) for name in ("training", "evaluation", "sampling", "saving"))
    used_before, progress_before = progress * span if span else by_steps, progress  # seconds, share
    if not minutes:
        progress, span = min(1.0, step / num_iterations), None
    elif new_horizon:
        span = used_before + max(seconds_left, planned_dt)
        progress = used_before / span
    if progress < progress_before and progress_before > 1 - warmdown_ratio:
        what = f"{progress_before:.0%} of the run were done, of the new horizon it is {progress:.0%}"
        tell("resume", f"{what}: the decayed learning rate rises once more")

# -----------------------------------------------------------------------------
# What the loop works with: fresh weights and optimizer, or those of the checkpoint, and the loader of rows

model.init_weights(device, seed)  # anew: the trial leaves no trace
optimizer = build_optimizer()
margin = 1.25 if minutes else 1.0  # a timed run may become faster
dataloader.fetch_more(corpus, int(margin * planned_iterations * rows_per_step), max_seq_len, tell_data)
loader = dataloader.DataLoader(corpus, max_seq_len, rows_per_step, seed, device, rank, world_size)
if resumed_from:
    try:
        model.load_state_dict(checkpoint.load(resumed_from, "model"))
        optimizer.load_state_dict(checkpoint.load(resumed_from, "optimizer"))
        loader.load_state_dict(data_place)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        advice = "Resume with those of its run."
        raise SettingError(f"{resumed_from} does not fit these settings: {reason}.\n{advice}") from None
elif init_from:
    origin_model = asdict(GPTConfig(**origin_config["model"])) | {"max_seq_len": max_seq_len}
    if origin_model != asdict(config):
        what = f"{origin} holds another model, {origin_model}"
        raise SettingError(f"{what}.\nStart from a run of this version.")
    model.load_state_dict(checkpoint.load(origin, "model"))
corpus_size = report.short(corpus.counts["train"]["tokens"])
epochs = planned_tokens / (loader.rows_per_epoch * max_seq_len)
corpus_name = f"{corpus.name} · vocabulary of {vocab_size:,} · fingerprint {corpus.fingerprint}"
tell("data", f"{corpus_name} · {corpus_size} training tokens, for {epochs:.2g} epochs")

how = "eager" if not compile else "compiled in parts" if model.has_compiled_parts else "compiled"
kernel = attention_backend(config, compute_dtype, device, compile)
tell("train", f"{how} · {kernel} attention · peak {report.short(peak, ' ')}FLOP/s ({peak_source})")

# -----------------------------------------------------------------------------
# The run's folder

settings = {name: globals()[name] for name in kinds if name not in CALL}
to_repeat = {name: settings[name] for name in settings if name not in ("wandb", *HORIZONS[2:])}
python = "python" if world_size == 1 else f"torchrun --standalone --nproc_per_node={world_size}"
if "num_iterations" not in horizons:  # the horizon stays what was asked for
    settings["num_iterations"] = None
run_config = {
    "settings": settings,
    "given": given_before | {name: given[name] for name in given if name not in CALL},
    "command": report.command_line(f"{python} train.py", to_repeat),
    "timed": bool(minutes),
    "model": asdict(config),
    "num_params": num_params,
    "num_flops_per_token": num_flops_per_token,
    "num_flops_per_token_causal": model.num_flops_per_token(exact_causal=True),
    "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, **corpus.counts},
    "device": device_name,
    "device_type": device_type,
    "mfu_peak": peak,
    "mfu_peak_source": peak_source,
    "world_size": world_size,
    "versions": report.versions(),
}
if rank == 0:
    try:
        checkpoints.mkdir(exist_ok=True)
        report.replace(run_folder / "config.json", json.dumps(run_config, indent=2))
        if not (run_folder / "tokenizer" / "tokenizer.json").exists():  # never touch a good one
            dataloader.save_tokenizer(corpus.tokenizer, run_folder / "tokenizer")
        report.cut_log(run_folder, step if resumed_from else -1)
    except OSError as error:
        advice = "Choose another --out-dir or make room."
        raise SettingError(f"{run_folder} cannot be written: {error.strerror}.\n{advice}") from None
    saves = 1 + planned_iterations // save_every if save_every > 0 else 1
    saves += int(planned_iterations * planned_dt / (60 * save_minutes)) if save_minutes > 0 else 0
    saves = min(saves, keep_checkpoints + 1)  # the oldest one goes when the new one is complete
    if warning := checkpoint.check_room(checkpoints, weight_bytes, checkpoint_bytes, saves, best=epochs > 1):
        tell("disk", warning)
log = report.Log(run_folder if rank == 0 else None, wandb, run_config)
event = "resumed" if resumed_from else "started"
log.write("event", step=step, event=event, planned_iterations=planned_iterations)
saver = checkpoint.Saver(checkpoints, keep_checkpoints, pin=on_gpu, synchronize=synchronize)


def write_samples():
    """Of validation documents [[beginning, what the model writes, how the text really goes on], ...]."""
    prompts, real = zip(*validation.beginnings(4, 24, 128))
    written = zip(*model.generate(prompts, corpus.bos, 128, seed=seed))
    decode = corpus.tokenizer.decode
    return [[decode(a[1:]), decode(b), decode(c)] for a, b, c in zip(prompts, written, real)]


# -----------------------------------------------------------------------------
# The loop. Host and device meet only at the end of a window of steps

start_step, time_before = step, total_training_time
warm_from = start_step + 10  # until then caches and allocators warm up: those steps are not timed
last_saved, last_save_time = step if resumed_from else -1, time.monotonic()
dt = planned_dt  # seconds per step in the last window
mean_dt = mean_dt or planned_dt  # on average since `warm_from`; until there is a window, in the start before
tokens = step * total_batch_size
flops_so_far = num_flops_per_token * tokens
timetable = None  # of a timed run, from its first step on
samples, sample_step, sample_seconds = [], -1, 0.0
skips_in_a_row, failure = 0, None  # failure: why the run cannot go on
evaluation_due = step == 0 or (eval_every > 0 and step % eval_every == 0)
save_due = sample_due = finished = stop = False
signals = machine.Signals()  # from now on they are obeyed at the end of a window; stop: the one that came
new_folder = None
clock.lap("setup")
while True:
    # once in a while: evaluate. Another evaluation has its place here, its time within eval_seconds
    if evaluation_due and val_step != step:
        begin = time.monotonic()
        batches = ranks.watch(validation.batches(device_batch_size, device, rank, world_size))
        # compiled, it is the graph that trains; and on MPS attention without gradients has looked ahead
        with torch.set_grad_enabled(compile or device_type != "cpu"):
            val_bpb = report.bits_per_byte(model, batches, device)
        min_val_bpb, val_step = min(min_val_bpb, val_bpb), step
        eval_seconds = time.monotonic() - begin
        val_record = {"step": step, "val_bpb": val_bpb, "min_val_bpb": min_val_bpb}
        val_record |= {"total_training_flops": flops_so_far, "total_training_time": total_training_time}
        log.write("val", **val_record)
        show(report.val_line(val_record))
        clock.lap("evaluation")
        # the text is read again: from here on val_bpb may rise, so the weights where it is lowest are kept
        if loader.epoch > 1 and val_bpb == min_val_bpb and not finished and rank == 0:
            best_state = {"step": step, "val_bpb": val_bpb, "epoch": loader.epoch}
            saver.save(step, {"model": model.state_dict()}, best_state, kind="best")
            clock.lap("saving")

    # once in a while: save
    if save_due and last_saved != step:
        ranks.heartbeat()
        last_save_time = time.monotonic()
        different = optimizer.different_rank()
        if different is not None:
            failure = f"the weights of rank {different} differ from those of rank 0; nothing is saved"
            break
        if all(p.isfinite().all() for p in model.parameters()):
            last_saved = step
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state = {
                "step": step,
                "progress": timetable.at(time.monotonic()) if minutes else progress,
                "min_val_bpb": min_val_bpb,
                "val_bpb": val_bpb,
                "val_step": val_step,
                "smooth_train_loss": smooth_train_loss,
                "total_training_time": total_training_time,
                "skipped_steps": skipped_steps,
                "mean_dt": mean_dt,
                "planned_iterations": planned_iterations,
                "span": span,
                "spent": dict(clock.spent),
                "data": loader.state_dict(),
                **{name: run_config[name] for name in ("settings", "given", "versions", "model")},
            }
            if rank == 0:
                saver.save(step, tensors, state)
        else:
            tell("save", "left out: the weights are not finite")
        clock.lap("saving")

    # once in a while: sample, after saving, because it only shows something
    if sample_due and sample_step != step and rank == 0:
        begin, sample_step = time.monotonic(), step
        samples = report.attempt("sampling", write_samples) or samples
        show(report.show_samples(samples))
        sample_seconds = time.monotonic() - begin
        clock.lap("sampling")
    if finished or stop:
        break

    # how far the next window goes: rank 0 decides, all ranks obey
    most = log_every or (1 if step < warm_from else min(10, max(1, int(0.5 / dt))))
    most = min(most, max(1, int(10 / dt)))  # signals and saves wait for a window's end
    for period in (eval_every, sample_every, save_every):
        most = min(most, period - step % period) if period > 0 else most
    if step < warm_from:
        most = min(most, warm_from - step)
    if minutes and timetable is None:  # the clock of a timed run starts with its first step
        seconds_left = 60 * minutes - clock.elapsed("corpus") - eval_seconds - closing_seconds
        span = span or max(seconds_left, dt)
        timetable = Timetable(time.monotonic(), span, progress, last_step)
    if minutes:
        window = timetable.window(time.monotonic(), dt, most, step)
    else:
        window = (min(1.0, step / num_iterations), 0.0, max(0, min(most, num_iterations - step)), 0.0)
    progress, increment, window_steps, stall = ranks.first(window)
    if stall:
        tell("time", f"the run stood still: its deadline is put off by {stall:.1f} s")
    if window_steps == 0:  # what the end needs, then out
        report.end_live()
        if step == start_step and resumed_from:
            tell("resume", "nothing is left to train: the run has come to its end")
        finished = evaluation_due = save_due = sample_due = True
        continue

    ranks.heartbeat()
    step_nats, step_norms, step_skips = [], [], []  # 0-D tensors on the device
    wait_before, window_start = loader.wait_time, time.perf_counter()
    for _ in range(int(window_steps)):
        # one step of training: accumulate gradients, set what the schedules say, update, forget the gradients
        rows = next(loader)  # this rank's: (rows_per_rank, T + 1)
        nats = torch.zeros((), device=device)
        for micro_step, micro in enumerate(rows.split(device_batch_size), 1):
            loss = model(micro[:, :-1], micro[:, 1:])  # summed over its targets
            if micro_step == micro_steps:
                optimizer.reduce_early()  # ranks average each gradient while the backward pass goes on
            (loss / (rows_per_rank * max_seq_len)).backward()  # a mean; the optimizer averages over ranks
            nats += loss.detach()
        lrm = lr_multiplier(step, progress, warmup, warmdown_ratio, final_lr_frac)
        momentum = muon_momentum(step, progress, warmdown_ratio)
        decay = weight_decay * weight_decay_multiplier(progress, warmdown_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay
        optimizer.step(nats)
        model.zero_grad(set_to_none=True)

        step += 1
        progress = progress + increment if minutes else step / num_iterations
        step_nats.append(nats)
        step_norms.append(optimizer.grad_norm)
        step_skips.append(optimizer.skipped)
        if signals.stop and world_size == 1:
            break

    # the window ends: the only synchronization, one transfer, one record
    global_nats = ranks.total(torch.stack(step_nats))
    table = torch.stack([global_nats, torch.stack(step_norms), torch.stack(step_skips)])  # (3, steps)
    losses, norms, skips = table.tolist()
    synchronize()
    dt = (time.perf_counter() - window_start) / len(losses)
    for loss_sum, skipped in zip(losses, skips):
        train_loss = math.nan if skipped else loss_sum / total_batch_size  # a mean over the global batch
        if skipped:
            skipped_steps, skips_in_a_row = skipped_steps + 1, skips_in_a_row + 1
            failure = "loss or gradient not finite 5 times in a row" if skips_in_a_row == 5 else failure
        else:
            smooth_train_loss, skips_in_a_row = report.update_ema(smooth_train_loss, train_loss, ema_beta), 0
    debiased_smooth_loss = report.debias(smooth_train_loss, ema_beta, step - skipped_steps)
    if step > warm_from:
        total_training_time += dt * len(losses)
    mean_dt = (total_training_time - time_before) / (step - warm_from) if step > warm_from else dt
    tokens = step * total_batch_size
    flops_so_far = num_flops_per_token * tokens
    tok_per_sec = total_batch_size / dt
    record = {
        "step": step,
        "train_loss": train_loss,
        "train_loss_ema": debiased_smooth_loss,
        "progress": progress,
        "lrm": lrm,
        "muon_momentum": momentum,
        "weight_decay": decay,
        "grad_norm": norms[-1],
        "dt": dt,
        "tok_per_sec": tok_per_sec,
        "mfu": num_flops_per_token * tok_per_sec / (peak * world_size),
        "data_wait": (loader.wait_time - wait_before) / (dt * len(losses)),
        "tokens": tokens,
        "total_training_flops": flops_so_far,
        "total_training_time": total_training_time,
        "epoch": loader.epoch,
        "peak_memory": machine.peak_memory(device),
        "skipped_steps": skipped_steps,
    }
    log.write("step", **record)
    if any(skips):
        places = range(loader.cursor - len(skips) * rows_per_step, loader.cursor, rows_per_step)
        cursors = [place for place, skipped in zip(places, skips) if skipped]  # where those batches begin
        log.write("event", step=step, event="skipped_step", skipped_steps=skipped_steps, cursors=cursors)
    log.saves(saver.outcomes(), step)
    seconds_left = mean_dt * (last_step - step)
    if minutes:
        seconds_left = min(seconds_left, timetable.left(time.monotonic()))
    show_step(record, num_iterations, val_bpb, peak_source, seconds_left)
    if failure:
        culprit = optimizer.not_finite() or "the loss"
        failure = f"{failure}, first in {culprit}"
        log.write("event", step=step, event="not_finite", parameter=culprit)
        break
    if step == warm_from:
        gc.collect()
        gc.freeze()  # what lives now lives to the end

    # what is due now: rank 0 decides, a signal may come to any rank, all ranks obey
    evaluation_due = eval_every > 0 and step % eval_every == 0
    sample_due = sample_every > 0 and step % sample_every == 0
    save_due = save_every > 0 and step % save_every == 0
    save_due |= 0 < 60 * save_minutes < time.monotonic() - last_save_time
    if minutes:  # what the end does anyway is not begun shortly before it
        evaluation_due &= seconds_left > 3 * eval_seconds
        sample_due &= seconds_left > 3 * sample_seconds
    due = (evaluation_due, sample_due, save_due) if rank == 0 else (0, 0, 0)
    *due, asked, stop = map(int, ranks.agree(*due, signals.save, signals.stop))
    evaluation_due, sample_due, save_due = due[0] and not stop, due[1] and not stop, due[2] or asked or stop
    signals.save = False
    clock.lap("training")

# -----------------------------------------------------------------------------
# The end: what was trained is safe before anything is shown

report.end_live()
ranks.end()
saver.wait()
save_error = log.saves(saver.outcomes(), step, "the last one failed")
if checkpoint.is_full(save_error) and last_saved == step:  # perhaps there is room for the weights alone
    saver.save(step, {"model": tensors["model"]}, state, prune=False)
    saver.wait()
    if not log.saves(saver.outcomes(), step, "not even the weights alone had room"):
        tell("save", f"the weights alone had room: step_{step:06d} can be sampled from, but not resumed")
failed = bool(failure or save_error or last_saved != step)
event = "failed" if failure else "interrupted" if stop else "finished"
log.write("event", step=step, event=event, **({"reason": failure} if failure else {}))
if failure and rank == 0:
    good, _ = checkpoint.newest_valid(checkpoints)
    show(f"error: {failure}.\nThe last good checkpoint: {good or 'none'}.")
if stop:
    call = {"out_dir": run_folder.parent, "run_name": run_folder.name, "resume": True}
    tell("stopped", f"by {signal.Signals(stop).name} after step {step}; to continue:")
    show(report.command_line(f"{python} {report.quoted(Path(__file__).absolute())}", call))
clock.lap("saving")
if peak_source == "measured":  # the better of two: another program may have slowed the first
    peak = max(peak, machine.find_peak(device, compute_dtype)[0])
tok_per_sec = total_batch_size / mean_dt
summary = {
    "val_bpb": val_bpb,
    "min_val_bpb": min_val_bpb,
    "train_loss_ema": report.debias(smooth_train_loss, ema_beta, step - skipped_steps),
    "steps": step,
    "progress": progress,
    "tokens": tokens,
    "total_training_flops": flops_so_far,
    "total_training_time": total_training_time,
    "wall_time": clock.elapsed(),
    "tok_per_sec": tok_per_sec,
    "mfu": num_flops_per_token * tok_per_sec / (peak * world_size),
    "mfu_peak": peak,
    "mfu_peak_source": peak_source,
    "peak_memory": machine.peak_memory(device),
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
    failed = not report.finish(run_folder, summary) or failed
    log.close(summary)
sys.exit(1 if failed else 128 + stop if stop else 0)
