"""
onedial: pretrain a GPT. One dial, --depth, sets the model; --minutes sets how long training takes.

    python train.py                                               # a laptop: five minutes, no GPU, no network
    python train.py --depth 12                                    # one GPU
    torchrun --standalone --nproc_per_node=8 train.py --depth 12  # eight GPUs

On one H100, depth 12 trains on 485 thousand tokens per second. Every setting below is also a flag
(--max-seq-len 1024, --no-compile). None means auto: the value that is found is printed and saved.
"""

import time

process_start = time.monotonic()  # --minutes counts from here: the imports below are slow

import machine  # before torch: it sets environment variables that torch reads

errors = machine.ErrorHook()  # user-fixable errors print two lines, all others a traceback
ranks = machine.Ranks()  # one process of several that torchrun has started, or a single one
rank, world_size = ranks.rank, ranks.world_size
errors.rank = rank

import gc
import json
import math
import signal
import socket
import sys
from functools import cache, partial
from pathlib import Path

import torch

import checkpoint
import dataloader
import dataset
import plan
import report
from checkpoint import RunFolder
from model import GPT, GPTConfig, attention_backend
from optim_muon import MuonAdamW, optimizer_state_bytes
from settings import SettingError, Settings

# -----------------------------------------------------------------------------
# Settings: name: type = value  # comment. Edit them here, or give a flag

# run
run_name: str | None = None  # folder in out_dir (auto: <date>-<time>)
out_dir: str = "out"  # folder that holds all runs
resume: bool = False  # continue the newest run, or --run-name NAME, from its newest valid checkpoint
wandb: bool = False  # log to Weights & Biases too
# device
device_type: str | None = None  # cuda, mps or cpu (auto: the first one that is available)
dtype: str | None = None  # bfloat16, float16 or float32 for activations (auto: the first that is fast here)
compile: bool | None = None  # torch.compile (auto: if the run is long enough to gain time by it)
seed: int = 42  # random seed of weights, data order and samples
# data
data: str | None = None  # a path, stdlib, fineweb, climbmix, tinystories, hf:OWNER/NAME (auto: by the device)
text_field: str | None = None  # field or column with the text (auto: text, content, story, … if a string)
document_separator: str | None = None  # between documents in a file (auto: <|endoftext|> in .txt files)
vocab_size: int | None = None  # tokens of the BPE trained on the corpus (auto: from its size and the time)
init_from: str | None = None  # start with weights, shape and tokenizer of another run, out/NAME (auto: none)
# model
depth: int | None = None  # layers; width, heads and batch follow (auto: from the time, or 12 on CUDA, or 4)
aspect_ratio: int | None = None  # width / depth, rounded up to whole heads (auto: 64; 128 for depth 1)
head_dim: int | None = None  # width of an attention head (auto: 64; 128 from depth 8 on)
dropout: float | None = None  # share of a layer's input (auto: 0; with --minutes more for a small text)
max_seq_len: int | None = None  # T, tokens in a row (auto: 2048 on CUDA, else 512; less for a short text)
# horizon: at most one of these four (auto: compute-optimal on CUDA, else five minutes)
num_iterations: int | None = None  # steps
minutes: float | None = None  # wall time from start to report, without preparing the corpus
target_flops: float | None = None  # total training FLOPs
target_param_data_ratio: float | None = None  # tokens per matrix and head parameter (optimal: 12)
# batch
total_batch_size: int | None = None  # tokens per step over all devices (auto: from the horizon)
device_batch_size: int | None = None  # rows per forward pass on one device (auto: the most that fit)
# optimizer: peak learning rates for 2^19 tokens per step and width 768; scaled to the batch and width in use
embedding_lr: float = 0.3  # token embedding; value embeddings get half of it
unembedding_lr: float = 0.008  # head
matrix_lr: float = 0.02  # matrices of the blocks
scalar_lr: float = 0.5  # residual scalars and gates, each with a factor of its own
weight_decay: float | None = None  # for the matrices of the blocks (auto: 0.28, less in long runs)
warmup_steps: int = 40  # steps until the learning rate is at its peak, at most a tenth of the run
warmdown_ratio: float = 0.65  # share of the run over which the learning rate decays
final_lr_frac: float = 0.05  # learning rate at the end, as a share of the peak
# evaluation, log, checkpoints; -1 turns a periodic action off
eval_every: int | None = None  # steps between evaluations (auto: about ten over the run)
eval_bytes: int | None = None  # bytes of validation text to evaluate (auto: 50,000,000 on CUDA, else 131,072)
log_every: int | None = None  # steps between records, at most 10 s (auto: 1 at first, then half a second)
sample_every: int = -1  # steps between samples; there is always one at the end
save_every: int = -1  # steps between checkpoints
save_minutes: float = 10.0  # minutes between checkpoints
keep_checkpoints: int = 2  # number of newest checkpoints to keep
peak_tflops: float | None = None  # peak of one device, for the MFU (auto: as published, else measured)

HORIZONS = ("num_iterations", "minutes", "target_flops", "target_param_data_ratio")
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # candidates for an automatic depth
SHAPE = ("depth", "aspect_ratio", "head_dim", "vocab_size")  # taken from the run in --init-from
OF_THE_CALL = ("run_name", "out_dir", "resume")  # not saved with the run
# automatic values that depend on the machine: a resumed run finds them again
OF_THE_MACHINE = ("device_type", "dtype", "device_batch_size", "log_every", "peak_tflops")
LIMITS = {  # lowest and highest value; all other numbers must be above 0
    **{"seed": (0, 2**31), "vocab_size": (257, 65_535), "max_seq_len": (32, 2**20), "minutes": (0.05, 1e6)},
    **dict.fromkeys(("weight_decay", "warmup_steps"), (0, 1e9)),
    **dict.fromkeys(("warmdown_ratio", "final_lr_frac"), (0, 1)),
    "dropout": (0, 0.45),
    **dict.fromkeys(("eval_every", "sample_every", "save_every", "save_minutes"), (-1, 1e9)),
}


def absolute(path):
    """Make a path absolute, so that a run can be resumed from any folder. Names of data sets stay."""
    is_name = path == "stdlib" or dataset.is_public(path)
    return path if is_name else str(Path(path).expanduser().absolute())


