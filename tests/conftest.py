"""Shared by the tests: the path to the scripts, a small corpus, and a fixture that runs train.py."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower for tiny models
signal.signal(signal.SIGINT, signal.default_int_handler)  # processes started in the background ignore it

import report  # noqa: E402  it imports torch, which reads OMP_NUM_THREADS

TINY = (
    "--depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 64 --total-batch-size 512 --vocab-size 512 "
    "--eval-bytes 4096 --no-compile --peak-tflops 0.1 --device-type cpu --dtype float32 "
    # low learning rates: differences from the order of summation stay small for 20 steps
    "--matrix-lr 0.004 --embedding-lr 0.06 --unembedding-lr 0.002 --scalar-lr 0.1"
).split()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The session's folder: text/, a corpus of a few hundred kB; cache/; hidden/, which hides matplotlib."""
    folder = tmp_path_factory.mktemp("home")
    text = folder / "text"
    text.mkdir()
    library = Path(json.__file__).parent.parent
    for file in sorted(library.glob("*.py"))[:40]:
        (text / file.name).write_bytes(file.read_bytes())
    (folder / "hidden").mkdir()
    (folder / "hidden" / "matplotlib.py").write_text("raise ImportError('hidden by the tests')")
    return folder


@pytest.fixture
def train(home, tmp_path):
    """
    train("--num-iterations", 20, ...) runs train.py in a subprocess on the tiny corpus and model. It returns
    the exit code, output, folder (of --run-name a by default), log (records), summary, config (or None).
    Without draw=True matplotlib is hidden, which saves two seconds.
    """

    def start(*flags, processes=1, tiny=True, script=REPO / "train.py", threads=1, draw=False, nodes=()):
        command = [sys.executable, str(script)]
        if processes > 1 or nodes:
            torchrun = ["-m", "torch.distributed.run", *(nodes or ["--standalone"])]
            command = [sys.executable, *torchrun, f"--nproc_per_node={processes}", str(script)]
        flags = [str(f) for f in flags]
        if tiny:
            flags = [*TINY, "--data", str(home / "text"), "--out-dir", str(tmp_path / "out"), *flags]
        if tiny and "--run-name" not in flags and "--resume" not in flags:
            flags += ["--run-name", "a"]
        env = {**os.environ, "ONEDIAL_HOME": str(home / "cache"), "OMP_NUM_THREADS": str(threads)}
        if not draw:
            env["PYTHONPATH"] = str(home / "hidden")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command + flags, cwd=tmp_path, env=env, **pipes)

    def finish(process, run="a"):
        output = process.communicate(timeout=300)[0]
        folder = tmp_path / "out" / run
        read = lambda name: json.loads((folder / name).read_text()) if (folder / name).exists() else None  # noqa: E731
        log = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
        return SimpleNamespace(
            code=process.returncode,
            output=output,
            folder=folder,
            log=[json.loads(line) for line in log],
            summary=read("summary.json"),
            config=read("config.json"),
        )

    def run(*flags, run="a", **options):
        return finish(start(*flags, **options), run)

    run.start, run.finish, run.home, run.out = start, finish, home, tmp_path / "out"
    return run


def losses(result):
    """{step: train_loss} of a run."""
    return {r["step"]: r["train_loss"] for r in result.log if r["kind"] == "step"}


def edited_copy(folder, old, new, file="train.py"):
    """Copy all scripts to `folder` and replace `old` in one of them. Returns the path of its train.py."""
    for path in REPO.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    if (REPO / "export").exists():
        shutil.copytree(REPO / "export", folder / "export", dirs_exist_ok=True)
    text = (folder / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    return folder / "train.py"


def wait_for(process, start):
    """Read a run's output until a line starts with `start`. Returns that line."""
    for line in process.stdout:
        if line.startswith(start):
            return line


def wait_for_progress(folder, share):
    """Wait until the log of the run in `folder` shows a progress above `share`."""
    deadline = time.monotonic() + 120
    while not any(record.get("progress", 0) > share for record in report.read_log(folder)):
        assert time.monotonic() < deadline, f"no progress above {share} in 120 s"
        time.sleep(0.05)


class Hub(http.server.BaseHTTPRequestHandler):
    """
    The part of the hub that a download needs, on this machine. files: {name: content}. listing: whether it
    lists them, too, with commit, sizes and sha256. mode: how it fails, or {name: mode}. changed: {name:
    another content that is sent}. rates: {name: bytes per second}. log: the names of the files sent.
    """

    files, changed, rates, log, mode = {}, {}, {}, [], "good"
    commit, listing = "c0ffee" + "0" * 34, True
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name, get = self.path.split("/")[-1].split("?")[0], self.command == "GET"
        mode = self.mode if isinstance(self.mode, str) else self.mode.get(name, "good")
        if mode == "drops":
            self.close_connection = True
            return
        is_listing, known = self.path.startswith("/api/"), name in self.files and "nobody" not in self.path
        troubled = mode in ("404", "429", "500", "503") or (mode == "500 on GET" and get)
        status = int(mode[:3]) if troubled else 200 if known or (is_listing and self.listing) else 404
        content = b"{}"
        if status == 200:
            content = self.listed() if is_listing else self.changed.get(name, self.files[name])
        if get and known:
            self.log.append(name)
        length = len(content) // 2 if mode == "short" and get else len(content)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if get and mode == "truncates":  # sends half of the announced length, and nothing on a retry
            self.wfile.write(b"" if "Range" in self.headers else content[: length // 2])
            self.close_connection = True
        elif get:
            block = 1_000  # at a low rate, too, a client gets some within its timeout
            for at in range(0, length, block):
                self.wfile.write(content[at : min(length, at + block)])
                SLEEP(block / self.rates.get(name, 1e9))

    do_HEAD = do_POST = do_GET

    def listed(self):
        """The answer to HfApi().dataset_info."""
        siblings = []
        for name, content in self.files.items():
            size, digest = len(content), hashlib.sha256(content).hexdigest()
            lfs = {"sha256": digest, "size": size, "pointerSize": 100}
            siblings.append({"rfilename": name, "size": size, "lfs": lfs})
        return json.dumps({"id": "some/set", "sha": self.commit, "siblings": siblings}).encode()

    def log_message(self, *arguments):
        pass


SLEEP = time.sleep  # a test may replace that of the module


@contextlib.contextmanager
def hub_server():
    """A Hub that serves, a class of its own; `address` is for HF_ENDPOINT."""
    kind = type("Hub", (Hub,), {"files": {}, "changed": {}, "rates": {}, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    kind.address = f"http://127.0.0.1:{server.server_port}"
    yield kind
    server.shutdown()
    server.server_close()
