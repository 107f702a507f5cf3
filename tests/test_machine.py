"""Devices: with fake answers from torch. Ranks, signals and the environment: in real processes."""

import faulthandler
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import types
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import REPO

import machine
from machine import BenchmarkFailed, DoesNotFit, MachineError
from optim_muon import MuonAdamW

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))

# -----------------------------------------------------------------------------
# The device


@pytest.fixture
def has(monkeypatch):
    """
    has("mps", gpus=2) makes torch report these devices, besides the CPU -> the list of calls that prepare a
    device. The process that runs the tests is not changed.
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


def test_the_first_available_device_is_found(has):
    done = has()
    assert machine.find_device() == CPU and done == ["cpu"]
    has("mps")
    assert machine.find_device() == MPS
    has("cuda", "mps", gpus=4)
    assert machine.find_device(local_rank=3, world_size=8) == torch.device("cuda", 3)
    assert done == ["cpu", 3, "high"]
    assert machine.find_device("mps") == MPS and machine.find_device("cpu", 5, 8) == CPU
    assert done == ["cpu", 3, "high", "cpu"]


SEVERAL = "several processes cannot share one MPS device"


@pytest.mark.parametrize(
    "available, arguments, message",
    [
        ([], ("tpu",), "--device-type tpu is unknown.\nChoose one of: cuda, mps, cpu."),
        ([], ("cuda",), "--device-type cuda is not available on this machine.\nChoose one of: cpu."),
        (
            ["cuda"],
            ("mps",),
            "--device-type mps is not available on this machine.\nChoose one of: cuda, cpu.",
        ),
        (["cuda"], (None, 2, 4), "there are more processes than GPUs.\nUse --nproc_per_node=2."),
        (["cuda"], ("cuda", 2, 3), "there are more processes than GPUs.\nUse --nproc_per_node=2."),
        (["mps"], (None, 0, 2), f"{SEVERAL}.\nStart one, without torchrun."),
    ],
)
def test_an_unusable_device_is_an_error_of_two_lines(has, available, arguments, message):
    done = has(*available, gpus=2)
    with pytest.raises(MachineError) as error:
        machine.find_device(*arguments)
    assert str(error.value) == message and done == []


@pytest.mark.parametrize(
    "capability, install",
    [
        ((8, 0), None),
        ((8, 9), None),  # runs the machine code of 8.0
        ((12, 1), None),  # runs that of 12.0
        ((7, 0), "its build for CUDA 12.6: uv pip install torch==.* --torch-backend cu126"),
        ((10, 3), "a newer PyTorch"),
        ((13, 0), "a newer PyTorch"),
    ],
)
def test_a_gpu_without_kernels_is_an_error_of_two_lines(capability, install):
    architectures = ["sm_80", "sm_90a", "sm_120"]
    if install is None:
        machine.check_kernels(capability, architectures)
        return
    with pytest.raises(MachineError, match=install) as error:
        machine.check_kernels(capability, architectures)
    assert str(error.value).count("\n") == 1
    machine.check_kernels(capability, [*architectures, "compute_70"])  # PTX is compiled at the first start
    machine.check_kernels(capability, ["gfx942"])


def test_activations_are_bfloat16_if_the_hardware_has_it(monkeypatch):
    capability, units = (8, 0), {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert machine.find_dtype(CUDA) == torch.bfloat16
    for capability in ((7, 0), (7, 2), (7, 5)):  # noqa: B007  V100, Jetson Xavier, T4
        assert machine.find_dtype(CUDA) == torch.float16
    for capability in ((6, 0), (6, 1)):  # noqa: B007  P100, GTX 10
        assert machine.find_dtype(CUDA) == torch.float32
    assert machine.find_dtype(CUDA, "float16") == torch.float16
    assert machine.find_dtype(CUDA, "bfloat16") == torch.bfloat16  # emulated, but that is what the user wants
    assert machine.find_dtype(CPU) == torch.float32
    units = {"avx512_f": True, "avx512_bf16": False}
    assert machine.find_dtype(CPU) == torch.float32
    for name in ("avx512_bf16", "amx_bf16"):
        units = {name: True}
        assert machine.find_dtype(CPU) == torch.bfloat16
        assert machine.find_dtype(CPU, "float32") == torch.float32
        assert machine.find_dtype(MPS) == torch.float32


@pytest.mark.parametrize(
    "device, wanted, words",
    [(CPU, "float64", "unknown"), (MPS, "bfloat16", "later"), (MPS, "float16", "later")],
)
def test_an_unusable_dtype_is_an_error_of_two_lines(device, wanted, words):
    with pytest.raises(MachineError, match=words) as error:
        machine.find_dtype(device, wanted)
    assert str(error.value).startswith(f"--dtype {wanted}") and str(error.value).count("\n") == 1


@pytest.fixture
def amd(monkeypatch):
    """amd("gfx1030") pretends that PyTorch's build for AMD runs on a GPU of this architecture."""

    def pretend(name):
        monkeypatch.setattr(torch.version, "hip", "7.2.53211")
        capability = tuple(int(digits, 16) for digits in re.fullmatch(r"gfx(..?)(.).", name).groups())
        properties = types.SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return pretend


