"""Generation against the training forward, sampling, scores, the command line of sample.py, export."""

import importlib.util
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO, TINY
from test_model import build, wake

import checkpoint
import dataloader
import dataset
import model as model_module
import report
from model import GPT, CachedAttention, GPTConfig, sample_next_token
from sample import letters, score, scoring_batches, without_folders

BOS = 299


def uncached(model, row, count):
    """The reference: greedy generation that runs the training forward on the complete row for each new id."""
    T, row, new = model.config.max_seq_len, list(row), []
    for _ in range(count):
        if len(row) > T:
            row = [BOS, *row[-(T // 2) :]]
        new.append(model(torch.tensor([row]))[0, -1].argmax().item())
        row.append(new[-1])
    return new


def test_only_generation_forbids_cudnn(monkeypatch):
    """cuDNN builds a plan for each new length. In training PyTorch may pick it."""
    allowed, attend = [], model_module.causal_attention

    def record(*heads):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*heads)

    monkeypatch.setattr(model_module, "causal_attention", record)
    model = build(n_layer=1)
    model(torch.zeros(1, 4, dtype=torch.int64))
    [*model.generate([[1, 2]], BOS, 2)]
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert allowed == [True, False, False, True]


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_cached_generation_equals_uncached(n_layer, length):
    model = wake(build(max_seq_len=16, n_layer=n_layer))
    rows = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(0)).tolist()
    new = [*model.generate(rows, BOS, 27, temperature=0)]  # the context is exceeded twice
    assert [list(row) for row in zip(*new)] == [uncached(model, row, 27) for row in rows]
    assert len(set(map(tuple, new))) > 10


def test_logits_token_by_token_equal_those_of_the_forward_pass():
    model = wake(build())
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    caches = [CachedAttention(model.config, 2, torch.float32, "cpu") for _ in model.blocks]
    found = [model.next_token_logits(tokens[:, :end], caches) for end in (5, *range(6, 33))]
    found = torch.stack(found, dim=1)
    torch.testing.assert_close(found, model(tokens)[:, 4:], atol=1e-5, rtol=1e-5)


def test_top_p_of_zero_takes_the_most_likely_token():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for top_p in (0.0, 1e-9):
        assert torch.equal(sample_next_token(logits, 0.8, 0, top_p, torch.Generator()), logits.argmax(dim=-1))


def test_the_same_seed_gives_the_same_texts_and_each_row_its_own():
    model, rows = wake(build()), [[BOS, 5, 6]] * 4
    first, same, other = ([*model.generate(rows, BOS, 20, seed=seed)] for seed in (1, 1, 2))
    assert first == same != other
    assert len(set(zip(*first))) == 4  # four different texts from one prompt


def test_tokens_are_sampled_with_the_right_probabilities():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits, order = p.log()[None].expand(20_000, -1), torch.tensor([3, 0, 4, 1, 2])

    def frequencies(temperature=1.0, top_k=0, top_p=1.0):
        generator = torch.Generator().manual_seed(0)
        ids = sample_next_token(logits[:, order], temperature, top_k, top_p, generator)
        return torch.bincount(order[ids], minlength=5) / len(ids)

    def normalized(values):
        return torch.tensor(values) / sum(values)

    for found, expected in (
        (frequencies(), p),
        (frequencies(temperature=0.5), normalized([0.16, 0.09, 0.0225, 0.01, 0.0025])),
        (frequencies(top_k=3), normalized([0.4, 0.3, 0.15, 0, 0])),
        (frequencies(top_k=99), p),
        (frequencies(top_p=0.8), normalized([0.4, 0.3, 0.15, 0, 0])),  # 0.7 would be too few
        (frequencies(top_k=4, top_p=0.7), normalized([0.4, 0.3, 0, 0, 0])),  # top_p of the remaining 0.95
        (frequencies(top_p=1e-9), normalized([1.0, 0, 0, 0, 0])),
        (frequencies(temperature=0), normalized([1.0, 0, 0, 0, 0])),
        (frequencies(temperature=1e-30), normalized([1.0, 0, 0, 0, 0])),
        (frequencies(temperature=1e-40), normalized([1.0, 0, 0, 0, 0])),  # 1 / 1e-40 is infinite in fp32
        (frequencies(temperature=1e-46), normalized([1.0, 0, 0, 0, 0])),  # 0 in fp32
    ):
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
        assert (found[expected == 0] == 0).all()


def test_a_character_is_printed_when_all_its_bytes_have_arrived():
    text = "aé€😀 ende"
    for size in (1, 2, 3, 5):
        data = text.encode()
        parts = [*letters(data[i : i + size] for i in range(0, len(data), size))]
        assert "".join(parts) == text and len(parts) == math.ceil(len(data) / size)
    assert [*letters([b"x\xe2\x82"])] == ["x"]  # the last token is not the end of the character
    assert "".join(letters([b"x\xe2", b"y\xff\xc3", b"\xa9"])) == "x\ufffdy\ufffdé"


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 100, 150])
def test_each_token_is_scored_once_and_a_stride_guarantees_context(stride, length):
    tokens = torch.randint(299, (length,), generator=torch.Generator().manual_seed(0))
    tokens[0] = BOS
    token_bytes = torch.arange(300) % 3 + 1
    token_bytes[BOS] = 0
    places, size = [], 0
    for inputs, targets, count in scoring_batches(tokens, token_bytes, 16, stride):
        size += count
        for row, target in zip(inputs, targets):
            found = [(t, row[: t + 1].tolist()) for t in range(16) if target[t] >= 0]
            for t, context in found:
                place = len(places) + 1  # position in the text; bos is at 0
                known = min(place, t)  # number of text tokens before it in this row
                assert context == [BOS, *tokens[place - known : place].tolist()]
                assert target[t] == tokens[place]
                assert known >= min(place, 16 - stride)
                places.append(place)
    assert places == [*range(1, length)] and size == token_bytes[tokens].sum()


