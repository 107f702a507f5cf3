"""Numbers, console, log, report and comparison, judged by arithmetic done another way and by real runs."""

import json
import math
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import REPO

import report

# -----------------------------------------------------------------------------
# Measuring

PEAKS = {  # names as drivers report them -> published dense bf16 TFLOP/s, None for what must be measured
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H100 PCIe MIG 3g.40gb": None,
    "NVIDIA H100": None,  # which of them?
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": None,
    "NVIDIA H20": None,
    "NVIDIA H800": None,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA GH200 144G HBM3e": None,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA B300 SXM6 AC": None,
    "NVIDIA GB10": None,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-80GB MIG 2g.20gb": None,
    "NVIDIA A100X": None,
    "GRID A100-40C": None,
    "NVIDIA A800-SXM4-80GB": None,
    "NVIDIA A10": None,
    "NVIDIA A10G": None,
    "NVIDIA A40": None,
    "NVIDIA RTX A4000": None,
    "NVIDIA RTX A6000": None,
    "NVIDIA RTX 6000 Ada Generation": None,
    "NVIDIA L40S": 362,
    "NVIDIA L40": None,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 5090 D": None,
    "NVIDIA GeForce RTX 5090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4080 SUPER": None,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": None,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": None,
    "Tesla T4": None,
    "Tesla V100-SXM2-16GB": None,
    "AMD Instinct MI300X": None,
    "Apple M4 Max": None,
    "Intel(R) Xeon(R) Platinum 8480CL": None,
    "": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_peak_belongs_to_the_whole_name(name, monkeypatch):
    monkeypatch.setattr(report, "measured_peak", lambda device, dtype: 7.0)
    expected = (PEAKS[name] * 1e12, "published") if PEAKS[name] else (7.0, "measured")
    assert report.find_peak(torch.device("cuda"), name, torch.bfloat16) == expected


def test_a_peak_is_given_else_published_else_measured(monkeypatch):
    monkeypatch.setattr(report, "measured_peak", lambda device, dtype: 7.0)
    cuda, cpu, h100 = torch.device("cuda"), torch.device("cpu"), "NVIDIA H100 80GB HBM3"
    assert report.find_peak(cuda, h100, torch.bfloat16, 0.5) == (0.5e12, "given")
    assert report.find_peak(cuda, h100, torch.bfloat16) == (989e12, "published")
    assert report.find_peak(cuda, h100, torch.float32) == (7.0, "measured")  # 989 is not the peak of fp32
    assert report.find_peak(cuda, "NVIDIA L40", torch.bfloat16) == (7.0, "measured")
    assert report.find_peak(cpu, h100, torch.bfloat16) == (7.0, "measured")


@pytest.mark.parametrize("speed", [2e8, 2e9, 1e11, 5e13, 1e15])
def test_a_measured_peak_is_the_median_and_takes_two_seconds_at_most(monkeypatch, speed):
    clock, products = 0.0, 0

    def product(a, b):
        nonlocal clock, products
        products += 1
        slow = {1: 3.0, 4: 2.0}.get(products % 6, 1.0)  # the first of six, and one of the others, is slow
        clock += 2 * len(a) ** 3 / speed * slow

    monkeypatch.setattr(report.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(torch, "randn", torch.empty)
    monkeypatch.setattr(torch, "mm", product)
    assert report.measured_peak(torch.device("cpu"), torch.float32) == pytest.approx(speed)
    assert clock <= 2.5


def test_each_device_waits_in_its_own_way(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("mps"))
    for device_type in ("cuda", "mps", "cpu"):
        report.synchronizer(device_type)()
    assert calls == ["cuda", "mps"]


def test_peak_memory_is_the_device_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 11)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 22)
    assert report.peak_memory(torch.device("cuda")) == 11
    assert report.peak_memory(torch.device("mps")) == 22
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    assert report.peak_memory(torch.device("cpu")) == pytest.approx(high_water * unit, rel=0.01)


