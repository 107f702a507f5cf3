"""
The machine that a run uses: how errors end the process, the device with its speed and memory, the ranks that
train together, the largest micro-batch that fits, and signals.
"""

import sys

if sys.platform == "win32":  # it has no SIGUSR1, no SIGHUP and no module `resource`
    print("error: onedial does not run on Windows.\nRun it in WSL, Windows' own Linux.", file=sys.stderr)
    sys.exit(2)

import contextlib
import ctypes
import faulthandler
import gc
import importlib.util
import math
import os
import platform
import re
import resource
import signal
import statistics
import tempfile
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

# Variables that torch and its libraries read when they are imported. Values that the user has set are kept
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # OpenMP threads that spin longer slow down a shared CPU
# lets the compile cache keep graphs with our autograd functions, so that later starts compile faster
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
# PyTorch calls its attention kernels for RX 7900 and RX 9070 experimental; the others take quadratic memory
os.environ.setdefault("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")
# Less fragmentation. Not under WSL2, where some drivers crash with it; not in PyTorch's build for AMD (ROCm),
# which hangs or crashes with it (pytorch issues 187343 and 192259); and not if the user has set the newer
# variable, because torch prefers this one
torch_folder = Path(importlib.util.find_spec("torch").origin).parent
is_rocm = (torch_folder / "lib" / "libtorch_hip.so").exists()
is_wsl = "microsoft" in platform.uname().release.lower()
if not is_wsl and not is_rocm and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
PARENT = os.getppid()  # torchrun, if it has started this process
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it requests a save; before training there is nothing to save

import torch
import torch.distributed as dist

HANG_SECONDS = 600  # a log interval, a validation batch or a collective that takes longer ends the run
# GPU name without maker, brand and memory size -> published dense bf16 and fp16 TFLOP/s. The name must be
# equal: another word in it (Laptop, Ti, D, MIG) means another chip. The peak of all other GPUs is measured
PUBLISHED_PEAKS = {
    "GB200": 2500, "B200": 2250, "RTX 5090": 209.5,
    "GH200": 989, "H200": 989, "H100 HBM3": 989, "H100 PCIE": 756, "H100 NVL": 835,
    "L40S": 362, "L4": 121, "RTX 4090": 165.2,
    "A100 SXM4": 312, "A100 PCIE": 312, "RTX 3090": 71,
    # AMD. An MI250X or MI250 is two devices, and each has half of its peak
    "MI355X": 2516.6, "MI350X": 2306.9, "MI325X": 1307.4, "MI300X": 1307.4, "MI300A": 980.6,
    "MI250X": 191.5, "MI250": 181, "MI210": 181, "RX 7900 XTX": 122.8, "RX 7900 XT": 103,
}  # fmt: skip
MAKERS = r"NVIDIA|GEFORCE|AMD|INSTINCT|RADEON|OAM|\d+GB?"  # words that say nothing about the chip
# AMD's architectures that multiply bf16 matrices in hardware: MI100 and later, RX 7000, RX 9000
AMD_BF16 = re.compile(r"gfx(908|90a|94\d|95\d|11\d\d|12\d\d)")


# -----------------------------------------------------------------------------
# Errors