report.open_console()
console = report.Console(rank)
print0 = console.print0  # "label    text", on rank 0 only
errors.clean_up = [lambda error: console.end_live()]
convert = {"data": absolute, "init_from": absolute}
# from here on each constant has its flag's value
settings = Settings(globals(), __file__, exclusive=HORIZONS, convert=convert)

# -----------------------------------------------------------------------------
# The run: a new folder, or the one to resume. It is claimed before anything slow

out_folder = Path(out_dir).expanduser().absolute()
run = RunFolder.find(out_folder, run_name) if resume else None
has_begun = bool(run) and run.has_begun()
saved_device_type = None
if run:
    saved_settings, requested_before, warnings = run.saved_settings()
    saved_device_type = saved_settings.get("device_type")
    differences = settings.inherit(
        saved_settings,
        requested_before,
        found_again=OF_THE_MACHINE,
        # they follow the horizon; batch and weight decay do too, but changing them would change the training
        with_exclusive=("compile", "eval_every"),
        fixed=("init_from",) if has_begun else (),
    )
    for line in (*warnings, *differences):
        print0("resume", line)
settings.check(LIMITS)
if rank == 0:
    run = run or RunFolder.create(out_folder, run_name)
    errors.clean_up.append(lambda error: run.abandon())  # a new folder, before the first step
    missing = run.claim()  # locked until the process exits, however it exits
    print0("run", run.path)
    for line in missing:  # what the file system cannot do
        print0("disk", line)

# -----------------------------------------------------------------------------
# The machine

clock = report.Clock(process_start)
for line in ranks.warnings:
    print0("node", line)
device = machine.find_device(device_type, ranks.local_rank, world_size)
device_type, on_gpu = device.type, device.type == "cuda"
if saved_device_type not in (None, device_type) and settings.requested.get("compile") is None:
    compile = None  # the saved value was found for another device
compute_dtype = machine.find_dtype(device, dtype)
dtype = str(compute_dtype).removeprefix("torch.")
device_name, synchronize = machine.device_name(device), machine.synchronizer(device)
print0("device", f"{world_size} × {device_name} · {dtype}" if world_size > 1 else f"{device_name} · {dtype}")
if on_gpu and compute_dtype == torch.float32 and not machine.has_fast_bf16(device):
    print0("device", "no fast bf16 or fp16 here: a step takes twice the memory and several times as long")
clock.lap("setup")

# -----------------------------------------------------------------------------
# The data, prepared before the ranks are connected: no collective call waits for the tokenizer

data = data or ("fineweb" if on_gpu else "stdlib")
if not any((num_iterations, minutes, target_flops, target_param_data_ratio)):
    minutes, target_param_data_ratio = (None, 12.0) if on_gpu else (5.0, None)
tokenizer = None
if init_from and not has_begun:  # shape and tokenizer of the other run; its weights are loaded below
    initial, initial_weights, initial_config = checkpoint.initial_weights(Path(init_from))
    initial_settings = initial_config["settings"]
    settings.require({name: initial_settings[name] for name in SHAPE}, source="--init-from")
    max_seq_len = max_seq_len or initial_settings["max_seq_len"]
    print0("init", f"from {initial}")
if init_from:
    tokenizer = dataset.load_tokenizer((run.path if has_begun else Path(init_from)) / "tokenizer")
eval_bytes = eval_bytes or (50_000_000 if on_gpu else 131_072)
print_data = partial(console.print, "data")  # on the rank that prepares the corpus
largest_vocab = plan.largest_vocab(minutes) if minutes and not on_gpu else 2**15
reading = {"text_field": text_field, "separator": document_separator, "out_dir": out_folder}
corpus = dataset.prepare(data, vocab_size, print_data, largest_vocab, tokenizer, **reading)
for note in corpus.notes:
    print0("data", note)
vocab_size, data = corpus.tokenizer.n_vocab, corpus.data or data  # a hub data set with its commit
max_seq_len = max_seq_len or corpus.row_length(2048 if on_gpu else 512)
num_rows = math.inf if corpus.more else sum(corpus.rows_per_shard("train", max_seq_len))
validation = dataloader.ValidationRows(corpus, eval_bytes, max_seq_len)
clock.lap("corpus")
ranks.connect(device)
if len(set(ranks.all_gather(corpus.content()))) > 1:
    what = f"--data {data} is not the same on all nodes"
    raise dataset.DataError(f"{what}.\nCopy it, and the cache of prepared text, from one node to the others.")
if rank > 0 and ranks.local_rank == 0:
    console.print("node", f"{socket.gethostname()} has joined with rank {rank} of {world_size}")
peak_flops, peak_source = machine.find_peak_flops(device, compute_dtype, peak_tflops)
run_path = ranks.broadcast(str(run.path) if run else None)
run = run or RunFolder(run_path)  # on rank 0 it holds the lock
machine.set_fallback_temporary_folder(run.path)

# -----------------------------------------------------------------------------
# The model: everything follows from depth. An automatic depth follows from the time or the FLOPs


def build_model(depth):
    """The model of a depth, without weights yet."""
    config = GPTConfig.of_depth(depth, vocab_size, max_seq_len, aspect_ratio, head_dim)
    with torch.device("meta"):
        return GPT(config, compute_dtype)


def optimizer_bytes(model):
    """Bytes of the optimizer's state, on all ranks together. Muon is for the matrices of the blocks."""
    counts = model.num_params()
    return optimizer_state_bytes({"muon": counts["matrix"], "adamw": sum(counts.values()) - counts["matrix"]})


def fits(model, rows, recompute=True):
    """Whether training with `rows` rows at a time should fit the GPU's memory; True on other devices."""
    needed = model.training_bytes(rows * max_seq_len, optimizer_bytes(model) / world_size, recompute)
    return needed < 0.9 * memory  # libraries and temporary tensors take the rest