def test_the_average_is_the_weighted_mean_of_the_losses_seen():
    losses, beta, smooth = [5.0, 3.0, 4.0, 1.0], 0.9, 0.0
    for count, loss in enumerate(losses, 1):
        smooth = report.update_ema(smooth, loss, beta)
        weights = [beta ** (count - i) for i in range(1, count + 1)]
        mean = sum(w * x for w, x in zip(weights, losses)) / sum(weights)
        assert report.debias(smooth, beta, count) == pytest.approx(mean, rel=1e-12)
        if count == 1:
            assert report.debias(smooth, beta, count) == pytest.approx(loss, rel=1e-12)
    assert math.isnan(report.debias(0.0, beta, 0))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_bits_per_byte_against_a_loop(rows):
    torch.manual_seed(0)
    table = torch.randn(7, 7)  # logits of the next token by the last one
    tokens, targets = torch.randint(7, (2, 6, 5))
    targets[:, 0] = -1  # no text is behind them: neither nats nor bytes
    sizes = [1, 1, 2, 3, 1, 5, 4]  # bytes of each token
    nats, count = 0.0, 0
    for token, target in zip(tokens.flatten().tolist(), targets.flatten().tolist()):
        if target >= 0:
            weights = [math.exp(x) for x in table[token].tolist()]
            nats -= math.log(weights[target] / sum(weights))
            count += sizes[target]

    def model(tokens, targets):
        logits = table[tokens].flatten(0, 1)
        options = {"ignore_index": -1, "reduction": "sum"}
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), **options)

    batches = [
        (x, y, sum(sizes[t] for t in y.flatten().tolist() if t >= 0))
        for x, y in zip(tokens.split(rows), targets.split(rows))
    ]
    found = report.bits_per_byte(model, batches, torch.device("cpu"))
    assert found == pytest.approx(nats / math.log(2) / count, rel=1e-6)


def test_the_clock_books_every_second_once(monkeypatch):
    now = iter([12.0, 15.5, 16.0])
    monkeypatch.setattr(report.time, "time", lambda: next(now))
    clock = report.Clock(10.0)
    for name in ("setup", "training", "setup"):
        clock.lap(name)
    assert clock.spent == {"setup": 2.5, "training": 3.5}


# -----------------------------------------------------------------------------
# Console

RECORD = {
    **{"step": 120, "train_loss_ema": 4.231, "lrm": 1.0, "tok_per_sec": 512e3, "mfu": 0.461},
    **{"data_wait": 0.0, "total_training_flops": 120 * 5e14, "tokens": 120 * 512e3, "dt": 1.0},
    **{"val_bpb": 1.2931, "min_val_bpb": 1.2931},
}


def test_a_line_says_how_fast_and_of_which_peak():
    line = report.step_line(RECORD, 2840, 1.2931, "published", 2760)
    assert line == (
        "step  120/2840  loss 4.2310  val 1.2931  lr 1.00   512k tok/s   500 TFLOP/s  mfu 46.1%  "
        "data  0%  eta 46m00s"
    )
    assert "mfu 71% of measured" in report.step_line(RECORD | {"mfu": 0.71}, 2840, 1.3, "measured", 60)


def test_lines_of_a_run_stand_under_each_other():
    lines = [
        report.step_line(RECORD | change, 9999, 1.3, "measured", 60)
        for change in (
            {},
            {"step": 9999},
            {"train_loss_ema": 10.8249},
            {"train_loss_ema": math.nan},
            {"tok_per_sec": 1.234e6, "dt": 7e4},
            {"tok_per_sec": 999_999, "dt": 0.01, "mfu": 0.02},
        )
    ]
    assert len({line.index("eta") for line in lines}) == 1
    assert len({line.index("tok/s") for line in lines}) == 1


