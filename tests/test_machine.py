"""Devices by stand-ins for what torch tells of them; ranks, signals and the environment in real processes."""

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import types
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import REPO

import machine
from machine import FAILS, FITS, TOO_LARGE

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))

# -----------------------------------------------------------------------------
# The device


@pytest.fixture
def has(monkeypatch):
    """
    has("mps", gpus=2) lets torch find these devices, besides the CPU -> the list of what is then done to make
    one ready. Nothing is done to the process that runs the tests.
    """
    done = []

    def has(*names, gpus=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", done.append)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        monkeypatch.setattr(torch, "set_float32_matmul_precision", done.append)
        monkeypatch.setattr(machine, "prepare_cpu", lambda: done.append("cpu"))
        return done

    return has


def test_the_first_device_that_is_there_is_found(has):
    done = has()
    assert machine.find_device() == CPU and done == ["cpu"]
    has("mps")
    assert machine.find_device() == MPS
    has("cuda", "mps", gpus=4)
    assert machine.find_device(local_rank=3, world_size=8) == torch.device("cuda", 3)
    assert done == ["cpu", 3, "high"]
    assert machine.find_device("mps") == MPS and machine.find_device("cpu", 5, 8) == CPU  # as wanted
    assert done == ["cpu", 3, "high", "cpu"]


SEVERAL = "several processes cannot share one MPS device"


@pytest.mark.parametrize(
    "there, arguments, message",
    [
        ([], ("tpu",), "--device-type tpu is unknown.\nChoose one of: cuda, mps, cpu."),
        ([], ("cuda",), "--device-type cuda: not to be had on this machine.\nHere there is cpu."),
        (["cuda"], ("mps",), "--device-type mps: not to be had on this machine.\nHere there is cuda."),
        (["cuda"], (None, 2, 4), "there are more processes than GPUs.\nGive --nproc_per_node=2."),
        (["cuda"], ("cuda", 2, 3), "there are more processes than GPUs.\nGive --nproc_per_node=2."),
        (["mps"], (None, 0, 2), f"{SEVERAL}.\nStart one, without torchrun."),
    ],
)
def test_a_device_that_is_not_to_be_had_is_an_error_of_two_lines(has, there, arguments, message):
    done = has(*there, gpus=2)
    with pytest.raises(machine.MachineError) as error:
        machine.find_device(*arguments)
    assert str(error.value) == message and done == []


@pytest.mark.parametrize(
    "capability, install",
    [
        ((8, 0), None),
        ((8, 9), None),  # by the machine code of 8.0
        ((12, 1), None),  # by that of 12.0
        ((7, 0), "its build for CUDA 12.6"),
        ((10, 3), "a newer PyTorch"),
        ((13, 0), "a newer PyTorch"),
    ],
)
def test_a_gpu_without_kernels_is_an_error_of_two_lines(capability, install):
    architectures = ["sm_80", "sm_90a", "sm_120"]
    if install is None:
        machine.check_kernels(capability, architectures)
        return
    with pytest.raises(machine.MachineError, match=install) as error:
        machine.check_kernels(capability, architectures)
    assert str(error.value).count("\n") == 1
    machine.check_kernels(capability, [*architectures, "compute_70"])  # compiled for it at the first start
    machine.check_kernels(capability, ["gfx942"])


def test_activations_are_bfloat16_where_the_hardware_has_it(monkeypatch):
    capability, units = (8, 0), {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert machine.find_dtype(CUDA) == torch.bfloat16
    capability = (7, 5)
    assert machine.find_dtype(CUDA) == torch.float32
    assert machine.find_dtype(CUDA, "bfloat16") == torch.bfloat16  # emulated, but as wanted
    assert machine.find_dtype(CPU) == torch.float32
    units = {"avx512_f": True, "avx512_bf16": False}
    assert machine.find_dtype(CPU) == torch.float32
    for name in ("avx512_bf16", "amx_bf16"):
        units = {name: True}
        assert machine.find_dtype(CPU) == torch.bfloat16
        assert machine.find_dtype(CPU, "float32") == torch.float32
        assert machine.find_dtype(MPS) == torch.float32


@pytest.mark.parametrize("device, wanted, words", [(CPU, "float16", "unknown"), (MPS, "bfloat16", "leaks")])
def test_a_dtype_that_does_not_do_is_an_error_of_two_lines(device, wanted, words):
    with pytest.raises(machine.MachineError, match=words) as error:
        machine.find_dtype(device, wanted)
    assert str(error.value).startswith(f"--dtype {wanted}") and str(error.value).count("\n") == 1


def test_sums_that_metal_gets_wrong_are_refused(monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "Apple M4 Pro")
    machine.check_sums(MPS, 32_767)
    monkeypatch.setattr(machine, "device_name", lambda device: "Apple M2 Max")
    machine.check_sums(MPS, 32_000)
    for device in (CPU, CUDA):
        machine.check_sums(device, 10**6)
    with pytest.raises(machine.MachineError, match="here they are 32,767.\nGive a smaller"):
        machine.check_sums(MPS, 32_767)


def test_a_device_has_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.device_name(torch.device("cuda", 3)) == "GPU 3"
    name, threads = machine.device_name(CPU).rsplit(", ", 1)
    assert name.strip() == name != "" and threads == f"{torch.get_num_threads()} threads"
    monkeypatch.setattr(sys, "platform", "plan9")  # a system that no command is known for
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "alpha")
    assert machine.device_name(MPS) == "alpha"


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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(machine, "measured_peak", lambda device, dtype: 7.0)
    expected = (PEAKS[name] * 1e12, "published") if PEAKS[name] else (7.0, "measured")
    assert machine.find_peak(CUDA, torch.bfloat16) == expected


def test_a_peak_is_given_else_published_else_measured(monkeypatch):
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(machine, "measured_peak", lambda device, dtype: 7.0)
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    assert machine.find_peak(CUDA, torch.bfloat16, 0.5) == (0.5e12, "given")
    assert machine.find_peak(CUDA, torch.bfloat16) == (989e12, "published")
    assert machine.find_peak(CUDA, torch.float32) == (7.0, "measured")  # 989 is not the peak of fp32
    assert machine.find_peak(CPU, torch.bfloat16) == (7.0, "measured")
    name = "NVIDIA L40"
    assert machine.find_peak(CUDA, torch.bfloat16) == (7.0, "measured")


@pytest.mark.parametrize("speed", [2e8, 4e8, 2e9, 1e11, 5e13, 1e15])
def test_a_measured_peak_is_the_median_and_takes_two_seconds_at_most(monkeypatch, speed):
    clock, products = 0.0, 0

    def product(a, b):
        nonlocal clock, products
        products += 1
        slow = {1: 3.0, 4: 2.0}.get(products % 6, 1.0)  # the first of six, and one of the others, is slow
        clock += 2 * len(a) ** 3 / speed * slow

    monkeypatch.setattr(machine, "time", types.SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(torch, "randn", torch.empty)
    monkeypatch.setattr(torch, "mm", product)
    assert machine.measured_peak(CPU, torch.float32) == pytest.approx(speed)
    assert clock <= 2.5


def test_each_device_waits_in_its_own_way(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("mps"))
    for device in (CUDA, MPS, CPU):
        machine.synchronizer(device)()
    assert calls == ["cuda", "mps"]


def test_peak_memory_is_the_device_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 11)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 22)
    assert machine.peak_memory(CUDA) == 11
    assert machine.peak_memory(MPS) == 22
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    assert machine.peak_memory(CPU) == pytest.approx(high_water * unit, rel=0.01)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("as torch's class says, whatever the words"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.81 GB, max allowed: 9.07 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def test_memory_that_does_not_do_is_told_from_other_errors():
    assert all(map(machine.is_out_of_memory, MEMORY_ERRORS))
    for error in (RuntimeError("CUDA error: an illegal memory access"), ValueError("out of range")):
        assert not machine.is_out_of_memory(error)


def test_a_gpu_without_memory_to_spare_is_crowded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 96)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 100))  # bytes that are free, and in all
    assert machine.is_crowded(CUDA) and machine.is_crowded(CUDA, 0.05)
    assert not machine.is_crowded(CUDA, 0.03) and not machine.is_crowded(CUDA, 0.0)
    assert not machine.is_crowded(CPU) and not machine.is_crowded(MPS)


