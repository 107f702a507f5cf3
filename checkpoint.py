"""
Checkpoints: weights and state to disk and back, so that a kill at any moment never costs a good one.

A checkpoint is a folder step_000200 with model.pt, optimizer.pt, state.json and manifest.json, which holds
size and sha256 of the others. It is written under a temporary name, synced, and renamed once it is complete.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import torch


class CheckpointError(Exception):
    """A run's folder that cannot be used; the message says why and what to do, in two lines."""


class Saver:
    """
    Writes checkpoints into `root` from a background thread, one at a time, and keeps the `keep` newest. The
    caller waits only while tensors are copied into host buffers: reused ones, and pinned if `pin` is set.
    """

    def __init__(self, root, keep, pin=False, synchronize=lambda: None):
        self.root, self.keep, self.pin, self.synchronize = Path(root), keep, pin, synchronize
        self.buffers, self.thread, self.pending = {}, ThreadPoolExecutor(max_workers=1), None

    def save(self, step, tensors, state):
        """
        Begin to write step_<step>: each {name: state dict} of `tensors` as name.pt, `state` as state.json.
        A save that is still being written is waited for. -> the outcome of that one, as of `wait`.
        """
        outcome = self.wait()
        copies = {name: self.copy(content, name) for name, content in tensors.items()}
        self.synchronize()  # the copies from the device are asynchronous
        self.pending = self.thread.submit(self.write, step, copies, state)
        return outcome

    def copy(self, content, place):
        """The same nested dicts, with each tensor copied into the host buffer of its place."""
        if isinstance(content, dict):
            return {key: self.copy(value, f"{place}/{key}") for key, value in content.items()}
        if place not in self.buffers:
            self.buffers[place] = torch.empty(content.shape, dtype=content.dtype, pin_memory=self.pin)
        return self.buffers[place].copy_(content.detach(), non_blocking=self.pin)

    def write(self, step, tensors, state):
        try:
            return write(self.root, step, tensors, state, self.keep), None
        except Exception as error:
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__  # torch.save wraps the disk's error in one of its own
            clean_up(self.root)  # what was written of it takes room that the log may need
            return None, error

    def poll(self):
        """Once for each save that has ended: (its folder, None) or (None, the error); else None."""
        return self.wait() if self.pending and self.pending.done() else None

    def wait(self):
        """Wait for the save that is being written -> its outcome as of `poll`, or None if there is none."""
        pending, self.pending = self.pending, None
        return pending.result() if pending else None


def write(root, step, tensors, state, keep):
    """Write one checkpoint, then delete all but the `keep` newest valid ones -> its folder."""
    folder, temporary = root / f"step_{step:06d}", root / f".tmp-step_{step:06d}"
    clean_up(root)  # what a killed run has left
    temporary.mkdir()  # if root has vanished, that is an error and no reason to make another one
    for name, content in tensors.items():
        with open(temporary / f"{name}.pt", "wb") as file:  # a file of Python's names the disk's error
            torch.save(content, file)
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    manifest = {}
    for file in sorted(temporary.iterdir()):
        sync(file)
        manifest[file.name] = entry(file)
    manifest["manifest.json"] = own_entry(manifest)
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    sync(temporary / "manifest.json")
    sync(temporary)
    if folder.exists():  # a damaged one, or else the run would have gone on from there
        discard(folder)
    os.rename(temporary, folder)
    sync(root)
    valid = 0
    for old in complete(root):
        if valid >= keep:
            discard(old)
        elif old == folder or fault(old) is None:
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


def complete(root):
    """The checkpoints under `root` that were written to their end, newest first."""
    return [folder for folder in newest_first(root) if (folder / "manifest.json").exists()]


def newest_first(root):
    """The folders step_<number> under `root`, whatever is in them; a copy under another name is none."""
    found = [p for p in Path(root).glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


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


def newest_valid(root):
    """-> (the newest checkpoint without fault, or None; the faults of newer ones, which were passed over)."""
    faults = []
    for folder in newest_first(root):
        reason = fault(folder)
        if reason is None:
            return folder, faults
        faults.append(reason)
    return None, faults


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


def lock(folder):
    """Make this the one process that writes into `folder` -> the lock. CheckpointError if that cannot be."""
    held = filelock.FileLock(folder / "lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        reason = "is being written by a run that is still going.\nStop that one first."
        raise CheckpointError(f"{folder} {reason}") from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}.\nMake it writable.") from None
    return held


def load(folder, name):
    """Read name.json, or name.pt onto the CPU: tensors and plain values only, never pickled code."""
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True, mmap=True)
