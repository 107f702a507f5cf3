"""
Checkpoints: weights and state to disk and back, so that a kill at any moment never costs a good one.

A checkpoint is a folder step_000200 with model.pt, optimizer.pt, state.json and manifest.json, which holds
size and sha256 of the others. It is written under a temporary name, synced, and renamed once it is complete.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


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


def save(root, step, tensors, state, keep):
    """
    Write root/step_<step>: each {name: state dict} of `tensors` as name.pt, and `state` as state.json.
    Then delete all but the `keep` newest complete checkpoints. Returns the folder; OSError if the disk fails.
    """
    folder, temporary = Path(root) / f"step_{step:06d}", Path(root) / f".tmp-step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, content in tensors.items():
        torch.save(content, temporary / f"{name}.pt")
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    manifest = {}
    for file in sorted(temporary.iterdir()):
        sync(file)
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    sync(temporary / "manifest.json")
    sync(temporary)
    if folder.exists():  # the same step, reached again after resuming from an earlier one
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync(folder.parent)
    for old in complete(root)[keep:] if keep > 0 else []:
        shutil.rmtree(old)
    return folder


def complete(root):
    """The checkpoints under `root` that were written to their end, newest first."""
    return sorted((p.parent for p in Path(root).glob("step_*/manifest.json")), reverse=True)


def verify(folder):
    """Compare each file with the manifest; CheckpointError names the first that is missing or changed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder / 'manifest.json'} is missing or damaged") from None
    for name, entry in manifest.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 has changed")


def newest_valid(root):
    """-> (the newest checkpoint that verifies, or None; the reasons why newer ones were passed over)."""
    reasons = []
    for folder in sorted(Path(root).glob("step_*"), reverse=True):
        try:
            verify(folder)
            return folder, reasons
        except CheckpointError as error:
            reasons.append(str(error))
    return None, reasons


def load(folder, name):
    """Read name.pt onto the CPU, or name.json; tensors and plain values only, never pickled code."""
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True, mmap=True)