def does_not_fit(depth, rows):
    """The error for it. It suggests fewer rows, or for one row the largest depth that fits."""
    depths = [d for d in DEPTHS if d < depth and (memory == math.inf or fits(build_model(d), 1))]
    advice = f"--depth {depths[-1]}" if depths else "a smaller --max-seq-len or --vocab-size"
    if rows > 1:
        advice = f"--device-batch-size {plan.largest_divisor(rows, rows - 1)}"
    batch = f"{report.plural(rows, 'row')} of {max_seq_len} tokens"
    what = f"depth {depth}: a step on {batch} does not fit in memory"
    return SettingError(f"{what}.\nTry {advice}.")


@cache
def affordable_tokens(depth):
    """Tokens for target_flops, or for the time: estimated from peak FLOP/s on a GPU, else measured."""
    model = build_model(depth)
    if target_flops:
        return target_flops / model.num_flops_per_token()
    # the other quarter: updates, evaluations, closing work
    training_time = 0.75 * max(1.0, 60 * minutes - clock.elapsed(without="corpus"))
    if on_gpu:
        flop_per_sec = world_size * peak_flops * plan.expected_mfu(model.config.n_embd)
        tok_per_sec = flop_per_sec / model.num_flops_per_token()
    else:
        model.init_weights(device, seed)
        batch = torch.randint(vocab_size, (4, max_seq_len + 1), device=device)
        pass_times = machine.timings(lambda: model(batch[:, :-1], batch[:, 1:]).backward(), device, 4)
        tok_per_sec = world_size * 4 * max_seq_len / min(pass_times)
    return ranks.broadcast(training_time * tok_per_sec)


def is_affordable(depth):
    """Whether a model of this depth fits, and can be trained on as many tokens as its parameters need."""
    model = build_model(depth)
    needed = plan.needed_tokens(model.num_scaling_params(), corpus.unique_tokens)
    return fits(model, 1) and affordable_tokens(depth) >= needed


memory = -ranks.all_reduce_max(-machine.free_memory(device))[0]  # bytes, of the device that has least
depth_from_budget = depth is None and bool(minutes or target_flops)
if depth_from_budget:
    depth = plan.deepest(DEPTHS, is_affordable)
depth = depth or (12 if on_gpu else 4)
model = build_model(depth)
if not fits(model, 1):
    raise does_not_fit(depth, 1)
model.init_weights(device, seed)
config = model.config
aspect_ratio, head_dim = aspect_ratio or config.n_embd // depth, config.head_dim
num_params = model.num_params()  # {role: count}
num_flops_per_token = model.num_flops_per_token()
parameters = report.parameter_counts(num_params)
flop = f"{report.short(num_flops_per_token, ' ')}FLOP per token"
print0("model", f"depth {depth}, width {config.n_embd} · {parameters} · {flop}")
if depth_from_budget:
    budget = report.plural(minutes, "minute") if minutes else f"{target_flops:.2g} FLOPs"
    shape_flags = f"--depth {depth} --vocab-size {vocab_size} --max-seq-len {max_seq_len}"
    print0("dial", f"depth chosen for {budget}; to keep this shape: {shape_flags}")

# -----------------------------------------------------------------------------
# The optimizer: one table, role -> kind and settings. Source of the numbers: nanochat, tuned at depth 12. The
# plan scales the learning rates to the batch. A new role is a line in GPT.parameter_roles and a line here

width_scale = (config.n_embd / 768) ** -0.5  # for head and embeddings: width 256 -> 1.73, 1536 -> 0.71
wide_lr = embedding_lr * width_scale
roles = {
    "matrix": dict(kind="muon", lr=matrix_lr),  # the loop sets momentum and weight decay
    "head": dict(kind="adamw", lr=unembedding_lr * width_scale, betas=(0.8, 0.96), weight_decay=0.01),
    "embedding": dict(kind="adamw", lr=wide_lr, betas=(0.8, 0.995), weight_decay=0.001),
    "value_embedding": dict(kind="adamw", lr=0.5 * wide_lr, betas=(0.8, 0.995), weight_decay=0.01),
    # eps is 1e-8, not 1e-10: the first gradients of the scalars are only rounding errors
    "resid_scalar": dict(kind="adamw", lr=0.01 * scalar_lr, betas=(0.8, 0.95), weight_decay=0.05, eps=1e-8),
    "x0_scalar": dict(kind="adamw", lr=scalar_lr, betas=(0.96, 0.95), eps=1e-8),
    "smear": dict(kind="adamw", lr=0.4 * scalar_lr, betas=(0.8, 0.95), eps=1e-8),
}


def build_optimizer(compile):
    """MuonAdamW over every role of the table, with a fresh state."""
    groups = [{**roles[role], "params": params} for role, params in model.parameter_roles().items()]
    # on a CPU compiling the updates takes 25 s and gains 4% of a step
    options = {"compile": compile and on_gpu, "loss_scaling": compute_dtype == torch.float16}
    # Muon's products: all numbers in them are below 50, and fp16 rounds them eight times as finely as bf16
    return MuonAdamW(groups, orthogonalize_dtype=compute_dtype, **options)


# -----------------------------------------------------------------------------
# The state of the loop, new or resumed

step = 0  # steps done; a skipped step counts
progress = 0.0  # of the run, from 0 to 1; all schedules are functions of it
tokens = 0  # trained so far
flops_so_far = 0
min_val_bpb = val_bpb = math.inf  # bits per byte of the validation text: lowest, latest
val_step = -1  # of the latest evaluation
smooth_train_loss, ema_beta = 0.0, 0.9  # exponential moving average of the train loss; it starts at 0
total_training_time = 0.0  # seconds of training steps, without the first 10 after each start
mean_dt = None  # seconds per step on average
skipped_steps = 0  # steps with a non-finite loss or gradient: they changed nothing
scale_skips = 0  # steps in fp16 that changed nothing because the loss scale was too large
planned_iterations = None  # steps planned at the first start or at a new horizon: warmup is a tenth at most
span, span_used = None, 0.0  # of a timed run: seconds from first step to closing work; used so far

resumed_from, new_horizon, saved_batch = None, False, None
if resume:
    resumed_from, faults = ranks.broadcast(run.to_resume() if rank == 0 else None)
    for fault in faults:
        print0("resume", f"skipped: {fault}")
    print0("resume", f"from {resumed_from}" if resumed_from else "no checkpoint yet: starting at step 0")