def test_without_a_stride_rows_equal_those_of_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDIAL_HOME", str(tmp_path / "cache"))
    text = (REPO / "model.py").read_text() + "y" * 5000
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("some text to learn from " * 900)
    (tmp_path / "text" / "val.txt").write_text(text)
    corpus = dataset.prepare(str(tmp_path / "text"), 512)
    tokens = dataset.encode_held_out(corpus.tokenizer, [text])
    token_bytes = torch.from_numpy(dataset.token_bytes(corpus.tokenizer).astype(np.int64))
    ours = scoring_batches(torch.from_numpy(tokens.astype(np.int64)), token_bytes, 64, 64, 8)
    theirs = [*dataloader.ValidationRows(corpus, 10**9, 64).batches(8, "cpu")]
    for (inputs, targets, size), (rows, expected, bytes_) in zip(ours, theirs, strict=True):
        padding = len(rows) - len(inputs)  # an evaluation pads its last batch
        assert torch.equal(torch.nn.functional.pad(inputs, (0, 0, 0, padding), value=corpus.bos), rows)
        assert torch.equal(torch.nn.functional.pad(targets, (0, 0, 0, padding), value=-1), expected)
        assert size == bytes_
    texts = [text, "x", "y" * 5000]
    uncut = dataset.encode_held_out(corpus.tokenizer, texts, whole=True)
    assert (uncut == corpus.bos).sum() == 3 and (tokens == corpus.bos).sum() == 3  # cut at 16,384 characters


# -----------------------------------------------------------------------------
# The command line

# runs sample.py once per list of arguments in one process, which imports torch only once
CALLS = """
import contextlib, io, json, os, runpy, sys
calls = json.load(sys.stdin)
results = []
for arguments, written in calls:
    sys.argv = ["sample.py", *arguments]
    contents = (b"", b"", written.encode())
    out, error, sys.stdin = (io.TextIOWrapper(io.BytesIO(text), "utf-8") for text in contents)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = runpy.run_path(SCRIPT, run_name="__main__") and 0
        except SystemExit as end:
            status = end.code or 0
    results.append((status, *(stream.detach().getvalue().decode() for stream in (out, error))))
os.write(3, json.dumps(results).encode())
"""


@pytest.fixture(scope="module")
def out(home, tmp_path_factory):
    """A folder with the run out/a of 12 steps."""
    folder = tmp_path_factory.mktemp("out")
    flags = ["--data", home / "text", "--num-iterations", 12, "--run-name", "a"]
    command = [str(word) for word in (sys.executable, REPO / "train.py", *TINY, *flags)]
    env = {**os.environ, "ONEDIAL_HOME": str(home / "cache"), "PYTHONPATH": str(home / "hidden")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def call(folder, *calls, written=""):
    """`python sample.py ARGUMENTS` in `folder` for each list of arguments -> [(status, stdout, stderr)]."""
    read, write = os.pipe()
    script = CALLS.replace("SCRIPT", repr(str(REPO / "sample.py")))
    script = script.replace("os.write(3", f"os.write({write}")
    calls = json.dumps([(["--device-type", "cpu", *map(str, arguments)], written) for arguments in calls])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r}){script}"]
    done = subprocess.run(command, input=calls.encode(), pass_fds=[write], capture_output=True, cwd=folder)
    os.close(write)
    with open(read, "rb") as pipe:
        assert done.returncode == 0, done.stderr.decode()
        return json.load(pipe)


