"""No kill, flipped bit or full disk costs a run: real processes, real damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, losses

import checkpoint

DISK_CALLS = {"open", "os.rename", "os.mkdir", "shutil.rmtree", "os.remove", "os.rmdir", "os.scandir"}


def write_and_die(root, moment):
    """Write step 2 in a forked process that kills itself at its moment-th disk call -> its exit status."""
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
    return checkpoint.write(root, step, {"model": state, "optimizer": state}, {"step": step}, keep)


def test_what_was_saved_comes_back(tmp_path):
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


def test_sigkill_at_any_moment_of_the_writing(tmp_path):
    for moment in range(1, 1000):
        root = tmp_path / f"kill{moment}"
        root.mkdir()
        write(root, 1)
        status = write_and_die(root, moment)
        folder, reasons = checkpoint.newest_valid(root)
        assert folder is not None and reasons == [], (moment, reasons)
        value = 2.0 if folder.name == "step_000002" else 1.0
        assert torch.equal(checkpoint.load(folder, "model")["w"], torch.full((1000,), value))
        write(root, 3)  # the next save cleans up
        assert not list(root.glob(".tmp-*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert moment > 20 and value == 2.0  # the moments cover the writing from its start to its end


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, name, harm):
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
    assert str(folder / name) in checkpoint.fault(folder)
    newest, reasons = checkpoint.newest_valid(tmp_path)
    assert newest.name == "step_000001" and len(reasons) == 1 and name in reasons[0]


def test_every_bit_of_the_manifest_counts(tmp_path):
    folder = write(tmp_path, 1)
    content = (folder / "manifest.json").read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        if changed.split() != content.split():  # white space is not information
            assert "manifest.json is missing or damaged" in checkpoint.fault(folder)


def test_pruning_counts_only_valid_ones(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    third = write(tmp_path, 3)
    (third / "model.pt").write_bytes(b"rubbish")
    (tmp_path / "step_000004").mkdir()  # without manifest: never complete
    fifth = write(tmp_path, 5, keep=2)
    assert not first.exists() and second.exists() and fifth.exists()
    assert (tmp_path / "step_000004").exists()
    assert checkpoint.newest_valid(tmp_path)[0] == fifth


def test_copies_under_other_names_are_left_alone(tmp_path):
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
        buffer = saver.buffers["model/w"].data_ptr()
        weights.fill_(-1)  # the loop goes on while the thread writes
    folder, error = saver.wait()
    assert error is None and folder.name == "step_000003" and saver.wait() is None
    assert [f.name for f in checkpoint.complete(tmp_path)] == ["step_000003", "step_000002"]
    for step in (2, 3):
        assert checkpoint.load(tmp_path / f"step_{step:06d}", "model")["w"].unique().tolist() == [step]
    saver.save(4, {"model": {"w": weights}}, {})
    assert saver.buffers["model/w"].data_ptr() == buffer
    saver.wait()


def test_a_failed_save_is_told_and_the_next_one_tries_again(tmp_path):
    root = tmp_path / "checkpoints"
    root.write_text("a file in the way")
    saver = checkpoint.Saver(root, keep=2)
    saver.save(1, {"model": {"w": torch.ones(3)}}, {})
    folder, error = saver.wait()
    assert folder is None and isinstance(error, OSError)
    root.unlink()
    root.mkdir()
    saver.save(2, {"model": {"w": torch.ones(3)}}, {})
    assert saver.wait()[0].name == "step_000002"


def weights_of(run, step):
    return torch.load(run.folder / "checkpoints" / f"step_{step:06d}" / "model.pt")


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_weights(train):
    flags = ["--num-iterations", 400, "--save-every", 20, "--eval-every", -1]
    whole = train(*flags)
    for number, seconds in enumerate((0.2, 0.5, 0.9)):
        process = train.start(*flags, "--run", "b", "--resume")
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, number
    last = train(*flags, "--run", "b", "--resume", run="b")
    assert last.code == 0, last.output
    a, b = weights_of(whole, 400), weights_of(last, 400)
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [r["step"] for r in last.log if r["kind"] == "step"]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 400
    common = losses(whole).keys() & losses(last).keys()
    assert len(common) > 10 and all(losses(whole)[s] == losses(last)[s] for s in common)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_name(train):
    flags = ["--num-iterations", 20, "--save-every", 10, "--eval-every", -1]
    whole = train(*flags)
    path = whole.folder / "checkpoints" / "step_000020" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    before = weights_of(whole, 20)
    again = train("--resume")
    assert again.code == 0 and f"{path} is damaged" in again.output and "step_000010" in again.output
    after = weights_of(again, 20)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint.fault(path.parent) is None  # written anew


@pytest.mark.slow
def test_a_checkpoint_moves_between_world_sizes(train):
    flags = ["--num-iterations", 18, "--save-every", 6, "--eval-every", -1, "--keep-checkpoints", 9]
    whole = train(*flags)
    moved = train(*flags, "--run", "b", run="b", processes=2)
    for step, processes in ((6, 1), (12, 4)):
        for folder in (moved.folder / "checkpoints").iterdir():
            if int(folder.name[-6:]) > step:
                shutil.rmtree(folder)
        moved = train(*flags, "--run", "b", "--resume", run="b", processes=processes)
        assert moved.code == 0 and f"step_{step:06d}" in moved.output, moved.output
    assert moved.summary["val_bpb"] == pytest.approx(whole.summary["val_bpb"], rel=1e-4)
    a, b = losses(whole), losses(moved)
    assert 18 in b and all(a[s] == pytest.approx(b[s], rel=1e-4) for s in a.keys() & b.keys())


@pytest.mark.slow
@pytest.mark.parametrize("target, sent", [("rank", signal.SIGTERM), ("torchrun", signal.SIGINT)])
def test_a_signal_saves_on_both_of_two_ranks_at_one_step(train, target, sent):
    flags = ["--num-iterations", 100_000, "--log-every", 1_000_000, "--eval-every", -1]
    process = train.start(*flags, processes=2)
    first_step(process)
    first_step(process)  # the 10th: from here on windows would never end by themselves
    time.sleep(0.5)
    children = ranks_of(process, "train.py.*num-iterations 100000")
    os.kill(max(children) if target == "rank" else process.pid, sent)
    result = train.finish(process)
    last = result.log[-1]
    assert last["event"] == "interrupted" and f"by {sent.name}" in result.output
    assert "continue with: torchrun --nproc_per_node=2 train.py --" in result.output
    folder, reasons = checkpoint.newest_valid(result.folder / "checkpoints")
    assert folder.name == f"step_{last['step']:06d}" and reasons == []
    assert result.output.count("stopped  by") == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_training_goes_on(train, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        flags = ["--num-iterations", 30, "--save-every", 10, "--out-dir", disk]
        result = train.finish(train.start(*flags), run="a")
    finally:
        log = (disk / "a" / "log.jsonl").read_text().splitlines()
        subprocess.run(["umount", str(disk)])
    assert result.code == 1, result.output
    assert result.output.count("save     failed, the next one tries again: [Errno 28] No space left") == 2
    assert result.output.count("error: the last save failed: [Errno 28] No space left") == 1
    assert "Traceback" not in result.output
    assert max(json.loads(line)["step"] for line in log) == 30


def test_a_folder_that_vanishes_is_one_line_and_training_goes_on(train, tmp_path):
    process = train.start("--num-iterations", 100_000, "--save-every", 20)
    first_step(process)
    shutil.rmtree(tmp_path / "out" / "a")
    for line in process.stdout:
        if "the next one tries again" in line:
            break
    assert "No such file" in line
    process.send_signal(signal.SIGTERM)
    result = train.finish(process)
    assert result.code == 1 and "error: the last save failed: " in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "out" / "a").exists()


def test_a_closed_pipe_stops_no_run(train):
    process = train.start("--num-iterations", 30)
    first_step(process)
    process.stdout.close()
    assert process.wait(timeout=100) == 0


def test_saves_by_the_clock(train):
    result = train("--num-iterations", 200, "--save-minutes", 0.005, "--eval-every", -1)
    saved = [r["step"] for r in result.log if r.get("event") == "saved"]
    assert len(saved) > 2 and saved == sorted(set(saved)) and saved[-1] == 200
    folders = {f.name for f in (result.folder / "checkpoints").iterdir()}
    assert folders == {f"step_{step:06d}" for step in saved[-2:]}  # the --keep-checkpoints


def test_without_any_valid_checkpoint_nothing_is_begun_anew(train):
    whole = train("--num-iterations", 10)
    (whole.folder / "checkpoints" / "step_000010" / "state.json").unlink()
    again = train("--resume")
    assert again.code == 2 and "state.json" in again.output and "is valid" in again.output
    assert again.log == whole.log


@pytest.mark.slow
def test_a_run_that_is_still_going_cannot_be_resumed(train):
    process = train.start("--num-iterations", 100_000)
    first_step(process)
    second = train("--resume", "--run", "a")
    assert second.code == 2 and "still going" in second.output
    process.send_signal(signal.SIGINT)
    assert train.finish(process).code == 128 + signal.SIGINT
    assert train("--resume", "--run", "a", "--num-iterations", 1).code == 0


@pytest.mark.slow
def test_sigusr1_saves_and_training_goes_on(train):
    process = train.start("--num-iterations", 400, "--eval-every", -1)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGUSR1)
            break
    result = train.finish(process)
    saved = [r for r in result.log if r.get("event") == "saved"]
    assert result.code == 0 and result.summary["steps"] == 400
    assert len(saved) == 2 and saved[0]["folder"] < "step_000400" == saved[1]["folder"]


def first_step(process):
    """Read a run's output up to its first step line."""
    for line in process.stdout:
        if line.startswith("step"):
            return