if resumed_from:
    names = "step progress min_val_bpb val_bpb val_step smooth_train_loss total_training_time skipped_steps "
    names += "data planned_iterations span settings model spent"
    saved_state = checkpoint.load_state(resumed_from, names.split())
    dataset.check_same(corpus, saved_state["data"]["fingerprint"])
    with checkpoint.must_fit(resumed_from):
        config.check_same(saved_state["model"])
    step, progress = saved_state["step"], saved_state["progress"]
    saved_batch = saved_state["settings"]["total_batch_size"]
    tokens = saved_state.get("tokens", step * saved_batch)  # older checkpoints have no sums
    flops_so_far = saved_state.get("total_training_flops", num_flops_per_token * tokens)
    min_val_bpb, val_bpb, val_step = (saved_state[name] for name in ("min_val_bpb", "val_bpb", "val_step"))
    smooth_train_loss = saved_state["smooth_train_loss"]
    total_training_time, mean_dt = saved_state["total_training_time"], saved_state.get("mean_dt")
    skipped_steps, scale_skips = saved_state["skipped_steps"], saved_state.get("scale_skips", 0)
    planned_iterations, span = saved_state["planned_iterations"], saved_state["span"]
    if saved_state["settings"]["eval_bytes"] != eval_bytes:  # measured on another text
        min_val_bpb, val_bpb, val_step = math.inf, math.inf, -1
    clock.add(saved_state["spent"])
    spent = sum(clock.spent[name] for name in ("training", "evaluation", "sampling", "saving"))
    span_used = saved_state.get("span_used") or (progress * span if span else spent)
    new_horizon = any(saved_state["settings"][name] != settings.values()[name] for name in HORIZONS)

# -----------------------------------------------------------------------------
# The plan, 1) horizon: tokens to train on. A timed run knows them once a step has been measured

if num_iterations:
    total_batch_size = total_batch_size or plan.whole_rows(2**19 if on_gpu else 2**12, max_seq_len, num_rows)
    planned_tokens = num_iterations * total_batch_size
elif target_flops:  # 1.5e18 FLOPs at depth 12, 1e9 per token -> 1.5e9 tokens
    planned_tokens = target_flops / num_flops_per_token
elif target_param_data_ratio:  # ratio 12 at depth 12, vocabulary 50,257: 12 × 124e6 -> 1.5e9 tokens
    planned_tokens = target_param_data_ratio * model.num_scaling_params()

# a timed run ends before it memorizes a small text, and reads it with dropout: 10 epochs -> 0.2
max_tokens = plan.MAX_EPOCHS * corpus.unique_tokens if minutes else math.inf
share_of_time = min(1.0, max_tokens / affordable_tokens(depth)) if minutes else 1.0
if dropout is None:
    dropout = plan.best_dropout(affordable_tokens(depth) / corpus.unique_tokens) if minutes else 0.0
for block in model.blocks:
    block.dropout = dropout


def dropout_keys(first_row, rows):
    """For each row a number that depends only on the seed and its place in the order of all rows, or None."""
    if dropout:
        places = torch.arange(first_row, first_row + rows, device=device)
        return (seed + 7919 * places).int()  # a step larger than the number of layers


planned_flops = None if minutes else num_flops_per_token * planned_tokens
compile_mode = plan.compile_mode(device_type, minutes and minutes * share_of_time, planned_flops)
if compile is None:
    compile = compile_mode != "nothing"
if compile and compile_mode == "graph" and world_size == 1:
    model.compile(dynamic=False)
elif compile:  # several ranks compile blocks: each one's gradients are averaged while the next one runs
    model.compile_parts()

# -----------------------------------------------------------------------------
# The benchmark: a few steps on random rows find the micro-batch that fits, compile, and measure a step


def benchmark_step(compile):
    """A fresh optimizer -> the two parts of a training step on random rows."""
    optimizer = build_optimizer(compile)

    def micro_step(size):
        rows, model.recompute = size
        random_rows = torch.randint(vocab_size, (rows, max_seq_len + 1), device=device)
        loss = model(random_rows[:, :-1], random_rows[:, 1:], dropout_keys(0, rows))
        optimizer.scale(loss / (rows * max_seq_len)).backward()
        return loss.detach()

    return micro_step, optimizer.step


def benchmark(sizes, compile):
    """
    -> (first of `sizes` that fits; seconds of a micro-step; seconds of an optimizer step; compile: False if
    torch.compile does not work here). sizes: (rows, whether to recompute blocks in the backward pass).
    """
    compiling = "compiling, up to a minute the first time, and " if compile else ""
    print0("measure", f"{compiling}timing steps of {sizes[0][0]} × {max_seq_len} tokens")
    headroom = 0.0 if device_batch_size else 0.05
    make_parts, release = lambda: benchmark_step(compile), lambda: model.zero_grad(set_to_none=True)
    try:
        with console.waiting("measure", "compiling" if compile else "timing steps"):
            return *machine.benchmark(make_parts, sizes, device, ranks, headroom, release), compile
    except machine.DoesNotFit:
        raise does_not_fit(depth, sizes[-1][0]) from None
    except machine.BenchmarkFailed as failure:
        if not compile or settings.requested.get("compile"):  # if asked for, a failure to compile is an error
            raise failure.__cause__ or failure from None
        reason = f"{type(failure.__cause__ or failure).__name__}: {failure.__cause__ or failure}"
        reason = " ".join(reason.split())[:200]
    print0("measure", f"torch.compile does not work here, continuing without it: {reason}")
    torch.compiler.set_stance("force_eager")
    return benchmark(sizes, compile=False)


# H100, depth 12: 131,072 tokens at a time are 3% faster than 65,536; eight ranks have only 65,536 of 2^19
tokens_at_once = (131_072 if world_size <= 4 else 65_536) if on_gpu else 4_096
largest = device_batch_size or plan.whole_rows(tokens_at_once, max_seq_len, num_rows) // max_seq_len
batch_was_given = settings.requested.get("total_batch_size") is not None
if total_batch_size:
    rows_per_rank = plan.share_batch(total_batch_size, max_seq_len, world_size, batch_was_given)
    largest = plan.largest_divisor(rows_per_rank, min(rows_per_rank, largest))
