"""No kill, flipped bit or full disk loses a run. Tested with real processes and real damage."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from conftest import REPO, TINY, edited_copy, losses, wait_for

import checkpoint
from checkpoint import CheckpointError, RunFolder

DISK_CALLS = {"open", "os.rename", "os.mkdir", "shutil.rmtree", "os.remove", "os.rmdir", "os.scandir"}


def write_and_die(root, moment):
    """Write step 2 in a forked process that kills itself at its `moment`-th disk call. Returns its status."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1, moment))

        def die(event, arguments):
            if event in DISK_CALLS and next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        write(root, 2, keep=1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def write(root, step, keep=9):
    state = {"w": torch.full((1000,), float(step)), "n": {"m": torch.arange(10)}}
    tensors = {"model": state, "optimizer": state}
    return checkpoint.write(root, f"step_{step:06d}", tensors, {"step": step}, keep)


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path):
    folder = write(tmp_path, 7)
    assert checkpoint.newest_valid(tmp_path) == (folder, [])
    loaded = checkpoint.load(folder, "model")
    assert torch.equal(loaded["w"], torch.full((1000,), 7.0)) and loaded["n"]["m"].tolist() == list(range(10))
    assert checkpoint.load(folder, "state") == {"step": 7}
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.pt", "optimizer.pt", "state.json"]


def test_only_tensors_and_plain_values_are_loaded(tmp_path):
    folder = write(tmp_path, 1)
    torch.save({"evil": os.system}, folder / "model.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|GLOBAL"):
        checkpoint.load(folder, "model")


