"""
Benchmarks. They print figures and are no tests. All figures are medians. Functions that are compared run in
turns in one process.

    python tests/bench.py train [FLAG ...]        train.py with its flags: speed, and where a step's time goes
    python tests/bench.py generate [DEPTH ...]    tokens per second with the KV cache, without it, and at best
    python tests/bench.py export FOLDER           tokens per second of an export: ours, and by transformers
    python tests/bench.py attention               the attention kernels, forward and backward
    python tests/bench.py loss                    head and loss, with all logits at once and in chunks
    python tests/bench.py optimizer [DEPTH ...]   our optimizer against PyTorch's
    python tests/bench.py checkpoint [DEPTH ...]  how long a save stops the training, and the speed of writing
    python tests/bench.py logging                 training with and without log records
    python tests/bench.py data                    tokenization, rows, start, resume, memory of the loader
    python tests/bench.py all                     all of the above but export, with their defaults
    python tests/bench.py gpu [OUT.json]          a GPU in 8 minutes: correctness, speed, profile, tests

A subcommand is a function in BENCHMARKS; the words after its name are its arguments.

What a GPU has to confirm; nothing since commit 5725d61 has run on one. In brackets: the part of `gpu`.
- gradients, compiled and eager, in bf16 or fp16, in chunks, and of recomputed blocks  [gradients]
- fp16 products with fp32 results, and no overflow at a loss scale of 2^16  [gradients]
- start, save, resume; reading back one record per log interval  [end to end]
- H100, depth 12: 600k tokens/s at a vocabulary of 32,768 (546k then), 540k at 50,257 (485k then), in exact
  bf16; depth 20: 180k (163k then); 131,072 tokens at a time fit  [depth 12, depth 12 small, depth 20]
- blocks compiled one by one: time to the first step, at most 2% slower  [12 blocks]
- the memory estimate, within 5% of the peak  [estimated, beside the memory of each speed]
- time of the loss kernel, of attention with look_back, of ReLU²  [profile]
- causality, the optimizer without synchronization (with a loss scale, too)  [tests]
- one graph with recomputed blocks: train.py --depth 16 --max-seq-len 65536 on 24 GB
- gradients reduced during the backward pass:
  torchrun --standalone --nproc_per_node=2 train.py --depth 12 --num-iterations 40
- the dial: whether train.py --minutes 3 ends lower than --minutes 3 --depth D for the two neighbours of its D
- T4, V100, RTX 20: auto chooses fp16 and efficient attention; `scale_skips` stays below 1% of the steps.
  V100: the build cu126 compiles, or train.py says that it continues without compiling
- AMD: bf16 on gfx90a, gfx942, gfx1100; flash attention; no warning about expandable segments. Apple: train.py
"""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine  # before torch: it sets environment variables that torch reads

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint as checkpoint_module
import dataloader
import dataset
import report
from model import GPT, QK_SCALE, BlockedAttention, ChunkedCrossEntropy, GPTConfig, Linear, softcap
from optim_muon import MuonAdamW, optimizer_state_bytes

ROOT = Path(machine.__file__).parent
device = machine.find_device()
on_gpu, on_mps = device.type == "cuda", device.type == "mps"
dtype, synchronize = machine.find_dtype(device), machine.synchronizer(device)
VOCAB, ROW, ROWS = (50_257, 2048, 32) if on_gpu else (4096, 512, 4)  # vocabulary, T, rows per micro-batch


def compile_model(model, in_parts=not on_gpu):
    """Compile in place as train.py does: one graph in long runs, in parts in short ones, not on MPS."""
    if not in_parts:
        model.compile(dynamic=False)
    elif not on_mps:
        model.compile_parts()


def seconds_of(work):
    """(result of work(), seconds until the device has finished it)."""
    synchronize()
    start = time.perf_counter()
    value = work()
    synchronize()
    return value, time.perf_counter() - start


def timings(functions, seconds=20):
    """Seconds of each call of each function. They run in turns; the first two calls are warm-up."""
    times, begin = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - begin < seconds:
        times.append([seconds_of(function)[1] for function in functions])
    return list(zip(*times[2:]))


def medians(functions, seconds=20):
    """Median seconds per call of each function; see `timings`."""
    return [statistics.median(column) for column in timings(functions, seconds)]


def headline(*facts):
    """Print the first line of a table."""
    print(" · ".join([machine.device_name(device), f"torch {torch.__version__}", *facts]))


def build_model(config, compute_dtype):
    """A GPT on the device, with its initial weights."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype)
    model.init_weights(device, 0)
    return model


def model_of_depth(depth):
    """The GPT of train.py at this depth, with this script's vocabulary and row length."""
    return build_model(GPTConfig.of_depth(depth, VOCAB, ROW), dtype)


