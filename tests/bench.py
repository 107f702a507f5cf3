"""
Benchmarks: figures to look at, not tests. Medians; what is compared takes turns in one process.

    python tests/bench.py train [FLAG ...]        train.py, and where its time goes; flags as of train.py
    python tests/bench.py attention               the attention kernels, forward and backward
    python tests/bench.py loss                    head and loss: whole, and in chunks
    python tests/bench.py optimizer [DEPTH ...]   the optimizer against PyTorch's own
    python tests/bench.py checkpoint [DEPTH ...]  the pause of the loop and the rate of writing
    python tests/bench.py logging                 training with and without records
    python tests/bench.py data                    tokenization, rows, start, resume, memory of the loader
    python tests/bench.py all                     one after the other, at their defaults

A subcommand is a function with @benchmark; what follows its name on the command line are its arguments.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as checkpoint_module
import dataloader
import report
from model import GPT, QK_SCALE, ChunkedCrossEntropy, GPTConfig, Linear, blocked_attention, softcap
from optim_muon import MuonAdamW

BENCHMARKS = {}
on_gpu, on_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
device = torch.device("cuda" if on_gpu else "mps" if on_mps else "cpu")
dtype = torch.bfloat16 if report.has_fast_bf16(device) else torch.float32  # as train.py does
synchronize = report.synchronizer(device.type)
VOCAB, ROW, ROWS = (50_257, 2048, 32) if on_gpu else (4096, 512, 4)  # vocabulary, T, rows of a micro-batch


def compiled(function):
    """The function as train.py would run it: compiled, but on MPS as it is."""
    return function if on_mps else torch.compile(function, dynamic=False)


def benchmark(function):
    """Make a function a subcommand of this script."""
    BENCHMARKS[function.__name__] = function
    return function


def medians(functions, seconds=20):
    """Median seconds of a call of each function; they take turns, and the first two calls do not count."""
    return [statistics.median(column) for column in timings(functions, seconds)]


def timings(functions, seconds=20):
    """Seconds of each call of each function; they take turns, and the first two calls are left out."""
    times, begin = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - begin < seconds:
        times.append([])
        for function in functions:
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[-1].append(time.perf_counter() - start)
    return list(zip(*times[2:]))


def headline(*facts):
    """The line that each table starts with."""
    print(" · ".join([report.device_name(device), f"torch {torch.__version__}", *facts]))


def build_model(config, compute_dtype):
    """A GPT on the device, with its initial weights."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype, max_logits=2**22 if device.type == "cpu" else 2**29)
    model.init_weights(device, 0)
    return model