if device_batch_size:
    sizes = [(largest, False), (largest, True)]
else:  # recomputing takes a third more time: only if not even one row fits without it
    all_sizes = [(rows, recompute) for recompute in (False, True) for rows in plan.micro_batch_sizes(largest)]
    sizes = [size for size in all_sizes if fits(model, *size)] or [(1, True)]
(micro_batch_size, recompute), micro_step_time, update_time, compile = benchmark(sizes, compile)

# -----------------------------------------------------------------------------
# The plan, continued

weight_bytes = 4 * sum(num_params.values())
checkpoint_bytes = weight_bytes + optimizer_bytes(model)
# of an evaluation, until the first one is timed: a forward pass takes a third of a micro-step, say half
eval_seconds = math.ceil(len(validation) / (micro_batch_size * world_size)) * micro_step_time / 2
closing_seconds = 0.0
if minutes:
    # closing work besides an evaluation: samples of 128 tokens, a checkpoint at 250 MB/s, peak, report
    generate_8 = partial(model.generate, [[corpus.bos] * 24] * 4, corpus.bos, 8)
    times = machine.timings(lambda: list(generate_8()), device, 2)  # the first call loads kernels
    closing_seconds = 16 * times[1] + checkpoint_bytes / 250e6 + 6.0
    seconds_left = 60 * minutes - clock.elapsed(without="corpus") - eval_seconds - closing_seconds
    if span and not new_horizon:
        seconds_left = span - span_used
    seconds_left = max(1.0, ranks.broadcast(seconds_left))
    training_seconds = seconds_left - eval_seconds * plan.num_evaluations(eval_seconds, seconds_left)
    rows_per_second = micro_batch_size * world_size / micro_step_time
    planned_tokens = tokens + training_seconds * rows_per_second * max_seq_len

planned_tokens = min(planned_tokens, max_tokens)

# 2) batch: 1.5e9 tokens -> 2^19; five minutes of a CPU, 4e6 tokens -> 2^12
best_batch = plan.whole_rows(plan.best_batch_size(planned_tokens), max_seq_len, num_rows)
wanted_batch = total_batch_size or best_batch
rows_per_rank = plan.share_batch(wanted_batch, max_seq_len, world_size, batch_was_given)
rows_per_step = rows_per_rank * world_size
total_batch_size = rows_per_step * max_seq_len
wanted_rows = device_batch_size
device_batch_size = plan.largest_divisor(rows_per_rank, min(rows_per_rank, micro_batch_size))
micro_steps = rows_per_rank // device_batch_size
machine.check_matmul_length(device, max(vocab_size, device_batch_size * max_seq_len))
if device_batch_size < micro_batch_size:  # compile and measure that shape, too
    _, micro_step_time, update_time, compile = benchmark([(device_batch_size, recompute)], compile)
planned_dt = micro_steps * micro_step_time + update_time
clock.lap("trial")  # the benchmark's name in summary.json

if minutes:
    last_step = max(1, step + int(min(1e12, (max_tokens - tokens) / total_batch_size)))
    expected_steps = min(last_step, step + max(1, int(training_seconds / planned_dt)))
else:
    last_step = num_iterations or max(1, round(step + (planned_tokens - tokens) / total_batch_size))
    expected_steps = last_step
if planned_iterations is None or new_horizon or total_batch_size != saved_batch:
    planned_iterations = expected_steps
planned_tokens = tokens + max(0, expected_steps - step) * total_batch_size
amounts = expected_steps, planned_tokens, num_flops_per_token * planned_tokens
ends_early = minutes and expected_steps == last_step
print0("plan", report.horizon_line(minutes, *amounts, expected_steps * planned_dt, ends_early))
split = f"{report.plural(micro_steps, 'micro-step')} × {report.plural(device_batch_size, 'row')} × "
split += f"{max_seq_len:,} tokens"
split = f"{world_size} ranks × {split}" if world_size > 1 else split
if wanted_rows not in (None, device_batch_size):
    split += f"; {wanted_rows} rows at a time do not divide {rows_per_rank}"
if abs(total_batch_size - wanted_batch) >= max_seq_len:
    split += f"; {world_size} processes cannot share {wanted_batch:,}"
print0("plan", f"2) batch: {total_batch_size:,} tokens ({split})")

# 3) learning rates: 2^19 tokens per step -> × 1; 2^20 -> × 1.41; 2^12 -> AdamW × 0.55, Muon × 2.6
adamw_scale, muon_scale = plan.lr_scales(total_batch_size)
for options in roles.values():
    options["lr"] *= muon_scale if options["kind"] == "muon" else adamw_scale
warmup = min(warmup_steps, planned_iterations / 10)
scales = f"the settings × {adamw_scale:.3g} for AdamW, × {muon_scale:.3g} for Muon"
print0("plan", f"3) learning rates: {scales}; {report.plural(round(warmup), 'step')} of warmup")

# 4) weight decay: 2,840 steps × 2^19 tokens -> 0.28; four times as many steps -> 0.07
if weight_decay is None:
    weight_decay = plan.best_weight_decay(total_batch_size, planned_tokens)
print0("plan", f"4) weight decay: {weight_decay:.3g}; dropout: {dropout:.2g}")

# 5) evaluations: about ten; in a timed run for at most 5% of its time
if eval_every is None:
    evaluations = plan.num_evaluations(eval_seconds, training_seconds if minutes else math.inf)
    eval_every = math.ceil(expected_steps / evaluations) if evaluations >= 1 else -1
between = f", and every {report.plural(eval_every, 'step')}" if eval_every > 0 else ""
print0("plan", f"5) evaluations: at the start and the end{between}")

# -----------------------------------------------------------------------------
# What the loop works with: rows, progress, weights, optimizer, log, checkpoints

clock.lap("setup")
margin = 1.25 if minutes else 1.0  # a timed run may become faster than planned
# the other files of a public data set arrive while the run trains. One process on each node fetches them
fetcher = dataset.Fetcher(corpus, max_seq_len, print_data, is_active=ranks.local_rank == 0)
fetcher.want(int(margin * planned_tokens / max_seq_len))
loader = dataloader.DataLoader(corpus, max_seq_len, rows_per_step, seed, device, rank, world_size)