AMD = {  # architecture -> dtype of activations
    "gfx900": torch.float32,  # Vega: the "capability" is (9, 0), like an H100's
    "gfx906": torch.float32,  # MI50
    "gfx908": torch.bfloat16,  # MI100
    "gfx90a": torch.bfloat16,  # MI250X
    "gfx942": torch.bfloat16,  # MI300X
    "gfx950": torch.bfloat16,  # MI355X
    "gfx1010": torch.float32,
    "gfx1030": torch.float32,  # RX 6900: (10, 3), like a B300's
    "gfx1100": torch.bfloat16,  # RX 7900
    "gfx1151": torch.bfloat16,  # Strix Halo
    "gfx1201": torch.bfloat16,  # RX 9070
}


@pytest.mark.parametrize("name", AMD)
def test_the_dtype_on_an_amd_gpu_depends_on_its_architecture(amd, name):
    amd(name)
    assert machine.find_dtype(CUDA) == AMD[name]
    assert machine.amd_architecture(CUDA) == name
    assert machine.find_dtype(CUDA, "float16") == torch.float16


def test_an_amd_gpu_without_kernels_is_an_error_of_two_lines(has, amd, monkeypatch):
    done = has("cuda")
    amd("gfx1031")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx942", "gfx1030"])
    with pytest.raises(MachineError, match="gfx1031.\nSet HSA_OVERRIDE_GFX_VERSION.*gfx1030") as error:
        machine.find_device()
    assert str(error.value).count("\n") == 1 and done == []
    amd("gfx1030")
    assert machine.find_device() == torch.device("cuda", 0)


def test_matrix_products_that_an_m1_or_m2_gets_wrong_are_refused(monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "Apple M4 Pro")
    machine.check_matmul_length(MPS, 32_767)
    monkeypatch.setattr(machine, "device_name", lambda device: "Apple M2 Max")
    machine.check_matmul_length(MPS, 32_000)
    for device in (CPU, CUDA):
        machine.check_matmul_length(device, 10**6)
    with pytest.raises(MachineError, match="dimension 32,767 wrong.*\nUse a smaller"):
        machine.check_matmul_length(MPS, 32_767)


def test_a_device_has_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.device_name(torch.device("cuda", 3)) == "GPU 3"
    name, threads = machine.device_name(CPU).rsplit(", ", 1)
    assert name.strip() == name != "" and threads == f"{torch.get_num_threads()} threads"
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "alpha")

    def no_process(command):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "popen", no_process)  # at the limit of processes
    monkeypatch.setattr(machine, "Path", lambda path: REPO / "no" / "proc")
    for system in ("plan9", "darwin", "linux"):  # the first is a system that we do not know
        monkeypatch.setattr(sys, "platform", system)
        assert machine.device_name(MPS) == "alpha"


