"""
Checkpoints: weights and state to disk and back, so that a kill at any moment never costs a good one.

A checkpoint is a folder step_000200 with model.pt, optimizer.pt, state.json and manifest.json, which holds
size and sha256 of the others. It is written under a temporary name, synced, and renamed once it is complete.
"""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import filelock
import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class Saver:
    """
    Writes checkpoints into `root` from a background thread, one at a time, and keeps the `keep` newest. The
    caller waits only while tensors are copied into host buffers: reused ones, and pinned if `pin` is set.
    """

    def __init__(self, root, keep, pin=False, synchronize=lambda: None):
        self.root, self.keep, self.pin, self.synchronize = Path(root), keep, pin, synchronize
        self.buffers, self.thread, self.outcome = {}, None, None

    def save(self, step, tensors, state):
        """
        Begin to write step_<step>: each {name: state dict} of `tensors` as name.pt, `state` as state.json.
        A save that is still being written is waited for. -> the outcome of that one, as of `wait`.
        """
        outcome = self.wait()
        copies = {name: self.copy(content, name) for name, content in tensors.items()}
        self.synchronize()  # the copies from the device are asynchronous
        self.thread = threading.Thread(target=self.write, args=(step, copies, state))
        self.thread.start()
        return outcome

    def copy(self, content, place):
        """The same nested dicts and lists, with each tensor copied into the host buffer of its place."""
        if isinstance(content, dict):
            return {key: self.copy(value, f"{place}/{key}") for key, value in content.items()}
        if not isinstance(content, torch.Tensor):
            return content
        buffer = self.buffers.get(place)
        if buffer is None or buffer.shape != content.shape or buffer.dtype != content.dtype:
            buffer = torch.empty(content.shape, dtype=content.dtype, pin_memory=self.pin)
            self.buffers[place] = buffer
        return buffer.copy_(content.detach(), non_blocking=self.pin)

    def write(self, step, tensors, state):
        try:
            self.outcome = write(self.root, step, tensors, state, self.keep), None
        except Exception as error:
            reason = error
            while reason.__context__ and not isinstance(reason, OSError):
                reason = reason.__context__  # torch.save wraps the disk's error in one of its own
            self.outcome = None, reason
            clean_up(self.root)  # what was written of it takes room that the log may need

    def poll(self):
        """Once for each save that has ended: (its folder, None) or (None, the error); else None."""
        return self.wait() if self.thread and not self.thread.is_alive() else None

    def wait(self):
        """Wait for the save that is being written -> its outcome as of `poll`, or None if there is none."""
        if self.thread:
            self.thread.join()
        outcome, self.thread, self.outcome = self.outcome, None, None
        return outcome


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
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest["manifest.json"] = {"sha256": own_sha256(manifest)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    sync(temporary / "manifest.json")
    sync(temporary)
    if folder.exists():  # a damaged one, or else the run would have gone on from there
        os.rename(folder, root / f".tmp-old-{folder.name}")
    os.rename(temporary, folder)
    sync(root)
    clean_up(root)
    valid = 0
    for old in complete(root):
        if valid >= keep:
            gone = root / f".tmp-old-{old.name}"  # a kill must not leave half of it under its name
            os.rename(old, gone)
            shutil.rmtree(gone)
        elif old == folder or is_valid(old):
            valid += 1
    return folder


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


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_sha256(manifest):
    """The checksum of a manifest's entries for the other files."""
    entries = {name: entry for name, entry in manifest.items() if name != "manifest.json"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def complete(root):
    """The checkpoints under `root` that were written to their end, newest first."""
    return [folder for folder in newest_first(root) if (folder / "manifest.json").exists()]


def newest_first(root):
    """The folders step_<number> under `root`, whatever is in them; a copy under another name is none."""
    found = [p for p in Path(root).glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def is_valid(folder):
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def verify(folder):
    """Compare each file with the manifest; CheckpointError names the first that is missing or changed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        intact = manifest.pop("manifest.json")["sha256"] == own_sha256(manifest)
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        intact = False
    if not intact:
        raise CheckpointError(f"{folder / 'manifest.json'} is missing or damaged")
    for name, entry in manifest.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{path} is damaged: {size:,} bytes, not {entry['bytes']:,}")
            if sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is damaged: its sha256 has changed")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def newest_valid(root):
    """-> (the newest checkpoint that verifies, or None; the reasons why newer ones were passed over)."""
    reasons = []
    for folder in newest_first(root):
        try:
            verify(folder)
            return folder, reasons
        except CheckpointError as error:
            reasons.append(str(error))
    return None, reasons


def saved_settings(run_folder):
    """
    -> (the settings, the flags that were given) of a run: from its config.json or, if that is lost, from its
    newest valid checkpoint; empty where there is neither.
    """
    try:
        config = json.loads((run_folder / "config.json").read_text())
        return config["settings"], config["given"]
    except (OSError, ValueError, KeyError, TypeError):
        newest, _ = newest_valid(run_folder / "checkpoints")
        state = load(newest, "state") if newest else {}
        return state.get("settings", {}), state.get("given", {})


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