def test_sigkill_at_any_moment_while_writing(tmp_path):
    for moment in range(1, 1000):
        root = tmp_path / f"kill{moment}"
        root.mkdir()
        write(root, 1)
        status = write_and_die(root, moment)
        folder, faults = checkpoint.newest_valid(root)
        assert folder is not None and faults == [], (moment, faults)
        value = 2.0 if folder.name == "step_000002" else 1.0
        assert torch.equal(checkpoint.load(folder, "model")["w"], torch.full((1000,), value))
        write(root, 3)  # the next save cleans up
        assert not list(root.glob(".tmp-*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert moment > 20 and value == 2.0  # every disk call was covered, until the write was complete


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named_and_the_previous_checkpoint_is_used(tmp_path, name, harm):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    content = bytearray((folder / name).read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    elif harm == "truncate":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        (folder / name).unlink()
    assert str(folder / name) in checkpoint.find_fault(folder)
    newest, faults = checkpoint.newest_valid(tmp_path)
    assert newest.name == "step_000001" and len(faults) == 1 and name in faults[0]


def test_a_flipped_bit_in_the_manifest_is_detected(tmp_path):
    folder = write(tmp_path, 1)
    content = (folder / "manifest.json").read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        if changed.split() != content.split():  # a change of white space alone is harmless
            assert "manifest.json is missing or damaged" in checkpoint.find_fault(folder)


def test_pruning_counts_only_valid_checkpoints(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    third = write(tmp_path, 3)
    (third / "model.pt").write_bytes(b"garbage")
    (tmp_path / "step_000004").mkdir()  # no manifest: it was never complete
    fifth = write(tmp_path, 5, keep=2)
    assert not first.exists() and second.exists() and fifth.exists()
    assert (tmp_path / "step_000004").exists()
    assert checkpoint.newest_valid(tmp_path)[0] == fifth


def test_copies_with_other_names_are_ignored(tmp_path):
    first = write(tmp_path, 1)
    shutil.copytree(first, tmp_path / "step_000001-copy")
    second = write(tmp_path, 2, keep=1)
    assert checkpoint.newest_valid(tmp_path) == (second, [])
    assert not first.exists() and (tmp_path / "step_000001-copy").exists()


def test_the_saver_copies_before_it_returns_and_reuses_its_buffers(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep=2)
    weights = torch.zeros(1000)
    for step in (1, 2, 3):
        weights.fill_(step)
        saver.save(step, {"model": {"w": weights}}, {"step": step})
        buffer = saver.buffers["/model/w"].data_ptr()
        weights.fill_(-1)  # training continues while the thread writes
    saver.wait()
    assert saver.outcomes() == [(f"step_00000{n}", None) for n in (1, 2, 3)] and saver.outcomes() == []
    assert [f.name for f in checkpoint.newest_first(tmp_path)] == ["step_000003", "step_000002"]
    for step in (2, 3):
        assert checkpoint.load(tmp_path / f"step_{step:06d}", "model")["w"].unique().tolist() == [step]
    saver.save(4, {"model": {"w": weights}}, {})
    assert saver.buffers["/model/w"].data_ptr() == buffer
    saver.wait()


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path):
    root = tmp_path / "checkpoints"
    root.write_text("a file in the way")
    saver = checkpoint.Saver(root, keep=2)
    saver.save(1, {"model": {"w": torch.ones(3)}}, {})
    saver.wait()
    ((name, error),) = saver.outcomes()
    assert name == "step_000001" and isinstance(error, OSError)
    root.unlink()
    root.mkdir()
    saver.save(2, {"model": {"w": torch.ones(3)}}, {})
    saver.wait()
    assert saver.outcomes() == [("step_000002", None)]
    assert checkpoint.newest_valid(root)[0].name == "step_000002"


def test_the_best_weights_are_kept_beside_the_checkpoints(tmp_path):
    saver, weights = checkpoint.Saver(tmp_path, keep=1), {"model": {"w": torch.ones(3)}}
    saver.save(10, weights, {"val_bpb": 1.5})
    saver.save(30, weights, {"val_bpb": 1.3}, kind="best")
    saver.save(20, weights, {"val_bpb": 1.2}, kind="best")  # a run resumed at step 10
    saver.save(40, weights, {"val_bpb": 1.4})
    saver.wait()
    assert saver.outcomes()[1] == ("best_000030", None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best_000020", "step_000040"]
    assert checkpoint.newest_valid(tmp_path)[0].name == "step_000040"  # a resume ignores best_*
    assert checkpoint.best(tmp_path)[0].name == "best_000020"
    saver.save(50, weights, {"val_bpb": 1.1})
    saver.wait()
    assert checkpoint.best(tmp_path)[0].name == "step_000050"
    (tmp_path / "step_000050" / "model.pt").write_bytes(b"damaged")
    folder, faults = checkpoint.best(tmp_path)
    assert folder.name == "best_000020" and "model.pt" in faults[0]
    shutil.rmtree(tmp_path / "best_000020")
    assert checkpoint.best(tmp_path)[0] is None


def test_val_bpb_of_different_texts_is_not_compared(tmp_path):
    weights = {"model": {"w": torch.ones(3)}}

    def save(step, kind, val_bpb, eval_bytes, val_step=None):
        state = {"step": step, "val_bpb": val_bpb, "settings": {"eval_bytes": eval_bytes}}
        state |= {"val_step": val_step or step}
        checkpoint.write(tmp_path, f"{kind}_{step:06d}", weights, state, keep=1)

    save(10, "best", 1.1, 4096)
    save(20, "step", 1.2, 4096)
    assert checkpoint.best(tmp_path)[0].name == "best_000010"
    save(25, "step", 1.0, 4096, val_step=24)  # saved between two evaluations: of weights that are not saved
    assert checkpoint.best(tmp_path)[0].name == "best_000010"
    save(26, "step", 1.0, 4096)
    assert checkpoint.best(tmp_path)[0].name == "step_000026"
    save(30, "step", 1.4, 8192)  # resumed with another --eval-bytes
    assert checkpoint.best(tmp_path)[0].name == "step_000030"
    save(40, "best", 1.5, 4096)  # resumed at step 30 with the first one again
    assert checkpoint.best(tmp_path)[0].name == "best_000040"


def test_a_state_without_a_needed_name_is_an_error_of_two_lines(tmp_path):
    folder = write(tmp_path, 7)
    assert checkpoint.load_state(folder, ["step"]) == {"step": 7}
    with pytest.raises(CheckpointError, match=f"^{folder} has no model.\nResume it with the version"):
        checkpoint.load_state(folder, ["step", "model"])


def weights_of(run, step):
    """The saved weights of a run at a step."""
    return torch.load(run.folder / "checkpoints" / f"step_{step:06d}" / "model.pt")


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_weights(train, tmp_path):
    flags = ["--num-iterations", 400, "--save-every", 20, "--eval-every", -1]
    first = train(*flags)
    (tmp_path / "out" / "b").mkdir()  # as a job script does: one command line starts and resumes the run
    for number, seconds in enumerate((0.2, 0.5, 0.9)):
        process = train.start(*flags, "--run-name", "b", "--resume")
        wait_for(process, "step")
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, number
    last = train(*flags, "--run-name", "b", "--resume", run="b")
    assert last.code == 0, last.output
    a, b = weights_of(first, 400), weights_of(last, 400)
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [r["step"] for r in last.log if r["kind"] == "step"]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 400
    common = losses(first).keys() & losses(last).keys()
    assert len(common) > 10 and all(losses(first)[s] == losses(last)[s] for s in common)


@pytest.mark.slow
def test_a_resume_names_and_skips_a_damaged_checkpoint(train):
    flags = ["--num-iterations", 20, "--save-every", 10, "--eval-every", -1]
    first = train(*flags)
    path = first.folder / "checkpoints" / "step_000020" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    before = weights_of(first, 20)
    again = train("--resume")
    words = " ".join(again.output.split())
    assert again.code == 0 and f"{path} is damaged" in words and "step_000010" in words
    after = weights_of(again, 20)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint.find_fault(path.parent) is None  # written again


@pytest.mark.slow
def test_a_checkpoint_moves_between_world_sizes(train):
    flags = ["--num-iterations", 18, "--save-every", 6, "--eval-every", -1, "--keep-checkpoints", 9]
    first = train(*flags)
    moved = train(*flags, "--run-name", "b", run="b", processes=2)
    for step, processes in ((6, 1), (12, 4)):
        for folder in (moved.folder / "checkpoints").iterdir():
            if int(folder.name[-6:]) > step:
                shutil.rmtree(folder)
        moved = train(*flags, "--run-name", "b", "--resume", run="b", processes=processes)
        assert moved.code == 0 and f"step_{step:06d}" in moved.output, moved.output
    assert moved.summary["val_bpb"] == pytest.approx(first.summary["val_bpb"], rel=1e-4)
    a, b = losses(first), losses(moved)
    assert 18 in b and all(a[s] == pytest.approx(b[s], rel=1e-4) for s in a.keys() & b.keys())


@pytest.mark.slow
@pytest.mark.parametrize("target, sent", [("rank", signal.SIGTERM), ("torchrun", signal.SIGINT)])
def test_a_signal_to_one_rank_saves_both_at_the_same_step(train, target, sent):
    flags = ["--num-iterations", 100_000, "--log-every", 150, "--eval-every", -1]
    process = train.start(*flags, processes=2)
    wait_for(process, "step")
    time.sleep(0.5)
    os.kill(ranks_of(process)[-1] if target == "rank" else process.pid, sent)
    result = train.finish(process)
    last = result.log[-1]
    assert last["event"] == "interrupted" and f"by {sent.name}" in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("torchrun ")]
    script, out = shlex.quote(str(REPO / "train.py")), shlex.quote(str(result.folder.parent))
    assert line == f"torchrun --standalone --nproc_per_node=2 {script} --out-dir {out} --run-name a --resume"
    folder, faults = checkpoint.newest_valid(result.folder / "checkpoints")
    assert folder.name == f"step_{last['step']:06d}" and faults == []
    assert result.output.count("stopped  by") == 1


@pytest.mark.slow
def test_two_nodes_resume_after_one_of_them_is_lost(train):
    """The README's command on each of two nodes. Here a node is a torchrun with one process."""

    def start(*flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"localhost:{free.getsockname()[1]}"
        nodes = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
        flags = ["--save-every", 10, "--eval-every", -1, *flags]
        return [train.start(*flags, nodes=nodes) for _ in range(2)]

    agents = start("--num-iterations", 100_000)
    deadline = time.monotonic() + 60
    while not [*train.out.glob("a/checkpoints/step_*/manifest.json")]:
        assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
        time.sleep(0.1)
    found = subprocess.run(["pgrep", "-P", str(agents[1].pid)], capture_output=True, text=True)
    for pid in (agents[1].pid, *map(int, found.stdout.split())):  # the node and all its processes are gone
        os.kill(pid, signal.SIGKILL)
    lost, left = train.finish(agents[1]), train.finish(agents[0])
    assert lost.code == -signal.SIGKILL and left.code == 1
    saved, faults = checkpoint.newest_valid(left.folder / "checkpoints")
    step = int(saved.name[-6:])
    assert step >= 10 and not faults
    agents = start("--run-name", "a", "--resume", "--num-iterations", step + 10)
    results = [train.finish(agent) for agent in agents]
    assert [result.code for result in results] == [0, 0], results[0].output + results[1].output
    assert [f"step_{step:06d}" in result.output for result in results].count(True) == 1  # only rank 0 prints
    joined = re.compile(r"^node     \S+ has joined with rank 1 of 2$", re.MULTILINE)
    assert sum(len(joined.findall(result.output)) for result in results) == 1  # of the other node
    assert results[0].summary["steps"] == step + 10 and results[0].summary["world_size"] == 2
    seen = [r["step"] for r in results[0].log if r["kind"] == "step"]
    assert seen == sorted(set(seen)) and seen[-1] == step + 10


@pytest.mark.parametrize(
    "event, trains, requeued",
    [
        ("interrupted", True, True),
        ("interrupted", False, False),  # a later start that fails before it trains: the log is an older one's
        ("failed", True, False),
        ("finished", True, False),
    ],
)
def test_a_slurm_job_is_requeued_only_if_it_was_interrupted(tmp_path, event, trains, requeued):
    status = 0 if event == "finished" else 1
    record = json.dumps({"kind": "event", "step": 3, "event": event})
    log = f"mkdir -p out/mine; echo '{record}' >> out/mine/log.jsonl"
    subprocess.run(log, shell=True, cwd=tmp_path)
    time.sleep(0.05)
    commands = {  # fake commands of a cluster; each logs its arguments
        "srun": f"{'true' if not trains else log}; exit {status}",
        "scontrol": "if [ $1 = show ]; then echo node7; echo node8; fi",
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n{script}\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", str(REPO / "runs" / "slurm.sh"), "mine", "--depth", "20"]
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ("scontrol requeue 77" in calls) == requeued
    (line,) = [call for call in calls if call.startswith("srun ")]
    assert "--rdzv_endpoint=node7:29500" in line and "--nnodes=2" in line
    assert line.endswith("train.py --run-name mine --resume --depth 20")


def test_scripts_keep_their_line_ends_in_a_checkout_of_git_for_windows(tmp_path):
    (tmp_path / "here").mkdir()
    shutil.copytree(REPO / "runs", tmp_path / "here" / "runs")
    shutil.copy(REPO / ".gitattributes", tmp_path / "here")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    clone = ["clone", "-q", "-c", "core.autocrlf=true", "here", "there"]  # the setting of git for Windows
    for command in (
        ["init", "-q", "here"],
        ["-C", "here", "add", "."],
        ["-C", "here", "commit", "-qm", "a"],
        clone,
    ):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    for script in (tmp_path / "here" / "runs").iterdir():
        assert script.read_bytes() == (tmp_path / "there" / "runs" / script.name).read_bytes()
    for script in (tmp_path / "there" / "runs").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """small_disk("3m") mounts a disk of 3 MB and returns its folder."""
    disk = tmp_path / "disk"

    def mount(size):
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a small disk here")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


def run_on(train, disk, *flags):
    """Train with the run's folder on the disk. The weights take 0.8 MB, a checkpoint 2 MB."""
    result = train(*flags, "--out-dir", disk)
    log = disk / "a" / "log.jsonl"
    result.log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return result


@pytest.mark.slow
def test_training_continues_on_a_full_disk_and_saves_the_weights_if_they_fit(train, small_disk):
    disk = small_disk("3m")
    flags = ["--num-iterations", 30, "--save-every", 10, "--eval-every", -1]
    result = run_on(train, disk, *flags)
    assert result.code == 1 and "Traceback" not in result.output, result.output
    words = " ".join(result.output.split())
    assert "3 × 0.002 GB of checkpoints do not fit" in words
    assert words.index("do not fit") < words.index("step 1/30")
    assert words.count("tries again: [Errno 28] No space left") == 1  # at step 20
    assert words.count("the last one failed: [Errno 28] No space left") == 1
    assert "saved the weights alone: step_000030" in words
    assert max(r["step"] for r in result.log) == 30
    only = disk / "a" / "checkpoints" / "step_000030"
    assert checkpoint.find_fault(only) is None and "embedding.weight" in checkpoint.load(only, "model")
    refused = run_on(train, disk, *flags, "--run-name", "a", "--resume")
    lines = refused.output[refused.output.index("error: ") :].splitlines()
    assert refused.code == 2 and len(lines) == 2 and f"{only} contains only the weights" in lines[0]
    shutil.rmtree(only)
    again = run_on(train, disk, "--keep-checkpoints", 1, "--run-name", "a", "--resume")
    assert "step_000010" in again.output and again.code == 1, again.output


@pytest.mark.slow
def test_a_disk_too_small_for_the_weights_is_an_error_before_training(train, small_disk):
    result = run_on(train, small_disk("700k"), "--num-iterations", 30)
    assert result.code == 2 and "the weights alone take 0.00079 GB" in result.output, result.output
    assert "\nstep " not in result.output and not result.log


def test_the_check_of_disk_space(tmp_path, monkeypatch):
    disk = types.SimpleNamespace(free=10e9, total=20e9)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda root: disk)
    run = RunFolder.create(tmp_path, "a")
    run.checkpoints.mkdir()
    assert run.check_disk_space(1e9, 3e9, saves=3) is None
    assert "are missing" in run.check_disk_space(1.1e9, 3e9, saves=3, best=True)
    warning = run.check_disk_space(1e9, 3e9, saves=4)
    assert warning.startswith("4 × 3 GB of checkpoints do not fit into 10 GB: 2 GB are missing")
    write(run.checkpoints, 1)  # an existing checkpoint is pruned: the next one uses its space
    assert run.check_disk_space(1e9, 3e9, saves=4) is None
    disk.free = 0.9e9
    with pytest.raises(CheckpointError, match="the weights alone take 1 GB"):
        run.check_disk_space(1e9, 3e9, 1)
    disk.free = disk.total = 0  # a network file system that does not say
    assert run.check_disk_space(1e9, 3e9, 1) is None


NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@pytest.mark.parametrize("number", [*NOT_SUPPORTED, errno.EIO, errno.ENOSPC])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, number):
    fsync, files = os.fsync, []

    def limited(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(path):
            raise OSError(number, os.strerror(number))
        files.append(os.path.basename(path))
        fsync(handle)

    run = RunFolder.create(tmp_path, "a")
    run.checkpoints.mkdir()
    monkeypatch.setattr(os, "fsync", limited)
    saver = checkpoint.Saver(run.checkpoints, keep=2)
    saver.save(1, {"model": {"w": torch.ones(3)}}, {})
    saver.wait()
    ((name, error),) = saver.outcomes()
    assert sorted(files) == ["manifest.json", "model.pt", "state.json"]
    if number in NOT_SUPPORTED:
        (line,) = run.claim()
        assert error is None and checkpoint.newest_valid(run.checkpoints)[0].name == "step_000001"
        assert line.startswith(f"the file system of {run.path} does not support syncing folders: ")
    else:  # of reading or writing
        assert error.errno == number and not [*run.checkpoints.glob("step_*")]
        with pytest.raises(CheckpointError, match=f"cannot write to {run.path}: {os.strerror(number)}"):
            run.claim()


@pytest.mark.parametrize("number", [*NOT_SUPPORTED, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def limited(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", limited)
    for run in (RunFolder.create(tmp_path, "a"), RunFolder.find(tmp_path, "a")):  # no lock stays behind
        if number == errno.EIO:
            with pytest.raises(CheckpointError, match=f"cannot write to {run.path}: "):
                run.claim()
        else:
            (line,) = run.claim()
            assert line.startswith(f"the file system of {run.path} does not support file locks: ")


# train.py on a file system that has none of this, under any path with /share/
LIMITED = """
import errno, fcntl, os, runpy, sys
sys.path.insert(0, {repo!r})
def limit(module, name, number, only_folders=False):
    call = getattr(module, name)
    def limited(file, *arguments, **options):
        path = os.readlink(f"/proc/self/fd/{{file}}") if isinstance(file, int) else str(file)
        if "/share/" in path + "/" and (os.path.isdir(path) or not only_folders):
            raise OSError(number, os.strerror(number), path)
        return call(file, *arguments, **options)
    setattr(module, name, limited)
limit(os, "fsync", errno.EINVAL, only_folders=True)
limit(fcntl, "flock", errno.ENOLCK)
for name in ("chmod", "fchmod", "link", "symlink", "utime"):
    limit(os, name, errno.EPERM)
runpy.run_path({repo!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_on_a_limited_file_system_says_once_what_is_missing(train, tmp_path):
    script, out = tmp_path / "limited.py", tmp_path / "share" / "out"
    script.write_text(LIMITED.format(repo=str(REPO)))
    flags = ["--eval-every", -1, "--save-every", 5, "--out-dir", out, "--run-name", "a"]
    for steps, resume in ((10, []), (20, ["--resume"])):
        result = train(*flags, "--num-iterations", steps, *resume, script=script)
        assert result.code == 0 and "Traceback" not in result.output, result.output
        words = " ".join(result.output.split())
        assert words.count("does not support file locks") == 1
        assert words.count("does not support syncing folders") == 1
        newest, faults = checkpoint.newest_valid(out / "a" / "checkpoints")
        assert newest.name == f"step_{steps:06d}" and not faults and "save " not in words
    assert (out / "a" / "report.md").exists()


def test_a_checkpoint_that_cannot_be_deleted_is_kept(tmp_path, monkeypatch):
    """A share of Windows locks files that someone reads."""
    first, rename = write(tmp_path, 1), os.rename

    def locked(old, new):
        if old == first:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(old, new)

    monkeypatch.setattr(os, "rename", locked)
    assert write(tmp_path, 2, keep=1).exists() and first.exists()
    monkeypatch.undo()
    write(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_the_newest_run_is_found_where_times_are_rounded(tmp_path):
    stamp = "20261126-060504"
    for name in (f"{stamp}-2", f"{stamp}-10", stamp):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (1000, 1000))
    assert RunFolder.find(tmp_path).path.name == f"{stamp}-10"
    os.utime(tmp_path / stamp / "config.json", (1002, 1002))
    assert RunFolder.find(tmp_path).path.name == stamp


def test_a_save_without_another_thread(tmp_path, monkeypatch):
    saver, weights = checkpoint.Saver(tmp_path, keep=2), {"w": torch.ones(3)}

    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    saver.save(1, {"model": weights, "optimizer": weights}, {"step": 1})
    saver.wait()
    assert saver.outcomes() == [("step_000001", None)]
    with pytest.raises(RuntimeError, match="new thread"):  # rather now than after the training
        checkpoint.Saver(tmp_path, keep=2)


def test_the_saver_uses_unpinned_memory_if_pinning_fails(tmp_path, monkeypatch):
    empty, pinned = torch.empty, []

    def limited(*shape, pin_memory=False, **options):  # only one buffer can be pinned
        pinned.append(pin_memory)
        if pin_memory and len(pinned) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", limited)
    saver = checkpoint.Saver(tmp_path, keep=2, pin=True)
    saver.save(1, {"model": {"a": torch.ones(3), "b": torch.ones(4)}}, {})
    saver.wait()
    assert saver.outcomes() == [("step_000001", None)] and pinned == [True, True, False, False]
    monkeypatch.setattr(saver, "buffers", {})
    monkeypatch.setattr(torch, "empty", exhausted)
    saver.save(2, {"model": {"a": torch.ones(3)}}, {})
    ((name, error),) = saver.outcomes()
    assert name == "step_000002" and "allocate" in str(error)


def exhausted(*shape, **options):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_a_deleted_run_folder_prints_one_line_and_training_continues(train, tmp_path):
    process = train.start("--num-iterations", 100_000, "--save-every", 20)
    wait_for(process, "step")
    shutil.rmtree(tmp_path / "out" / "a")
    for line in process.stdout:
        if "tries again" in line:
            break
    assert "No such file" in line
    process.send_signal(signal.SIGTERM)
    result = train.finish(process)
    assert result.code == 1 and "save     the last one failed: " in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "out" / "a").exists()


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_a_run(train):
    process = train.start("--num-iterations", 30)
    wait_for(process, "step")
    process.stdout.close()
    assert process.wait(timeout=100) == 0


@pytest.mark.slow
def test_saves_by_the_clock(train):
    result = train("--num-iterations", 200, "--save-minutes", 0.005, "--eval-every", -1)
    saved = [r["step"] for r in result.log if r.get("event") == "saved"]
    assert len(saved) > 2 and saved == sorted(set(saved)) and saved[-1] == 200
    folders = {f.name for f in (result.folder / "checkpoints").iterdir()}
    assert folders == {f"step_{step:06d}" for step in saved[-2:]}  # --keep-checkpoints is 2


@pytest.mark.slow
def test_a_resume_without_a_valid_checkpoint_is_an_error(train):
    first = train("--num-iterations", 10)
    (first.folder / "checkpoints" / "step_000010" / "state.json").unlink()
    again = train("--resume")
    assert again.code == 2 and "state.json" in again.output and "is valid" in again.output
    assert again.log == first.log


def start_unnamed(train, *flags, **options):
    """Start a run without a name, which the fixture cannot do."""
    home, out = train.home, train.out
    return train.start(*TINY, "--data", home / "text", "--out-dir", out, *flags, tiny=False, **options)


@pytest.mark.slow
def test_runs_started_at_the_same_time_get_different_folders(train):
    begin = time.time()
    processes = [start_unnamed(train, "--num-iterations", 12, "--eval-every", -1) for _ in range(4)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    folders = sorted(train.out.iterdir())
    assert len(folders) == 4 and all((folder / "summary.json").exists() for folder in folders)
    printed = [re.search(r"^run      (.+)$", output, re.MULTILINE)[1] for output in outputs]
    assert sorted(printed) == sorted(map(str, folders))
    stamp = time.strptime(folders[0].name[:15], "%Y%m%d-%H%M%S")
    assert -2 < time.mktime(stamp) - begin < 60


def test_runs_created_in_the_same_second_and_a_name_that_exists(tmp_path, monkeypatch):
    class Clock(checkpoint.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 11, 26, 6, 5, 4)

    monkeypatch.setattr(checkpoint, "datetime", Clock)
    names = [RunFolder.create(tmp_path / "out").path.name for _ in range(3)]
    assert names == ["20261126-060504", "20261126-060504-2", "20261126-060504-3"]
    assert RunFolder.create(tmp_path / "out", "mine").path.name == "mine"
    (tmp_path / "file").write_text("")
    cases = {("out", "mine"): "--resume", ("out", "x" * 300): "too long", ("file", None): "--out-dir"}
    for (out, name), advice in cases.items():
        with pytest.raises(CheckpointError, match=advice) as error:
            RunFolder.create(tmp_path / out, name)
        assert len(str(error.value).splitlines()) == 2


def test_only_a_folder_created_by_this_process_is_abandoned(tmp_path):
    new = RunFolder.create(tmp_path, "a")
    new.claim()
    found = RunFolder.find(tmp_path, "a")
    found.abandon()
    assert new.is_new and not found.is_new and new.path.is_dir()
    new.abandon()
    assert not new.path.exists()
    with pytest.raises(CheckpointError, match=f"no run {new.path} to resume.\nStart one without"):
        RunFolder.find(tmp_path, "a")
    with pytest.raises(CheckpointError, match=f"no run in {tmp_path} to resume.\nStart one without"):
        RunFolder.find(tmp_path)


def test_a_run_folder_finds_its_settings_and_its_checkpoint(tmp_path):
    run = RunFolder.create(tmp_path)
    assert run.saved_settings() == ({}, {}, []) and run.to_resume() == (None, [])
    run.checkpoints.mkdir()
    assert not run.has_begun()
    state, weights = {"settings": {"depth": 2}, "given": {"depth": 2}}, {"w": torch.ones(3)}
    tensors = {"model": weights, "optimizer": weights}
    folder = checkpoint.write(run.checkpoints, "step_000001", tensors, state, keep=9)
    assert run.has_begun() and run.to_resume() == (folder, [])
    *saved, (warning,) = run.saved_settings()
    assert saved == [{"depth": 2}, {"depth": 2}] and warning.endswith(f"the settings come from {folder}")
    with pytest.raises(CheckpointError, match="cannot read .*config.json.*\n.*give another run"):
        checkpoint.initial_weights(run.path)
    config = {"settings": {"depth": 3}, "given": {}}
    (run.path / "config.json").write_text(json.dumps(config))
    assert run.saved_settings() == ({"depth": 3}, {}, [])
    found, opened, found_config = checkpoint.initial_weights(run.path)
    assert (found, found_config) == (folder, config) and torch.equal(opened["w"], weights["w"])
    only_weights = checkpoint.write(run.checkpoints, "step_000002", {"model": weights}, state, keep=9)
    with pytest.raises(CheckpointError, match=f"{only_weights} contains only the weights"):
        run.to_resume()


@pytest.mark.slow
def test_resuming_a_name_that_does_not_exist_is_an_error(train, tmp_path):
    flags = ["--num-iterations", 12, "--run-name", "my-first-run", "--eval-every", -1]
    first = train(*flags, run="my-first-run")
    assert first.code == 0
    wrong = train("--resume", "--run-name", "my-frist-run")
    assert wrong.code == 2 and "Did you mean my-first-run?" in wrong.output, wrong.output
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["my-first-run"]


@pytest.mark.slow
def test_resume_starts_a_run_in_an_empty_folder_and_works_from_another_directory(train, tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    flags = ["--num-iterations", 100_000, "--run-name", "a", "--resume", "--eval-every", -1]
    data = os.path.relpath(train.home / "text", tmp_path)  # a relative path must also work
    process = train.start(*flags, "--data", data)
    wait_for(process, "step")
    process.send_signal(signal.SIGINT)
    first = train.finish(process)
    assert first.code == 130 and first.log[0]["event"] == "started", first.output
    (line,) = [line for line in first.output.splitlines() if line.startswith("python ")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = f"{shlex.quote(sys.executable)}{line[6:]} --num-iterations {first.summary['steps'] + 2}"
    env = {**os.environ, "ONEDIAL_HOME": str(train.home / "cache")}
    again = subprocess.run(command, shell=True, cwd=elsewhere, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert not list(elsewhere.iterdir())
    assert json.loads((first.folder / "summary.json").read_text())["steps"] == first.summary["steps"] + 2


@pytest.mark.slow
def test_a_claimed_folder_names_the_process_that_uses_it(tmp_path):
    run = RunFolder(tmp_path)
    run.claim()
    code = "import checkpoint, sys; checkpoint.RunFolder(sys.argv[1]).claim()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    host = socket.gethostname()
    assert other.returncode == 1 and f"in use by process {os.getpid()} on {host}" in other.stderr
    assert f"delete {tmp_path / 'lock'}" in other.stderr
    os.close(run.lock)
    assert subprocess.run(command, cwd=REPO).returncode == 0


@pytest.mark.slow
def test_a_run_that_is_still_training_cannot_be_resumed(train):
    process = train.start("--num-iterations", 100_000)
    wait_for(process, "step")
    second = train("--resume", "--run-name", "a")
    assert second.code == 2 and "is in use by process" in second.output
    process.send_signal(signal.SIGINT)
    assert train.finish(process).code == 128 + signal.SIGINT
    assert train("--resume", "--run-name", "a", "--num-iterations", 1).code == 0


@pytest.mark.slow
def test_sigusr1_saves_and_training_continues(train):
    process = train.start("--num-iterations", 400, "--eval-every", -1)
    wait_for(process, "step")
    process.send_signal(signal.SIGUSR1)
    result = train.finish(process)
    saved = [r for r in result.log if r.get("event") == "saved"]
    assert result.code == 0 and result.summary["steps"] == 400
    assert len(saved) == 2 and saved[0]["folder"] < "step_000400" == saved[1]["folder"]


def ranks_of(process):
    """The pids of the two training processes of torchrun, in the order in which they started."""
    command = ["pgrep", "-P", str(process.pid), "-f", "train.py"]
    found = subprocess.run(command, capture_output=True, text=True)
    first, second = sorted(int(pid) for pid in found.stdout.split())
    return first, second


def is_alive(pid):
    """Whether a process with this pid exists and has not ended."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip() != "" and not found.stdout.startswith(
        "Z"
    )  # Z: its parent has not read its status


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGXCPU])
def test_the_signals_of_batch_systems_save_and_stop(train, number):
    process = train.start("--num-iterations", 100_000, "--eval-every", -1)
    wait_for(process, "step")
    process.send_signal(number)
    result = train.finish(process)
    assert result.code == 128 + number and f"stopped  by {number.name}" in result.output, result.output
    saved, faults = checkpoint.newest_valid(result.folder / "checkpoints")
    assert result.log[-1]["event"] == "interrupted" and not faults
    assert saved.name == f"step_{result.log[-1]['step']:06d}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_save_and_end_if_torchrun_dies(train, number):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # machine.py ignores it, and processes inherit that
    process = train.start("--num-iterations", 100_003, "--eval-every", -1, processes=2)
    wait_for(process, "step")
    ranks = ranks_of(process)
    process.send_signal(number)  # torchrun does not handle SIGUSR1
    result = train.finish(process)  # when the ranks have closed the pipe
    assert result.code == -number and not any(map(is_alive, ranks))
    last = result.log[-1]
    assert last["event"] == "interrupted" and "stopped  by SIGTERM" in result.output, result.output
    saved, faults = checkpoint.newest_valid(result.folder / "checkpoints")
    assert saved.name == f"step_{last['step']:06d}" and not faults and result.summary["steps"] == last["step"]


@pytest.mark.slow
def test_if_one_rank_dies_all_stop(train):
    process = train.start("--num-iterations", 100_001, processes=2)
    wait_for(process, "step")
    first, second = ranks_of(process)
    begin = time.time()
    os.kill(second, signal.SIGKILL)
    result = train.finish(process)
    assert result.code == 1 and time.time() - begin < 60
    assert not is_alive(first) and not is_alive(second)


@pytest.mark.slow
def test_a_hanging_rank_stops_the_run_and_prints_all_stacks(train, tmp_path):
    script = edited_copy(tmp_path, "HANG_SECONDS = 600", "HANG_SECONDS = 8", file="machine.py")
    process = train.start("--num-iterations", 100_002, processes=2, script=script)
    wait_for(process, "step")
    begin = time.time()
    stopped = ranks_of(process)[-1]
    os.kill(stopped, signal.SIGSTOP)
    lines = iter(process.stdout.readline, "")
    assert any("most recent call first" in line for line in lines)
    os.kill(stopped, signal.SIGKILL)  # torchrun would do this after 30 s
    result = train.finish(process)
    assert result.code == 1 and time.time() - begin < 60 and "train.py" in result.output


@pytest.mark.slow
def test_resume_is_exact_beyond_the_end_of_an_epoch(train, tmp_path):
    (tmp_path / "short.py").write_text((train.home / "text" / "argparse.py").read_text()[:24_000])
    flags = ["--data", tmp_path / "short.py", "--num-iterations", 60, "--save-every", 30, "--eval-every", -1]
    first = train(*flags)
    assert first.code == 0 and [r for r in first.log if r["kind"] == "step"][-1]["epoch"] > 2, first.output
    before = weights_of(first, 60)
    shutil.rmtree(first.folder / "checkpoints" / "step_000060")
    again = train(*flags, "--run-name", "a", "--resume")
    assert again.code == 0 and "step_000030" in again.output, again.output
    after = weights_of(again, 60)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(losses(first)[s] == losses(again)[s] for s in losses(first).keys() & losses(again).keys())


@pytest.mark.slow
def test_the_best_weights_are_kept_and_used_if_the_text_is_read_again(train, tmp_path):
    text = tmp_path / "short.py"
    text.write_text((train.home / "text" / "argparse.py").read_text()[:16_000])
    run = train("--data", text, "--num-iterations", 200, "--eval-every", 20, "--matrix-lr", 0.02)
    assert run.code == 0, run.output
    vals = {r["step"]: r["val_bpb"] for r in run.log if r["kind"] == "val"}
    lowest = min(vals, key=vals.get)
    epoch = next(r["epoch"] for r in run.log if r["step"] == lowest and r["kind"] == "step")
    assert epoch > 1 and vals[200] > 1.01 * vals[lowest]
    assert f"val      val_bpb was lowest at step {lowest}, after {epoch:.1f} epochs" in run.output
    best, _ = checkpoint.newest_valid(run.folder / "checkpoints", "best")
    assert best.name == f"best_{lowest:06d}" and len([*best.parent.glob("best_*")]) == 1
    state = checkpoint.load(best, "state")
    assert state["val_bpb"] == run.summary["min_val_bpb"] == vals[lowest]
    assert state["settings"]["eval_bytes"] == 4096  # `checkpoint.best` compares val_bpb of the same text only

    def score():
        command = [sys.executable, str(REPO / "sample.py"), str(run.folder), "--score", str(text)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])

    with_best = score()
    shutil.rmtree(best)
    assert score() < 0.99 * with_best  # the last weights fit their training text better
    again = train("--data", text, "--resume", "--num-iterations", 210)
    assert "step_000200" in again.output and again.summary["steps"] == 210


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_extended(train):
    first = train("--num-iterations", 20)
    again = train("--resume")
    assert again.code == 0, again.output
    assert "nothing is left to train" in again.output
    keys = ("steps", "tokens", "val_bpb", "train_loss_ema", "total_training_flops", "total_training_time")
    keys += ("tok_per_sec", "mfu")  # those of the run, not of the second start's benchmark
    assert {key: again.summary[key] for key in keys} == {key: first.summary[key] for key in keys}
    config = (first.folder / "config.json").read_text()
    (first.folder / "config.json").write_text(config[:100])
    damaged = train("--resume", "--run-name", "a")
    assert damaged.code == 0 and "the settings come from" in " ".join(damaged.output.split()), damaged.output
    assert damaged.config["settings"] == json.loads(config)["settings"]
    more = train("--resume", "--num-iterations", 30)
    assert more.code == 0 and "--num-iterations was 20, is 30" in more.output
    expected = "100% of the run was done, 67% of the new horizon: the learning rate rises again"
    assert expected in " ".join(more.output.split()) and more.summary["steps"] == 30


# train.py with {fault} on the last of two ranks, in the 7th step of the optimizer
FAULTY = """
import os, runpy, sys
sys.path.insert(0, {repo!r})
import optim_muon
step = optim_muon.MuonAdamW.step
def faulty(self, loss):
    self.calls = getattr(self, "calls", 0) + 1
    parameter = self.param_groups[-1]["params"][-1]  # a scalar, on every rank
    bad = self.calls == 7 and os.environ["RANK"] == "1"
    if bad and {fault!r} == "nan":
        parameter.grad[0] = float("nan")
    step(self, loss)
    if bad and {fault!r} == "bit":
        parameter.data[0] += 1e-6
optim_muon.MuonAdamW.step = faulty
runpy.run_path({repo!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_all_ranks_skip_a_step_if_one_has_a_nan_gradient(train, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(repo=str(REPO), fault="nan"))
    flags = ["--num-iterations", 12, "--save-every", 6, "--eval-every", -1]
    result = train(*flags, script=script, processes=2)
    assert result.code == 0, result.output  # the ranks' weights are compared before each save
    (event,) = [r for r in result.log if r.get("event") == "skipped_step"]
    assert (event["step"], event["skipped_steps"], event["cursors"]) == (7, 1, [6 * 8])
    found = losses(result)
    assert found[7] is None and all(found[s] is not None for s in found if s != 7)
    assert result.summary["skipped_steps"] == 1
    clean = train(*flags, "--run-name", "b", run="b", processes=2)
    assert "Warning" not in clean.output
    assert [found[s] for s in range(1, 7)] == [losses(clean)[s] for s in range(1, 7)]
    assert found[8] != losses(clean)[8]  # the clean run made one more update


@pytest.mark.slow
def test_a_rank_with_different_weights_is_named_and_nothing_is_saved(train, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(repo=str(REPO), fault="bit"))
    result = train("--num-iterations", 12, "--save-every", 6, script=script, processes=2)
    assert result.code == 1
    assert "the weights of rank 1 differ from those of rank 0" in result.output
    assert [f.name for f in checkpoint.newest_first(result.folder / "checkpoints")] == ["step_000006"]