timeline = plan.ProgressBySteps(last_step, total_batch_size, step, tokens)
progress_now = timeline.at(step)
if minutes:
    end = time.monotonic() + 60 * minutes - clock.elapsed(without="corpus")
    if new_horizon:  # its span is known at the first step
        span, progress_now = None, max(progress_now, span_used / (span_used + seconds_left))
    else:
        progress_now = progress
    timeline = plan.ProgressByClock(end, span, span_used, 0.0 if new_horizon else progress, by_steps=timeline)
if progress_now < progress and progress > 1 - warmdown_ratio:
    shares = f"{progress:.0%} of the run was done, {progress_now:.0%} of the new horizon"
    print0("resume", f"{shares}: the learning rate rises again")

model.init_weights(device, seed)  # again: the benchmark has trained them
optimizer = build_optimizer(compile)
if resumed_from:
    with checkpoint.must_fit(resumed_from):
        model.load_state_dict(checkpoint.load(resumed_from, "model"))
        optimizer.load_state_dict(checkpoint.load(resumed_from, "optimizer"))
        loader.load_state_dict(saved_state["data"])
elif init_from:
    with checkpoint.must_fit(initial):
        config.check_same(initial_config["model"] | {"max_seq_len": max_seq_len})
        model.load_state_dict(initial_weights)
    ranks.broadcast_tensors(model.state_dict().values())  # the other run may have saved since rank 0 chose
    del initial_weights
clock.lap("setup")
with console.waiting("data", f"waiting for the next file of {corpus.name}"):
    while step < last_step and loader.batches_ready == 0:
        data_error, _ = loader.add_files(fetcher, ranks.all_gather)
        if data_error:
            raise dataset.DataError(data_error)
clock.lap("corpus")  # until here, waiting for data is no training time
corpus_size = f"{'about ' if corpus.more else ''}{report.short(corpus.unique_tokens)}"
epochs = planned_tokens / corpus.unique_tokens
corpus_name = f"{corpus.name} · vocabulary of {vocab_size:,} · fingerprint {corpus.fingerprint}"
print0("data", f"{corpus_name} · {corpus_size} training tokens, for {epochs:.2g} epochs")
how = "uncompiled" if not compile else "compiled in parts" if model.has_compiled_parts else "compiled"
how += ", blocks are recomputed in the backward pass" if model.recompute else ""
kernel = attention_backend(config, compute_dtype, device)
print0("train", f"{how} · {kernel} attention · peak {report.short(peak_flops, ' ')}FLOP/s ({peak_source})")

steps_or_minutes = {"num_iterations": None if minutes else last_step, "minutes": minutes}
to_repeat = settings.values(without=(*OF_THE_CALL, *HORIZONS, "wandb")) | steps_or_minutes
run_config = report.run_config(
    settings=settings.values(without=OF_THE_CALL),
    given={name: value for name, value in settings.requested.items() if name not in OF_THE_CALL},
    command=report.command_line(f"{ranks.launcher()} train.py", to_repeat),
    timed=bool(minutes),
    model=model,
    corpus=corpus,
    device=device_name,
    device_type=device_type,
    mfu_peak=peak_flops,
    mfu_peak_source=peak_source,
    world_size=world_size,
)
if rank == 0:
    with run.writing():
        run.checkpoints.mkdir(exist_ok=True)
        report.replace(run.path / "config.json", json.dumps(run_config, indent=2))
        if not (run.path / "tokenizer" / "tokenizer.json").exists():  # never overwrite a good one
            dataset.save_tokenizer(corpus.tokenizer, run.path / "tokenizer")
        logged = report.cut_log(run.path, step if resumed_from else -1)
    saves = plan.num_saves(expected_steps, planned_dt, save_every, save_minutes)
    saves = min(saves, keep_checkpoints + 1)  # the oldest one is deleted after the newest is complete
    if warning := run.check_disk_space(weight_bytes, checkpoint_bytes, saves, best=epochs > 1):
        print0("disk", warning)
log = report.Log(run.path if rank == 0 else None, console, wandb)
log.numbers |= logged if rank == 0 else {}
console.val_bpb = val_bpb
event = "resumed" if resumed_from else "started"
log.write("event", step=step, event=event, planned_iterations=planned_iterations)
saver = checkpoint.Saver(run.checkpoints, keep_checkpoints, pin=on_gpu, synchronize=synchronize)


def write_samples():
    """For some validation documents: [[their beginning, the model's text, how they go on], ...]."""
    prompts, real = zip(*validation.beginnings(4, 24, 128))
    written = zip(*model.generate(prompts, corpus.bos, 128, seed=seed))
    texts = partial(dataloader.sample_texts, corpus.tokenizer)
    return [texts(prompt[1:], *continuations) for prompt, *continuations in zip(prompts, written, real)]


# -----------------------------------------------------------------------------
# The loop. CPU and GPU synchronize once per log interval