class MachineError(Exception):
    """This machine cannot do what was asked. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


# These stop a run: Ctrl-C, a batch system or `kill`, a closed terminal, submitit, the limit of CPU time
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)


def handle(numbers, handler):
    """Install a signal handler, but leave SIGHUP ignored under nohup."""
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Interrupted(KeyboardInterrupt):
    """A signal of STOPPING before the training loop, where Signals takes over; its argument is the number."""


class ErrorHook:
    """
    Installs itself as sys.excepthook. User-fixable errors (with an attribute `exit_status`, or out of memory)
    print their two lines and exit with that status; signals of STOPPING exit with 128 + their number; all
    other errors print a traceback and exit with 1. Before that, each function in the list `clean_up` is
    called with the error.
    """

    def __init__(self, rank=0):
        self.rank, self.clean_up = rank, []
        sys.excepthook = self
        handle(STOPPING, self.interrupt)

    def interrupt(self, number, frame):
        """Signal handler."""
        raise Interrupted(number)

    def __call__(self, kind, error, trace):
        if is_out_of_memory(error):
            advice = "Try a smaller --depth or --device-batch-size."
            error = MachineError(f"the device has too little memory.\n{advice}")
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            advice = "Raise the limit of processes (ulimit -u) or of memory (ulimit -v)."
            error = MachineError(f"the system starts no more threads.\n{advice}")
        for function in self.clean_up:
            try:
                function(error)
            except Exception:  # the error itself must still be printed
                traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            sys.exit(128 + (error.args[0] if isinstance(error, Interrupted) else signal.SIGINT))
        status = getattr(error, "exit_status", None)
        if status is None:
            sys.__excepthook__(kind, error, trace)
            sys.exit(1)
        if self.rank > 0:  # if rank 0 has the same error, it prints first and torchrun ends this process
            time.sleep(2)
        print(f"error: {error}", file=sys.stderr, flush=True)
        if "WORLD_SIZE" in os.environ:  # an orderly exit may abort: threads of the connection still run
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)


def is_out_of_memory(error):
    """Whether an exception means that memory ran out on a GPU, on MPS or on the CPU."""
    messages = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    found = any(message in str(error) for message in messages)
    return found or isinstance(error, (torch.OutOfMemoryError, MemoryError))


# -----------------------------------------------------------------------------
# The device


def find_device(wanted=None, local_rank=0, world_size=1):
    """
    -> the torch.device of this rank, prepared for training: `wanted` (cuda, mps or cpu), or the first of
    these that is available. MachineError if that device cannot be used.

    What MPS computes wrong (torch 2.13) is avoided in find_dtype, check_matmul_length, MuonAdamW.step and the
    evaluation in train.py. It has all other operators of a training step.
    """
    kinds = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    available = [name for name in kinds if kinds[name].is_available()]
    kind = wanted or available[0]
    if kind not in kinds:
        raise MachineError(f"--device-type {kind} is unknown.\nChoose one of: {', '.join(kinds)}.")
    if kind not in available:
        advice = f"Choose one of: {', '.join(available)}."
        raise MachineError(f"--device-type {kind} is not available on this machine.\n{advice}")
    if kind == "mps" and world_size > 1:
        raise MachineError("several processes cannot share one MPS device.\nStart one, without torchrun.")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise MachineError(f"there are more processes than GPUs.\nUse --nproc_per_node={count}.")
        capability = torch.cuda.get_device_capability(local_rank)
        check_kernels(capability, torch.cuda.get_arch_list(), amd_architecture(local_rank))
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums may overflow
        return torch.device("cuda", local_rank)
    if kind == "cpu":
        prepare_cpu()
    return torch.device(kind)


def amd_architecture(device):
    """
    The name of an AMD GPU's architecture, such as "gfx942", or "" for other GPUs. PyTorch's build for AMD
    calls its devices cuda, and their "capability" is the number in that name: (10, 3) has no bf16.
    """
    if not torch.version.hip:
        return ""
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]  # "gfx90a:sramecc+:xnack-"


def check_kernels(capability, architectures, amd=""):
    """
    MachineError if this build of PyTorch cannot run on a GPU of compute `capability`, for example (7, 0).
    architectures: what it was built for. Machine code ("sm_80") also runs on later minor versions of the same
    major version (8.9); PTX ("compute_90") runs on every later version. amd: as from amd_architecture.
    """
    if amd and architectures and amd not in architectures:
        what = f"PyTorch {torch.__version__} has no kernels for a GPU of architecture {amd}"
        advice = "Set HSA_OVERRIDE_GFX_VERSION to a relative in its list, such as 10.3.0 for gfx1030"
        raise MachineError(f"{what}.\n{advice}: {', '.join(architectures)}.")
    pattern = re.compile(r"(sm|compute)_(\d+)(\d)")  # major and minor of "sm_90" and "sm_90a"
    built = [(kind, (int(x), int(y))) for kind, x, y in pattern.findall(" ".join(architectures))]
    for kind, version in built:
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    if built:  # empty for AMD GPUs, whose architectures have other names
        older = capability < min(version for _, version in built)
        advice = "Install a newer PyTorch."
        if older:
            version = torch.__version__.split("+")[0]
            advice = f"Install its build for CUDA 12.6: uv pip install torch=={version} --torch-backend cu126"
        gpu = "GPU of compute capability {}.{}".format(*capability)
        raise MachineError(f"PyTorch {torch.__version__} has no kernels for a {gpu}.\n{advice}")


def prepare_cpu():
    """Make runs on a CPU repeat bit for bit, and let the process reuse freed memory without page faults."""
    # Without this, threads add up an embedding's gradients in any order. torch.use_deterministic_algorithms
    # does the same, but imports the compiler, which takes a second
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # only for debugging, and slow
    # glibc returns freed memory to the system, and the page faults of getting it back take 10% of a step
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, size in ((-1, 2**30), (-2, 2**26), (-3, 2**30)):
            mallopt(parameter, size)  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def find_dtype(device, wanted=None):
    """
    -> the torch.dtype of activations: `wanted`, or bfloat16 where the hardware multiplies it fast, or float16
    where it multiplies that fast, or float32.
    """
    if wanted not in (None, "bfloat16", "float16", "float32"):
        raise MachineError(f"--dtype {wanted} is unknown.\nChoose one of: bfloat16, float16, float32.")
    if wanted in ("bfloat16", "float16") and device.type == "mps":
        raise MachineError(f"--dtype {wanted}: causal attention on MPS then sees later tokens.\nUse float32.")
    fastest = "bfloat16" if has_fast_bf16(device) else "float16" if has_fast_fp16(device) else "float32"
    return getattr(torch, wanted or fastest)


def has_fast_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware. Where it emulates them, fp32 is faster."""
    if device.type == "cuda" and torch.version.hip:
        return bool(AMD_BF16.fullmatch(amd_architecture(device)))
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(units.get(name) for name in ("avx512_bf16", "amx_bf16"))