PEAKS = {  # name as the driver reports it -> published dense bf16 TFLOP/s, or None: it must be measured
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H100 PCIe MIG 3g.40gb": None,
    "NVIDIA H100": None,  # could be any of the three
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
    "AMD Instinct MI355X": 2516.6,
    "AMD Instinct MI350X": 2306.9,
    "AMD Instinct MI325X": 1307.4,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI300X OAM": 1307.4,
    "AMD Instinct MI300X VF": None,  # a share of one
    "AMD Instinct MI300A": 980.6,
    "AMD Instinct MI250X": 191.5,
    "AMD Instinct MI250X / MI250": None,  # could be either
    "AMD Instinct MI250": 181,
    "AMD Instinct MI210": 181,
    "AMD Instinct MI100": None,
    "AMD Radeon RX 7900 XTX": 122.8,
    "Radeon RX 7900 XTX": 122.8,
    "AMD Radeon RX 7900 XT": 103,
    "AMD Radeon RX 7900 GRE": None,
    "AMD Radeon RX 6900 XT": None,
    "AMD Radeon Graphics": None,
    "Apple M4 Max": None,
    "Intel(R) Xeon(R) Platinum 8480CL": None,
    "": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_published_peak_belongs_to_one_exact_name(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(machine, "measure_peak_flops", lambda device, dtype: 7.0)
    expected = (PEAKS[name] * 1e12, "published") if PEAKS[name] else (7.0, "measured")
    assert machine.find_peak_flops(CUDA, torch.bfloat16) == expected


def test_the_peak_is_given_or_published_or_measured(monkeypatch):
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(machine, "measure_peak_flops", lambda device, dtype: 7.0)
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    assert machine.find_peak_flops(CUDA, torch.bfloat16, 0.5) == (0.5e12, "given")
    assert machine.find_peak_flops(CUDA, torch.bfloat16) == (989e12, "published")
    assert machine.find_peak_flops(CUDA, torch.float32) == (7.0, "measured")  # 989 is not the peak of fp32
    assert machine.find_peak_flops(CPU, torch.bfloat16) == (7.0, "measured")
    name = "NVIDIA L40"
    assert machine.find_peak_flops(CUDA, torch.bfloat16) == (7.0, "measured")


@pytest.mark.parametrize("speed", [2e8, 4e8, 2e9, 1e11, 5e13, 1e15])
def test_the_measured_peak_is_a_median_and_takes_at_most_two_seconds(monkeypatch, speed):
    clock, products = 0.0, 0

    def product(a, b):
        nonlocal clock, products
        products += 1
        slow = {1: 3.0, 4: 2.0}.get(products % 6, 1.0)  # the first of six, and one of the others, is slow
        clock += 2 * len(a) ** 3 / speed * slow

    monkeypatch.setattr(machine, "time", types.SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(torch, "randn", torch.empty)
    monkeypatch.setattr(torch, "mm", product)
    assert machine.measure_peak_flops(CPU, torch.float32) == pytest.approx(speed)
    assert clock <= 2.5


def test_each_device_has_its_own_synchronize(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("mps"))
    for device in (CUDA, MPS, CPU):
        machine.synchronizer(device)()
    assert calls == ["cuda", "mps"]


def test_peak_memory_of_each_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 11)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 22)
    assert machine.peak_memory(CUDA) == 11
    assert machine.peak_memory(MPS) == 22
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    assert machine.peak_memory(CPU) == pytest.approx(high_water * unit, rel=0.01)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("the class is enough, the message does not matter"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.81 GB, max allowed: 9.07 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def test_out_of_memory_is_distinguished_from_other_errors():
    assert all(map(machine.is_out_of_memory, MEMORY_ERRORS))
    for error in (RuntimeError("CUDA error: an illegal memory access"), ValueError("out of range")):
        assert not machine.is_out_of_memory(error)


def test_headroom_is_a_share_of_a_gpus_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 96)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 100))  # free and total bytes
    assert machine.lacks_headroom(CUDA, 0.05)
    assert not machine.lacks_headroom(CUDA, 0.03) and not machine.lacks_headroom(CUDA, 0.0)
    assert not machine.lacks_headroom(CPU, 0.05) and not machine.lacks_headroom(MPS, 0.05)


def test_free_memory_includes_what_the_process_has_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    assert machine.free_memory(CUDA) == 65
    assert machine.free_memory(CPU) == machine.free_memory(MPS) == float("inf")


def test_unused_memory_is_returned_to_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("empty Metal's"))
    for device in (CPU, MPS, CUDA):
        machine.reset_memory(device)
    assert calls == ["empty Metal's", "empty", "reset"]


# -----------------------------------------------------------------------------
# Errors


@pytest.fixture
def hook(monkeypatch):
    """hook(rank) installs an ErrorHook for one test -> (the hook, the seconds that it would have slept)."""
    slept = []
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(machine.time, "sleep", slept.append)

    def install(rank=0):
        hook = machine.ErrorHook(rank)
        assert sys.excepthook is hook
        return hook, slept

    return install


class ElsewhereError(Exception):
    """A user-fixable error of some other file."""

    exit_status = 2


NO_THREADS = "the system starts no more threads.\nRaise the limit of processes (ulimit -u) or of memory "
NO_THREADS += "(ulimit -v)."
TOO_SMALL = "the device has too little memory.\nTry a smaller --depth or --device-batch-size."


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "error, status, message",
    [
        (ElsewhereError("--depth 0 is out of range.\nUse 1."), 2, "--depth 0 is out of range.\nUse 1."),
        (MachineError("a\nb"), 2, "a\nb"),
        (DoesNotFit("a\nb"), 2, "a\nb"),
        *((error, 2, TOO_SMALL) for error in MEMORY_ERRORS),
        (RuntimeError("can't start new thread"), 2, NO_THREADS),
    ],
)
def test_user_fixable_errors_print_two_lines(hook, capsys, rank, error, status, message):
    hook, slept = hook(rank)
    with pytest.raises(SystemExit) as exit:
        hook(type(error), error, None)
    assert exit.value.code == status and slept == [2] * rank  # rank 0 prints first
    assert capsys.readouterr().err == f"error: {message}\n"


def test_other_errors_print_a_traceback(hook, capsys):
    hook, slept = hook(1)
    for error in (ValueError("no"), BenchmarkFailed("no")):
        with pytest.raises(SystemExit) as exit:
            hook(type(error), error, None)
        printed = capsys.readouterr().err
        assert exit.value.code == 1 and slept == [] and type(error).__name__ + ": no" in printed
    with pytest.raises(SystemExit) as exit:
        hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert exit.value.code == 130 and capsys.readouterr().err == ""