start_step, time_before = step, total_training_time
warm_from = start_step + 10  # caches and allocators warm up until then: these steps are not timed
last_saved, last_save_time = step if resumed_from else -1, time.monotonic()
dt = planned_dt  # seconds per step in the last interval
mean_dt = mean_dt or planned_dt  # on average since warm_from; if no step is left, that of the start before
samples, sample_step, sample_seconds = [], -1, 0.0
skips_in_a_row, failure = 0, None  # failure: why the run cannot continue
data_error, wait_line = None, 5  # why the next file of a public set does not arrive; seconds until a line
evaluation_due = val_step < 0 or (eval_every > 0 and step % eval_every == 0)
save_due = sample_due = finished = stop = False
signals = machine.Signals()  # they take effect at the end of an interval; signals.stop: its number, or 0
errors.clean_up = [lambda error: console.end_live(), log.fail]  # from here on the folder stays
clock.lap("setup")
while True:
    # once in a while: evaluate. Other evaluations belong here, before eval_seconds is measured
    if evaluation_due and val_step != step:
        begin = time.monotonic()
        batches = ranks.watch(validation.batches(device_batch_size, device, rank, world_size))
        # with gradients the compiled training graph is reused, and attention on MPS is causal (a bug there)
        with torch.set_grad_enabled(compile or device_type != "cpu"):
            val_bpb = report.bits_per_byte(model, batches, device)
        min_val_bpb, val_step = min(min_val_bpb, val_bpb), step
        eval_seconds = time.monotonic() - begin
        val_record = {"step": step, "val_bpb": val_bpb, "min_val_bpb": min_val_bpb}
        val_record |= {"total_training_flops": flops_so_far, "total_training_time": total_training_time}
        log.write("val", **val_record)
        console.val(val_record)
        clock.lap("evaluation")
        # from the second epoch on val_bpb may rise again: keep the weights where it is lowest
        if loader.epoch > 1 and val_bpb == min_val_bpb and rank == 0:
            best_state = {"step": step, "val_bpb": val_bpb, "epoch": loader.epoch}
            best_state["settings"] = run_config["settings"]
            saver.save(step, {"model": model.state_dict()}, best_state, kind="best")
            clock.lap("saving")

    # once in a while: save
    if save_due and last_saved != step:
        ranks.heartbeat()
        last_save_time = time.monotonic()
        different = optimizer.first_different_rank()
        if different is not None:
            failure = f"the weights of rank {different} differ from those of rank 0; nothing is saved"
            break
        if all(p.isfinite().all() for p in model.parameters()):
            last_saved = step
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state = {
                "step": step,
                "progress": timeline.at(step, time.monotonic()),
                "tokens": tokens,
                "total_training_flops": flops_so_far,
                "min_val_bpb": min_val_bpb,
                "val_bpb": val_bpb,
                "val_step": val_step,
                "smooth_train_loss": smooth_train_loss,
                "total_training_time": total_training_time,
                "skipped_steps": skipped_steps,
                **({"scale_skips": scale_skips} if compute_dtype == torch.float16 else {}),
                "mean_dt": mean_dt,
                "planned_iterations": planned_iterations,
                **timeline.state_dict(time.monotonic()),
                "spent": dict(clock.spent),
                "data": loader.state_dict(),
                **{name: run_config[name] for name in ("settings", "given", "versions", "model")},
            }
            if rank == 0:
                saver.save(step, tensors, state)
            del tensors  # the gathered state of the optimizer: on every rank as much as the model and more
        else:
            print0("save", "skipped: the weights are not finite")
        clock.lap("saving")

    # once in a while: sample, after saving
    if sample_due and sample_step != step and rank == 0:
        begin, sample_step = time.monotonic(), step
        samples = console.attempt("sampling", write_samples) or samples
        console.samples(samples)
        sample_seconds = time.monotonic() - begin
        clock.lap("sampling")
    if finished or stop or data_error:
        break

    # how many steps until the next report: rank 0 decides
    max_steps = plan.interval_steps(step, warm_from, dt, log_every, (eval_every, sample_every, save_every))
    closing_time = eval_seconds + closing_seconds
    max_steps = min(max_steps, max(1, loader.batches_ready))
    interval = timeline.next_interval(step, dt, max_steps, time.monotonic(), closing_time)
    interval = ranks.broadcast(interval)
    progress = interval.progress[0]
    if interval.suspended:
        print0("time", f"the process was suspended: deadline extended by {interval.suspended:.1f} s")
    if interval.steps == 0:  # the run is over: evaluate, save and sample once more
        if step == start_step and resumed_from:
            print0("resume", "nothing is left to train: the run is complete")
        finished = evaluation_due = save_due = sample_due = True
        continue

    ranks.heartbeat()
    # the next file of a public data set. A run without rows waits here, and saves if it waits in vain
    data_error, stop = loader.add_files(fetcher, ranks.all_gather, signals.stop)
    if loader.batches_ready == 0:
        save_due = bool(data_error or stop)
        if time.perf_counter() > loader.waiting_since + wait_line:
            print0("data", f"waiting for {corpus.more[0]} for {wait_line} s")
            wait_line *= 2
        continue

    wait_line = 5
    loss_sums, grad_norms, skips, scale_skipped = [], [], [], []  # per step, 0-D tensors on the device
    wait_before, interval_start = loader.wait_time, loader.waiting_since or time.perf_counter()
    for next_progress in interval.progress[1:]:
        # one step of training: accumulate gradients, set what the schedules say, update, clear the gradients
        rows = next(loader)  # of this rank: (rows_per_rank, T + 1)
        first_row = loader.cursor - rows_per_step + rank * rows_per_rank  # its place in the order of all rows
        loss_sum = torch.zeros((), device=device)
        for micro_step, micro_batch in enumerate(rows.split(device_batch_size), 1):
            keys = dropout_keys(first_row + (micro_step - 1) * device_batch_size, len(micro_batch))
            loss = model(micro_batch[:, :-1], micro_batch[:, 1:], keys)  # summed over its targets
            if micro_step == micro_steps:
                optimizer.reduce_early()  # ranks average each gradient while the backward pass runs
            mean_loss = loss / (rows_per_rank * max_seq_len)  # over the rank; step() averages over ranks
            optimizer.scale(mean_loss).backward()  # the loss scale is only there in fp16
            loss_sum += loss.detach()
        lrm = plan.lr_multiplier(step, progress, warmup, warmdown_ratio, final_lr_frac)
        momentum = plan.muon_momentum(step, progress, warmdown_ratio)
        decay = weight_decay * plan.weight_decay_multiplier(progress, warmdown_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay
        optimizer.step(loss_sum)
        model.zero_grad(set_to_none=True)

        step, progress = step + 1, next_progress
        loss_sums.append(loss_sum)
        grad_norms.append(optimizer.grad_norm)
        skips.append(optimizer.skipped)
        scale_skipped.append(optimizer.scale_skipped)
        if signals.stop and world_size == 1:
            break

    # the interval ends: CPU and GPU synchronize, with one transfer and one record
    global_sums = ranks.all_reduce_sum(torch.stack(loss_sums))
    table = torch.stack([global_sums, *map(torch.stack, (grad_norms, skips, scale_skipped))])  # (4, steps)
    loss_sums, grad_norms, skips, scale_skipped = table.tolist()
    scale_skips += int(sum(scale_skipped))
    skips = [skip - for_scale for skip, for_scale in zip(skips, scale_skipped)]  # their losses count
    synchronize()
    steps_done = len(loss_sums)
    dt = (time.perf_counter() - interval_start) / steps_done
    for global_sum, skipped in zip(loss_sums, skips):
        train_loss = math.nan if skipped else global_sum / total_batch_size  # mean over the global batch
        if skipped:
            skipped_steps, skips_in_a_row = skipped_steps + 1, skips_in_a_row + 1
            failure = "loss or gradient not finite 5 times in a row" if skips_in_a_row == 5 else failure
        else:
            smooth_train_loss, skips_in_a_row = report.update_ema(smooth_train_loss, train_loss, ema_beta), 0
    debiased_smooth_loss = report.debias(smooth_train_loss, ema_beta, step - skipped_steps)
    if step > warm_from:
        total_training_time += dt * steps_done
    mean_dt = (total_training_time - time_before) / (step - warm_from) if step > warm_from else dt
    tokens += total_batch_size * steps_done
    flops_so_far += num_flops_per_token * total_batch_size * steps_done
    tok_per_sec = total_batch_size / dt
    record = {
        "step": step,
        "train_loss": train_loss,
        "train_loss_ema": debiased_smooth_loss,
        "progress": progress,
        "lrm": lrm,
        "muon_momentum": momentum,
        "weight_decay": decay,
        "grad_norm": grad_norms[-1],
        "dt": dt,
        "tok_per_sec": tok_per_sec,
        "mfu": num_flops_per_token * tok_per_sec / (peak_flops * world_size),
        "data_wait": (loader.wait_time - wait_before) / (dt * steps_done),
        "tokens": tokens,
        "total_training_flops": flops_so_far,
        "total_training_time": total_training_time,
        "epoch": loader.epoch,
        "peak_memory": machine.peak_memory(device),
        "skipped_steps": skipped_steps,
    }
    if compute_dtype == torch.float16:
        record |= {"loss_scale": optimizer.loss_scale.item(), "scale_skips": scale_skips}
    log.write("step", **record)
    if any(skips):
        begins = range(loader.cursor - steps_done * rows_per_step, loader.cursor, rows_per_step)
        cursors = [cursor for cursor, skipped in zip(begins, skips) if skipped]  # where those batches begin
        log.write("event", step=step, event="skipped_step", skipped_steps=skipped_steps, cursors=cursors)
    log.saves(saver.outcomes(), step)
    seconds_left = timeline.seconds_left(step, mean_dt, time.monotonic())
    console.step(record, None if minutes else last_step, peak_source, seconds_left)
    fetcher.want(int(loader.cursor + margin * rows_per_step * seconds_left / mean_dt + 0.5))
    if failure:
        culprit = optimizer.first_nonfinite_parameter() or "the loss"
        failure = f"{failure}, first in {culprit}"
        log.write("event", step=step, event="not_finite", parameter=culprit)
        break
    if step == warm_from:
        gc.collect()
        gc.freeze()  # objects that live now live until the end

    # what is due: rank 0 decides; a signal may reach any rank, and all ranks act on it
    evaluation_due = eval_every > 0 and step % eval_every == 0
    sample_due = sample_every > 0 and step % sample_every == 0
    save_due = save_every > 0 and step % save_every == 0
    save_due |= 0 < 60 * save_minutes < time.monotonic() - last_save_time
    if minutes:  # the end of a timed run evaluates and samples anyway: not just before it
        evaluation_due &= seconds_left > 3 * eval_seconds
        sample_due &= seconds_left > 3 * sample_seconds
    save_due |= signals.save
    signals.save = False
    due = (evaluation_due, sample_due) if rank == 0 else (0, 0)
    *due, save_due, stop = map(int, ranks.all_reduce_max(*due, save_due, signals.stop))
    evaluation_due, sample_due = due[0] and not stop, due[1] and not stop
    save_due |= stop
    clock.lap("training")

# -----------------------------------------------------------------------------
# The end: save first, then show

console.end_live()
ranks.disconnect()
saver.wait()
save_error = log.saves(saver.outcomes(), step, "the last one failed")
if checkpoint.is_full(save_error) and last_saved == step != start_step:  # the weights alone may fit
    saver.save(step, {"model": model.state_dict()}, state, prune=False)
    saver.wait()
    if not log.saves(saver.outcomes(), step, "the weights alone do not fit either"):
        print0("save", f"saved the weights alone: step_{step:06d} can be sampled from, but not resumed")
failed = bool(failure or save_error or last_saved != step)
reason = failure or data_error
event = "failed" if reason else "interrupted" if stop else "finished"
log.write("event", step=step, event=event, **({"reason": reason} if reason else {}))
if failure and rank == 0:
    good, _ = checkpoint.newest_valid(run.checkpoints)
    console.show(f"error: {failure}.\nThe last good checkpoint is {good or 'none'}.")
if data_error:
    console.show(f"error: {data_error}")
if stop or data_error:
    why = f"by {signal.Signals(stop).name}" if stop else "without the next file"
    call = {"out_dir": run.path.parent, "run_name": run.path.name, "resume": True}
    print0("stopped", f"{why} after step {step}; to continue:")
    console.show(report.command_line(f"{ranks.launcher()} {report.quoted(Path(__file__).absolute())}", call))
clock.lap("saving")
if peak_source == "measured":  # the better of two: another program may have slowed the first one
    again = console.attempt("measuring the peak", machine.measure_peak_flops, device, compute_dtype)
    peak_flops = max(peak_flops, again or 0.0)
if rank == 0:
    summary = report.summarize(
        log.numbers,
        run_config,
        progress=progress,
        tok_per_sec=total_batch_size / mean_dt,
        mfu_peak=peak_flops,
        wall_time=clock.elapsed(),
        peak_memory=machine.peak_memory(device),
        time=clock.spent,
        samples=samples,
    )
    failed = not report.finish(run.path, summary, console) or failed
    log.close()
sys.exit(1 if failed else 128 + stop if stop else 2 if data_error else 0)