def has_fast_fp16(device):
    """Whether a GPU without bf16 multiplies fp16 matrices fast: NVIDIA's V100, T4, RTX 20."""
    if device.type != "cuda" or torch.version.hip:  # AMD's without bf16 gain at most a factor of 2
        return False
    return torch.cuda.get_device_capability(device) in ((7, 0), (7, 2), (7, 5))


def check_matmul_length(device, length):
    """
    MachineError if the device (an M1 or M2) gets matrix products of inner dimension `length` wrong: all from
    32,767 on (pytorch issue 195163). Batched products, too, and those also in torch 2.14.
    """
    if device.type == "mps" and length > 32_000 and re.search(r"\bM[12]\b", device_name(device)):
        what = f"an M1 or M2 gets matrix products of inner dimension {length:,} wrong, and all above 32,000"
        raise MachineError(f"{what}.\nUse a smaller --vocab-size or --device-batch-size.")


def device_name(device):
    """The name of the GPU, or of the CPU with the number of threads, as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = ""
    with contextlib.suppress(OSError):  # there may be no /proc, and no process left to start
        if sys.platform == "darwin":
            name = os.popen("sysctl -n machdep.cpu.brand_string").read()
        if sys.platform == "linux":
            found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            name = found[1] if found else ""
    name = name.strip() or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def synchronizer(device):
    """-> a function that waits until the device has finished its work (on a CPU it returns at once)."""
    return torch.get_device_module(device).synchronize


def find_peak_flops(device, dtype, given_tflops=None):
    """-> (peak FLOP/s of one device for matrix products in `dtype`, "given", "published" or "measured")."""
    if given_tflops:
        return given_tflops * 1e12, "given"
    words = re.findall(r"[A-Z0-9.]+", device_name(device).upper())
    name = " ".join(word for word in words if not re.fullmatch(MAKERS, word))
    half = dtype in (torch.bfloat16, torch.float16)  # the same peak for both
    if device.type == "cuda" and half and name in PUBLISHED_PEAKS:
        return PUBLISHED_PEAKS[name] * 1e12, "published"
    return measure_peak_flops(device, dtype), "measured"


def measure_peak_flops(device, dtype):
    """FLOP/s of a product of random n × n matrices: the median of 5, for the largest n that 2 s allow."""
    begin = time.perf_counter()
    for n in (256, 512, 1024, 2048, 4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = statistics.median(timings(partial(torch.mm, a, b), device, 6)[1:])
        if time.perf_counter() - begin + 6 * 8 * seconds > 2:  # the next size takes 8 times as long
            break
    return 2 * n**3 / seconds


def timings(work, device, count):
    """Call work() `count` times -> the seconds of each call. The first call may also load kernels."""
    synchronize, times = synchronizer(device), []
    for _ in range(count):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def set_fallback_temporary_folder(folder):
    """
    Let torch.compile and others write temporary files to `folder` if no temporary folder is writable, or it
    has the mount option noexec: torch.compile could not load what it has compiled.
    """
    try:
        usable = not os.statvfs(tempfile.gettempdir()).f_flag & getattr(os, "ST_NOEXEC", 0)  # not on macOS
    except OSError:
        usable = False
    if not usable:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def free_memory(device):
    """Bytes of a GPU's memory that this process can use; infinity for other devices, where it is unknown."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def lacks_headroom(device, headroom):
    """Whether at the peak less than `headroom`, a share of a GPU's memory, was left. Other devices: False."""
    if device.type != "cuda":
        return False
    return torch.cuda.max_memory_reserved() > (1 - headroom) * torch.cuda.mem_get_info()[1]