def ranks_of(process, pattern):
    """The pids of the training processes that torchrun started, in the order of their start."""
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
    return sorted(int(pid) for pid in found if int(pid) != process.pid)


@pytest.mark.slow
def test_when_one_rank_dies_all_end(train):
    process = train.start("--num-iterations", 100_001, processes=2)
    first_step(process)
    begin = time.time()
    os.kill(ranks_of(process, "train.py.*num-iterations 100001")[-1], signal.SIGKILL)
    result = train.finish(process)
    assert result.code == 1 and time.time() - begin < 60
    assert ranks_of(process, "train.py.*num-iterations 100001") == []


@pytest.mark.slow
def test_a_hanging_rank_ends_the_run_with_all_stacks(train, tmp_path):
    for name in ("train", "model", "optim_muon", "dataloader", "report", "checkpoint"):
        (tmp_path / f"{name}.py").write_bytes((REPO / f"{name}.py").read_bytes())
    script = tmp_path / "train.py"
    assert "HANG_SECONDS = 600" in script.read_text()
    script.write_text(script.read_text().replace("HANG_SECONDS = 600", "HANG_SECONDS = 8"))
    process = train.start("--num-iterations", 100_002, processes=2, script=script)
    first_step(process)
    begin = time.time()
    stopped = ranks_of(process, "train.py.*num-iterations 100002")[-1]
    os.kill(stopped, signal.SIGSTOP)
    result = train.finish(process)
    assert result.code == 1 and time.time() - begin < 60
    assert "most recent call first" in result.output and "train.py" in result.output