def model_of_depth(depth):
    """The GPT that train.py makes of this depth, with this script's vocabulary and row length."""
    head_dim = 128 if depth >= 8 else 64
    n_head = -(-depth * 64 // head_dim)
    return build_model(GPTConfig(VOCAB, ROW, depth, n_head, n_head * head_dim), dtype)


def build_optimizer(model, compute_dtype):
    """MuonAdamW over a model with random gradients."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    roles = model.parameter_roles().items()
    groups = [dict(kind="muon" if r == "matrix" else "adamw", lr=1e-5, params=params) for r, params in roles]
    return MuonAdamW(groups, compute_dtype, compile=on_gpu)


def all_products(model, rows, dtype):
    """A function that does every matrix product of a forward and backward pass over `rows` tokens."""
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, Linear)]
    shapes = [(n, k) for n, k in shapes if n * k > 10_000]  # without the gates
    random = {(n, k): [torch.randn(s, device=device, dtype=dtype) for s in ((rows, k), (n, k), (rows, n))]
              for n, k in set(shapes)}  # fmt: skip

    def products():
        for shape in shapes:
            x, weight, grad = random[shape]
            x @ weight.T, grad @ weight, grad.T @ x

    return products, 6 * sum(n * k for n, k in shapes) * rows


@benchmark
def train(*flags):
    """train.py as a user runs it: speed, memory, start, and where the time of a step goes."""
    batch = 2**19 if on_gpu else 2048
    defaults = f"--data stdlib --vocab-size {VOCAB} --num-iterations {40 if on_gpu else 80} --run bench"
    defaults += f" --total-batch-size {batch} --eval-every -1 --eval-tokens {ROWS * ROW}"
    with tempfile.TemporaryDirectory() as out:
        script = str(Path(report.__file__).parent / "train.py")
        command = [sys.executable, script, *defaults.split(), "--out-dir", out, *flags]
        start, first_step, lines = time.time(), None, []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step") and not first_step:
                first_step = time.time() - start
        if process.wait():
            sys.exit("".join(lines))
        files = (Path(out, "bench", f"{name}.json") for name in ("config", "summary"))
        config, summary = (json.loads(file.read_text()) for file in files)
    settings, peak = config["settings"], summary["mfu_peak"]
    if settings["device_type"] != device.type:
        sys.exit(f"this script measures on {device.type}: let train.py run there too")
    speed, batch = summary["tok_per_sec"], settings["total_batch_size"]
    flops, causal = (config["num_flops_per_token" + kind] for kind in ("", "_causal"))

    compute_dtype, rows = getattr(torch, settings["dtype"]), settings["device_batch_size"]
    model = build_model(GPTConfig(**config["model"]), compute_dtype)
    forward = torch.compile(model, dynamic=False) if settings["compile"] else model
    row = torch.randint(config["model"]["vocab_size"], (rows, settings["max_seq_len"] + 1), device=device)
    tokens, targets = row[:, :-1], row[:, 1:]  # the strides of training: the same compiled graph
    products, product_flops = all_products(model, tokens.numel(), compute_dtype)
    optimizer = build_optimizer(model, compute_dtype)
    passes = lambda: forward(tokens, targets).backward()  # noqa: E731
    once, both, products, step = medians([lambda: forward(tokens, targets), passes, products, optimizer.step])
    micro_steps = batch / tokens.numel() / config["world_size"]
    parts = {"forward, with the loss's gradients": once * micro_steps}  # a loss in chunks makes them there
    parts |= {"backward": (both - once) * micro_steps, "optimizer": step}
    parts["other: loop, loader, noise"] = batch / speed - sum(parts.values())

    headline(f"depth {summary['depth']}", "compiled" if settings["compile"] else "eager", settings["dtype"])
    print(f"{speed:,.0f} tokens/s · {speed * flops / 1e12:,.3f} TFLOP/s · peak memory ", end="")
    print(f"{summary['peak_memory'] / 1e9:.2f} GB · {first_step:.1f} s from start to the first record")
    print(f"MFU {summary['mfu']:.1%} of {peak / 1e12:,.3f} TFLOP/s ({summary['mfu_peak_source']})", end="")
    print(f", exact causal {summary['mfu'] * causal / flops:.1%}")
    print(f"{f'a step of {batch:,} tokens':36}{'ms':>10}{'share':>9}")
    for name, seconds in parts.items():
        print(f"{name:36}{1e3 * seconds:10,.1f}{seconds * speed / batch:9.1%}")
    rate, passes = product_flops / products, tokens.numel() * flops / both
    print(f"the passes' matrix products alone reach {rate / 1e12:,.3f} TFLOP/s; ", end="")
    print(f"the passes {passes / rate:.0%} of that, training {speed * flops / rate:.0%}\n")


@benchmark
def attention():
    """Causal attention by each kernel that there is: forward, and forward with backward."""
    headline(str(dtype), "exact causal TFLOP/s, forward / forward and backward")
    tokens, width = (32_768, 768) if on_gpu else (2048, 256)
    names = ("CUDNN", "FLASH", "EFFICIENT") if on_gpu else ("FLASH", "MATH")
    lengths = (1024, 2048, 4096) if on_gpu else (256, 512, 1024)
    for head_dim, T in [(d, T) for d in (64, 128) for T in lengths]:
        shape = (tokens // T, T, width // head_dim, head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        grad, scale = torch.randn(shape, device=device, dtype=dtype), QK_SCALE**2 / head_dim**0.5

        def sdpa(name):
            with sdpa_kernel(getattr(SDPBackend, f"{name}_ATTENTION" if name != "MATH" else name)):
                heads = (x.transpose(1, 2) for x in (q, k, v))  # noqa: B023
                y = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)  # noqa: B023
                return y.transpose(1, 2)

        candidates = {name.lower(): lambda name=name: sdpa(name) for name in names}
        if device.type == "cpu":
            in_blocks = torch.compile(blocked_attention, dynamic=False)
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            candidates["blocked"] = lambda f=in_blocks, h=heads, s=scale: f(*h, s).transpose(1, 2)
        if on_gpu:
            candidates |= other_kernels(q, k, v, scale)
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


def other_kernels(q, k, v, scale):
    """FlexAttention and FlashAttention-2's variable lengths: {name: function}."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn

    B, T, n_head, head_dim = q.shape
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    starts = torch.arange(0, B * T + 1, T, device=device, dtype=torch.int32)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    packed = [x.reshape(B * T, n_head, head_dim) for x in (q, k, v)]

    def varlen():
        y = varlen_attn(*packed, starts, starts, T, T, window_size=(-1, 0), scale=scale)
        return y.view(B, T, n_head, head_dim)

    return {"flex": lambda: compiled(*heads, block_mask=mask, scale=scale).transpose(1, 2), "varlen": varlen}


@benchmark
def loss():
    """Head and loss, forward and backward, with all logits at once and in chunks."""
    N, V, C = (65_536, 50_304, 768) if on_gpu else (2048, 4096, 256)
    x = torch.randn(N, C, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, C, device=device) / C**0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def whole():
        logits = softcap(F.linear(x, weight.to(dtype)).float())
        return F.cross_entropy(logits, targets, reduction="sum")

    variants = {"whole": whole}
    for chunks in (2, 4, 8, 16):
        variants[f"{chunks} chunks"] = lambda n=chunks: ChunkedCrossEntropy.apply(x, weight, targets, V, n)
    headline(str(dtype), f"{N:,} rows × {V:,} logits", "head and loss, forward and backward, compiled")
    functions, memory = [lambda f=f: f().backward() for f in map(compiled, variants.values())], []
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


@benchmark
def optimizer(*depths):
    """Time per step, share of a training step and memory of the state, on one device."""
    batch = 2**19 if on_gpu else 2**12
    for depth in map(int, depths or ((12,) if on_gpu else (4, 8))):
        model = model_of_depth(depth)
        forward = compiled(model)
        tokens = torch.randint(VOCAB, (ROWS, ROW), device=device)
        (passes,) = medians([lambda: forward(tokens, tokens).backward()])  # noqa: B023
        passes *= batch / (ROWS * ROW)

        ours = build_optimizer(model, dtype)
        roles = model.parameter_roles()
        matrices = list(roles["matrix"].values())
        others = [p for role, params in roles.items() if role != "matrix" for p in params.values()]
        fused = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        muon, adamw = torch.optim.Muon(matrices, lr=1e-5), torch.optim.AdamW(others, lr=1e-5)
        times = medians([ours.step, fused.step, lambda: (muon.step(), adamw.step())])  # noqa: B023

        headline(f"depth {depth}")
        counts = [sum(p.numel() for p in params) / 1e6 for params in (matrices, others)]
        print(f"{counts[0]:.1f} M parameters by Muon, {counts[1]:.1f} M by AdamW")
        print(f"forward and backward of {batch:,} tokens, compiled: {1e3 * passes:,.0f} ms")
        print(f"{'':30}{'ms':>9}{'/ ours':>9}{'of a step':>12}{'state, MB':>12}")
        held = {
            "MuonAdamW": [bucket.state for bucket in ours.buckets],
            "AdamW(fused) for everything": fused.state.values(),
            "torch.optim.Muon + AdamW": [*muon.state.values(), *adamw.state.values()],
        }
        for t, (name, states) in zip(times, held.items()):
            size = sum(tensor.nbytes for state in states for tensor in state.values()) / 2**20
            print(f"{name:30}{1e3 * t:9.1f}{t / times[0]:9.2f}{t / (t + passes):12.1%}{size:12,.1f}")
        print(flush=True)
        torch.compiler.reset()  # the next depth compiles anew


@benchmark
def checkpoint(*depths):
    """How long a save holds up the loop, and how fast it is written, against torch.save."""
    for depth in map(int, depths or ((12,) if on_gpu else (4, 8))):
        model = model_of_depth(depth)
        optimizer = build_optimizer(model, dtype)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            saver = checkpoint_module.Saver(folder, keep=2, pin=on_gpu, synchronize=synchronize)
            plain = Path(folder, "plain.pt")
            pauses, writings, plains = [], [], []
            for number in range(5):
                tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                synchronize()
                start = time.perf_counter()
                saver.save(number, tensors, {})
                pauses.append(time.perf_counter() - start)
                path, error = saver.wait()
                assert error is None, error
                writings.append(time.perf_counter() - start)
                start = time.perf_counter()
                with open(plain, "wb") as file:
                    torch.save(tensors, file)
                    os.fsync(file.fileno())
                plains.append(time.perf_counter() - start)
            size = sum(file.stat().st_size for file in path.iterdir())
        pause, writing, plain = (statistics.median(times[1:]) for times in (pauses, writings, plains))
        headline(f"depth {depth}", f"{size / 1e6:,.0f} MB, medians of {len(pauses) - 1} saves")
        print(f"the loop waits           {1e3 * pause:8.1f} ms, {pause / plain:.1%} of plain torch.save")
        print(f"written and checksummed  {1e3 * writing:8.1f} ms, {size / writing / 1e6:,.0f} MB/s")
        print(f"plain torch.save, fsync  {1e3 * plain:8.1f} ms, {size / plain / 1e6:,.0f} MB/s\n")


@benchmark
def logging():
    """Training steps with train.py's synchronizations and records, twice a second, and with none."""
    model = model_of_depth(4)
    forward = compiled(model)
    optimizer = build_optimizer(model, dtype)
    tokens = torch.randint(VOCAB, (ROWS, ROW), device=device)
    fields = ["train_loss", "train_loss_ema", "lrm", "grad_norm", "dt", "tok_per_sec", "mfu", "data_wait"]
    record = {"step": 1, "tokens": 1, "total_training_flops": 1e12, **dict.fromkeys(fields, 0.5)}

    def block(window, log):
        """20 steps, with a record after each `window` of them."""
        losses = []
        for step in range(1, 21):
            nats = forward(tokens, tokens)
            nats.backward()
            optimizer.step(nats.detach())
            losses.append(nats.detach())
            if step % window == 0:
                torch.stack([torch.stack(losses), optimizer.grad_norm.expand(len(losses))]).tolist()
                losses.clear()
                synchronize()
                log.write("step", **record, peak_memory=report.peak_memory(device))
                print(report.step_line(record, 1000, 1.0, "published", 60.0), file=console, flush=True)

    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "console"), "w") as console:
        log = report.Log(Path(folder))
        (alone,) = medians([lambda: block(21, log)], seconds=0)
        window = min(10, max(1, int(0.5 / (alone / 20))))
        without, logged = timings([lambda: block(21, log), lambda: block(window, log)], seconds=40)
        ratios = sorted(b / a - 1 for a, b in zip(without, logged))
        headline(f"depth 4, {1e3 * statistics.median(without) / 20:.1f} ms a step, a record every {window}")
        low, middle, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
        print(f"records cost {middle:+.2%} (quartiles {low:+.2%}, {high:+.2%}, of {len(ratios)} pairs)")
        (host,) = medians([lambda: log.write("step", **record)], seconds=2)
        print(f"of which {1e6 * host:.0f} µs a record for the host: {host / (window * alone / 20):.4%}\n")


