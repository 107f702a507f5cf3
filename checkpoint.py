"""
A run's folder and its checkpoints: weights and state to disk and back, so that a kill at any moment never
costs a good one.

A checkpoint is a folder step_000200 with model.pt, optimizer.pt, state.json and manifest.json, which holds
size and sha256 of the others. It is written under a temporary name, synced, and renamed once it is complete.
A folder best_000150 holds weights alone: those with the lowest val_bpb, where a text was read repeatedly.
"""

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

import filelock
import torch


class CheckpointError(Exception):
    """A run's folder that cannot be used; the message says why and what to do, in two lines."""


# -----------------------------------------------------------------------------
# The run's folder


def make_run(out_dir, name=None):
    """
    Make the folder of a new run, in one step, so that no other start can have the same one -> its path.
    Without a name it is <date>-<time>, then -2, -3 …. CheckpointError if it exists or cannot be made.
    """
    wanted = name or f"{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = out_dir / (wanted if number == 1 else f"{wanted}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if name:
                advice = "Continue it with --resume, or choose another --run-name."
                raise CheckpointError(f"the run {folder} exists.\n{advice}") from None
        except OSError as error:
            reason = f"{folder} cannot be made: {error.strerror}"
            raise CheckpointError(f"{reason}.\nChoose another --out-dir or --run-name.") from None


def find_run(out_dir, name=None):
    """-> the folder of the run to resume: `name`, or the newest. CheckpointError if there is none."""
    runs = sorted(out_dir.glob("*/config.json"), key=os.path.getmtime)
    if name and (out_dir / name).is_dir():
        return out_dir / name
    if name:
        names = [path.parent.name for path in runs]
        near = difflib.get_close_matches(name, names, n=3) or names[-3:]
        advice = f"Did you mean {', '.join(near)}?" if near else "Start one without --resume."
        raise CheckpointError(f"there is no run {out_dir / name} to resume.\n{advice}")
    if not runs:
        raise CheckpointError(f"{out_dir} holds no run to resume.\nStart one without --resume.")
    return runs[-1].parent


def lock(folder):
    """Make this the one process that writes into `folder` -> the lock. CheckpointError if that cannot be."""
    held, owner = filelock.FileLock(folder / "lock"), folder / "lock.json"
    try:
        held.acquire(timeout=0)
        owner.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    except filelock.Timeout:
        try:
            by = "process {process} on {host}".format(**json.loads(owner.read_text()))
        except (OSError, ValueError, KeyError):
            by = "another process"
        advice = f"Stop that run first. If it is dead and its machine gone, delete {folder / 'lock'}."
        raise CheckpointError(f"{folder} is being written by {by}, a run still going.\n{advice}") from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}.\nMake it writable.") from None
    return held


def saved_settings(run_folder):
    """
    -> (the settings, the flags that were given, where they are from) of a run: from its config.json or, if
    that is lost, from its newest valid checkpoint; empty where there is neither.
    """
    try:
        config = json.loads((run_folder / "config.json").read_text())
        return config["settings"], config["given"], "config.json"
    except (OSError, ValueError, KeyError, TypeError):
        newest, _ = newest_valid(run_folder / "checkpoints")
        state = load(newest, "state") if newest else {}
        return state.get("settings", {}), state.get("given", {}), newest