@pytest.mark.slow
def test_a_run_can_be_used_while_it_trains_on(home, tmp_path):
    """It saves at every step and keeps one checkpoint, so a checkpoint exists for a few milliseconds."""
    flags = ["--data", home / "text", "--num-iterations", 10**6, "--run-name", "a", "--save-every", 1]
    flags += ["--keep-checkpoints", 1, "--eval-every", -1]
    command = [str(word) for word in (sys.executable, REPO / "train.py", *TINY, *flags)]
    env = {**os.environ, "ONEDIAL_HOME": str(home / "cache"), "PYTHONPATH": str(home / "hidden")}
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not [*tmp_path.glob("out/a/checkpoints/step_*")]:
            assert training.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (tmp_path / "file.txt").write_text("def main():\n    pass\n")
        calls = 6 * [["x", "--tokens", 3], ["out/a", "--score", "file.txt"]]
        calls += [["out/a", "--export", "taken"]] if importlib.util.find_spec("transformers") else []
        results = call(tmp_path, *calls)
        assert [(error, 0) for status, _, error in results if status] == []
        steps = [re.match(r"out/a/checkpoints/step_(\d+), ", error)[1] for _, _, error in results]
        assert len(set(steps)) > 2, "the run has to save while it is used"
        done = subprocess.run([sys.executable, REPO / "report.py", "out/a"], env=env, cwd=tmp_path)
        assert done.returncode == 0 and training.poll() is None
    finally:
        training.kill()
        training.wait()


def save(root, name, val_bpb=1.0):
    """A checkpoint with a weight that is equal to its step."""
    step = int(name.split("_")[1])
    root.mkdir(exist_ok=True)
    state = {"step": step, "val_bpb": val_bpb}
    return checkpoint.write(root, name, {"model": {"w": torch.tensor(step)}}, state, keep=None)


@pytest.mark.parametrize("after", ["find_fault", "newest_valid", "best", "load"])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_checkpoint_that_vanishes_before_it_is_opened_is_no_damage(tmp_path, monkeypatch, after, replaced):
    """Its run deletes it just before, or just after, each of the steps from choosing to opening."""
    root, names = tmp_path / "checkpoints", iter(["step_000003", "best_000004", "step_000005"])
    for name in ("step_000001", "step_000002", "best_000001"):
        save(root, name, val_bpb=0.5 if "best" in name else 1.0)
    (tmp_path / "config.json").write_text("{}")
    original = getattr(checkpoint, after)

    def train_on():
        if name := next(names, None):
            old = checkpoint.newest_first(root, name.split("_")[0])
            if replaced:
                save(root, name, val_bpb=0.5 if "best" in name else 1.0)
            for folder in old:
                checkpoint.discard(folder)
                checkpoint.clean_up(root)

    def disturbed(*arguments):
        train_on()
        result = original(*arguments)
        train_on()
        return result

    monkeypatch.setattr(checkpoint, after, disturbed)
    folder, weights, state, faults = checkpoint.load_best(root)
    assert faults == []
    if replaced:
        assert weights["w"] == state["step"] == int(folder.name.split("_")[1])
    else:
        assert (folder, weights, state) == (None, None, None)
        with pytest.raises(checkpoint.CheckpointError, match="has no valid checkpoint\\.\n"):
            checkpoint.initial_weights(tmp_path)


def test_weights_to_start_from_are_open_before_their_run_deletes_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    folder = save(tmp_path / "checkpoints", "step_000007")
    found, weights, config = checkpoint.initial_weights(tmp_path)
    shutil.rmtree(folder)
    assert (found, config) == (folder, {}) and weights["w"] == 7