def test_the_memory_to_be_had_is_what_is_free_and_what_the_process_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    assert machine.free_memory(CUDA) == 65
    assert machine.free_memory(CPU) == machine.free_memory(MPS) == float("inf")


def test_only_a_gpu_s_memory_is_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("empty Metal's"))
    for device in (CPU, MPS, CUDA):
        machine.forget_memory(device)
    assert calls == ["empty Metal's", "empty", "reset"]


# -----------------------------------------------------------------------------
# One process alone


@pytest.fixture
def alone(monkeypatch):
    """The ranks of a process that torchrun has not started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = machine.Ranks()
    ranks.start(CPU)
    return ranks


def test_a_process_alone_gets_back_what_it_gave(alone):
    assert (alone.rank, alone.local_rank, alone.world_size) == (0, 0, 1)
    value, tensor = {"a": [1, None]}, torch.arange(3.0)
    assert alone.first(value) is value
    assert alone.agree(1, -2.5) == [1, -2.5] and alone.agree(7) == [7]
    assert alone.total(tensor) is tensor and tensor.tolist() == [0.0, 1.0, 2.0]
    assert not dist.is_initialized()
    alone.end()


def test_ranks_are_numbered_by_torchrun(monkeypatch):
    for name, value in {"RANK": 11, "LOCAL_RANK": 3, "WORLD_SIZE": 16}.items():
        monkeypatch.setenv(name, str(value))
    ranks = machine.Ranks()
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (11, 3, 16)


def test_a_heartbeat_before_each_item(alone, monkeypatch):
    events = []
    monkeypatch.setattr(alone, "heartbeat", lambda: events.append("beat"))
    for item in alone.watch(iter("ab")):
        events.append(item)
    assert events == ["beat", "a", "beat", "b"]


def test_only_ranks_that_wait_for_each_other_have_a_time_limit(alone, monkeypatch):
    calls = []
    later = lambda seconds, exit: calls.append((seconds, exit))  # noqa: E731
    monkeypatch.setattr(faulthandler, "dump_traceback_later", later)
    alone.heartbeat()
    assert calls == []
    alone.world_size = 2
    alone.heartbeat()
    assert calls == [(machine.HANG_SECONDS, True)]


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize(
    "error, expected",
    [(None, FITS), (ValueError("no"), FAILS), *((error, TOO_LARGE) for error in MEMORY_ERRORS)],
)
def test_an_attempt_has_an_outcome(alone, error, expected, collective):
    def work():
        if error:
            raise error

    outcome, seconds, found = machine.attempt(work, CPU, alone, 0.05, collective)
    assert (outcome, found) == (expected, error) and type(outcome) is int and 0 <= seconds < 30


def test_outcomes_stand_from_good_to_bad():
    assert FITS < FAILS < TOO_LARGE  # so that the largest is the worst


def test_an_attempt_waits_for_the_device(alone, monkeypatch):
    def wait():
        events.append("wait")
        time.sleep(0.05)
        if late:
            raise late

    events, late = [], None
    monkeypatch.setattr(machine, "synchronizer", lambda device: wait)
    outcome, seconds, error = machine.attempt(lambda: events.append("work"), CPU, alone, 0.05)
    assert (outcome, error, events) == (FITS, None, ["work", "wait"]) and seconds >= 0.05
    late = MEMORY_ERRORS[0]  # what is asynchronous fails late
    assert machine.attempt(lambda: None, CPU, alone, 0.05)[::2] == (TOO_LARGE, late)


def test_what_leaves_too_little_memory_is_too_large(alone, monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "is_crowded", lambda device, spare: seen.append((device, spare)) or True)
    assert machine.attempt(lambda: None, CPU, alone, 0.25)[::2] == (TOO_LARGE, None)
    assert seen == [(CPU, 0.25)]


def test_an_interrupt_is_no_outcome(alone):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.attempt(work, CPU, alone, 0.05)


# -----------------------------------------------------------------------------
# Two real processes, connected as torchrun connects its own

OUTCOMES = [(FITS, FITS), (FITS, FAILS), (TOO_LARGE, FITS), (FAILS, TOO_LARGE)]  # of rank 0 and of rank 1


def two_ranks(ranks):
    """What both do together -> what this one found."""
    found = {"first": ranks.first({"of": [ranks.rank, None]})}
    found["agree"] = ranks.agree(ranks.rank, -ranks.rank, 0.5)
    tensor = torch.tensor([1.0, 10.0 * ranks.rank])
    found["total"], found["in place"] = ranks.total(tensor).tolist(), tensor.tolist()
    found["watch"] = list(ranks.watch([1, 2]))
    found["outcomes"], found["errors"] = [], []
    machine.is_crowded = lambda device, spare: wanted == TOO_LARGE and ranks.rank == 0
    for pair in OUTCOMES:
        wanted = pair[ranks.rank]

        def work(wanted=wanted):
            if wanted == FAILS:
                raise ValueError("no")
            if wanted == TOO_LARGE and ranks.rank == 1:
                raise torch.OutOfMemoryError("no")

        outcome, _, error = machine.attempt(work, CPU, ranks, 0.05)
        found["outcomes"].append(outcome)
        found["errors"].append(type(error).__name__)

    def ends_on_one():
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("within collective calls")

    if ranks.rank == 1:  # rank 0 would wait
        try:
            machine.attempt(ends_on_one, CPU, ranks, 0.05, collective=True)
        except torch.OutOfMemoryError as error:
            found["collective"] = str(error)
    return found


def process(rank, port, folder):
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        ranks = machine.Ranks()
        ranks.start(CPU)
        found = two_ranks(ranks)
        ranks.end()
        found["ended"] = not dist.is_initialized()
        (folder / f"{rank}.json").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.mark.slow
def test_two_ranks_agree_and_the_outcome_is_the_worst_of_both(tmp_path):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")  # there is one: it serves test_optim.py too
    context.set_forkserver_preload(["pytest", "torch._dynamo"])
    processes = [context.Process(target=process, args=(rank, store.port, tmp_path)) for rank in range(2)]
    for p in processes:
        p.start()
    deadline = time.monotonic() + 60
    for p in processes:
        p.join(max(0, deadline - time.monotonic()))
        p.kill()
    assert [p.exitcode for p in processes] == [0, 0]
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for found in both:
        assert found["first"] == {"of": [0, None]}
        assert found["agree"] == [1.0, 0.0, 0.5]
        assert found["total"] == found["in place"] == [2.0, 10.0]
        assert found["watch"] == [1, 2] and found["ended"]
        assert found["outcomes"] == [max(pair) for pair in OUTCOMES]
        assert all(type(outcome) is int for outcome in found["outcomes"])
    assert both[0]["errors"] == ["NoneType", "NoneType", "NoneType", "ValueError"]  # its own
    assert both[1]["errors"] == ["NoneType", "ValueError", "NoneType", "OutOfMemoryError"]
    assert both[1]["collective"] == "within collective calls"  # raised, and no outcome


# -----------------------------------------------------------------------------
# Processes of their own, with a stand-in for torch, which notes the environment as it is imported


@pytest.fixture
def bare(tmp_path):
    """bare(code, *before, **environment) runs code in another process, after the command `before`."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os\nseen = dict(os.environ)\n")
    (tmp_path / "torch" / "distributed.py").touch()

    def run(code, *before, **environment):
        env = {name: value for name, value in os.environ.items() if name not in SET}
        env |= {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPO))), **environment}
        command = [*before, sys.executable, "-c", code]
        hears = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        options = {"capture_output": True, "text": True, "timeout": 60, "preexec_fn": hears}
        return subprocess.run(command, cwd=tmp_path, env=env, **options)

    return run