def reset_memory(device):
    """Return unused memory to the device, and start to measure the peak again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device):
    """Peak bytes of CUDA's allocator; of the process on a CPU; on MPS what the driver has allocated now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -----------------------------------------------------------------------------
# The ranks


def read_ranks(environment):
    """
    torchrun's variables -> ((rank, local_rank, world_size), a line on each variable that is ignored). Whoever
    launches several processes sets both RANK and WORLD_SIZE; a process that has only one of them, left over
    from something else, trains alone. MachineError if the variables contradict each other.
    """
    found = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    missing = [name for name in ("RANK", "WORLD_SIZE") if not found[name]]
    if missing:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        ignored = [f"{name}={value}" for name, value in found.items() if value not in (None, "", alone[name])]
        why = f"without {missing[0]}, this process trains alone"
        return (0, 0, 1), [f"{variable} is ignored: {why}" for variable in ignored]
    advice = "Start the processes with torchrun, or unset RANK and WORLD_SIZE to train alone."
    if not re.fullmatch(r"[1-9]\d*", found["WORLD_SIZE"]):
        raise MachineError(f"WORLD_SIZE={found['WORLD_SIZE']} is not a number of processes.\n{advice}")
    world_size = int(found["WORLD_SIZE"])
    for name in ("RANK", "LOCAL_RANK"):
        value = found[name] or "0"
        if not re.fullmatch(r"\d+", value) or int(value) >= world_size:
            raise MachineError(f"{name}={value} is not a number from 0 to {world_size - 1}.\n{advice}")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                what = f"RANK={found['RANK']} of WORLD_SIZE={world_size} needs {name}, which is not set"
                raise MachineError(f"{what}.\n{advice}")
    return (int(found["RANK"]), int(found["LOCAL_RANK"] or 0), world_size), []


class Ranks:
    """
    The processes that train together, numbered by torchrun: rank, local_rank, world_size. broadcast,
    all_gather, all_reduce_max and all_reduce_sum are collective calls; a single process gets its own values.
    warnings: a line on each variable that is ignored. MachineError if the variables contradict each other.
    """

    def __init__(self):
        (self.rank, self.local_rank, self.world_size), self.warnings = read_ranks(os.environ)
        self.per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size)

    def connect(self, device):
        """Connect the ranks, by NCCL on GPUs and by gloo on CPUs. Call it before any collective call."""
        self.device = device
        if is_orphan():  # it would wait for torchrun's address for ten minutes
            raise MachineError("torchrun has ended, and with it the run.\nStart it again.")
        if self.world_size > 1:
            on_gpu, hook = device.type == "cuda", sys.excepthook
            options = {"device_id": device if on_gpu else None, "timeout": timedelta(seconds=HANG_SECONDS)}
            dist.init_process_group("nccl" if on_gpu else "gloo", **options)
            sys.excepthook = hook  # torch has wrapped it, and loses its output if the hook exits

    def broadcast(self, value):
        """-> rank 0's value, any object that can be pickled, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def all_gather(self, value):
        """-> the values of all ranks, any objects that can be pickled, as a list."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_tensors(self, tensors):
        """Overwrite tensors with those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def all_reduce_max(self, *numbers):
        """-> for each number its maximum over the ranks, as a list (floats if there are several ranks)."""
        if self.world_size == 1:
            return list(numbers)
        largest = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def all_reduce_sum(self, tensor):
        """Sum a tensor over the ranks, in place -> the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def launcher(self):
        """The start of a command line that starts as many processes, on each of as many nodes."""
        nodes = self.world_size // self.per_node
        if self.world_size == 1:
            return "python"
        where = "--standalone"
        if nodes > 1:
            where = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
        return f"torchrun {where} --nproc_per_node={self.per_node}"

    def heartbeat(self):
        """If several ranks do not call this for HANG_SECONDS, they print their threads' stacks and exit."""
        if self.world_size > 1:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)

    def watch(self, items):
        """Yield the items, with a heartbeat before each."""
        for item in items:
            self.heartbeat()
            yield item

    def disconnect(self):
        """End the watchdog and the connection: from now on no rank waits for another one."""
        faulthandler.cancel_dump_traceback_later()
        if self.world_size > 1:
            dist.destroy_process_group()