def test_clean_up_is_called_in_order_with_the_error_and_may_fail(hook, capsys):
    def fail(error):
        raise OSError("the disk is full")

    hook, _ = hook()
    calls, errors = [], [ElsewhereError("a\nb"), ValueError("no"), KeyboardInterrupt()]
    hook.clean_up = [lambda error: calls.append((1, error)), fail, lambda error: calls.append((2, error))]
    for error in errors:
        with pytest.raises(SystemExit):
            hook(type(error), error, None)
    assert calls == [(number, error) for error in errors for number in (1, 2)]
    assert "error: a\nb\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hook(MemoryError, MemoryError(), None)
    assert calls[-1][1].exit_status == 2  # out of memory is user-fixable for the clean-up too


# -----------------------------------------------------------------------------
# A single process


@pytest.fixture
def alone(monkeypatch):
    """The Ranks of a process that torchrun has not started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = machine.Ranks()
    ranks.connect(CPU)
    return ranks


def test_a_single_process_gets_its_own_values_back(alone):
    assert (alone.rank, alone.local_rank, alone.world_size) == (0, 0, 1)
    value, tensor = {"a": [1, None]}, torch.arange(3.0)
    assert alone.broadcast(value) is value
    assert alone.all_reduce_max(1, -2.5) == [1, -2.5] and alone.all_reduce_max(7) == [7]
    assert alone.all_reduce_sum(tensor) is tensor and tensor.tolist() == [0.0, 1.0, 2.0]
    assert not dist.is_initialized()
    alone.disconnect()


ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # torchrun and others set it, too


def test_ranks_are_numbered_by_torchrun(monkeypatch):
    for name, value in {**ADDRESS, "RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    ranks = machine.Ranks()
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.warnings) == (11, 3, 16, [])
    two_hosts = {**ADDRESS, "RANK": "1", "WORLD_SIZE": "2"}
    assert machine.read_ranks(two_hosts) == ((1, 0, 2), [])


@pytest.mark.parametrize(
    "variables, ignored",
    [
        ("", ""),
        ("RANK=0 WORLD_SIZE=1", ""),  # a job of one pod
        ("RANK=0", ""),  # the same without it: there is nothing to say
        ("RANK= LOCAL_RANK= WORLD_SIZE=", ""),
        ("RANK=1", "RANK=1 is ignored: without WORLD_SIZE"),
        ("RANK=-1", "RANK=-1 is ignored: without WORLD_SIZE"),
        ("RANK=first", "RANK=first is ignored: without WORLD_SIZE"),
        ("WORLD_SIZE=2", "WORLD_SIZE=2 is ignored: without RANK"),
        ("RANK= WORLD_SIZE=2 MASTER_ADDR=host MASTER_PORT=1", "WORLD_SIZE=2 is ignored: without RANK"),
        ("LOCAL_RANK=1", "LOCAL_RANK=1 is ignored: without RANK"),
    ],
)
def test_a_process_that_nobody_launched_trains_alone(variables, ignored):
    numbers, warnings = machine.read_ranks(dict(pair.split("=") for pair in variables.split()))
    assert numbers == (0, 0, 1)
    assert warnings == ([f"{ignored}, this process trains alone"] if ignored else [])


@pytest.mark.parametrize(
    "variables, message",
    [
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1 is not a number from 0 to 1"),
        ("RANK=first WORLD_SIZE=2", "RANK=first is not a number from 0 to 1"),
        ("RANK=2 WORLD_SIZE=2", "RANK=2 is not a number from 0 to 1"),
        ("RANK=1 WORLD_SIZE=1", "RANK=1 is not a number from 0 to 0"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=two", "LOCAL_RANK=two is not a number from 0 to 1"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE=two is not a number of processes"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE=0 is not a number of processes"),
        ("RANK=0 WORLD_SIZE=-1", "WORLD_SIZE=-1 is not a number of processes"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=", "RANK=0 of WORLD_SIZE=2 needs MASTER_ADDR, which is not set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=", "RANK=0 of WORLD_SIZE=2 needs MASTER_PORT, which is not set"),
    ],
)
def test_numbers_of_ranks_that_make_no_sense_are_an_error_of_two_lines(variables, message):
    with pytest.raises(MachineError) as error:
        machine.read_ranks(ADDRESS | dict(pair.split("=") for pair in variables.split()))
    advice = "Start the processes with torchrun, or unset RANK and WORLD_SIZE to train alone."
    assert str(error.value) == f"{message}.\n{advice}"


def test_a_heartbeat_before_each_item(alone, monkeypatch):
    events = []
    monkeypatch.setattr(alone, "heartbeat", lambda: events.append("beat"))
    for item in alone.watch(iter("ab")):
        events.append(item)
    assert events == ["beat", "a", "beat", "b"]


def test_only_several_ranks_have_a_watchdog(alone, monkeypatch):
    calls = []
    later = lambda seconds, exit: calls.append((seconds, exit))  # noqa: E731
    monkeypatch.setattr(faulthandler, "dump_traceback_later", later)
    alone.heartbeat()
    assert calls == []
    alone.world_size = 2
    alone.heartbeat()
    assert calls == [(machine.HANG_SECONDS, True)]


@pytest.mark.slow
def test_a_variable_of_the_ranks_is_ignored_or_an_error_without_a_folder(train, monkeypatch):
    flags = ["--num-iterations", 2, "--eval-every", -1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = train(*flags)
    assert alone.code == 0 and alone.summary["world_size"] == 1, alone.output
    line = "node     WORLD_SIZE=2 is ignored: without RANK, this process trains alone"
    assert alone.output.splitlines().count(line) == 1
    monkeypatch.setenv("RANK", "-1")
    wrong = train(*flags, "--run-name", "b", run="b")
    assert wrong.code == 2 and not wrong.folder.exists()
    assert wrong.output.startswith("error: RANK=-1 is not") and wrong.output.count("\n") == 2


# -----------------------------------------------------------------------------
# The benchmark, on a single process


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize(
    "error, expected",
    [(None, None), (ValueError("no"), BenchmarkFailed), *((error, DoesNotFit) for error in MEMORY_ERRORS)],
)
def test_an_attempt_returns_or_says_why_not(alone, error, expected, collective):
    def work():
        if error:
            raise error
        return "result"

    if error is None:
        result, seconds = machine.attempt(work, CPU, alone, 0.05, collective)
        assert result == "result" and 0 <= seconds < 30
        return
    with pytest.raises(expected) as caught:
        machine.attempt(work, CPU, alone, 0.05, collective)
    assert caught.value.__cause__ is (error if expected is BenchmarkFailed else None)
    if expected is DoesNotFit:
        assert caught.value.exit_status == 2 and str(caught.value).count("\n") == 1


def test_an_attempt_waits_for_the_device(alone, monkeypatch):
    def wait():
        events.append("wait")
        time.sleep(0.05)
        if late:
            raise late

    events, late = [], None
    monkeypatch.setattr(machine, "synchronizer", lambda device: wait)
    _, seconds = machine.attempt(lambda: events.append("work"), CPU, alone, 0.05)
    assert events == ["work", "wait"] and seconds >= 0.05
    late = MEMORY_ERRORS[0]  # asynchronous work fails late
    with pytest.raises(DoesNotFit):
        machine.attempt(lambda: None, CPU, alone, 0.05)


def test_an_attempt_that_leaves_too_little_memory_does_not_fit(alone, monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "lacks_headroom", lambda *arguments: seen.append(arguments) or True)
    with pytest.raises(DoesNotFit):
        machine.attempt(lambda: None, CPU, alone, 0.25)
    assert seen == [(CPU, 0.25)]


def test_an_interrupt_ends_the_benchmark(alone):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.attempt(work, CPU, alone, 0.05)


@pytest.fixture
def no_gc():
    """
    No automatic garbage collection: the benchmark has to collect its optimizers itself. To make that fast,
    objects that already exist are left out.
    """
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


class FakeOptimizer:
    """An optimizer that is part of a reference cycle, as torch's are."""

    def __init__(self):
        self.me = self