ALLOCATOR, ALLOCATOR_TOO = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
SET = ("GOMP_SPINCOUNT", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", ALLOCATOR, ALLOCATOR_TOO)
IMPORTING = """
import json, platform
kernel = platform.uname()
platform.uname = lambda: kernel._replace(release={release!r})
import machine
print(json.dumps(machine.torch.seen))
"""


@pytest.mark.parametrize(
    "release, allocator",
    [
        ("6.8.0-45-generic", "expandable_segments:True"),
        ("5.15.153.1-microsoft-standard-WSL2", None),
        ("4.4.0-19041-Microsoft", None),
    ],
)
def test_torch_finds_its_environment_set_as_it_is_imported(bare, release, allocator):
    found = json.loads(bare(IMPORTING.format(release=release)).stdout)
    assert found.get(ALLOCATOR) == allocator
    assert found["GOMP_SPINCOUNT"] == "3000"
    assert found["TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"] == "1"


@pytest.mark.parametrize("release", ["6.8.0-45-generic", "5.15.153.1-microsoft-standard-WSL2"])
def test_what_a_user_has_set_stays(bare, release):
    own = {ALLOCATOR: "max_split_size_mb:64", "GOMP_SPINCOUNT": "7"}
    found = json.loads(bare(IMPORTING.format(release=release), **own).stdout)
    assert {name: found[name] for name in own} == own


def test_the_new_name_of_the_allocator_s_setting_stays_too(bare):
    own = {ALLOCATOR_TOO: "max_split_size_mb:64"}
    found = json.loads(bare(IMPORTING.format(release="6.8.0-45-generic"), **own).stdout)
    assert found[ALLOCATOR_TOO] == own[ALLOCATOR_TOO] and ALLOCATOR not in found


def test_a_hang_shows_where_and_ends(bare):
    code = """
import time, machine
machine.HANG_SECONDS, ranks = 0.8, machine.Ranks()
for item in ranks.watch(range(3)):
    time.sleep(0.3)  # each in time
def hang():
    time.sleep(60)
hang()
"""
    begin = time.monotonic()
    done = bare(code, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 1 and time.monotonic() - begin < 30
    assert "in hang" in done.stderr


# -----------------------------------------------------------------------------
# Signals


@pytest.fixture
def handlers():
    """Puts the handlers back, and lets no signal end the tests meanwhile."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop(handlers, number):
    signals = machine.Signals()
    assert (signals.stop, signals.save) == (0, False)
    signal.raise_signal(number)
    assert (signals.stop, signals.save) == (number, False)


def test_a_signal_asks_to_save(handlers):
    signals = machine.Signals()
    signal.raise_signal(signal.SIGUSR1)
    assert (signals.stop, signals.save) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_only_the_first_ctrl_c_is_noted(handlers, number):
    machine.Signals()
    signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(number) != signal.SIG_DFL  # a scheduler may send it twice
    signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == signal.SIG_DFL


NOTED = """
import os, signal, machine
os.kill(os.getpid(), signal.SIGUSR1)  # there is nothing to save yet
signals = machine.Signals()
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
    os.kill(os.getpid(), number)
    print(signals.stop, signals.save, flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("still there")
"""


def test_a_terminal_that_goes_away_stops_a_run_but_not_under_nohup(bare):
    sighup, sigint = int(signal.SIGHUP), int(signal.SIGINT)
    done = bare(NOTED)
    assert done.returncode == -sigint  # the second Ctrl-C
    assert done.stdout.splitlines() == [f"{sighup} False", f"{sighup} True", f"{sigint} True"]
    done = bare(NOTED, "nohup")
    assert done.returncode == -sigint
    assert done.stdout.splitlines() == ["0 False", "0 True", f"{sigint} True"]


def test_windows_is_told_of_wsl_in_two_lines():
    code = (
        "import sys, runpy; sys.platform, sys.modules['resource'] = 'win32', None; sys.argv = ['train.py']\n"
    )
    code += "runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 2 and "WSL" in done.stderr