def test_user_fixable_errors_print_two_lines(out, tmp_path):
    shutil.copytree(out / "out", tmp_path / "out")
    for name in ("flipped", "unreadable", "other", "no-tokenizer", "not-saved"):
        shutil.copytree(tmp_path / "out" / "a", tmp_path / name)
    weights = tmp_path / "flipped" / "checkpoints" / "step_000012" / "model.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "unreadable" / "config.json").write_text("{")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["model"]["n_layer"] += 1
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "no-tokenizer" / "tokenizer" / "tokenizer.tiktoken").write_text("nonsense")
    shutil.rmtree(tmp_path / "not-saved" / "checkpoints")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jsonl").write_text('{"words": "x"}\n')
    cases = {
        ("out/a", "x", "--tokens", "-1"): "--tokens: -1 is out of range",
        ("out/a", "x", "--tokens", "many"): "invalid int value: 'many'",
        ("out/a", "x", "--temperature", "-1"): "--temperature: -1 is out of range",
        ("out/a", "x", "--temperature", "nan"): "--temperature: nan is out of range",
        ("out/a", "x", "--top-k", "-1"): "--top-k: -1 is out of range",
        ("out/a", "x", "--top-p", "1.1"): "--top-p: 1.1 is out of range",
        ("out/a", "x", "--num-samples", "0"): "--num-samples: 0 is out of range",
        ("out/a", "def", "main("): "Put the prompt into quotes",
        ("out/a", "x", "--stride", "8"): "--stride needs --score",
        ("out/a", "x", "--text-field", "body"): "--text-field needs --score",
        ("out/a", "x", "--document-separator", "%"): "--document-separator needs --score",
        ("out/a", "--score", "words.jsonl"): "none of its fields is known to contain the text: words",
        ("out/a", "--score", "words.jsonl", "--text-field", "text"): "words.jsonl has no field text",
        ("out/a", "x", "--device-type", "abacus"): "abacus is unknown",
        ("out/b", "x"): "there is no run out/b",
        ("out/b",): "there is no run out/b",  # not a prompt for the newest run
        ("empty", "x"): "empty is not a run",
        ("empty",): "empty is not a run",
        ("x" * 5000, "x"): "there is no run xxx",
        ("out/a", "-x"): "unrecognized arguments: -x",
        ("flipped", "x"): "model.pt is damaged: its sha256 has changed",
        ("unreadable", "x"): "unreadable is damaged: JSONDecodeError",
        ("other", "x"): "other is damaged: RuntimeError",
        ("no-tokenizer", "x"): "no-tokenizer is damaged: ValueError",
        ("not-saved", "x"): "not-saved has no checkpoint yet",
        ("out/a", "--score", "empty"): "empty: there is no text in it",
        ("out/a", "--score", "nowhere"): "no such file",
        ("out/a", "--score", "x" * 5000): "cannot be read: File name too long",
        ("out/a", "--export", "empty"): "empty exists",
    }
    results = call(tmp_path, *cases)
    for (arguments, message), (status, written, error) in zip(cases.items(), results, strict=True):
        *loaded, first, advice = error.splitlines()
        assert status == 2 and not written, arguments
        assert first.startswith("error: ") and message in first, (arguments, error)
        assert advice.endswith(".") and len(loaded) <= 1, (arguments, error)
    ((status, _, error),) = call(tmp_path / "empty", ["x"])
    assert status == 2 and "no run in out/ has saved" in error and len(error.splitlines()) == 2


@pytest.mark.slow
def test_unusual_prompts_and_settings_work(out):
    long = (REPO / "model.py").read_text()
    prompts = ["", "def main(", "<|bos|>", os.fsdecode(b"caf\xe9"), long]
    calls = [["out/a", prompt, "--tokens", 8] for prompt in prompts]
    calls += [["out/a", "x", "--top-k", 0], ["out/a", "x", "--top-k", 1], ["out/a", "x", "--temperature", 0]]
    calls += [["out/a", "x", "--num-samples", 3, "--tokens", 9], ["x", "--top-p", 0.5]]
    calls += [["out/a", "x", "--temperature", 100, "--top-k", 0, "--tokens", 1500]]  # almost uniform sampling
    results = call(out, *calls)
    for (_, prompt, *_), (status, _, error) in zip(calls, results):
        assert status == 0 and error.startswith("out/a/checkpoints/step_000012, "), error
        notes = 2 if prompt == long else 1
        assert len(error.splitlines()) == notes, error
    shown = [*prompts[:3], "caf\ufffd", long]
    assert all(written.startswith(text) for (_, written, _), text in zip(results, shown))
    assert results[6][1] == results[7][1] != results[5][1]
    assert "<|bos|>" not in results[10][1] and len(results[10][1]) < 3000  # a bos ends it
    first, *others = re.split(r"\n--- \d\n", results[8][1])
    assert len({first.rstrip("\n"), *others}) == 3 and all(text.startswith("x") for text in others)