class FakeTraining:
    """
    make_parts, release and a clock for `benchmark`. limit: rows that fit. seconds: time of micro_step
    in each round; update takes a tenth of it. errors: {"micro_step" or "update": what it raises, once}.
    """

    def __init__(self, monkeypatch, limit=100, seconds=(9.0, 3.0, 1.0, 2.0), **errors):
        self.limit, self.seconds, self.errors = limit, seconds, errors
        self.clock, self.calls, self.optimizers = 0.0, [], []
        monkeypatch.setattr(machine, "time", types.SimpleNamespace(perf_counter=lambda: self.clock))
        monkeypatch.setattr(machine, "reset_memory", lambda device: self.calls.append("reset"))
        monkeypatch.setattr(machine, "lacks_headroom", self.lacks_headroom)
        self.headroom = []

    def lacks_headroom(self, device, headroom):
        self.headroom.append(headroom)
        return False

    def alive(self):
        return sum(optimizer() is not None for optimizer in self.optimizers)

    def make_parts(self):
        assert self.alive() == 0  # never two of them
        optimizer, count = FakeOptimizer(), 0
        self.optimizers.append(weakref.ref(optimizer))

        def work(part, share):
            nonlocal count
            self.clock += share * self.seconds[count]
            if part in self.errors:
                raise self.errors.pop(part)

        def micro_step(rows):
            work("micro_step", 1.0)
            self.calls.append(rows)
            if rows > self.limit:
                raise torch.OutOfMemoryError("as if")
            return "the loss"

        def update(loss):
            nonlocal count
            assert loss == "the loss" and optimizer.me
            work("update", 0.1)
            self.calls.append("update")
            count += 1

        return micro_step, update

    def release(self):
        self.calls.append("release")

    def benchmark(self, sizes, ranks, **options):
        return machine.benchmark(self.make_parts, sizes, CPU, ranks, release=self.release, **options)