def origin(run_folder):
    """-> (the best checkpoint of a run that another one shall start from, its config). CheckpointError."""
    found, faults = best(run_folder / "checkpoints")
    if found is None:
        what = f"--init-from {run_folder} holds no valid checkpoint" + "".join(f"; {f}" for f in faults[:1])
        raise CheckpointError(f"{what}.\nGive the folder of a run that has saved, such as out/NAME.")
    try:
        return found, json.loads((run_folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        what = f"--init-from: {run_folder / 'config.json'} cannot be read: {error}"
        raise CheckpointError(f"{what}.\nPut it back as it was.") from None


def is_full(error):
    """Whether an error says that a disk, or somebody's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_room(root, weights, whole, saves, best=False):
    """
    Compare the room for checkpoints under `root` with what a run will need: so many of `whole` bytes at a
    time, and the best weights if asked for -> a warning or None. CheckpointError if not even the weights, of
    so many bytes, have room.
    """
    free, there = shutil.disk_usage(root).free, len(newest_first(root))
    if free < weights:
        need = f"the weights alone take {weights / 1e9:.2g} GB, and {root} has {free / 1e9:.2g} GB free"
        raise CheckpointError(f"{need}.\nMake room there, or choose another --out-dir.")
    missing = max(1, saves - there) * whole + best * weights - free
    if missing > 0:
        what = f"{saves} × {whole / 1e9:.2g} GB of checkpoints do not fit into {free / 1e9:.2g} GB"
        return f"{what}: {missing / 1e9:.2g} GB are missing. Make room, or keep fewer with --keep-checkpoints"
    return None


# -----------------------------------------------------------------------------
# Saving


class Saver:
    """
    Writes checkpoints into `root` from a background thread, one at a time, and keeps the `keep` newest. The
    caller waits only while tensors are copied into host buffers: reused ones, and pinned if `pin` is set
    and the host allows it. No error is raised: each save has an outcome.
    """

    def __init__(self, root, keep, pin=False, synchronize=lambda: None):
        self.root, self.keep, self.pin, self.synchronize = Path(root), keep, pin, synchronize
        self.buffers, self.thread, self.pending, self.ended = {}, ThreadPoolExecutor(1), None, []

    def save(self, step, tensors, state, prune=True, kind="step"):
        """
        Begin to write <kind>_<step>: each {name: state dict} of `tensors` as name.pt, `state` as state.json.
        A save that is still being written is waited for. Without `prune` older ones are all kept; a save of
        the kind "best" takes the place of the one before.
        """
        name = f"{kind}_{step:06d}"
        self.wait()
        try:
            copies = self.copy(tensors)
            self.synchronize()  # the copies from the device are asynchronous
        except (RuntimeError, MemoryError) as error:
            if self.pin:  # a host may limit what can be pinned
                self.pin, self.buffers = False, {}
                return self.save(step, tensors, state, prune, kind)
            self.ended.append((name, error))
            return
        keep = 1 if kind == "best" else self.keep if prune else None
        self.pending = self.thread.submit(self.write, name, copies, state, keep)

    def copy(self, content, place=""):
        """The same nested dicts, with each tensor copied into the host buffer of its place."""
        if isinstance(content, dict):
            return {key: self.copy(value, f"{place}/{key}") for key, value in content.items()}
        if place not in self.buffers:  # pinned memory comes in powers of two: up to twice the size
            self.buffers[place] = torch.empty(content.shape, dtype=content.dtype, pin_memory=self.pin)
        return self.buffers[place].copy_(content.detach(), non_blocking=self.pin)

    def write(self, name, tensors, state, keep):
        try:
            write(self.root, name, tensors, state, keep)
            return name, None
        except Exception as error:
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__  # torch.save wraps the disk's error in one of its own
            clean_up(self.root)  # what was written of it takes room that the log may need
            return name, error

    def wait(self):
        """Wait for the save that is being written."""
        if self.pending:
            self.ended.append(self.pending.result())
            self.pending = None

    def outcomes(self):
        """-> [(folder's name, None or the error)] of the saves that have ended since the last call."""
        if self.pending and self.pending.done():
            self.wait()
        ended, self.ended = self.ended, []
        return ended


def write(root, name, tensors, state, keep):
    """
    Write the checkpoint <kind>_<step>, then delete the others of its kind but for the newest valid ones, with
    it `keep` in number (None: all) -> its folder.
    """
    folder, temporary = root / name, root / f".tmp-{name}"
    clean_up(root)  # what a killed run has left
    temporary.mkdir()  # if root has vanished, that is an error and no reason to make another one

    def write_part(part):  # disk and checksum take about as long: of several files at the same time
        file = temporary / f"{part}.pt"
        with open(file, "wb") as handle:  # a file of Python's names the disk's error
            torch.save(tensors[part], handle)
        sync(file)
        return entry(file)

    with ThreadPoolExecutor() as threads:
        entries = threads.map(write_part, tensors)
    manifest = {f"{part}.pt": found for part, found in zip(tensors, entries)}
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    sync(temporary / "state.json")
    manifest["state.json"] = entry(temporary / "state.json")
    manifest["manifest.json"] = own_entry(manifest)
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    sync(temporary / "manifest.json")
    sync(temporary)
    if folder.exists():  # a damaged one, or else the run would have gone on from there
        discard(folder)
    os.rename(temporary, folder)
    sync(root)
    valid = 1  # the new one
    for old in newest_first(root, name.split("_")[0]):
        if keep is None or old == folder:
            continue
        if valid >= keep:
            discard(old)
        elif fault(old) is None:
            valid += 1
    clean_up(root)
    return folder


def discard(folder):
    """Give a checkpoint over to `clean_up`; a kill must not leave half of it under its name."""
    os.rename(folder, folder.with_name(f".tmp-old-{folder.name}"))


def clean_up(root):
    """Delete what was not written to its end."""
    for left_over in root.glob(".tmp-*"):
        shutil.rmtree(left_over, ignore_errors=True)


def sync(path):
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def entry(path):
    """What the manifest holds of a file: its size and its checksum."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def own_entry(manifest):
    """What the manifest holds of itself: the checksum of its entries for the other files."""
    return {"sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def newest_first(root, kind="step"):
    """The folders <kind>_<number> under `root`, whatever is in them; a copy under another name is none."""
    found = [p for p in Path(root).glob(f"{kind}_*") if p.name.removeprefix(f"{kind}_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(f"{kind}_")), reverse=True)


def fault(folder):
    """Compare each file with the manifest -> what is wrong with the first that is not as it was, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        intact = manifest.pop("manifest.json") == own_entry(manifest)
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        intact = False
    if not intact:
        return f"{folder / 'manifest.json'} is missing or damaged"
    for name, expected in manifest.items():
        try:
            found = entry(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        if found != expected:
            changed = "sha256" if found["bytes"] == expected["bytes"] else "size"
            return f"{folder / name} is damaged: its {changed} has changed"
    return None


# -----------------------------------------------------------------------------
# Loading


def newest_valid(root, kind="step"):
    """-> (the newest checkpoint without fault, or None; the faults of newer ones, which were passed over)."""
    faults = []
    for folder in newest_first(root, kind):
        reason = fault(folder)
        if reason is None:
            return folder, faults
        faults.append(reason)
    return None, faults


def best(root):
    """-> (the checkpoint under `root` whose val_bpb is lowest, the newest or the best; faults as above)."""
    newest, faults = newest_valid(root)
    lowest, _ = newest_valid(root, "best")
    if newest and lowest and load(newest, "state")["val_bpb"] <= load(lowest, "state")["val_bpb"]:
        return newest, faults
    return lowest or newest, faults


def to_resume(root):
    """
    -> (the checkpoint under `root` to go on from, or None; the faults of newer ones, which are passed over).
    CheckpointError if none of those that are there will do.
    """
    newest, faults = newest_valid(root)
    if faults and not newest:
        what = f"no checkpoint in {root} is valid: {faults[0]}"
        raise CheckpointError(f"{what}.\nPut a good one back, or start another run.")
    if newest and not (newest / "optimizer.pt").exists():
        what = f"{newest} holds the weights alone, as the disk was full: training cannot go on from it"
        raise CheckpointError(f"{what}.\nMake room, and move that folder away to resume from the one before.")
    return newest, faults


def load(folder, name):
    """Read name.json, or name.pt onto the CPU: tensors and plain values only, never pickled code."""
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    path, options = folder / f"{name}.pt", {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **options)
    except UnicodeEncodeError:  # PyTorch maps only files whose path is valid Unicode
        with open(path, "rb") as file:
            return torch.load(file, **options)