def test_prompts_that_look_like_paths_or_flags(out):
    prompts = ["// returns the sum", "//", "/", ".", "a/b", "/usr is", "x" * 5000 + "/y", "-x", "--tokens"]
    calls = [["--tokens", 3, "--", prompt] for prompt in prompts]
    calls += [["out/a", "--tokens", 3, "--", "-x"], ["out/a", "--tokens", 3, "x"]]
    results = call(out, *calls)
    for arguments, (status, written, error) in zip(calls, results, strict=True):
        assert status == 0 and written.startswith(arguments[-1]), (arguments, error)
        assert error.startswith("out/a/checkpoints/step_000012, ")


@pytest.mark.slow
def test_a_prompt_of_a_million_blanks(out):
    """The tokenizer panics if it gets them at once."""
    command = [sys.executable, str(REPO / "sample.py"), "out/a", "--tokens", "3"]
    blanks = " " * 1_500_000
    done = subprocess.run(command, cwd=out, input=blanks + "\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(blanks), done.stderr
    assert re.search(r"the prompt has [\d,]+ tokens: only its end is used", done.stderr)


@pytest.mark.slow
def test_piped_prompts_use_the_best_checkpoint_of_the_newest_run(out, tmp_path):
    shutil.copytree(out / "out", tmp_path / "out")
    shutil.copytree(out / "out" / "a", tmp_path / "out" / "0")
    step = tmp_path / "out" / "0" / "checkpoints" / "step_000012"
    tensors, state = {"model": checkpoint.load(step, "model")}, checkpoint.load(step, "state")
    checkpoint.write(step.parent, "best_000006", tensors, {**state, "val_bpb": 0.5}, keep=1)
    ((status, written, error),) = call(tmp_path, ["--tokens", 5], written="import os\n\nclass A\n")
    first, second = error.splitlines()
    assert status == 0 and second.startswith("out/0/checkpoints/best_000006, 0.5000 bits per byte")
    assert first == "out/0 saved last, of 2 runs in out/. For another one: python sample.py out/a"
    assert written.startswith("import os") and "\nclass A" in written and "> " not in written[:2]


def test_scores_of_documents_files_and_stdin(out, tmp_path):
    texts = ["def main():\n    pass\n" * 40, "", "x = 1"]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "one.txt").write_text(texts[0])
    files = [tmp_path / "two.jsonl", tmp_path / "one.txt"]
    calls = [["out/a", "--score", *more] for more in (files, ["-"], [*files, "--stride", 8])]
    plain, alone, strided = call(out, *calls, written=texts[0])
    pattern = r"([\d.]+) bits per byte, perplexity ([\d.]+) per token, ([\d,]+) tokens, ([\d,]+) bytes  (.+)"
    rows = [re.fullmatch(pattern, line).groups() for line in plain[1].splitlines()]
    names = [f"{files[0]}:1", f"{files[0]}:2", str(files[0]), str(files[1]), "together"]
    sizes = [int(row[3].replace(",", "")) for row in rows]
    assert [row[4] for row in rows] == names and sizes == [840, 5, 845, 840, 1685]
    bits = [float(row[0]) * size for row, size in zip(rows, sizes)]
    assert bits[0] + bits[1] == pytest.approx(bits[2]) and bits[2] + bits[3] == pytest.approx(bits[4])
    for (_, perplexity, tokens, *_), total in zip(rows, bits):
        assert float(perplexity) == pytest.approx(2 ** (total / int(tokens.replace(",", ""))), rel=1e-3)
    assert alone[1].split()[:9] == plain[1].splitlines()[3].split()[:9]
    assert strided[1].count("\n") == 5 and strided[1].split()[0] != plain[1].split()[0]