def test_a_benchmark_is_the_best_of_three_rounds_after_a_warm_up(alone, monkeypatch, no_gc):
    training = FakeTraining(monkeypatch)
    size, micro_step_time, update_time = training.benchmark([8], alone)
    assert training.alive() == 0
    assert (size, micro_step_time, update_time) == (8, 1.0, pytest.approx(0.1))
    rounds = [8, "update", "reset"] + [8, "update"] * 3
    assert training.calls == [*rounds, "release", "reset"]
    assert training.headroom == [0.0] * 3 + [0.05] * 6  # make_parts and the warm-up need none


def test_the_micro_batch_is_halved_until_it_fits(alone, monkeypatch, no_gc):
    training = FakeTraining(monkeypatch, limit=2)
    assert training.benchmark([8, 4, 2, 1], alone)[0] == 2
    assert training.alive() == 0 and len(training.optimizers) == 3
    assert training.calls[:6] == [8, "release", "reset", 4, "release", "reset"]


@pytest.mark.parametrize("sizes", [[8, 4, 2, 1], [8]])
def test_a_benchmark_in_which_nothing_fits(alone, monkeypatch, no_gc, sizes):
    training = FakeTraining(monkeypatch, limit=0)
    with pytest.raises(DoesNotFit) as error:
        training.benchmark(sizes, alone)
    assert training.calls == [call for size in sizes for call in (size, "release", "reset")]
    assert error.value.exit_status == 2 and str(error.value).count("\n") == 1


@pytest.mark.parametrize("part", ["micro_step", "update"])
def test_after_a_benchmark_that_failed_there_can_be_another(alone, monkeypatch, no_gc, part):
    cause = RuntimeError("ptxas is missing")
    training = FakeTraining(monkeypatch, **{part: cause})
    try:
        training.benchmark([8, 4], alone)
    except BenchmarkFailed as error:
        assert error.__cause__ is cause and f"in {part}" in "".join(traceback.format_exception(error))
        cause = None
    assert training.calls[-2:] == ["release", "reset"] and len(training.optimizers) == 1
    assert training.benchmark([8, 4], alone)[0] == 8 and training.alive() == 0


def test_no_state_of_a_real_optimizer_stays_in_memory(alone, no_gc):
    weight, states = torch.nn.Parameter(torch.ones(4, 4)), []

    def make_parts():
        assert all(state() is None for state in states) and weight.grad is None
        optimizer = MuonAdamW([dict(kind="muon", lr=0.1, params={"weight": weight})])
        states.extend(weakref.ref(state) for state in optimizer.buckets[0].state.values())

        def micro_step(rows):
            if rows > 4:
                raise torch.OutOfMemoryError("as if")
            loss = (torch.ones(rows, 4) @ weight).sum()
            loss.backward()
            return loss.detach()

        return micro_step, optimizer.step

    def release():
        weight.grad = None

    assert machine.benchmark(make_parts, [8, 4], CPU, alone, release=release)[0] == 4
    assert len(states) == 4 and all(state() is None for state in states) and weight.grad is None


def test_a_benchmark_without_headroom_may_fill_the_memory(alone, monkeypatch, no_gc):
    training = FakeTraining(monkeypatch)
    training.benchmark([8], alone, headroom=0.0)
    assert set(training.headroom) == {0.0}


def test_an_optimizer_that_does_not_fit_counts_as_too_large(alone, no_gc):
    def make_parts():
        raise torch.OutOfMemoryError("as if")

    with pytest.raises(DoesNotFit):
        machine.benchmark(make_parts, [2, 1], CPU, alone)


# -----------------------------------------------------------------------------
# Two real processes, connected as torchrun connects its own


def scenario(name, ranks):
    """make_parts for `benchmark`, on two ranks that differ."""
    second = ranks.rank == 1

    def micro_step(rows):
        if name == "one fails" and second:
            raise ValueError("no")
        if name == "one fails, one is full":
            raise torch.OutOfMemoryError("as if") if second else ValueError("no")
        if name == "one is full" and second and rows > 4:
            raise torch.OutOfMemoryError("as if")
        full = name == "one is full" and not second and rows > 2
        machine.lacks_headroom = lambda device, headroom: full and headroom > 0
        return rows

    def make_parts():
        if name == "no memory for the optimizer" and second:
            raise torch.OutOfMemoryError("as if")
        return micro_step, lambda loss: time.sleep(0.03 if second else 0.01)

    return make_parts


SCENARIOS = ("one is full", "one fails", "one fails, one is full", "no memory for the optimizer")


