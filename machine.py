"""
What a run runs on: the device and its speed, the ranks that train together, the signals that people and
schedulers send, and the clock that ends a hang.
"""

import sys

if sys.platform == "win32":  # there are no such signals, and no module `resource`
    print("error: this does not run on Windows.\nRun it in WSL, the Linux in Windows.", file=sys.stderr)
    sys.exit(2)

import ctypes
import faulthandler
import math
import os
import platform
import re
import resource
import signal
import statistics
import tempfile
import time
from datetime import timedelta

# What torch and its libraries read as they are imported; what a user has set stays
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # threads that spin for long slow a shared CPU many times
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")  # for quick warm starts
# less fragmentation; but some drivers under WSL2 crash on it, and this name would outdo the newer one
if "microsoft" not in platform.uname().release.lower() and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # "save": until there is something, it asks for nothing

import torch
import torch.distributed as dist

HANG_SECONDS = 600  # a window, a validation batch or a collective that takes longer ends the run
# dense bf16 TFLOP/s, as published, by the words of a GPU's name without maker, brand and gigabytes: any
# other word (Laptop, Ti, D, MIG) makes it another chip. What is not here is measured
PUBLISHED_PEAKS = {
    "GB200": 2500, "B200": 2250, "RTX 5090": 209.5,
    "GH200": 989, "H200": 989, "H100 HBM3": 989, "H100 PCIE": 756, "H100 NVL": 835,
    "L40S": 362, "L4": 121, "RTX 4090": 165.2,
    "A100 SXM4": 312, "A100 PCIE": 312, "RTX 3090": 71,
}  # fmt: skip


class MachineError(Exception):
    """Something that this machine cannot do; the message says what and what to do, in two lines."""


# -----------------------------------------------------------------------------
# The device


def find_device(wanted=None, local_rank=0, world_size=1):
    """
    -> the torch.device of this rank: `wanted` (cuda, mps or cpu) or the first of them that is there, made
    ready for training. MachineError if it is not to be had.
    """
    there = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    found = next(name for name in there if there[name].is_available())
    kind = wanted or found
    if kind not in there:
        raise MachineError(f"--device-type {kind} is unknown.\nChoose one of: {', '.join(there)}.")
    if not there[kind].is_available():
        raise MachineError(f"--device-type {kind}: not to be had on this machine.\nHere there is {found}.")
    if kind == "mps" and world_size > 1:
        raise MachineError("several processes cannot share one MPS device.\nStart one, without torchrun.")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise MachineError(f"there are more processes than GPUs.\nGive --nproc_per_node={count}.")
        check_kernels(torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list())
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda", local_rank)
    if kind == "cpu":
        prepare_cpu()
    return torch.device(kind)


def check_kernels(capability, architectures):
    """
    MachineError if this build of PyTorch cannot run on a GPU of that capability, (7, 0) or the like. Its
    `architectures`: machine code, "sm_80", runs on later minors of its major too, "compute_90" on all later.
    """
    pattern = re.compile(r"(sm|compute)_(\d+)(\d)")  # of "sm_90a" as of "sm_90"
    built = [(kind, (int(x), int(y))) for kind, x, y in pattern.findall(" ".join(architectures))]
    for kind, version in built:
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    if built:  # AMD's GPUs have other names
        older = capability < min(version for _, version in built)
        advice = "Install its build for CUDA 12.6, cu126." if older else "Install a newer PyTorch."
        gpu = "GPU of capability {}.{}".format(*capability)
        raise MachineError(f"PyTorch {torch.__version__} has no kernels for a {gpu}.\n{advice}")


def prepare_cpu():
    """Make the CPU repeat a run bit for bit, and let freed memory be used again without page faults."""
    # else threads add up an embedding's gradients as they come. torch.use_deterministic_algorithms does the
    # same, but it imports the compiler, which takes a second
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging only, and not free
    # glibc gives freed memory back to the system, and getting it again costs page faults: 10% of a step
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_trim_threshold, 2**30)
        mallopt(m_top_pad, 2**26)
        mallopt(m_mmap_threshold, 2**30)


def find_dtype(device, wanted=None):
    """-> the torch.dtype of activations: `wanted`, else bfloat16 where the hardware has it, or float32."""
    if wanted not in (None, "bfloat16", "float32"):
        raise MachineError(f"--dtype {wanted} is unknown.\nChoose one of: bfloat16, float32.")
    if wanted == "bfloat16" and device.type == "mps":
        what = "--dtype bfloat16: Metal's causal attention leaks later tokens in half precision"
        raise MachineError(f"{what}.\nLeave it out.")
    return getattr(torch, wanted or ("bfloat16" if has_fast_bf16(device) else "float32"))


def has_fast_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware; where it is emulated, fp32 is much faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(units.get(name) for name in ("avx512_bf16", "amx_bf16"))


def check_sums(device, length):
    """MachineError if matrix products that sum `length` terms are wrong on this device, an M1 or M2."""
    if device.type == "mps" and length > 32_000 and re.search(r"\bM[12]\b", device_name(device)):
        what = f"Metal sums more than 32,766 products wrongly, and here they are {length:,}"
        raise MachineError(f"{what}.\nGive a smaller vocabulary or --device-batch-size.")