@benchmark
def data():
    """Tokenization against tiktoken's own batches, rows, warm start, resume, memory of the loader."""
    T, rows = 2048, 256

    def seconds(work):
        start = time.perf_counter()
        return work(), time.perf_counter() - start

    def resident():
        status = Path("/proc/self/status")  # Linux only
        kilobytes = re.search(r"VmRSS:\s+(\d+)", status.read_text())[1] if status.exists() else 0
        return int(kilobytes) / 1e3

    with tempfile.TemporaryDirectory() as home:
        os.environ["ONEDIAL_HOME"] = home
        corpus, cold = seconds(lambda: dataloader.prepare("stdlib", 4096))
        print(f"cold start on stdlib          {cold:.1f} s, {corpus.counts['train']['bytes'] / 1e6:.0f} MB")

        def start():
            again = dataloader.prepare("stdlib", 4096)
            dataloader.ValidationRows(again, T, 32_768)
            return next(dataloader.DataLoader(again, T, 8, 0, "cpu"))

        warm = statistics.median(seconds(start)[1] for _ in range(3))
        print(f"warm start to a first batch   {warm:.2f} s")
        _, files = dataloader.find_files("stdlib")
        texts = [text for file in files for text in dataloader.read_documents(file)]
        encoding, threads, times = corpus.tokenizer, os.cpu_count(), []
        for _ in range(3):
            theirs = seconds(lambda: encoding.encode_ordinary_batch(texts, num_threads=threads))[1]
            ours = seconds(lambda: dataloader.encode_texts(encoding, texts, Path(home), "train", str))[1]
            times.append((theirs / ours, sum(map(len, texts)) / 1e6 / ours))
        ratio, speed = (statistics.median(column) for column in zip(*times))
        print(f"tokenization, {threads} threads       {ratio:.0%} of tiktoken's speed, {speed:.1f} MB/s")

        corpus.shards["train"] = []
        for n in range(2):  # two shards of the public size
            tokens = np.random.default_rng(n).integers(0, 4096, dataloader.SHARD_TOKENS, dtype=np.uint16)
            header = np.array([20240520, 1, len(tokens)] + [0] * 253, dtype="<i4")
            path = Path(home, f"{n}.bin")
            corpus.shards["train"].append((path, dataloader.write(path, header, tokens)))
        del tokens
        before = resident()
        loader = dataloader.DataLoader(corpus, T, rows, 0, "cpu")
        next(loader)
        times = [seconds(lambda: [next(loader) for _ in range(40)])[1] for _ in range(5)]
        speed = 40 * rows * T / statistics.median(times)
        print(f"rows of {T:,}                 {speed / 1e6:.0f} M tokens/s")
        while loader.epoch < 1.1:  # through both shards
            next(loader)
        print(f"memory of the loader          {resident() - before:.0f} MB, the mapped shard included")

        def resume():
            again = dataloader.DataLoader(corpus, T, rows, 0, "cpu")
            again.load_state_dict({**loader.state_dict(), "cursor": 10**12})
            return next(again)

        resumed = statistics.median(seconds(resume)[1] for _ in range(3))
        print(f"resume to the next batch      {resumed:.2f} s")


if __name__ == "__main__":
    name, *arguments = sys.argv[1:] or [""]
    if name == "all":
        for function in BENCHMARKS.values():
            function()
            torch.compiler.reset()  # the shapes of one would count against the next one's limit
    elif name in BENCHMARKS:
        BENCHMARKS[name](*arguments)
    else:
        listing = [f"    {name:12}{function.__doc__}" for name, function in BENCHMARKS.items()]
        sys.exit("\n".join(["Which benchmark? Or all?", *listing]))