def two_ranks(ranks):
    """What both ranks do -> what this one found."""
    gc.freeze()  # for fast collections
    found = {"broadcast": ranks.broadcast({"of": [ranks.rank, None]})}
    found["all_reduce_max"] = ranks.all_reduce_max(ranks.rank, -ranks.rank, 0.5)
    tensor = torch.tensor([1.0, 10.0 * ranks.rank])
    found["all_reduce_sum"], found["in place"] = ranks.all_reduce_sum(tensor).tolist(), tensor.tolist()
    found["watch"] = list(ranks.watch([1, 2]))
    for name in SCENARIOS:
        try:
            found[name] = machine.benchmark(scenario(name, ranks), [8, 4, 2, 1], CPU, ranks)
        except (BenchmarkFailed, DoesNotFit) as error:
            found[name] = [type(error).__name__, type(error.__cause__).__name__]

    def out_of_memory():
        raise torch.OutOfMemoryError("within collective calls")

    if ranks.rank == 1:  # rank 0 would wait
        try:
            machine.attempt(out_of_memory, CPU, ranks, 0.05, collective=True)
        except torch.OutOfMemoryError as error:
            found["collective"] = str(error)
    return found


def process(rank, port, folder):
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        ranks, hook = machine.Ranks(), machine.ErrorHook(rank)
        ranks.connect(CPU)
        found = {"hook": sys.excepthook is hook, **two_ranks(ranks)}  # torch has not wrapped it
        ranks.disconnect()
        found["disconnected"] = not dist.is_initialized()
        (folder / f"{rank}.json").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.mark.slow
def test_two_ranks_communicate_and_what_one_cannot_do_none_does(tmp_path):
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
        assert found["broadcast"] == {"of": [0, None]}
        assert found["all_reduce_max"] == [1.0, 0.0, 0.5]
        assert found["all_reduce_sum"] == found["in place"] == [2.0, 10.0]
        assert found["watch"] == [1, 2] and found["hook"] and found["disconnected"]
        size, _, update_time = found["one is full"]
        assert size == 2 and 0.01 <= update_time < 0.03  # rank 0's time
        assert found["one fails, one is full"][0] == found["no memory for the optimizer"][0] == "DoesNotFit"
    assert both[0]["one is full"] == both[1]["one is full"]
    assert both[0]["one fails"] == ["BenchmarkFailed", "NoneType"]
    assert both[1]["one fails"] == ["BenchmarkFailed", "ValueError"]
    assert both[1]["collective"] == "within collective calls"  # raised as it is


# -----------------------------------------------------------------------------
# Separate processes with a fake torch, which records the environment when it is imported


FAKE_TORCH = """
import os
seen = dict(os.environ)
class OutOfMemoryError(Exception):
    pass
"""


@pytest.fixture
def bare(tmp_path):
    """bare(code, *before, **environment) runs code in another process, after the command `before`."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(FAKE_TORCH)
    (tmp_path / "torch" / "distributed.py").touch()

    def run(code, *before, **environment):
        env = {name: value for name, value in os.environ.items() if name not in SET}
        env |= {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPO))), **environment}
        command = [*before, sys.executable, "-c", code]
        hears = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        options = {"capture_output": True, "text": True, "timeout": 60, "preexec_fn": hears}
        return subprocess.run(command, cwd=tmp_path, env=env, **options)

    return run


ALLOCATOR, ALLOCATOR_TOO = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
EXPERIMENTAL = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
SET = ("GOMP_SPINCOUNT", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", ALLOCATOR, ALLOCATOR_TOO)
SET += (EXPERIMENTAL,)
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
def test_the_environment_is_set_before_torch_is_imported(bare, release, allocator):
    found = json.loads(bare(IMPORTING.format(release=release)).stdout)
    assert found.get(ALLOCATOR) == allocator
    assert found["GOMP_SPINCOUNT"] == "3000"
    assert found["TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"] == "1"


@pytest.mark.parametrize("release", ["6.8.0-45-generic", "5.15.153.1-microsoft-standard-WSL2"])
def test_variables_that_the_user_has_set_are_kept(bare, release):
    own = {ALLOCATOR: "max_split_size_mb:64", "GOMP_SPINCOUNT": "7"}
    found = json.loads(bare(IMPORTING.format(release=release), **own).stdout)
    assert {name: found[name] for name in own} == own


def test_the_build_for_amd_keeps_its_allocator_and_gets_its_attention_kernels(bare, tmp_path):
    (tmp_path / "torch" / "lib").mkdir()
    (tmp_path / "torch" / "lib" / "libtorch_hip.so").touch()
    for own in ({}, {"PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:64", EXPERIMENTAL: "0"}):
        found = json.loads(bare(IMPORTING.format(release="6.8.0-45-generic"), **own).stdout)
        assert ALLOCATOR not in found and found[EXPERIMENTAL] == own.get(EXPERIMENTAL, "1")


def test_the_newer_variable_of_the_allocator_is_kept_too(bare):
    own = {ALLOCATOR_TOO: "max_split_size_mb:64"}
    found = json.loads(bare(IMPORTING.format(release="6.8.0-45-generic"), **own).stdout)
    assert found[ALLOCATOR_TOO] == own[ALLOCATOR_TOO] and ALLOCATOR not in found


@pytest.mark.parametrize(
    "error, status, message",
    [
        ("machine.MachineError('a\\nb')", 2, "error: a\nb\n"),
        ("machine.torch.OutOfMemoryError()", 2, f"error: {TOO_SMALL}\n"),
        ("KeyboardInterrupt", 130, ""),
        ("ValueError('no')", 1, "ValueError: no\n"),
    ],
)
def test_the_exit_status_of_a_process_with_the_hook(bare, error, status, message):
    code = f"import machine; machine.ErrorHook().clean_up.append(lambda error: print('clean')); raise {error}"
    done = bare(code)
    assert (done.returncode, done.stdout) == (status, "clean\n")
    assert done.stderr.endswith(message) and (status == 1) == ("Traceback" in done.stderr)


def test_a_hang_prints_the_stack_and_ends(bare):
    code = """