@pytest.mark.parametrize("source", ["published", "measured", "given"])
@pytest.mark.parametrize("total", [1, 9999, 99_999, 1_234_567, 10**9])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.9999, 1.0, 999.6, 1e5, 1e12, math.nan, math.inf])
def test_a_line_has_at_most_120_columns(source, total, size):
    huge = {key: size for key in ("train_loss_ema", "tok_per_sec", "mfu", "val_bpb", "min_val_bpb")}
    record = RECORD | huge | {"step": total, "dt": 1e-6 if size > 1 else 1e6, "data_wait": 1.0}
    assert len(report.step_line(record, total, size, source, 1e9)) <= 120
    usual = RECORD | {"step": total, "data_wait": 1.0, "mfu": 0.71, "train_loss_ema": 10.82}
    line = report.step_line(usual, total, 3.4567, source, 3599)
    assert len(line) <= 120 and (line.endswith("59m59s") or total > 1e8)  # nothing is cut off
    if size < 1e9:
        assert len(report.val_line(record, total)) <= 120


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (999_999, "1M")],
)
def test_short_numbers(number, text):
    assert report.short(number) == text
    assert report.short(2.5e15, " ") + "FLOP/s" == "2.5 PFLOP/s"


def test_durations():
    texts = ["0s", "59s", "1m00s", "59m59s", "1h00m", "100h00m"]
    assert [report.duration(s) for s in (-5, 59.4, 59.6, 3599, 3600, 360_000)] == texts