def device_name(device):
    """The name of the GPU or of the CPU, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    commands = {
        "darwin": "sysctl -n machdep.cpu.brand_string",
        "linux": "grep -m 1 '^model name' /proc/cpuinfo | cut -d : -f 2",
    }
    name = os.popen(commands.get(sys.platform, "")).read().strip()
    name = name or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def synchronizer(device):
    """The function that waits until the device has done its work; on CPU work is already synchronous."""
    return torch.get_device_module(device).synchronize


def find_peak(device, dtype, given_tflops=None):
    """-> (peak FLOP/s of one device in the training dtype, "given", "published" or "measured")."""
    if given_tflops:
        return given_tflops * 1e12, "given"
    words = re.findall(r"[A-Z0-9.]+", device_name(device).upper())
    name = " ".join(word for word in words if not re.fullmatch(r"NVIDIA|GEFORCE|\d+GB?", word))
    if device.type == "cuda" and dtype == torch.bfloat16 and name in PUBLISHED_PEAKS:
        return PUBLISHED_PEAKS[name] * 1e12, "published"
    return measured_peak(device, dtype), "measured"


def measured_peak(device, dtype):
    """FLOP/s of a product of random matrices on this device: the median of 5, of the largest in 2 s."""
    synchronize, begin = synchronizer(device), time.perf_counter()
    for n in (256, 512, 1024, 2048, 4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(6):
            synchronize()
            start = time.perf_counter()
            torch.mm(a, b)
            synchronize()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1:])  # the first one loads the kernel
        if time.perf_counter() - begin + 6 * 8 * seconds > 2:  # the next size takes 8 times as long
            break
    return 2 * n**3 / seconds


def is_out_of_memory(error):
    """Whether an exception means that the device's memory does not do, in Metal's and a CPU's words too."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    told = any(word in str(error) for word in words)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or told


def use_instead_of_no_temporary_folder(folder):
    """Where no temporary folder can be written to, have torch.compile and others use this one."""
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def free_memory(device):
    """Bytes of a GPU that this process can have; of other devices that is unknown, infinity."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def is_crowded(device, spare=0.05):
    """Whether the work so far has left less than this share of a GPU's memory: too little for hours."""
    if device.type != "cuda":
        return False
    return torch.cuda.max_memory_reserved() > (1 - spare) * torch.cuda.mem_get_info()[1]


def forget_memory(device):
    """Give unused memory back to the GPU, and let its peak count from now on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device):
    """Bytes at the peak: CUDA's allocator; on MPS the driver's allocation now; on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -----------------------------------------------------------------------------
# The ranks


class Ranks:
    """
    The processes that train together, as torchrun numbers them: rank, local_rank, world_size. `first`,
    `agree` and `total` are collective calls; of a process alone they return what they were given.
    """

    def __init__(self):
        self.rank, self.local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))

    def start(self, device):
        """Connect the ranks; the calls below need it."""
        self.device = device
        if self.world_size > 1:
            on_gpu, hook = device.type == "cuda", sys.excepthook
            options = {"device_id": device if on_gpu else None, "timeout": timedelta(seconds=HANG_SECONDS)}
            dist.init_process_group("nccl" if on_gpu else "gloo", **options)
            sys.excepthook = hook  # torch wraps it, and loses what it prints if it exits

    def first(self, value):
        """Rank 0's value, of any plain type, on every rank: all plan with one clock and one disk."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def agree(self, *numbers):
        """Of each number the largest that any rank has, as a list, of floats if there are several ranks."""
        if self.world_size == 1:
            return list(numbers)
        largest = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def total(self, tensor):
        """The sum of the ranks' tensors, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def heartbeat(self):
        """From now on HANG_SECONDS may pass until the next call; then each rank shows its stacks and ends."""
        if self.world_size > 1:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)

    def watch(self, items):
        """The items, with a heartbeat before each."""
        for item in items:
            self.heartbeat()
            yield item

    def end(self):
        """Part: from now on no rank waits for another one."""
        faulthandler.cancel_dump_traceback_later()
        if self.world_size > 1:
            dist.destroy_process_group()


FITS, FAILS, TOO_LARGE = 0, 1, 2  # outcomes of an attempt, from good to bad


def attempt(work, device, ranks, spare, collective=False):
    """
    work() on every rank -> (FITS, FAILS or TOO_LARGE for the device's memory, with that share of it to spare;
    seconds; the error or None). What one rank cannot do, none does: the outcome is the worst of all ranks. If
    work holds collective calls, memory that ends on one of several ranks is no outcome, for the others wait.
    """
    outcome, error, begin = FITS, None, time.perf_counter()
    try:
        work()
        synchronizer(device)()
        outcome = TOO_LARGE if is_crowded(device, spare) else FITS
    except Exception as failure:
        if is_out_of_memory(failure) and collective and ranks.world_size > 1:
            raise
        outcome, error = TOO_LARGE if is_out_of_memory(failure) else FAILS, failure
    seconds = time.perf_counter() - begin
    return int(*ranks.agree(outcome)), seconds, error


# -----------------------------------------------------------------------------
# Signals


class Signals:
    """
    What signals ask of this rank: `stop`, the number of the SIGINT, SIGTERM or SIGHUP that came, and `save`,
    whether SIGUSR1 came. They are only noted: all ranks act on them together, at the end of a window.
    """

    def __init__(self):
        self.stop, self.save = 0, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has its way
                signal.signal(number, self.note)

    def note(self, number, frame):
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.stop = number
        if number == signal.SIGINT:  # a second Ctrl-C, SIGTERM by way of torchrun, stops at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
