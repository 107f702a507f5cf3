"""
A run's folder and its checkpoints. Killing the process at any moment never damages a good checkpoint.

A checkpoint is a folder step_000200 with model.pt, optimizer.pt, state.json, and manifest.json with the size
and sha256 of each file. It is written under a temporary name, synced to disk, and renamed when complete.
A folder best_000150 contains only the weights with the lowest val_bpb, if the text is read more than once.
"""

import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch


class CheckpointError(Exception):
    """Unusable run folder or checkpoint. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


# -----------------------------------------------------------------------------
# The run's folder


class RunFolder:
    """The folder of one run. `is_new`: created by this process."""

    def __init__(self, path, is_new=False):
        self.path, self.is_new, self.lock = Path(path), is_new, None
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def create(cls, out_dir, name=None):
        """
        Create the folder of a new run with a single mkdir, so that two processes never get the same one. The
        default name is <date>-<time>, then -2, -3 …. CheckpointError if it exists or cannot be created.
        """
        check_name(name)
        base = name or f"{datetime.now():%Y%m%d-%H%M%S}"
        for number in itertools.count(1):
            path = out_dir / (base if number == 1 else f"{base}-{number}")
            try:
                path.mkdir(parents=True)
                return cls(path, is_new=True)
            except FileExistsError:
                if name:
                    advice = "Continue it with --resume, or choose another --run-name."
                    raise CheckpointError(f"the run {path} already exists.\n{advice}") from None
            except OSError as error:
                advice = "Choose another --out-dir or --run-name."
                raise CheckpointError(f"cannot create {path}: {error.strerror}.\n{advice}") from None

    @classmethod
    def find(cls, out_dir, name=None):
        """The run to resume: `name`, or the newest in `out_dir`. CheckpointError if there is none."""
        check_name(name)
        runs = sorted(out_dir.glob("*/config.json"), key=started)
        path = out_dir / name if name else runs[-1].parent if runs else None
        if path and path.is_dir():
            return cls(path)
        names = [config.parent.name for config in runs]
        similar = difflib.get_close_matches(name or "", names, n=3) or names[-3:]
        advice = f"Did you mean {', '.join(similar)}?" if similar else "Start one without --resume."
        raise CheckpointError(f"there is no run {path or f'in {out_dir}'} to resume.\n{advice}")

    def claim(self):
        """
        Lock the folder, so that only this process writes into it. The lock is held until the process exits,
        however it exits -> a line on each thing that the file system cannot do. CheckpointError if another
        process has the lock, or the folder is not writable.
        """
        import fcntl  # here, because Windows does not have it: machine.py prints what to do there

        missing, owner_file = [], self.path / "lock.json"
        try:
            self.lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
            if not supported(fcntl.flock, self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                missing.append("file locks: do not start a second process that resumes this run")
            owner_file.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
            if not sync(self.path):
                missing.append("syncing folders: a power failure may cost the newest checkpoint")
        except BlockingIOError:
            try:
                owner = "process {process} on {host}".format(**json.loads(owner_file.read_text()))
            except (OSError, ValueError, KeyError):
                owner = "another process"
            advice = f"Stop that process first. If its machine no longer runs, delete {self.path / 'lock'}."
            raise CheckpointError(f"{self.path} is in use by {owner}.\n{advice}") from None
        except OSError as error:
            what = f"cannot write to {self.path}: {error.strerror}"
            raise CheckpointError(f"{what}.\nMake the folder writable.") from None
        return [f"the file system of {self.path} does not support {what}" for what in missing]

    def abandon(self):
        """Remove the folder if this process created it: called if it exits before the first step."""
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)

    def has_begun(self):
        """Whether the folder contains a checkpoint, valid or not."""
        return bool(newest_first(self.checkpoints))

    def saved_settings(self):
        """
        (settings, flags given by the user, warnings: a list of lines) of the saved run. If config.json cannot
        be read they come from the newest valid checkpoint; a run without any has two empty dicts.
        """
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text())
            return config["settings"], config["given"], []
        except (OSError, ValueError, KeyError, TypeError):
            newest, _ = newest_valid(self.checkpoints)
            state = load(newest, "state") if newest else {}
            warnings = [f"{file} cannot be read: the settings come from {newest or 'the constants'}"]
            has_begun = newest or file.exists()
            return state.get("settings", {}), state.get("given", {}), warnings if has_begun else []

    def check_disk_space(self, weight_bytes, checkpoint_bytes, saves, best=False):
        """
        Compare the free disk space with what the run needs: `saves` checkpoints at the same time, and the
        best weights if `best` is set. Returns a warning or None. CheckpointError if not even the weights fit.
        """
        root = self.checkpoints
        disk, existing = shutil.disk_usage(root), len(newest_first(root))
        if disk.total == 0:  # some network file systems do not say
            return None
        free = disk.free
        if free < weight_bytes:
            what = f"the weights alone take {weight_bytes / 1e9:.2g} GB"
            what += f", but {root} has {free / 1e9:.2g} GB free"
            raise CheckpointError(f"{what}.\nFree some disk space, or choose another --out-dir.")
        missing = max(1, saves - existing) * checkpoint_bytes + best * weight_bytes - free
        if missing > 0:
            what = f"{saves} × {checkpoint_bytes / 1e9:.2g} GB of checkpoints do not fit"
            what += f" into {free / 1e9:.2g} GB"
            return f"{what}: {missing / 1e9:.2g} GB are missing. Free some space, or lower --keep-checkpoints"
        return None

    @contextlib.contextmanager
    def writing(self):
        """Turn an OSError inside the `with` block into a CheckpointError."""
        try:
            yield
        except OSError as error:
            advice = "Choose another --out-dir or free some space."
            raise CheckpointError(f"cannot write to {self.path}: {error.strerror}.\n{advice}") from None

    def to_resume(self):
        """(checkpoint to resume from or None, faults of newer ones). CheckpointError if none is usable."""
        newest, faults = newest_valid(self.checkpoints)
        if faults and not newest:
            what = f"no checkpoint in {self.checkpoints} is valid: {faults[0]}"
            raise CheckpointError(f"{what}.\nRestore a valid checkpoint, or start another run.")
        if newest and not (newest / "optimizer.pt").exists():
            what = f"{newest} contains only the weights, because the disk was full; it cannot be resumed"
            advice = "Free some disk space, and move that folder away to resume from the checkpoint before it"
            raise CheckpointError(f"{what}.\n{advice}.")
        return newest, faults


def started(config):
    """Sort key: when a run was last started. Times may be rounded to 2 s: <time>-2 is newer than <time>."""
    try:
        seconds = config.stat().st_mtime
    except OSError:  # deleted meanwhile
        seconds = 0.0
    return seconds, len(config.parent.name), config.parent.name


def check_name(name):
    """CheckpointError if a run's name is a path."""
    if name and (Path(name).name != name or name == ".."):
        what = f"--run-name {name} is not a plain name"
        raise CheckpointError(f"{what}.\nUse --out-dir for the folder that contains it.")