def test_only_a_terminal_gets_bold_letters(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" not in report.val_line(RECORD, 2840)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: True))
    bold = report.val_line(RECORD, 2840)
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold == f"\033[1m{report.val_line(RECORD, 2840)}\033[0m"


def test_header_and_samples_fit_too(config):
    config["device"] = "Intel(R) Xeon(R) Platinum 8480CL with a name that does not end soon, 112 threads"
    config["corpus"]["name"] = "folder/" * 40
    config |= {"mfu_peak": 989e12, "mfu_peak_source": "published"}
    config["settings"] |= {"total_batch_size": 2**19, "device_batch_size": 32, "max_seq_len": 2048}
    head = report.header(config, True, "cuDNN", 2840, 1.0, "long/" * 40)
    labels = [line[:9] for line in head.splitlines() if line[:9].strip()]
    assert labels == ["onedial  ", "device   ", "data     ", "plan     "]
    assert "peak 989 TFLOP/s (published)" in " ".join(head.split())
    assert "2,840 steps × 524,288 tokens (8 × 32 × 2,048)" in head and "about 47m20s" in head
    samples = report.show_samples([["a" * 200, "x = 1\n    indented\n" + "word " * 60], ["", "\n"]])
    assert max(map(len, (head + "\n" + samples).splitlines())) <= 120
    assert "\n             indented\n" in samples


# -----------------------------------------------------------------------------
# Log


def test_a_record_can_be_read_at_once_and_has_no_nan(tmp_path):
    log = report.Log(tmp_path)
    log.write("step", step=1, a=math.nan, b=-math.inf, c=2.5, d=[1], e="x")
    line = (tmp_path / "log.jsonl").read_text()
    fields = {"step": 1, "a": None, "b": None, "c": 2.5, "d": [1], "e": "x"}
    assert json.loads(line) == {"kind": "step", **fields}
    log.close()
    report.Log(None).write("step", step=1)  # what the other ranks do: nothing


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_does_not_stop_training(tmp_path, capsys):
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    log = report.Log(tmp_path)
    log.write("step", step=1)
    assert "No space left" in capsys.readouterr().out


def test_what_a_full_disk_refused_follows_once_there_is_room(tmp_path, capsys):
    log = report.Log(tmp_path)
    file = log.file

    def full(content):
        raise OSError(28, "No space left on device")

    log.file = types.SimpleNamespace(write=full)
    log.write("step", step=1)
    log.write("step", step=2)
    log.file = file
    log.write("step", step=3)
    assert [r["step"] for r in report.read_log(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("No space left") == 1


def test_a_log_is_read_without_its_broken_line_and_cut_after_a_step(tmp_path):
    records = [{"kind": "step", "step": n} for n in (1, 2, 3)]
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "log.jsonl").write_bytes(text.encode() + b'{"kind": "step", "st\xc3')
    assert report.read_log(tmp_path) == records
    report.cut_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(json.dumps(r) + "\n" for r in records[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


class FakeWandb(types.ModuleType):
    """Records what it is told; fails in the function that `broken` names."""

    def __init__(self, broken=None):
        super().__init__("wandb")
        self.calls, self.summary = [], {}
        for name in ("init", "define_metric", "log", "finish"):
            setattr(self, name, lambda *a, _name=name, **k: self.call(_name, a, k))
        self.broken = broken

    def call(self, name, arguments, options):
        self.calls.append((name, arguments, options))
        if name == self.broken:
            raise RuntimeError("no network")
        return self


def use(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = report.Log(tmp_path, wandb=True, config={"depth": 2})
    log.write("event", step=0, event="started")
    for step in (1, 2):
        log.write("step", step=step, train_loss=2.0, mfu=math.nan)
    log.close({"val_bpb": 1.5})


def test_wandb_hears_the_same_names(monkeypatch, tmp_path):
    wandb = FakeWandb()
    use(monkeypatch, tmp_path, wandb)
    calls = {name: [(a, k) for n, a, k in wandb.calls if n == name] for name, *_ in wandb.calls}
    axes = ["step", "total_training_time", "total_training_flops"]
    assert calls["define_metric"] == [*(((a,), {}) for a in axes), (("*",), {"step_metric": "step"})]
    assert calls["log"] == [(({"step": step, "train_loss": 2.0},), {}) for step in (1, 2)]
    assert wandb.summary == {"val_bpb": 1.5} and len(calls["finish"]) == 1
    again = FakeWandb()
    use(monkeypatch, tmp_path, again)  # the resumed run is the same run there
    first, second = (fake.calls[0][2] for fake in (wandb, again))
    assert first == second and first["resume"] == "allow" and first["config"] == {"depth": 2}
    other = FakeWandb()
    elsewhere = tmp_path / "elsewhere" / tmp_path.name
    elsewhere.mkdir(parents=True)
    use(monkeypatch, elsewhere, other)
    assert other.calls[0][2]["id"] != first["id"]


@pytest.mark.parametrize("broken", ["import", "init", "define_metric", "log", "finish"])
def test_a_broken_wandb_stops_nothing(monkeypatch, tmp_path, capsys, broken):
    use(monkeypatch, tmp_path, None if broken == "import" else FakeWandb(broken))
    assert capsys.readouterr().out.count("is off") == 1
    assert len(report.read_log(tmp_path)) == 3


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import pathlib, report; log = report.Log(pathlib.Path('.'), True, {'depth': 2})\n"
        "assert log.wandb; log.write('step', step=1, train_loss=2.0); log.close({'val_bpb': 1.5})"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "is off" not in run.stdout, run.stdout + run.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train_loss" in written.read_bytes() and b"val_bpb" in written.read_bytes()


# -----------------------------------------------------------------------------
# Report


@pytest.fixture
def config():
    """A config.json as train.py writes it, of a run with --minutes on a CPU."""
    auto = {"device_type": "cpu", "dtype": "float32", "vocab_size": 512, "head_dim": 32, "max_seq_len": 64}
    return {
        "settings": {
            **{"run": "a", "out_dir": "out", "resume": False, "wandb": False, "compile": False, **auto},
            **{"data": "my text", "depth": 2, "num_iterations": None, "minutes": 5.0, "target_flops": None},
            **{"total_batch_size": 512, "matrix_lr": 0.01, "weight_decay": 0.28, "eval_tokens": 1024},
            "seed": 42,
        },
        "given": {"run": "a", "minutes": 5.0, "compile": False, "matrix_lr": 0.01, "data": "my text"},
        "model": {"vocab_size": 512, "max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 64},
        "num_params": {"matrix": 1000, "head": 300, "embedding": 300, "value_embedding": 100, "smear": 26},
        "num_flops_per_token": 10_000,
        "num_flops_per_token_causal": 8_000.0,
        "corpus": {"name": "text", "fingerprint": "c0ffee", "train": {"tokens": 12_345}},
        "device": "a | CPU",
        "mfu_peak_source": "measured",
        "world_size": 1,
        "versions": {"python": "3.11", "torch": "2.13.0", "git_commit": "0123abc"},
    }


@pytest.fixture
def make(tmp_path, config):
    """make(name, steps, ending=…, tail=…, **config changes) writes a run's folder; 10 steps a record."""

    def folder(name, steps=100, ending="finished", tail="", **changes):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | changes))
        records = [{"kind": "event", "step": 0, "event": "started"}]
        for step in range(0, steps + 1, 10):
            sofar = {"total_training_flops": 5_120_000 * step, "total_training_time": 0.1 * step}
            sofar |= {"step": step, "grad_norm": 1.0 + step % 3}
            if step:
                speed = {"dt": 0.1, "tok_per_sec": 5120.0, "mfu": 0.5, "data_wait": 0.2}
                plan = {"lrm": 1.0, "muon_momentum": 0.9, "weight_decay": 0.1, "peak_memory": 10**8}
                loss = dict.fromkeys(("train_loss", "train_loss_ema"), 2 + 6 / step)
                counts = {"tokens": 512 * step, "skipped_steps": 0}
                records.append({"kind": "step", **sofar, **speed, **plan, **loss, **counts})
            if step % 20 == 0:
                records.append({"kind": "val", **sofar, "val_bpb": 1 + 2 / (1 + step), "min_val_bpb": 1.0})
        if ending:
            records.append({"kind": "event", "step": steps, "event": ending, "num_iterations": steps})
            spent = {"setup": 1.0, "corpus": 2.0, "trial": 3.0, "training": 10.5, "evaluation": 4.0}
            summary = {"steps": steps, "val_bpb": 1.25, "wall_time": 20.5, "time": spent, "mfu": 0.5}
            summary |= {"tok_per_sec": 5120.0, "samples": [["say `", "```\nhi"]]}
            (path / "summary.json").write_text(json.dumps(summary))
        (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
        return path

    return folder


def tables(text):
    """Markdown -> {first cell of a row: its other cells}."""
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_report_of_a_run(make):
    folder = make("a")
    text = report.write_report(folder).read_text()
    rows = tables(text)
    assert "finished: 100 of 100 steps" in text
    assert rows["val_bpb"] == ["1.2500"] and rows["mfu, of the measured peak"] == ["50.0%"]
    assert rows["mfu_causal"] == ["40.0%"] and rows["flops_per_sec"] == ["51.2 MFLOP/s"]
    assert rows["peak_memory, resident set"] == ["100 MB"]
    assert rows["all parameters"] == ["1,726"] and rows["FLOPs per token, exact causal"] == ["8,000"]
    assert rows["matrix_lr"] == ["0.01"] and "weight_decay" not in rows  # only what was given
    assert rows["device"] == ["a \\| CPU"] and rows["torch"] == ["2.13.0"]
    order = ["| val_bpb", "curves.png", "## Set", "## Hard", "## Time", "## Param", "## Sample", "## How"]
    places = [text.index(mark) for mark in order]
    assert places == sorted(places)
    assert "    ```\n    hi" in text  # a sample cannot end its block
    assert (folder / "curves.png").stat().st_size > 20_000


def test_an_edited_constant_is_told(make, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "show_curves", lambda runs, folder: "")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "train.py").write_text("seed: int = 42  # of all\neval_tokens: int | None = None  # used\n")
    for words in (["init"], ["add", "train.py"], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    clean = report.versions()
    assert len(clean["git_commit"]) == 40 and clean["edited_settings"] == ""
    (tmp_path / "train.py").write_text("seed: int = 42  # of all\neval_tokens: int | None = 1024  # used\n")
    edited = report.versions()
    assert edited["git_commit"] == clean["git_commit"] + "-dirty"
    rows = tables(report.write_report(make("a", versions=edited)).read_text())
    assert rows["eval_tokens"] == ["1024"] and "seed" not in rows


def test_the_time_adds_up(make, monkeypatch):
    monkeypatch.setattr(report, "show_curves", lambda runs, folder: "")
    rows = tables(report.write_report(make("a")).read_text())
    names = ["setup", "preparation of the corpus", "trial and compilation", "training", "evaluation"]
    seconds = [float(rows[name][0]) for name in [*names, "waiting for data"]]
    assert seconds == [1.0, 2.0, 3.0, 8.5, 4.0, 2.0]  # 0.2 of 100 steps of 0.1 s was waiting
    assert rows["together"][0] == "20.5"  # the wall time
    shares = [float(rows[name][1].rstrip("%")) for name in [*names, "waiting for data"]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_command_repeats_the_run(make, monkeypatch):
    monkeypatch.setattr(report, "show_curves", lambda runs, folder: "")

    def command(name, **options):
        text = report.write_report(make(name, **options)).read_text()
        return [line.strip() for line in text.splitlines()[-2:]]

    checkout, line = command("a")
    assert checkout == "git checkout 0123abc"
    flags = dict(re.findall(r"--(\S+) ('[^']*'|\S+)", line))
    assert line.startswith("python train.py --") and flags == {
        **{"num-iterations": "100", "total-batch-size": "512", "seed": "42", "data": "'my text'"},
        **{"dtype": "float32", "vocab-size": "512", "depth": "2", "head-dim": "32", "max-seq-len": "64"},
        **{"matrix-lr": "0.01", "compile": "off", "eval-tokens": "1024", "weight-decay": "0.28"},
        "device-type": "cpu",
    }
    versions = {"git_commit": "0123abc-dirty"}
    checkout, line = command("b", world_size=8, versions=versions)
    assert checkout.startswith("git checkout 0123abc  # and the changes")
    assert line.startswith("torchrun --standalone --nproc_per_node=8 train.py --")


def test_a_run_cut_off_has_a_report(make):
    folder = make("a", steps=90, ending=None, tail='{"kind": "step", "step": 100, "train_lo')
    text = report.write_report(folder).read_text()
    rows = tables(text)
    assert "still going, or cut off: 90 of ? steps" in text
    assert rows["tokens"] == ["46.1k"] and rows["total_training_flops"] == ["4.61e+08"]  # of step 90
    assert rows["val_bpb"] == ["1.0247"] and rows["wall_time"] == ["–"]  # of step 80
    assert rows["training"][0] == "7.2" and rows["together"][0] == "9.0"
    assert "--num-iterations" not in text  # nobody knows it


def test_a_summary_from_before_the_run_was_resumed_does_not_count(make, monkeypatch):
    monkeypatch.setattr(report, "show_curves", lambda runs, folder: "")
    folder = make("a")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 50}))
    assert tables(report.write_report(folder).read_text())["val_bpb"] == ["1.0198"]


def test_what_was_not_finite_leaves_a_gap(make):
    folder = make("a", ending="failed")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{k: None if "loss" in k or "norm" in k else v for k, v in r.items()} for r in lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    text = report.write_report(folder).read_text()
    assert "failed: 100" in text and tables(text)["train_loss_ema"] == ["–"] and "curves.png" in text


@pytest.mark.parametrize("steps, log", [(0, True), (0, False)])
def test_an_empty_run_says_so(make, steps, log):
    folder = make("a", steps=steps, ending=None)
    if not log:
        (folder / "log.jsonl").unlink()
    text = report.write_report(folder).read_text()
    assert "The log holds no step yet." in text and "all parameters" in text


def test_without_matplotlib_the_curves_are_text(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = report.write_report(make("a")).read_text()
    assert "curves.png" not in text
    (curve,) = re.findall(r"^    val_bpb +3 +([▁-█]+) 1.02  a$", text, re.MULTILINE)
    assert curve[0] == "█" and curve[-1] == "▁" and sorted(curve, reverse=True) == list(curve)


def test_a_sparkline_keeps_the_ends_and_the_width():
    line = report.sparkline([float(n) for n in range(1000)] + [None])
    first, bars, last = line.split()
    assert (first, last) == ("0", "999") and len(bars) == 60 and bars[0] == "▁" and bars[-1] == "█"
    assert report.sparkline([2.0]).split() == ["2", "▁", "2"]


def test_a_comparison_shows_what_differs(make, config):
    other = config["settings"] | {"matrix_lr": 0.02, "run": "b"}
    folders = [make("a"), make("b", steps=80, settings=other, device="another CPU")]
    path = report.compare(folders)
    assert path == folders[0].parent / "compare-a-b" / "compare.md"
    text = path.read_text()
    rows = tables(text)
    assert rows["steps"] == ["100", "80 (-20.0%)"] and rows["val_bpb"] == ["1.2500", "1.2500 (+0.0%)"]
    differing = tables(text[text.index("## Settings") :])
    assert differing == {
        **{"setting": ["a", "b"], "---": ["---", "---"]},
        **{"matrix_lr": ["0.01", "0.02"], "device": ["a \\| CPU", "another CPU"]},
    }
    assert (path.parent / "curves.png").stat().st_size > 20_000


def test_runs_of_one_name_are_told_apart(make, tmp_path):
    (tmp_path / "x").mkdir()
    folders = [make("a"), make("x/a"), make("empty", steps=0, ending=None)]
    text = report.compare(folders).read_text()
    assert str(folders[0]) in text and str(folders[1]) in text


def test_the_command_line(make, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        runpy.run_path(str(REPO / "report.py"), run_name="__main__")
        return capsys.readouterr().out.strip()

    a, b = make("a", steps=0, ending=None), make("b", steps=0, ending=None)
    assert call(a) == str(a / "report.md")
    assert call(a, b) == str(a.parent / "compare-a-b" / "compare.md")
    for wrong in ([a.parent / "nothing"], []):
        with pytest.raises(SystemExit) as end:
            call(*wrong)
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 2


# -----------------------------------------------------------------------------
# Real runs

COUNTING = """
import runpy, sys
sys.path.insert(0, {repo!r})
import report
waits, write = 0, report.Log.write
def wait():
    global waits
    waits += 1
def counting(log, kind, **fields):
    write(log, kind, **fields, waits=waits)
report.synchronizer, report.Log.write = (lambda device_type: wait), counting
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_waits_for_the_device_once_a_record_and_its_time_adds_up(train, tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(repo=str(REPO), train=str(REPO / "train.py")))
    run = train("--num-iterations", 40, "--log-every", 5, "--eval-every", 1000, script=script)
    assert run.code == 0, run.output
    steps = [r for r in run.log if r["kind"] == "step"]
    waits = [r["waits"] for r in steps]
    assert [b - a for a, b in zip(waits, waits[1:])] == [1] * (len(steps) - 1) and len(steps) < 12
    assert sum(run.summary["time"].values()) == pytest.approx(run.summary["wall_time"], abs=0.1)
    assert max(map(len, run.output[: run.output.index("---")].splitlines())) <= 120
    assert tables((run.folder / "report.md").read_text())["steps"] == ["40"]
    assert (run.folder / "curves.png").exists()


@pytest.mark.slow
def test_a_killed_run_still_has_its_report(train, tmp_path):
    process = train.start("--num-iterations", 100_000, "--eval-every", 1000)
    log = tmp_path / "out" / "a" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count('"step", "step"') > 20):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    run = train.finish(process)
    assert run.code == -signal.SIGKILL and run.summary is None
    with log.open("a") as file:
        file.write('{"kind": "step", "step": 9')
    text = report.write_report(run.folder).read_text()
    assert "still going, or cut off" in text and "curves.png" in text