# -----------------------------------------------------------------------------
# The benchmark: the largest micro-batch that fits, and its speed


class DoesNotFit(MachineError):
    """The training step does not fit in the device's memory with any of the micro-batch sizes."""


class BenchmarkFailed(Exception):
    """The training step failed on some rank. `__cause__` is the error of this rank, or None."""


def benchmark(make_parts, sizes, device, ranks, headroom=0.05, release=lambda: None):
    """
    Find the first micro-batch size that fits on every rank, and time the training step with it
    -> (size, micro_step_time, update_time): the times in seconds; rank 0's, broadcast.
    All ranks raise DoesNotFit or BenchmarkFailed together. Such an exception keeps the optimizer alive: leave
    the `except` block before the next benchmark. Otherwise nothing of the benchmark stays in memory.

    make_parts() -> (micro_step, update) creates the optimizer; called once per size. micro_step(size) runs
    forward and backward -> the detached loss. update(loss) is the optimizer's step. sizes: what micro_step
    takes, the fastest first, such as rows, descending.
    headroom: share of a GPU's memory that must stay free. release() frees the gradients after each size.
    """
    gc.collect()  # an earlier benchmark that failed
    for size in sizes:
        try:
            return ranks.broadcast((size, *time_rounds(make_parts, size, device, ranks, headroom)))
        except DoesNotFit:
            if size == sizes[-1]:
                raise
        finally:
            release()
            gc.collect()
            reset_memory(device)


def time_rounds(make_parts, size, device, ranks, headroom):
    """Run micro_step and update once as warm-up and three times -> their shortest times in seconds."""
    (micro_step, update), _ = attempt(make_parts, device, ranks, 0.0)
    times = []
    for round in range(4):
        needed = headroom if round > 0 else 0.0  # while torch.compile tunes, it needs memory of its own
        loss, micro_step_time = attempt(partial(micro_step, size), device, ranks, needed)
        # gradients are kept: memory peaks when a backward pass accumulates into existing ones
        _, update_time = attempt(partial(update, loss), device, ranks, needed, collective=True)
        times.append((micro_step_time, update_time))
        if round == 0:
            reset_memory(device)
    return [min(seconds) for seconds in zip(*times[1:])]


def attempt(work, device, ranks, headroom, collective=False):
    """
    Run work() on every rank -> (its result, seconds). All ranks raise DoesNotFit if one runs out of memory or
    has less than `headroom` left, or BenchmarkFailed if work() fails on one. `collective`: work() contains
    collective calls; there a rank that runs out of memory raises that error, because the others wait for it.
    """
    result = error = None
    begin = time.perf_counter()
    try:
        result = work()
        synchronizer(device)()
    except Exception as caught:
        if collective and ranks.world_size > 1 and is_out_of_memory(caught):
            raise
        error = caught
    seconds = time.perf_counter() - begin
    too_large = is_out_of_memory(error) if error else lacks_headroom(device, headroom)
    too_large, failed = ranks.all_reduce_max(too_large, error is not None)
    if too_large:
        raise DoesNotFit("the training step does not fit in memory.\nTry a smaller model or batch.")
    if failed:
        raise BenchmarkFailed("the training step failed on this rank or another one") from error
    return result, seconds


# -----------------------------------------------------------------------------
# Signals


class Signals:
    """
    Records which signals have arrived: `stop` is the number of the latest one of STOPPING, or 0; `save` is
    True after SIGUSR1. At the end of a log interval all ranks act on them together.
    """

    def __init__(self):
        self.stopped_by, self.save = 0, False
        handle((*STOPPING, signal.SIGUSR1), self.record)

    @property
    def stop(self):
        """The number of a signal, or 0. A rank whose torchrun has died stops as if it had got SIGTERM."""
        return self.stopped_by or (signal.SIGTERM if is_orphan() else 0)

    def record(self, number, frame):
        """Signal handler."""
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.stopped_by = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; torchrun sends it as SIGTERM
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_orphan():
    """Whether torchrun, which started this process, has died: killed, or by a signal such as SIGUSR1."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