def build_optimizer(model, compute_dtype):
    """MuonAdamW over the parameters of a model. Their gradients are set to random values."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    roles = model.parameter_roles().items()
    groups = [dict(kind="muon" if r == "matrix" else "adamw", lr=1e-5, params=params) for r, params in roles]
    return MuonAdamW(groups, compute_dtype, compile=on_gpu)


def all_products(model, rows, dtype):
    """(function with every matrix product of a forward and backward pass over `rows` tokens, its FLOPs)."""
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    shapes = [tuple(weight.shape) for weight in weights if weight.numel() > 10_000]  # without gates
    random = {(n, k): [torch.randn(s, device=device, dtype=dtype) for s in ((rows, k), (n, k), (rows, n))]
              for n, k in set(shapes)}  # fmt: skip

    def products():
        for shape in shapes:
            x, weight, grad = random[shape]
            x @ weight.T, grad @ weight, grad.T @ x

    return products, 6 * sum(n * k for n, k in shapes) * rows


def run_training(out, *flags, kill_after_evaluation=False):
    """
    Run train.py in out/bench. Returns (report.Run, result of `figures_of`). With `kill_after_evaluation` it
    is killed after the evaluation of its last step, because saving can take long.
    """
    command = [sys.executable, str(ROOT / "train.py"), "--out-dir", str(out), "--run-name", "bench", *flags]
    start, first_step, lines, killed = time.monotonic(), None, [], False
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        lines.append(line)
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("step") and first_step is None:
            first_step = time.monotonic() - start
        if kill_after_evaluation and sum(line.startswith("val") for line in lines) == 2:  # step 0, last step
            killed = True
            process.kill()
            break
    if process.wait() and not killed:
        sys.exit(1)  # train.py has printed the reason
    run = report.Run(Path(out, "bench"))
    return run, figures_of(run, lines, first_step)


def figures_of(run, lines, first_step):
    """{name: number or text}: speed without the first 10 steps, MFU, peak memory, seconds until step 1."""
    config, last = run.config, run.steps[-1]
    counted = (last["step"] - 10) * config["settings"]["total_batch_size"]
    speed = counted / last["total_training_time"] if counted > 0 else last["tok_per_sec"]
    flops, causal = (config["num_flops_per_token" + kind] / config["mfu_peak"] for kind in ("", "_causal"))
    printed = next((line.split(None, 1)[1] for line in lines if line.startswith("train ")), "")
    how = f"{printed.split(' · peak')[0]} · {config['settings']['dtype']}"
    memory, mfu, causal = last["peak_memory"], speed * flops, speed * causal
    figures = {"tok_per_sec": speed, "mfu": mfu, "mfu_causal": causal, "peak_memory": memory, "how": how}
    settings = config["settings"]
    with torch.device("meta"):
        model = GPT(GPTConfig(**config["model"]), getattr(torch, settings["dtype"]))
    counts = model.num_params()
    others = sum(counts.values()) - counts["matrix"]
    state = optimizer_state_bytes({"muon": counts["matrix"], "adamw": others})
    tokens, recompute = settings["device_batch_size"] * settings["max_seq_len"], "recomputed" in how
    figures["estimated_memory"] = model.training_bytes(tokens, state / config["world_size"], recompute)
    figures["start_to_first_step"] = first_step
    figures["speed"] = f"{speed:,.0f} tokens/s · MFU {mfu:.1%}, exact causal {causal:.1%}, of "
    figures["speed"] += f"{config['mfu_peak'] / 1e12:.4g} TFLOP/s ({config['mfu_peak_source']})"
    figures["start"] = f"{memory / 1e9:.2f} GB (estimated {figures['estimated_memory'] / 1e9:.2f})"
    figures["start"] += f" · first step after {first_step:.1f} s · {how}"
    return figures


def train(*flags):
    """Run train.py; print its speed, memory, start time, and the time of each part of a step."""
    batch = 2**19 if on_gpu else 2048
    defaults = f"--data stdlib --vocab-size {VOCAB} --num-iterations {40 if on_gpu else 80} --eval-every -1"
    defaults += f" --total-batch-size {batch} --eval-bytes {4 * ROWS * ROW} {'' if on_mps else '--compile'}"
    with tempfile.TemporaryDirectory() as out:
        run, figures = run_training(out, *defaults.split(), *flags)
    settings, config = run.config["settings"], GPTConfig(**run.config["model"])
    if settings["device_type"] != device.type:
        sys.exit(f"this script measures on {device.type}: run train.py with --device-type {device.type}")

    compute_dtype = getattr(torch, settings["dtype"])
    model = build_model(config, compute_dtype)
    if settings["compile"]:
        compile_model(model, in_parts="parts" in figures["how"])
    rows, T = settings["device_batch_size"], settings["max_seq_len"]
    row = torch.randint(config.vocab_size, (rows, T + 1), device=device)
    tokens, targets = row[:, :-1], row[:, 1:]  # the same strides as in training, so the same compiled graph
    products, product_flops = all_products(model, rows * T, compute_dtype)
    optimizer = build_optimizer(model, compute_dtype)
    forward = lambda: model(tokens, targets)  # noqa: E731
    once, both, products, step = medians([forward, lambda: forward().backward(), products, optimizer.step])
    batch, speed = settings["total_batch_size"], figures["tok_per_sec"]
    micro_steps = batch / (rows * T)
    # a loss in chunks computes its gradients in the forward pass
    parts = {"forward, with the loss's gradients": once * micro_steps}
    parts |= {"backward": (both - once) * micro_steps, "optimizer": step}
    parts["other: loop, loader, noise"] = batch / speed - sum(parts.values())

    headline(f"depth {settings['depth']}")
    print(figures["speed"], figures["start"], sep=" · ")
    print(f"{f'a step of {batch:,} tokens':36}{'ms':>10}{'share':>9}")
    for name, seconds in parts.items():
        print(f"{name:36}{1e3 * seconds:10,.1f}{seconds * speed / batch:9.1%}")
    flops = run.config["num_flops_per_token"]
    products, passes = product_flops / products, rows * T * flops / both  # FLOP/s
    print(f"matrix products alone: {products / 1e12:,.3f} TFLOP/s; ", end="")
    print(f"forward and backward: {passes / products:.0%} of that, all: {speed * flops / products:.0%}\n")


def generate(*depths):
    """Tokens per second with and without the KV cache, and compared with reading the weights alone."""
    kind = dtype if on_gpu else torch.float32  # as in sample.py
    headline(f"{kind}, one row, from token 1 to token {ROW}")
    for depth in [int(depth) for depth in depths] or [4, 8]:
        model = build_model(GPTConfig.of_depth(depth, VOCAB, ROW), kind).to(kind)
        weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
        rows = [torch.randn(1, weight.size(1), device=device, dtype=kind) for weight in weights]
        lengths = range(ROW // 32, ROW, ROW // 16)  # 16 lengths, spread over the row
        with torch.inference_mode():
            cached, products, uncached = medians(
                [
                    lambda: [*model.generate([[0]], 0, ROW)],  # noqa: B023
                    lambda: [row @ weight.T for row, weight in zip(rows, weights)],  # noqa: B023
                    lambda: [model(torch.zeros(1, n, dtype=torch.int64, device=device)) for n in lengths],  # noqa: B023
                ]
            )
        cached, uncached = cached / ROW, uncached / len(lengths)
        print(f"depth {depth}: {1 / cached:,.0f} tokens/s, without the cache {1 / uncached:,.1f};", end=" ")
        print(f"{products / cached:.0%} of the {1 / products:,.0f} tokens/s that reading the weights allows")


def export(folder):
    """Tokens per second of GPT.generate, as in sample.py, and of transformers, with 400 tokens after bos."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).to(device)
    bos = model.config.bos_token_id
    options = {"max_new_tokens": 400, "min_new_tokens": 400, "top_k": 50}
    for B in (1, 4):
        rows = torch.tensor([[bos, bos, bos]] * B, device=device)
        mask = torch.ones_like(rows)
        mask[1:, 0] = 0  # padding, if it is a batch
        ours, theirs = medians(
            [
                lambda: [*model.gpt.generate(rows.tolist(), bos, 400)],  # noqa: B023
                lambda: model.generate(rows, attention_mask=mask, **options),  # noqa: B023
            ]
        )
        print(f"{B} rows: {400 * B / ours:,.0f} tokens/s; transformers {400 * B / theirs:,.0f}")