def initial_weights(run_folder):
    """
    (best checkpoint, its weights, config.json as a dict) of the run in --init-from. The weights are opened
    at once, because that run may still train and delete the checkpoint. CheckpointError if missing.
    """
    folder, weights, _, faults = load_best(run_folder / "checkpoints")
    if folder is None:
        what = f"--init-from {run_folder} has no valid checkpoint" + "".join(f"; {f}" for f in faults[:1])
        raise CheckpointError(f"{what}.\nGive the folder of a run with a checkpoint, such as out/NAME.")
    try:
        return folder, weights, json.loads((run_folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        what = f"--init-from: cannot read {run_folder / 'config.json'}: {error}"
        raise CheckpointError(f"{what}.\nRestore the file, or give another run.") from None


def is_full(error):
    """Whether an error means that the disk or the user's quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# -----------------------------------------------------------------------------
# Saving


class Saver:
    """
    Writes checkpoints into `root` from a background thread, one at a time, and keeps the `keep` newest. The
    caller waits only while tensors are copied into host buffers. The buffers are reused, and pinned if `pin`
    is set and the host allows it. `save` raises no error: `outcomes` returns the result of each save.
    """

    def __init__(self, root, keep, pin=False, synchronize=lambda: None):
        self.root, self.keep, self.pin, self.synchronize = Path(root), keep, pin, synchronize
        self.buffers, self.thread, self.pending, self.done = {}, ThreadPoolExecutor(1), None, []
        self.thread.submit(int)  # start the thread: at a limit of processes this fails before the training

    def save(self, step, tensors, state, prune=True, kind="step"):
        """
        Start writing <kind>_<step>: each {name: state dict} of `tensors` as name.pt, `state` as state.json.
        Waits for the save before it. Without `prune` all older checkpoints are kept. Of the kind "best" only
        one is kept.
        """
        name = f"{kind}_{step:06d}"
        self.wait()
        try:
            copies = self.copy(tensors)
            self.synchronize()  # copies from the device are asynchronous
        except (RuntimeError, MemoryError) as error:
            if self.pin:  # a host may limit how much memory can be pinned
                self.pin, self.buffers = False, {}
                return self.save(step, tensors, state, prune, kind)
            self.done.append((name, error))
            return
        keep = 1 if kind == "best" else self.keep if prune else None
        self.pending = self.thread.submit(self.write, name, copies, state, keep)

    def copy(self, content, key=""):
        """The same nested dicts, with each tensor copied into the host buffer for its key."""
        if isinstance(content, dict):
            return {name: self.copy(value, f"{key}/{name}") for name, value in content.items()}
        if key not in self.buffers:  # pinned buffers are rounded up to a power of two: up to twice the size
            self.buffers[key] = torch.empty(content.shape, dtype=content.dtype, pin_memory=self.pin)
        return self.buffers[key].copy_(content.detach(), non_blocking=self.pin)

    def write(self, name, tensors, state, keep):
        """Write a checkpoint in the background thread. Returns its outcome: (name, None or the error)."""
        try:
            write(self.root, name, tensors, state, keep)
            return name, None
        except Exception as error:
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__  # torch.save raises its own error instead of the disk's
            clean_up(self.root)  # the incomplete files take space that the log may need
            return name, error

    def wait(self):
        """Wait until the pending save is written."""
        if self.pending:
            self.done.append(self.pending.result())
            self.pending = None

    def outcomes(self):
        """[(folder name, None or the error)] of the saves that finished since the last call."""
        if self.pending and self.pending.done():
            self.wait()
        done, self.done = self.done, []
        return done


def write(root, name, tensors, state, keep):
    """
    Write the checkpoint `name`, <kind>_<step>, and return its folder. Then delete older ones of its kind, so
    that `keep` valid ones remain, the new one included (None: delete nothing).
    """
    folder, temporary = root / name, root / f".tmp-{name}"
    clean_up(root)  # files of a killed process
    temporary.mkdir()  # without parents: if root was deleted, the save must fail

    def write_part(part):  # checksums take about as long as the disk: write several files in parallel
        file = temporary / f"{part}.pt"
        with open(file, "wb") as handle:  # an error of a Python file has the disk's error number
            torch.save(tensors[part], handle)
        sync(file)
        return file_entry(file)

    try:
        with ThreadPoolExecutor() as threads:
            entries = list(threads.map(write_part, tensors))
    except RuntimeError as error:
        if "can't start new thread" not in str(error):  # at the limit of processes
            raise
        entries = map(write_part, tensors)
    manifest = {f"{part}.pt": entry for part, entry in zip(tensors, entries)}
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    sync(temporary / "state.json")
    manifest["state.json"] = file_entry(temporary / "state.json")
    manifest["manifest.json"] = manifest_entry(manifest)
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    sync(temporary / "manifest.json")
    sync(temporary)
    if folder.exists():  # it is damaged, otherwise the run would have resumed from it
        discard(folder)
    os.rename(temporary, folder)
    sync(root)
    valid = 1  # the new one
    for old in newest_first(root, name.split("_")[0]):
        if keep is None or old == folder:
            continue
        if valid >= keep:
            with contextlib.suppress(OSError):  # a share can lock files that someone reads; tried again later
                discard(old)
        elif find_fault(old) is None:
            valid += 1
    clean_up(root)
    return folder


def discard(folder):
    """Rename a checkpoint for `clean_up` to delete: a kill must not leave half of it under its own name."""
    os.rename(folder, folder.with_name(f".tmp-old-{folder.name}"))


def clean_up(root):
    """Delete incomplete and discarded checkpoints."""
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sync(path):
    """Flush a file or folder to the disk -> whether its file system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # some network file systems open no folders
            return False
        raise
    try:
        return supported(os.fsync, handle)
    finally:
        os.close(handle)


def supported(call, *arguments):
    """
    Make a call to the operating system -> False if the file system has no such operation. Shares of Windows
    and VirtualBox cannot sync folders (EINVAL), others have no locks. Other errors are raised.
    """
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            raise
        return False
    return True


def file_entry(path):
    """The manifest's entry for a file: its size and checksum."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def manifest_entry(manifest):
    """The manifest's entry for itself: the checksum of its other entries."""
    return {"sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


# -----------------------------------------------------------------------------
# Finding and loading


def newest_first(root, kind="step"):
    """The folders <kind>_<step> under `root`, valid or not. A copy such as step_000200-copy is ignored."""
    found = [path for path in Path(root).glob(f"{kind}_*") if path.name.removeprefix(f"{kind}_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(f"{kind}_")), reverse=True)


def find_fault(folder):
    """Compare each file with the manifest. Returns what is wrong with the first damaged file, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        intact = manifest.pop("manifest.json") == manifest_entry(manifest)
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        intact = False
    if not intact:
        return f"{folder / 'manifest.json'} is missing or damaged"
    for name, expected in manifest.items():
        try:
            found = file_entry(folder / name)
        except OSError as error:
            return f"cannot read {folder / name}: {error.strerror}"
        if found != expected:
            changed = "sha256" if found["bytes"] == expected["bytes"] else "size"
            return f"{folder / name} is damaged: its {changed} has changed"
    return None


def newest_valid(root, kind="step"):
    """(newest valid checkpoint, or None; the faults of newer ones, which are skipped)."""
    faults = []
    for folder in newest_first(root, kind):
        fault = find_fault(folder)
        if fault is None:
            return folder, faults
        if os.path.lexists(folder):  # otherwise its run, which still trains, has deleted it meanwhile
            faults.append(fault)
    return None, faults


def best(root):
    """
    (valid checkpoint with the lowest val_bpb, or None; faults as in `newest_valid`). The candidates are the
    newest and the best_*. If a changed --eval-bytes makes their val_bpb incomparable, the later one wins. If
    the newest has not been evaluated at its step, its val_bpb is that of earlier weights: best_* wins.
    """
    newest, faults = newest_valid(root)
    lowest, _ = newest_valid(root, "best")
    if not newest or not lowest:
        return newest or lowest, faults
    states = {folder: load(folder, "state") for folder in (newest, lowest)}
    eval_bytes = {state["settings"]["eval_bytes"] for state in states.values() if "settings" in state}
    if len(eval_bytes) == 2:  # older versions saved best_* without settings: then val_bpb is compared
        return max(states, key=lambda folder: states[folder]["step"]), faults
    if states[newest].get("val_step") != states[newest].get("step"):
        return lowest, faults
    return min(states, key=lambda folder: states[folder]["val_bpb"]), faults


def load_best(root):
    """
    Open best(root) -> (checkpoint, its weights, its state, faults); all but faults None if none is valid.
    A run that still trains may delete a checkpoint before it is opened: then the choice is made again.
    """
    while True:
        candidates = [*newest_first(root), *newest_first(root, "best")]
        try:
            folder, faults = best(root)
            if folder:
                return folder, load(folder, "model"), load(folder, "state"), faults
            error = None
        except (OSError, RuntimeError) as caught:  # a RuntimeError comes from mapping a file that is gone
            error = caught
        if all(map(os.path.lexists, candidates)):
            if error:
                raise error
            return None, None, None, faults


def load_state(folder, names):
    """The content of state.json. CheckpointError if one of `names` is missing in it."""
    state = load(folder, "state")
    for name in names:
        if name not in state:
            raise CheckpointError(f"{folder} has no {name}.\nResume it with the version that has written it.")
    return state


@contextlib.contextmanager
def must_fit(folder):
    """Turn errors of loading a checkpoint into another model, or for other data, into a CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        what = f"{folder} does not fit these settings: {str(error).splitlines()[-1].strip().rstrip('.')}"
        raise CheckpointError(f"{what}.\nUse the settings of the run that has written it.") from None


def load(folder, name):
    """Read name.json, or name.pt onto the CPU: only tensors and plain values, never pickled code."""
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    path, options = folder / f"{name}.pt", {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **options)
    except UnicodeEncodeError:  # PyTorch can only mmap a file whose path is valid Unicode
        with open(path, "rb") as file:
            return torch.load(file, **options)
