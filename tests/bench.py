"""
Benchmarks: figures to look at, not tests. Medians; what is compared takes turns in one process.

    python tests/bench.py optimizer [DEPTH ...]   the optimizer against PyTorch's own
    python tests/bench.py data                    tokenization, rows, start, resume, memory of the loader

A subcommand is a function with @benchmark; what follows its name on the command line are its arguments.
"""

import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataloader
from model import GPT, GPTConfig
from optim_muon import MuonAdamW

BENCHMARKS = {}
on_gpu = torch.cuda.is_available()
device = torch.device("cuda" if on_gpu else "cpu")
device_name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
synchronize = torch.cuda.synchronize if on_gpu else lambda: None


def benchmark(function):
    """Make a function a subcommand of this script."""
    BENCHMARKS[function.__name__] = function
    return function


def medians(functions, seconds=20):
    """Median seconds of a call of each function; they take turns, and the first two calls do not count."""
    times, begin = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - begin < seconds:
        times.append([])
        for function in functions:
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*times[2:])]


@benchmark
def optimizer(*depths):
    """Time per step, share of a training step and memory of the state, on one device."""
    vocab_size, T, rows, batch = (50_257, 2048, 32, 2**19) if on_gpu else (4096, 512, 4, 2**12)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for depth in map(int, depths or ((12, 20) if on_gpu else (4, 8))):
        head_dim = 128 if depth >= 8 else 64
        n_head = -(-depth * 64 // head_dim)
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size, T, depth, n_head, n_head * head_dim), dtype)
        model.init_weights(device, 0)
        forward = torch.compile(model, dynamic=False)
        tokens = torch.randint(vocab_size, (rows, T), device=device)
        (passes,) = medians([lambda: forward(tokens, tokens).backward()])  # noqa: B023
        passes *= batch / (rows * T)

        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        roles = model.parameter_roles()
        kinds = {role: "muon" if role == "matrix" else "adamw" for role in roles}
        groups = [dict(kind=kinds[role], lr=1e-5, params=params) for role, params in roles.items()]
        matrices = list(roles["matrix"].values())
        others = [p for role, params in roles.items() if role != "matrix" for p in params.values()]
        ours = MuonAdamW(groups, dtype, compile=on_gpu)
        fused = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        muon, adamw = torch.optim.Muon(matrices, lr=1e-5), torch.optim.AdamW(others, lr=1e-5)
        times = medians([ours.step, fused.step, lambda: (muon.step(), adamw.step())])  # noqa: B023

        print(f"depth {depth}, {device_name}, torch {torch.__version__}")
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
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        listing = [f"    {name:12}{function.__doc__}" for name, function in BENCHMARKS.items()]
        sys.exit("\n".join(["Which benchmark?", *listing]))
    BENCHMARKS[sys.argv[1]](*sys.argv[2:])