def attention():
    """Causal attention with each available kernel: forward, and forward and backward."""
    headline(str(dtype), "exact causal TFLOP/s, forward / forward and backward")
    tokens, width = (32_768, 768) if on_gpu else (2048, 256)
    names = "CUDNN_ATTENTION FLASH_ATTENTION EFFICIENT_ATTENTION" if on_gpu else "FLASH_ATTENTION MATH"
    lengths = (1024, 2048, 4096) if on_gpu else (256, 512, 1024)
    for head_dim, T in [(d, T) for d in (64, 128) for T in lengths]:
        shape = (tokens // T, T, width // head_dim, head_dim)
        leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        grad, scale = torch.randn(shape, device=device, dtype=dtype), QK_SCALE**2 / head_dim**0.5
        heads = [x.transpose(1, 2) for x in leaves]
        candidates = {name.lower(): partial(sdpa, name, heads, scale) for name in names.split()}
        if device.type == "cpu":
            candidates["blocked"] = lambda h=heads, s=scale: BlockedAttention.apply(*h, s).transpose(1, 2)
        if on_gpu:
            candidates |= other_kernels(heads, scale)
        cells = []
        for name, forward in candidates.items():
            try:
                times = medians([forward, lambda f=forward: f().backward(grad)], seconds=1)  # noqa: B023
            except RuntimeError as error:
                cells.append(f"{name} {type(error).__name__}")
                continue
            flops = 4 * tokens * width * (T + 1) / 2
            cells.append(f"{name} {flops / times[0] / 1e12:.3g} / {3.5 * flops / times[1] / 1e12:.3g}")
        print(f"head_dim {head_dim:3}  T {T:5}   " + "   ".join(cells), flush=True)
    print()


def sdpa(name, heads, scale):
    """Attention with a kernel of PyTorch: q, k, v (B, n_head, T, head_dim) -> (B, T, n_head, head_dim)."""
    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(1, 2)


def other_kernels(heads, scale):
    """{name: function} of FlexAttention and of FlashAttention-2 with variable lengths."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = heads[0].shape
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    flex = partial(torch.compile(flex_attention, dynamic=False), *heads, block_mask=mask, scale=scale)
    starts = torch.arange(0, B * T + 1, T, device=device, dtype=torch.int32)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in heads]  # (B * T, n_head, head_dim)
    varlen = partial(varlen_attn, *packed, starts, starts, T, T, window_size=(-1, 0), scale=scale)
    return {"flex": lambda: flex().transpose(1, 2), "varlen": lambda: varlen().unflatten(0, (B, T))}


def loss():
    """Head and loss, forward and backward, with all logits at once and in chunks."""
    N, V, C = (65_536, 50_304, 768) if on_gpu else (2048, 4096, 256)
    x = torch.randn(N, C, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, C, device=device) / C**0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def at_once():
        logits = softcap(F.linear(x, weight.to(dtype)).float())
        return F.cross_entropy(logits, targets, reduction="sum")

    variants = {"at once": at_once}
    for n in (2, 4, 8, 16):
        variants[f"{n} chunks"] = partial(ChunkedCrossEntropy.apply, x, weight, targets, V, n, True)
    headline(str(dtype), f"{N:,} rows × {V:,} logits", "head and loss, forward and backward, compiled")
    compiled = variants.values() if on_mps else [torch.compile(f, dynamic=False) for f in variants.values()]
    functions, memory = [lambda f=f: f().backward() for f in compiled], []
    for function in functions:
        function()
        if on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            memory.append(f"{(torch.cuda.max_memory_allocated() - before) / 1e9:9.2f} GB more memory")
    times = medians(functions)
    for name, seconds, more in zip(variants, times, memory or [""] * len(times)):
        print(f"{name:12}{1e3 * seconds:9.1f} ms{6 * N * V * C / seconds / 1e12:9.3f} TFLOP/s{more}")
    print()


def optimizer(*depths):
    """Time per step, share of a training step, and memory of the optimizer state, on one device."""
    batch = 2**19 if on_gpu else 2**12
    for depth in map(int, depths or ((12,) if on_gpu else (4, 8))):
        model = model_of_depth(depth)
        compile_model(model)
        tokens = torch.randint(VOCAB, (ROWS, ROW), device=device)
        (passes,) = medians([lambda: model(tokens, tokens).backward()])  # noqa: B023
        passes *= batch / (ROWS * ROW)

        ours = build_optimizer(model, dtype)
        roles = model.parameter_roles()
        matrices = list(roles["matrix"].values())
        others = [p for role, params in roles.items() if role != "matrix" for p in params.values()]
        fused = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        muon, adamw = torch.optim.Muon(matrices, lr=1e-5), torch.optim.AdamW(others, lr=1e-5)
        times = medians([ours.step, fused.step, lambda: (muon.step(), adamw.step())])  # noqa: B023

        counts = [sum(p.numel() for p in params) / 1e6 for params in (matrices, others)]
        headline(f"depth {depth}: {counts[0]:.1f} M parameters with Muon, {counts[1]:.1f} M with AdamW")
        print(f"forward and backward of {batch:,} tokens, compiled: {1e3 * passes:,.0f} ms")
        print(f"{'':30}{'ms':>9}{'/ ours':>9}{'of a step':>12}{'state, MB':>12}")
        state_dicts = {
            "MuonAdamW": [bucket.state for bucket in ours.buckets],
            "AdamW(fused) for everything": fused.state.values(),
            "torch.optim.Muon + AdamW": [*muon.state.values(), *adamw.state.values()],
        }
        for t, (name, states) in zip(times, state_dicts.items()):
            size = sum(tensor.nbytes for state in states for tensor in state.values()) / 2**20
            print(f"{name:30}{1e3 * t:9.1f}{t / times[0]:9.2f}{t / (t + passes):12.1%}{size:12,.1f}")
        print(flush=True)
        torch.compiler.reset()  # the next depth has other shapes


def checkpoint(*depths):
    """How long a save stops the training, and how fast it is written, compared with torch.save."""
    for depth in map(int, depths or ((12,) if on_gpu else (4, 8))):
        model = model_of_depth(depth)
        optimizer = build_optimizer(model, dtype)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            saver = checkpoint_module.Saver(folder, keep=2, pin=on_gpu, synchronize=synchronize)
            times = []
            for number in range(5):
                tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _, pause = seconds_of(lambda: saver.save(number, tensors, {}))  # noqa: B023
                _, rest = seconds_of(saver.wait)
                assert saver.outcomes() == [(f"step_{number:06d}", None)]
                with open(Path(folder, "plain.pt"), "wb") as file:
                    save_plain = lambda: (torch.save(tensors, file), os.fsync(file.fileno()))  # noqa: B023, E731
                    times.append((pause, pause + rest, seconds_of(save_plain)[1]))
            newest, _ = checkpoint_module.newest_valid(folder)
            size = sum(file.stat().st_size for file in newest.iterdir())
        pause, writing, plain = (statistics.median(column) for column in zip(*times[1:]))
        headline(f"depth {depth}", f"{size / 1e6:,.0f} MB, medians of {len(times) - 1} saves")
        print(f"training stops for       {1e3 * pause:8.1f} ms, {pause / plain:.1%} of plain torch.save")
        print(f"written and checksummed  {1e3 * writing:8.1f} ms, {size / writing / 1e6:,.0f} MB/s")
        print(f"plain torch.save, fsync  {1e3 * plain:8.1f} ms, {size / plain / 1e6:,.0f} MB/s\n")


def logging():
    """Training with the synchronization and record of a log interval twice a second, and without."""
    model = model_of_depth(4)
    compile_model(model)
    optimizer = build_optimizer(model, dtype)
    tokens = torch.randint(VOCAB, (ROWS, ROW), device=device)
    fields = "progress train_loss train_loss_ema lrm grad_norm dt tok_per_sec mfu data_wait".split()
    record = {"step": 1, "tokens": 1, "total_training_flops": 1e12, **dict.fromkeys(fields, 0.5)}

    def block(interval, log, console):
        """20 steps with a record after each `interval` of them."""
        losses = []
        for step in range(1, 21):
            loss_sum = model(tokens, tokens)
            loss_sum.backward()
            optimizer.step(loss_sum.detach())
            losses.append(loss_sum.detach())
            if step % interval == 0:
                torch.stack([torch.stack(losses), optimizer.grad_norm.expand(len(losses))]).tolist()
                losses.clear()
                synchronize()
                log.write("step", **record, peak_memory=machine.peak_memory(device))
                console.step(record, 1000, "published", 60.0)
                console.end_live()  # prints the line that `step` keeps back

    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "console"), "w") as file:
        console = report.Console()
        log = report.Log(Path(folder), console)
        without_records = lambda: block(21, log, console)  # noqa: E731
        (alone,) = medians([without_records], seconds=0)
        interval = min(10, max(1, int(0.5 / (alone / 20))))
        with contextlib.redirect_stdout(file):
            without, logged = timings([without_records, lambda: block(interval, log, console)], seconds=40)
        ratios = sorted(b / a - 1 for a, b in zip(without, logged))
        headline(f"depth 4, {1e3 * statistics.median(without) / 20:.1f} ms a step, a record every {interval}")
        low, middle, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
        print(f"records cost {middle:+.2%} (quartiles {low:+.2%}, {high:+.2%}, of {len(ratios)} pairs)")
        (host,) = medians([lambda: log.write("step", **record)], seconds=2)
        share = host / (interval * alone / 20)
        print(f"writing a record takes {1e6 * host:.0f} µs, {share:.4%} of a log interval\n")


def data():
    """Tokenization compared with tiktoken's batches, rows, warm start, resume, memory of the loader."""
    T, rows = 2048, 256

    def resident():
        """Megabytes of this process in memory. Linux only, 0 elsewhere."""
        status = Path("/proc/self/status")
        kilobytes = re.search(r"VmRSS:\s+(\d+)", status.read_text())[1] if status.exists() else 0
        return int(kilobytes) / 1e3

    with tempfile.TemporaryDirectory() as home:
        os.environ["ONEDIAL_HOME"] = home
        corpus, cold = seconds_of(lambda: dataset.prepare("stdlib", 4096))
        print(f"cold start on stdlib          {cold:.1f} s, {corpus.counts['train']['bytes'] / 1e6:.0f} MB")

        def start():
            again = dataset.prepare("stdlib", 4096)
            dataloader.ValidationRows(again, 131_072, T)
            return next(dataloader.DataLoader(again, T, 8, 0, "cpu"))

        warm = statistics.median(seconds_of(start)[1] for _ in range(3))
        print(f"warm start to the first batch {warm:.2f} s")
        reader, text = dataset.TextReader(plain=True), dataset.Text()
        for file in dataset.find_files("stdlib").train:
            reader.read(file, text)
        places = text.documents()
        texts = [text[begin:end].decode() for begin, end in places]
        encoding, threads, times = corpus.tokenizer, os.cpu_count(), []
        arguments = text, places, Path(home), "train", str
        for _ in range(3):
            theirs = seconds_of(lambda: encoding.encode_ordinary_batch(texts, num_threads=threads))[1]
            ours = seconds_of(lambda: dataset.encode_texts(encoding, *arguments))[1]
            times.append((theirs / ours, sum(map(len, texts)) / 1e6 / ours))
        ratio, speed = (statistics.median(column) for column in zip(*times))
        print(f"tokenization, {threads} threads       {ratio:.0%} of tiktoken's speed, {speed:.1f} MB/s")

        corpus.shards["train"] = []
        for n in range(2):  # two shards of the size of public ones
            tokens = np.random.default_rng(n).integers(0, 4096, dataset.SHARD_TOKENS, dtype=np.uint16)
            header = np.array([20240520, 1, len(tokens)] + [0] * 253, dtype="<i4")
            path = Path(home, f"{n}.bin")
            corpus.shards["train"].append((path, dataset.write(path, header, tokens)))
        del tokens
        before = resident()
        loader = dataloader.DataLoader(corpus, T, rows, 0, "cpu")
        next(loader)
        times = [seconds_of(lambda: [next(loader) for _ in range(40)])[1] for _ in range(5)]
        speed = 40 * rows * T / statistics.median(times)
        print(f"rows of {T:,}                 {speed / 1e6:.0f} M tokens/s")
        while loader.epoch < 1.1:  # read both shards
            next(loader)
        print(f"memory of the loader          {resident() - before:.0f} MB, including the mapped shard")

        def resume():
            again = dataloader.DataLoader(corpus, T, rows, 0, "cpu")
            again.load_state_dict({**loader.state_dict(), "cursor": 10**12})
            return next(again)

        resumed = statistics.median(seconds_of(resume)[1] for _ in range(3))
        print(f"resume to the next batch      {resumed:.2f} s")


# -----------------------------------------------------------------------------
# The parts of `gpu`. Each runs alone, in an empty folder, and returns (line of the table, figures).
# Without CUDA they run at tiny sizes, so that everything has run once before time on a GPU is spent


def gradients():
    """Each gradient in the run's dtype (compiled, eager, recomputed) and in fp16, against eager fp32."""
    depth, T, vocab_size = (4, 2048, 50_257) if on_gpu else (2, 128, 512)
    model = build_model(GPTConfig.of_depth(depth, vocab_size, T), torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # parameters that start at zero would make other gradients zero
            p.add_(0.05 * torch.randn_like(p))
    row = torch.randint(vocab_size, (4, T + 1), device=device)
    tokens, targets = row[:, :-1], row[:, 1:]

    def passes():
        scale = 2.0**16 if model.compute_dtype == torch.float16 else 1.0
        model.zero_grad(set_to_none=True)
        (model(tokens, targets) / targets.numel() * scale).backward()
        return {name: p.grad / scale for name, p in model.named_parameters()}

    training_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    exact = passes()
    torch.set_float32_matmul_precision(training_precision)
    model.compute_dtype = dtype
    model.head.max_logits = targets.numel() * model.config.padded_vocab_size // 4  # in chunks, as in training
    found = {"eager": passes()}
    model.recompute = True
    found["recomputed"] = passes()
    model.recompute, model.compute_dtype = False, torch.float16
    found["fp16"] = passes()
    model.compute_dtype = dtype
    compile_model(model)
    found["compiled"] = passes()
    figures, words = {"dtype": str(dtype), "errors": {}}, []
    for how, grads in found.items():
        bad = [name for name, g in grads.items() if not g.isfinite().all()]
        errors = {n: ((grads[n] - g).norm() / g.norm()).item() for n, g in exact.items() if n not in bad}
        assert errors, f"{how}: no gradient is finite"
        middle, worst = statistics.median(errors.values()), max(errors, key=errors.get)
        figures["errors"][how] = errors
        figures[how] = {"median": middle, "worst": errors[worst], "worst_name": worst, "not_finite": bad}
        finite = f"NOT FINITE: {', '.join(bad)}" if bad else "all finite"
        words.append(f"{how} median {middle:.2%}, worst {errors[worst]:.2%} ({worst}), {finite}")
    return f"{figures['dtype'][6:]} against fp32: {'; '.join(words[::-1])}", figures


def end_to_end():
    """train.py from text to report: three steps, then resumed to five, compiled if train.py decides so."""
    flags = "--data stdlib --vocab-size 4096 --num-iterations 3 --save-every 2"
    flags += " --depth 4 --eval-bytes 262144" if on_gpu else " --depth 2 --max-seq-len 128 --eval-bytes 4096"
    first, figures = run_training(".", *flags.split())  # exits if train.py fails
    second, again = run_training(".", "--resume", "--num-iterations", "5")
    newest, faults = checkpoint_module.newest_valid("bench/checkpoints")
    checks = {
        "a save at step 2": any(r.get("folder") == "step_000002" for r in first.records),
        "resumed from step 3": [r["step"] for r in second.records if r.get("event") == "resumed"] == [3],
        "five steps in the log": [r["step"] for r in second.steps] == [1, 2, 3, 4, 5],
        "the last checkpoint is valid": newest is not None and newest.name == "step_000005" and not faults,
    }
    failed = ", ".join(check for check, passed in checks.items() if not passed)
    verdict = f"FAILED: {failed}" if failed else f"all {len(checks)} checks passed"
    line = f"{verdict} · {figures['start']} · {again['start_to_first_step']:.1f} s when resumed"
    return line, {"checks": checks, "first": figures, "resumed": again}


def speed(depth, vocab_size, batch, steps, in_parts=False):
    """
    Speed, MFU, memory and start of `steps` steps of train.py on random words. It compiles one graph, as in
    long runs, or each block (`in_parts`), as in short runs.
    """
    random = np.random.default_rng(0)
    words = random.integers(ord("a"), ord("z") + 1, (100_000, 8), dtype=np.uint8)
    words[:, 0] = ord(" ")  # training a BPE on such text takes less than a second
    Path("text.txt").write_bytes(words[random.integers(len(words), size=700_000)].tobytes())
    os.environ["ONEDIAL_HOME"] = str(Path("home").absolute())
    flags = f"--data text.txt --num-iterations {steps if in_parts else 10**6} --compile --eval-every {steps}"
    flags += f" --eval-bytes {4 * ROWS * ROW}"
    flags += f" --depth {depth} --total-batch-size {batch} --vocab-size {vocab_size}"
    if not on_gpu:
        flags += " --depth 2 --max-seq-len 128 --total-batch-size 1024 --vocab-size 512 --num-iterations 13"
    run, figures = run_training(".", *flags.split(), kill_after_evaluation=True)
    return f"{figures['speed']} · {figures['start']}", figures | {"settings": run.config["settings"]}


def kind_of(kernel):
    """The kind of work of a kernel, from its name. Inductor's names list the fused operations."""
    by_inductor = kernel.startswith("triton_")
    if not by_inductor and re.search(r"(?i)sdpa|flash|fmha|attention|cudnn", kernel):
        return "attention"
    if not by_inductor and re.search(r"(?i)nvjet|gemm|gemv|cutlass|splitk|::\w*mm$", kernel):
        return "products"
    of_loss = re.search(r"tanh|_exp(_|$)|_log(_|$)|gather|log_softmax|nll_loss", kernel)
    return "loss" if of_loss else "other elementwise"


def kernels(work, calls=3):
    """{name of a kernel, or on a CPU of an operator: its device time in ms per call of work}"""
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(calls):
            work()
        synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # µs
    return {event.key: getattr(event, field) / 1e3 / calls for event in events}


def profile():
    """Device time of a micro-step of depth 12 by kind of kernel, with its share of the optimizer step."""
    model = model_of_depth(12) if on_gpu else build_model(GPTConfig.of_depth(2, 512, 128), dtype)
    if on_gpu:
        compile_model(model)  # compiled kernels on a CPU have no telling names
    T = model.config.max_seq_len
    tokens, micro_steps = ROWS * T, 2**19 // (ROWS * T) if on_gpu else 1
    row = torch.randint(model.config.vocab_size, (ROWS, T + 1), device=device)
    passes, optimizer = lambda: model(row[:, :-1], row[:, 1:]).backward(), build_optimizer(model, dtype)
    wall, update = medians([passes, optimizer.step], seconds=5)
    total, by_kernel = 1e3 * (wall + update / micro_steps), kernels(passes)
    ms = dict.fromkeys(("products", "attention", "loss", "other elementwise"), 0.0)
    for name, spent in by_kernel.items():
        ms[kind_of(name)] += spent
    ms["optimizer"] = sum(kernels(optimizer.step).values()) / micro_steps
    ms["idle"] = total - sum(ms.values())
    words = [f"{kind} {spent:.3g} ms ({spent / total:.0%})" for kind, spent in ms.items()]
    figures = {"tokens": tokens, "ms": ms, "share": {kind: spent / total for kind, spent in ms.items()}}
    largest = sorted(by_kernel.items(), key=lambda item: -item[1])[:25]  # to check kind_of
    figures["largest"] = [[name[:150], kind_of(name), spent] for name, spent in largest]
    return f"{tokens:,} tokens in {total:.4g} ms: {', '.join(words)}", figures


def tests():
    """Run the tests that need CUDA."""
    files = [ROOT / "tests" / f"test_{name}.py" for name in ("model", "optim", "machine")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda"]
    command += [str(file) for file in files if file.exists()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1].strip("= "), {"status": done.returncode, "last_lines": lines[-30:]}


PARTS = {  # name: (time limit in seconds, function); the most important first, in case the time runs out
    "gradients": (100, gradients),
    "end to end": (120, end_to_end),
    "depth 12": (140, partial(speed, 12, 50_257, 2**19, 20)),
    "depth 12 small": (140, partial(speed, 12, 32_768, 2**19, 20)),
    "depth 20": (180, partial(speed, 20, 32_768, 2**19, 16)),
    "12 blocks": (100, partial(speed, 12, 50_257, 2**19, 20, in_parts=True)),
    "profile": (90, profile),
    "tests": (90, tests),
}
BUDGET = 470  # seconds for all parts; with the start of this script 8 minutes


def run_part(name, limit):
    """Run a part of `gpu` in its own process. Returns its figures, or {"error": its last output}."""
    command = [sys.executable, str(Path(__file__).resolve()), "gpu-part", name]
    directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with tempfile.TemporaryFile() as output, directory as folder:
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **streams)
        try:
            ending = f"exited with status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ending = f"was killed after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the process and its children
            process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    found = [line for line in lines if line.startswith('{"line":')]  # libraries may print more lines after it
    if found:
        return json.loads(found[-1]) | {"ending": ending}
    return {"error": "\n".join([f"no figures: it {ending}", *lines[-8:]])}


def gpu(path="bench-gpu.json"):
    """Check and measure a GPU in 8 minutes; print a table, write JSON. Without CUDA: a tiny dry run."""
    begin, results = time.monotonic(), {}
    Path(path).touch()  # fail now if it is not writable
    about = {"device": machine.device_name(device), "dry_run": not on_gpu, "versions": report.versions()}
    headline(*([] if on_gpu else ["dry run with tiny sizes: these are not figures of a GPU"]))
    print(f"{'part':15}{'seconds':>7}", flush=True)
    for name, (limit, _) in PARTS.items():
        start = time.monotonic()
        left = BUDGET - (start - begin)
        figures = run_part(name, min(limit, left)) if left > 10 else {"error": "no time"}
        results[name] = {"seconds": time.monotonic() - start, **figures}
        Path(path).write_text(json.dumps(about | {"parts": results}, indent=1))  # saved after each part
        lines = (figures.get("line") or figures["error"]).splitlines()
        text = f"\n{'':24}".join(row for line in lines for row in textwrap.wrap(line, 100))
        print(f"{name:15}{results[name]['seconds']:7.1f}  {text}", flush=True)
    print(f"{'total':15}{time.monotonic() - begin:7.1f}  all figures: {path}")


BENCHMARKS = (train, generate, export, attention, loss, optimizer, checkpoint, logging, data, gpu)
BENCHMARKS = {function.__name__: function for function in BENCHMARKS}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:] or [""]
    if name == "all":
        for function in [function for function in BENCHMARKS.values() if function not in (export, gpu)]:
            function()
            torch.compiler.reset()  # each benchmark has its own limit of recompilations
    elif name == "gpu-part":
        line, figures = PARTS[arguments[0]][1]()
        print(json.dumps({"line": line, **figures}))
    elif name in BENCHMARKS:
        BENCHMARKS[name](*arguments)
    else:
        sys.exit(f"Which benchmark?\n{__doc__}")