@pytest.mark.slow
def test_resuming_goes_on_exactly_beyond_the_end_of_an_epoch(train, tmp_path):
    (tmp_path / "short.py").write_text((REPO / "dataloader.py").read_text())
    flags = ["--data", tmp_path / "short.py", "--num-iterations", 60, "--save-every", 30, "--eval-every", -1]
    whole = train(*flags)
    assert whole.code == 0 and [r for r in whole.log if r["kind"] == "step"][-1]["epoch"] > 2, whole.output
    before = weights_of(whole, 60)
    shutil.rmtree(whole.folder / "checkpoints" / "step_000060")
    again = train(*flags, "--run", "a", "--resume")
    assert again.code == 0 and "step_000030" in again.output, again.output
    after = weights_of(again, 60)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(losses(whole)[s] == losses(again)[s] for s in losses(whole).keys() & losses(again).keys())


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_goes_on_if_there_is_more_to_do(train):
    whole = train("--num-iterations", 20)
    again = train("--resume")
    assert again.code == 0, again.output
    keys = ("steps", "tokens", "val_bpb", "train_loss_ema", "total_training_flops", "total_training_time")
    assert {key: again.summary[key] for key in keys} == {key: whole.summary[key] for key in keys}
    config = (whole.folder / "config.json").read_text()
    (whole.folder / "config.json").write_text(config[:100])
    damaged = train("--resume", "--run", "a")
    assert damaged.code == 0 and "the settings are taken from" in damaged.output, damaged.output
    assert damaged.config["settings"] == json.loads(config)["settings"]
    more = train("--resume", "--num-iterations", 30)
    assert more.code == 0 and "--num-iterations was 20, is 30" in more.output
    assert "the learning rate decays since step 7" in more.output and more.summary["steps"] == 30


# a train.py in which {fault} happens on the last of two ranks, in the optimizer's 7th step
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
def test_a_nan_in_one_ranks_gradients_is_skipped_by_all(train, tmp_path):
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
    clean = train(*flags, "--run", "b", run="b", processes=2)
    assert "Warning" not in clean.output
    assert [found[s] for s in range(1, 7)] == [losses(clean)[s] for s in range(1, 7)]
    assert found[8] != losses(clean)[8]  # the clean run made one update more


@pytest.mark.slow
def test_a_rank_whose_weights_differ_is_named_and_nothing_is_saved(train, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(repo=str(REPO), fault="bit"))
    result = train("--num-iterations", 12, "--save-every", 6, script=script, processes=2)
    assert result.code == 1
    assert "the weights of rank 1 differ from those of rank 0" in result.output
    assert [f.name for f in checkpoint.complete(result.folder / "checkpoints")] == ["step_000006"]