def test_text_is_found_as_the_run_has_found_it_or_as_flags_say(out, tmp_path):
    shutil.copytree(out / "out" / "a", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["settings"] |= {"text_field": "body", "document_separator": "\\n%%\\n"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    texts = ["def main():\n    pass\n" * 20 + "#", "x = 1", "class A:\n    y = 2"]
    (tmp_path / "files").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "files" / f"{n}.txt").write_text(text)
    rows = [{"text": "another text", "body": text} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    joined = "\n%%\n".join(texts)
    (tmp_path / "parts.txt").write_text(joined)
    (tmp_path / "marks.txt").write_text("<|endoftext|>".join(texts))
    a, flags = out / "out" / "a", ["--text-field", "body", "--document-separator", "%%"]
    results = call(
        tmp_path,
        [a, "--score", "texts.jsonl"],  # expected: the documents one by one
        ["b", "--score", "rows.jsonl"],
        [a, "--score", "rows.jsonl", *flags],
        ["b", "--score", "texts.jsonl", "--text-field", "auto"],
        [a, "--score", "files"],  # expected: the documents together
        ["b", "--score", "parts.txt"],
        ["b", "--score", "-"],
        [a, "--score", "parts.txt", *flags],
        ["b", "--score", "marks.txt", "--document-separator", "auto"],
        written=joined,
    )
    assert [error for status, _, error in results if status] == []
    found = [written.splitlines()[-1].rsplit("  ", 1)[0] for _, written, _ in results]
    assert found == [found[0]] * 4 + [found[4]] * 5


@pytest.mark.slow
def test_ctrl_c_and_a_full_disk_during_generation(out):
    command = [sys.executable, str(REPO / "sample.py"), "out/a", "x", "--tokens", "100000"]
    process = subprocess.Popen(command, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(20)  # it streams: these arrive long before the end
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and len(error.splitlines()) == 1, error
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=out, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_a_terminal_shows_a_prompt_until_ctrl_d(out):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(REPO / "sample.py"), "--tokens", "100000"]
    process = subprocess.Popen(command, cwd=out, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    screen = b""

    def read(until):
        nonlocal screen
        while until not in screen:
            screen += os.read(ours, 1000)
        screen = screen.split(until, 1)[1]

    read(b"> ")
    os.write(ours, b"def one(\n")
    read(b"def one(")  # the typed prompt
    read(b"def one(")  # the output
    process.send_signal(signal.SIGINT)  # stops only this text
    read(b"> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0 and len(process.stderr.read().splitlines()) == 1
    os.close(ours)


# runs sample.py with a model that writes a given text
WRITER = """
import sys
sys.path.insert(0, {repo!r})
import dataset, model, runpy
text = {text!r}.encode()
# one token per byte
model.GPT.generate = lambda self, rows, *_, **__: ([byte_ids[byte]] * len(rows) for byte in text)
load = dataset.load_tokenizer
def load_tokenizer(folder):
    global byte_ids
    tokenizer = load(folder)
    byte_ids = [tokenizer.encode_single_token(bytes([byte])) for byte in range(256)]
    return tokenizer
dataset.load_tokenizer = load_tokenizer
sys.argv = ["sample.py", *{arguments!r}]
runpy.run_path({repo!r} + "/sample.py", run_name="__main__")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_is_escaped_on_a_terminal_and_complete_in_a_pipe(out, terminal):
    written = "你好\x1b[2J\x1b]0;title\x07\x9b1m\ttab\n好"
    arguments = ["out/a", "a\x1b[H", "--num-samples", "2"]
    code = WRITER.format(repo=str(REPO), text=written, arguments=arguments)
    code = code.replace(".encode()", ".encode()[:-1]")  # the last character is not complete
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=out, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    _, error = process.communicate(timeout=120)
    screen = os.read(ours, 10_000).decode()
    os.close(ours)
    text = f"a\x1b[H{written[:-1]}"
    expected = f"{text}\n--- 2\n{text}\n"
    if terminal:
        text = "a\\x1b[H你好\\x1b[2J\\x1b]0;title\\x07\\x9b1m\ttab\n"
        expected = f"{text}\n--- 2\n{text}\n".replace("\n", "\r\n")
    assert process.returncode == 0 and screen == expected, error.decode()


# -----------------------------------------------------------------------------
# Export

# uses the export from another folder, without this repository
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
texts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained("taken", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("taken", trust_remote_code=True)
ids = tokenizer(texts)["input_ids"]
rows = torch.tensor([row[:40] for row in ids if len(row) >= 40][:3])
result = model(rows, labels=rows)
rolling = []  # what lm-evaluation-harness computes: (with the bos of the tokenizer as text, without)
for row in ids[-9:]:
    log_p = model(torch.tensor([model.config.bos_token_id, *row])[None, :-1]).logits[0].log_softmax(-1)
    chosen = log_p.gather(1, torch.tensor(row)[:, None])
    rolling.append((-chosen.sum().item(), -chosen[1:].sum().item()))
batch = tokenizer(["x", "def main("], padding=True, return_tensors="pt")
both = model.generate(**batch, max_new_tokens=9, do_sample=False).tolist()
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
piped = pipe(["x", "def main("], batch_size=2, max_new_tokens=9, do_sample=False)
expected = tokenizer.batch_decode(both, skip_special_tokens=True)
piped = [result["generated_text"] for (result,) in piped] == expected
greedy = model.generate(rows, max_new_tokens=90, do_sample=False)
sampled = model.generate(rows[:, :5], attention_mask=torch.ones_like(rows[:, :5]))  # a pipeline passes a mask
torch.save({"rows": rows, "logits": result.logits, "loss": result.loss, "greedy": greedy}, "results.pt")
facts = [ids, sampled.shape[1], rolling, batch.attention_mask.tolist(), both, piped]
facts += [tokenizer.model_max_length]
json.dump(facts, open("results.json", "w"))
"""


@pytest.mark.parametrize(
    "data, init_from, flags",
    [
        ("/home/ann/my notes", None, "--data 'my notes'"),
        ("../up/notes.txt", "/home/ann/out/first", "--data notes.txt --init-from first"),
        (".", "out/first/", "--data corpus --init-from first"),
        ("stdlib", None, "--data stdlib"),
        ("hf:owner/name/data", None, "--data hf:owner/name/data"),
    ],
)
def test_a_model_card_shows_no_folders(data, init_from, flags):
    settings = {"depth": 2, "data": data, "init_from": init_from, "seed": 7}
    command = report.command_line("python train.py", settings)
    config = without_folders({"settings": settings, "command": command, "corpus": {"name": "corpus"}})
    assert config["command"] == f"python train.py --depth 2 {flags} --seed 7"
    assert config["settings"]["data"] in flags and settings["data"] == data


@pytest.mark.slow
def test_exports_with_odd_names_and_from_a_folder_that_was_another_run(out, tmp_path):
    pytest.importorskip("transformers")
    odd, longest = os.fsdecode(b"b\xf6 $x"), "x" * 255
    for name in (odd, "other"):
        shutil.copytree(out / "out" / "a", tmp_path / name)
    (tmp_path / "run").symlink_to("other")
    command = [sys.executable, str(REPO / "sample.py")]
    files = {}
    for run, target in ((odd, longest), ("run", odd + "2"), ("run", "again")):
        if target == "again":  # the same path is another run now, with another tokenizer of the same size
            folder = tmp_path / "other" / "tokenizer"
            shutil.copytree(folder, tmp_path / "new" / "tokenizer")
            for file in ("config.json", "checkpoints", "log.jsonl"):
                (tmp_path / "new" / file).symlink_to(tmp_path / "other" / file)
            lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
            tokens = [line.split()[0] for line in lines]
            tokens[ord("x")], tokens[ord("y")] = tokens[ord("y")], tokens[ord("x")]
            ranks = b"".join(b"%s %d\n" % (token, rank) for rank, token in enumerate(tokens))
            (tmp_path / "new" / "tokenizer" / "tokenizer.tiktoken").write_bytes(ranks)
            (tmp_path / "run").unlink()
            (tmp_path / "run").symlink_to("new")
        done = subprocess.run([*command, run, "--export", target], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        files[target] = json.loads((tmp_path / target / "tokenizer.json").read_text())["model"]["vocab"]
    assert "# b\\udcf6 $x\n" in (tmp_path / longest / "README.md").read_text()
    assert files[longest] == files[odd + "2"] != files["again"] and files["again"]["x"] == ord("y")


@pytest.mark.slow
def test_an_export_works_without_this_repository_and_is_the_same_model(home, out, tmp_path):
    pytest.importorskip("transformers")
    ((status, written, error),) = call(out, ["out/a", "--export", tmp_path / "taken"])
    assert status == 0 and written.strip() == str(tmp_path / "taken"), error
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    names |= {"modeling_onedial.py", "model.py", "tokenizer_config.json"}
    found = {file.name for file in (tmp_path / "taken").iterdir()}
    assert names <= found and not [*tmp_path.glob(".tmp*")]
    card = (tmp_path / "taken" / "README.md").read_text()
    assert "| val_bpb | " in card and ("curves.png" in found) == ("(curves.png)" in card)
    assert len((REPO / "export" / "modeling_onedial.py").read_text().splitlines()) <= 160
    assert (tmp_path / "taken" / "model.py").read_text() == (REPO / "model.py").read_text()
    # no folder of the machine on which it was trained; the data of this run is HOME/text
    assert "trained on `text`" in card and " --data text " in card and " --no-compile " in card
    for line in (
        "# license: mit",
        "**License: not chosen yet.**",
        "lm_eval run --model hf",
        "- Text: `text`",
    ):
        assert line in card
    assert re.search(r"- Trained on 6.14k tokens, 0.0\d+ epochs, to step 12\n", card)
    assert re.search(r"- val_bpb: \*\*\d\.\d{4}\*\* bits per byte, on 4,096 bytes of held-out text", card)
    assert re.search(r"- Time: \d+s on 1 × \S+", card)
    texts = [file.read_bytes() for file in (tmp_path / "taken").iterdir()]
    assert not any(str(path).encode() in text for text in texts for path in (home, out, tmp_path))

    random_ = random.Random(0)
    pools = [list(" \n\t\r\x0b\x85\xa0\u2028\u3000"), list("0123456789²٣Ⅷ"), list("aaab' ")]
    pools += [["'s", "'LL", "'ſ", "<|bos|>"], [*map(chr, range(32, 127))], [*map(chr, range(0x80, 0x2000))]]
    pools += [[chr(random_.randrange(0xE000, 0x110000)) for _ in range(500)]]
    texts = [(REPO / name).read_text() for name in ("model.py", "train.py", "README.md")]
    for _ in range(3000):
        chosen = random_.sample(pools, random_.randint(1, 3))
        texts.append("".join(random_.choice(random_.choice(chosen)) for _ in range(random_.randint(0, 30))))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    options = {"input": json.dumps(texts).encode(), "capture_output": True, "cwd": tmp_path, "env": env}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], **options)
    assert done.returncode == 0, done.stderr.decode()

    tokenizer = dataset.load_tokenizer(out / "out" / "a" / "tokenizer")
    bos = tokenizer.n_vocab - 1
    results = json.loads((tmp_path / "results.json").read_text())
    ids, length, rolling, mask, both, piped, model_max_length = results
    for text, theirs in zip(texts, ids, strict=True):
        assert theirs == [bos, *tokenizer.encode(text, allowed_special="all")], text
    results = torch.load(tmp_path / "results.pt")
    with torch.device("meta"):
        model = GPT(GPTConfig(**json.loads((out / "out" / "a" / "config.json").read_text())["model"]))
    model.init_weights("cpu", 0)
    model.load_state_dict(checkpoint.load(out / "out" / "a" / "checkpoints" / "step_000012", "model"))
    rows = results["rows"]
    torch.testing.assert_close(results["logits"], model(rows), atol=1e-5, rtol=0)
    mean_loss = model(rows[:, :-1], rows[:, 1:]).item() / rows[:, 1:].numel()
    assert results["loss"].item() == pytest.approx(mean_loss, rel=1e-5)
    ours = [*zip(*model.generate(rows.tolist(), bos, 90, temperature=0))]  # beyond max_seq_len
    for new, theirs in zip(ours, results["greedy"][:, 40:].tolist(), strict=True):
        end = theirs.index(bos) if bos in theirs else 90  # transformers stops a text at bos
        assert list(new[:end]) == theirs[:end]
    assert 5 < length <= 25  # 20 new tokens: a default length in the export would win over max_length
    token_bytes = torch.from_numpy(dataset.token_bytes(tokenizer).astype("int64"))
    for text, row, (with_bos, without) in zip(texts[-9:], ids[-9:], rolling):
        assert with_bos > without + 1 or not text
        if text and bos not in row[1:]:
            assert without == pytest.approx(score(model, tokenizer, token_bytes, [text], None)[0], rel=1e-5)
    short, long = (tokenizer.encode(text) for text in ("x", "def main("))
    padding = [0] * (len(long) - len(short))
    assert (
        mask == [[*padding, 1, *[1] * len(short)], [1] * (1 + len(long))] and model_max_length == 64 and piped
    )
    for row, text in zip(both, (short, long)):
        new = [t[0] for t in model.generate([[bos, *text]], bos, 9, temperature=0)]
        assert row[1 + len(long) :][: (new + [bos]).index(bos)] == new[: (new + [bos]).index(bos)]