import time, machine
machine.HANG_SECONDS, ranks = 0.8, machine.Ranks()
for item in ranks.watch(range(3)):
    time.sleep(0.3)  # shorter than the limit
def hang():
    time.sleep(60)
hang()
"""
    begin = time.monotonic()
    done = bare(code, RANK="1", WORLD_SIZE="2", **ADDRESS)
    assert done.returncode == 1 and time.monotonic() - begin < 30
    assert "in hang" in done.stderr


# -----------------------------------------------------------------------------
# Signals


@pytest.fixture
def handlers():
    """Restores the handlers after the test; meanwhile no signal can end the tests."""
    numbers = (*machine.STOPPING, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU]
)
def test_a_signal_requests_a_stop(handlers, number):
    signals = machine.Signals()
    assert (signals.stop, signals.save) == (0, False)
    signal.raise_signal(number)
    assert (signals.stop, signals.save) == (number, False)


def test_a_signal_requests_a_save(handlers):
    signals = machine.Signals()
    signal.raise_signal(signal.SIGUSR1)
    assert (signals.stop, signals.save) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_only_the_first_ctrl_c_is_recorded(handlers, number):
    machine.Signals()
    signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(number) != signal.SIG_DFL  # a scheduler may send it twice
    signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == signal.SIG_DFL


ORPHAN = """
import os, subprocess, sys, time
code = "import machine, time; signals = machine.Signals(); print(signals.stop, flush=True); time.sleep(1); "
code += "print(int(signals.stop), flush=True)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
os.write(1, child.stdout.readline())
if os.fork() > 0:
    os._exit(0)  # the parent dies; its copy prints what the child prints
os.write(1, child.stdout.readline())
"""


def test_only_ranks_that_torchrun_has_left_alone_stop(bare):
    sigterm = int(signal.SIGTERM)
    assert bare(ORPHAN, TORCHELASTIC_RUN_ID="none").stdout.split() == ["0", str(sigterm)]
    assert bare(ORPHAN).stdout.split() == ["0", "0"]  # as when the shell of a run under nohup ends


def test_a_rank_that_torchrun_has_left_alone_does_not_wait_for_others(alone, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(machine, "PARENT", os.getppid() + 1)
    with pytest.raises(MachineError, match="^torchrun has ended.*\nStart it again.$"):
        alone.connect(CPU)


RECORDED = """
import os, signal, machine
os.kill(os.getpid(), signal.SIGUSR1)  # ignored: there is nothing to save yet
signals = machine.Signals()
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
    os.kill(os.getpid(), number)
    print(signals.stop, signals.save, flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("still there")
"""


def test_a_closed_terminal_stops_a_run_but_not_under_nohup(bare):
    sighup, sigint = int(signal.SIGHUP), int(signal.SIGINT)
    done = bare(RECORDED)
    assert done.returncode == -sigint  # the second Ctrl-C
    assert done.stdout.splitlines() == [f"{sighup} False", f"{sighup} True", f"{sigint} True"]
    done = bare(RECORDED, "nohup")
    assert done.returncode == -sigint
    assert done.stdout.splitlines() == ["0 False", "0 True", f"{sigint} True"]


@pytest.fixture
def noexec(tmp_path):
    """A temporary folder from which nothing can be executed."""
    folder = tmp_path / "noexec"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", str(folder)]).returncode:
        pytest.skip("cannot mount a folder here")
    yield folder
    subprocess.run(["umount", str(folder)])


FALLBACK = """
import os, tempfile, machine
machine.set_fallback_temporary_folder("the run")
print(tempfile.gettempdir(), os.environ.get("TMPDIR"))
"""


def test_compiled_code_is_not_written_where_it_cannot_be_loaded(bare, noexec, tmp_path):
    assert bare(FALLBACK, TMPDIR=str(tmp_path)).stdout == f"{tmp_path} {tmp_path}\n"
    assert bare(FALLBACK, TMPDIR=str(noexec)).stdout == "the run the run\n"


def test_on_windows_two_lines_recommend_wsl():
    code = (
        "import sys, runpy; sys.platform, sys.modules['resource'] = 'win32', None; sys.argv = ['train.py']\n"
    )
    code += "runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 2 and "WSL" in done.stderr
