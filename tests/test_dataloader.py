"""Tokens to rows: their order, resuming, prefetching, the validation rows."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dataloader
import dataset
from dataloader import DataLoader, NotEnoughText, ValidationRows
from dataset import prepare

REPO = Path(dataloader.__file__).parent
SYLLABLES = "ba de ki lo mu ra se ti vo nu pha chi gre sta lin ter mon ost und ell".split()
WORDS = np.array([a + b + c for a in SYLLABLES for b in SYLLABLES for c in ("", "s", "ing")])


def prose(seed, lines):
    chosen = np.random.RandomState(seed).choice(WORDS, (lines, 7)).tolist()
    return "".join(" ".join(words[: 3 + n % 5]) + ".\n" for n, words in enumerate(chosen))


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder of 60 files of text, 1 to 3 kB each, and an empty cache folder."""
    monkeypatch.setenv("ONEDIAL_HOME", str(tmp_path / "home"))
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n:02d}.txt").write_text(prose(n, 30 + n))
    return folder


@pytest.fixture
def corpus(text, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_TOKENS", 7000)
    return prepare(str(text), 400)


def read(corpus, split):
    """The tokens of each shard of a split, read without the modules under test."""
    return [np.fromfile(path, dtype="<u2")[512:].tolist() for path, _ in corpus.shards[split]]


def split_at(tokens, bos):
    """The documents in a list of tokens, each a list without its bos."""
    found = []
    for token in tokens:
        if token == bos:
            found.append([])
        else:
            found[-1].append(token)
    return found


def take(loader, count):
    return np.concatenate([next(loader).numpy() for _ in range(count)])


# -----------------------------------------------------------------------------
# Rows and their order


def test_every_token_is_a_target_once_an_epoch(corpus):
    T, shards = 48, read(corpus, "train")
    expected = Counter(
        tuple(tokens[i : i + T]) for tokens in shards for i in range(0, len(tokens) - T + 1, T)
    )
    assert len(shards) > 3 and sum(expected.values()) == sum(len(tokens) // T for tokens in shards)
    loader = DataLoader(corpus, T, 1, 0, "cpu")
    epochs = [take(loader, loader.rows_per_epoch) for _ in range(3)]
    for rows in epochs:
        assert rows.shape == (sum(expected.values()), T + 1) and rows.dtype == np.int64
        assert (rows[:, 0] == corpus.bos).all()
        assert Counter(map(tuple, rows[:, 1:].tolist())) == expected
    assert loader.epoch == 3
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_order_depends_on_corpus_seed_and_length_only(corpus):
    def rows(batch, world_size=1, seed=5, threaded=True):
        ranks = [DataLoader(corpus, 32, batch, seed, "cpu", rank, world_size) for rank in range(world_size)]
        if not threaded:
            ranks = [loader.batches() for loader in ranks]
        count = 2400 // batch
        return np.concatenate([next(ranks[i % world_size]).numpy() for i in range(count * world_size)])

    expected = rows(24)  # more than an epoch
    assert len(expected) > DataLoader(corpus, 32, 1, 0, "cpu").rows_per_epoch
    for options in ((8,), (1,), (48, 4), (24, 2), (12, 3), (24, 1, 5, False)):
        assert np.array_equal(rows(*options), expected), options
    assert not np.array_equal(rows(24, seed=6), expected)
    with pytest.raises(ValueError, match="cannot be divided"):
        DataLoader(corpus, 32, 9, 0, "cpu", 0, 2)


def test_any_object_can_be_the_corpus():
    shards = {"train": [np.arange(1, 21, dtype=np.uint16)] * 2, "val": [np.arange(5, dtype=np.uint16)]}
    corpus = SimpleNamespace(
        name="numbers",
        fingerprint="c0ffee",
        bos=0,
        more=None,
        spread_val=False,
        token_bytes=np.array([0] + [1] * 20, dtype=np.uint16),
        shards=shards,
        rows_per_shard=lambda split, T: [len(tokens) // T for tokens in shards[split]],
        open_shard=lambda split, index: shards[split][index],
    )
    rows = next(DataLoader(corpus, 10, 4, 0, "cpu")).tolist()
    assert sorted(rows) == sorted([[0, *range(1, 11)], [0, *range(11, 21)]] * 2)
    ((inputs, targets, size),) = ValidationRows(corpus, 10, 3).batches(2, "cpu")
    assert inputs.tolist() == [[0, 0, 1], [0, 3, 4]] and size == 4
    assert targets.tolist() == [[-1, 1, 2], [3, 4, -1]]


def test_the_shuffle_is_the_same_everywhere():
    assert dataloader.shuffled(8, 42, 0).tolist() == [4, 3, 7, 6, 0, 1, 5, 2]
    order = dataloader.row_order([3, 2], seed=7)
    assert [next(order) for _ in range(5)] == [(1, 0), (1, 1), (0, 1), (0, 2), (0, 0)]


def test_shards_and_rows_are_shuffled_each_epoch_but_a_growing_set_starts_as_listed():
    def epochs(growing, count=20):
        order = dataloader.row_order([30] * count, seed=1, can_grow=growing)
        return [list(itertools.islice(order, 30 * count)) for _ in range(3)]

    plain, growing, longer = epochs(False), epochs(True), epochs(True, 25)
    shards = lambda rows: tuple(dict.fromkeys(shard for shard, _ in rows))  # noqa: E731
    assert len({shards(rows) for rows in plain} | {tuple(range(20))}) == 4
    assert shards(growing[0]) == tuple(range(20)) and growing[1:] == plain[1:]
    assert longer[0][:600] == growing[0]
    for shard in range(20):
        assert len({tuple(row for s, row in rows if s == shard) for rows in plain} | {tuple(range(30))}) == 4


def growing(counts, present=1):
    """A corpus whose files have so many rows of 8 tokens; `present` of them are there."""
    files = [
        np.arange(1 + 1000 * n, 1 + 1000 * n + 8 * count, dtype=np.uint16) for n, count in enumerate(counts)
    ]
    corpus = SimpleNamespace(
        name="set", fingerprint="c0ffee", bos=0, unique_tokens=8 * sum(counts), arrived=present
    )
    corpus.more, shards = list(range(present, len(files))), files[:present]
    corpus.rows_per_shard = lambda split, T, first=0: [len(tokens) // T for tokens in shards[first:]]
    corpus.open_shard = lambda split, index: shards[index]
    corpus.next_file = lambda: "digest" if corpus.arrived > len(shards) else None

    def use_next_file():
        shards.append(files[corpus.more.pop(0)])
        return [f"used {len(shards) - 1}"]

    corpus.use_next_file = use_next_file
    return corpus


def test_files_that_arrive_later_keep_the_order_and_all_ranks_use_them_together():
    counts, said, asked = [10, 7, 9], [], []
    fetcher = SimpleNamespace(
        want=lambda rows, is_waiting: asked.append((rows, is_waiting)),
        say=said.append,
        failure=lambda: fetcher.fault,
    )
    fetcher.fault = None
    whole = DataLoader(growing(counts, 3), 8, 4, 0, "cpu")
    assert whole.batches_ready == math.inf
    expected = take(whole, 13)  # two epochs
    corpus = growing(counts)
    loader, others = DataLoader(corpus, 8, 4, 0, "cpu"), []
    add = lambda stop=0: loader.add_files(fetcher, lambda value: [value, *others], stop)  # noqa: E731
    assert add() == (None, 0) and loader.batches_ready == 2 and loader.epoch == 0
    rows = [take(loader, 2)]
    assert loader.epoch == pytest.approx(8 / 26) and loader.waiting_since is None
    assert add() == (None, 0) and add(stop=15) == (None, 15) and asked == [(12, True)] * 2
    assert loader.waiting_since is not None
    fetcher.fault = "the disk\nis full"
    assert add() == (fetcher.fault, 0)
    fetcher.fault, corpus.arrived = None, 3
    others = [(None, None, 0)]  # the other node does not have it yet
    assert add() == (None, 0) and loader.batches_ready == 0
    others = [(None, "no\nnetwork", 2)]
    assert add() == ("no\nnetwork", 2) and not said
    others = [("other", None, 0)]
    assert "1 of set is not the same on all nodes" in add()[0]
    others = [("digest", None, 0)]
    assert add() == (None, 0) and loader.batches_ready == math.inf and said == ["used 1", "used 2"]
    rows.append(take(loader, 11))
    assert loader.wait_time > 0.1 and loader.waiting_since is None  # it has waited for a file
    assert np.array_equal(np.concatenate(rows), expected) and loader.epoch == 2
    late = DataLoader(growing(counts, 1), 8, 2, 0, "cpu", 1, 2)
    late.load_state_dict({**late.state_dict(), "cursor": 30})
    assert late.batches_ready == 0
    late.corpus.arrived = 3
    late.add_files(fetcher, lambda value: [value])
    assert np.array_equal(take(late, 11), expected[31::2])
    small = DataLoader(growing([3, 4]), 8, 8, 0, "cpu")
    small.corpus.arrived = 2
    with pytest.raises(NotEnoughText, match="has 7 rows, and a batch has 8"):
        small.add_files(fetcher, lambda value: [value])


def test_a_batch_larger_than_the_corpus_is_an_error_of_two_lines(corpus):
    with pytest.raises(NotEnoughText, match="rows, and a batch has 100000") as error:
        DataLoader(corpus, 32, 100_000, 0, "cpu")
    assert str(error.value).count("\n") == 1 and error.value.exit_status == 2


def test_resume_continues_with_the_next_row(corpus):
    whole = DataLoader(corpus, 32, 6, 3, "cpu")
    rows = take(whole, 500)
    for batches, batch, world_size in ((1, 6, 1), (37, 12, 2), (200, 24, 4), (299, 3, 3)):
        before = DataLoader(corpus, 32, 6, 3, "cpu")
        take(before, batches)
        state = json.loads(json.dumps(before.state_dict()))
        assert state["cursor"] == 6 * batches  # without the batches prepared ahead
        after = []
        for rank in range(world_size):
            loader = DataLoader(corpus, 32, batch, 3, "cpu", rank, world_size)
            loader.load_state_dict(state)
            after.append(next(loader).numpy())
        assert np.array_equal(np.concatenate(after), rows[6 * batches :][:batch])


def test_resume_is_fast_and_refuses_another_corpus(corpus, text, tmp_path):
    loader = DataLoader(corpus, 32, 6, 3, "cpu")
    state = {**loader.state_dict(), "cursor": 10**15}
    start = time.perf_counter()
    loader.load_state_dict(state)
    next(loader)
    assert time.perf_counter() - start < 2
    (text / "00.txt").write_text("another text")
    for other, name in (
        (DataLoader(prepare(str(text), 400), 32, 6, 3, "cpu"), "fingerprint"),
        (DataLoader(corpus, 16, 6, 3, "cpu"), "T is 16, was 32"),
        (DataLoader(corpus, 32, 6, 4, "cpu"), "seed"),
    ):
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)


def test_the_thread_stays_two_batches_ahead_and_errors_reach_the_loop(corpus, monkeypatch):
    made = []
    batches = DataLoader.batches

    def counted(self):
        for batch in batches(self):
            made.append(batch)
            yield batch

    monkeypatch.setattr(DataLoader, "batches", counted)
    loader = DataLoader(corpus, 32, 4, 0, "cpu")
    assert loader.wait_time == 0
    for consumed in range(1, 4):
        next(loader)
        deadline = time.time() + 5
        while len(made) < consumed + 2 and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == consumed + 2
    waited = loader.wait_time
    next(loader)
    assert waited > 0 and loader.wait_time - waited < 0.05

    def broken(self):
        yield batches(self).__next__()
        raise dataset.DataError("a shard\nis damaged")

    monkeypatch.setattr(DataLoader, "batches", broken)
    loader = DataLoader(corpus, 32, 4, 0, "cpu")
    next(loader)
    with pytest.raises(dataset.DataError, match="a shard"):
        next(loader)
    with pytest.raises(StopIteration):  # and does not wait for a batch
        next(loader)


# -----------------------------------------------------------------------------
# Validation


def test_validation_rows_are_the_same_for_any_batch_and_world_size(corpus):
    validation = ValidationRows(corpus, 3000, 40)
    validation.tokens = stream = validation.tokens[:990]
    assert len(validation) == 25

    def everything(batch_size, world_size):
        rows, total = {}, 0
        for rank in range(world_size):
            batches = validation.batches(batch_size, "cpu", rank, world_size)
            for n, (tokens, targets, size) in enumerate(batches):
                assert tokens.shape == targets.shape == (batch_size, 40)
                assert (tokens[:, 0] == corpus.bos).all()
                for j in range(batch_size):
                    place = (n * world_size + rank) * batch_size + j
                    if place < 25:
                        rows[place] = (tokens[j].tolist(), targets[j].tolist())
                    else:
                        assert (targets[j] == -1).all()
                total += size
        return rows, total

    expected, size = everything(1, 1)
    assert sorted(expected) == list(range(25))
    length = lambda token: len(corpus.tokenizer.decode_single_token_bytes(token))  # noqa: E731
    for place, (tokens, targets) in expected.items():
        true = [*stream[place * 40 : place * 40 + 40].tolist(), *[corpus.bos] * 40][:40]
        assert tokens == [corpus.bos, *true[:-1]]
        assert targets == [-1 if t == corpus.bos else t for t in true]
    assert any(-1 in targets for _, targets in expected.values())
    assert size == sum(length(t) for t in stream.tolist() if t != corpus.bos)
    for batch_size in (1, 3, 8, 30):
        for world_size in (1, 2, 3):
            assert everything(batch_size, world_size) == (expected, size)
    starts = [place for place, token in enumerate(stream) if token == corpus.bos]
    beginnings = validation.beginnings(4, 5, 10)
    assert 1 < len(beginnings) <= 4 and len({tuple(prompt) for prompt, _ in beginnings}) > 1
    for prompt, more in beginnings:
        (place,) = [place for place in starts if stream[place : place + 15].tolist() == prompt + more]
        assert len(prompt) == 5 and corpus.bos not in more


def test_samples_do_not_cut_characters_in_half():
    tokenizer = dataset.train_tokenizer(["abc " * 9], 258)  # nearly one token per byte
    text = "a你好 🎉é。" * 3
    ids = tokenizer.encode_ordinary(text)
    assert len(ids) > len(text)
    for begin in range(len(ids)):
        for end in range(begin, len(ids)):
            prompt, same, other = dataloader.sample_texts(tokenizer, ids[:begin], ids[begin:end], [])
            assert text.startswith(prompt + same) and text.startswith(prompt) and other == ""
            assert len(text.encode()) > len((prompt + same).encode()) > end - 5
    prompt, wrong = dataloader.sample_texts(tokenizer, ids[:2], tokenizer.encode_ordinary("bc"))
    assert (prompt, wrong) == ("a", "\ufffdbc")  # the model did not complete the character


LANGUAGES = "αβγ 你好 🎉🎉 à é\r\n\u2028\u3000 done"


def test_what_is_evaluated_does_not_depend_on_the_vocabulary(text, monkeypatch):
    (text / "val.txt").write_bytes((LANGUAGES * 50 + prose(5, 2000)).encode() + b" " * 20_000)
    ours, theirs = prepare(str(text), 300), prepare(str(text), 900)
    monkeypatch.setattr(dataset, "SHARD_TOKENS", 10_000)  # documents run on from one shard to the next
    in_shards = prepare(str(text), 301)
    assert len(in_shards.shards["val"]) > 5
    for eval_bytes in (1, 20_000, 60_000, 10**9):
        found = [
            [
                c.tokenizer.decode_bytes(document)
                for document in split_at(ValidationRows(c, eval_bytes, 64).tokens.tolist(), c.bos)
            ]
            for c in (ours, theirs, in_shards)
        ]
        assert found[0] == found[1] == found[2]
        size, whole = sum(map(len, found[0])), (text / "val.txt").stat().st_size
        assert abs(size - min(eval_bytes, whole)) <= 2 * 2**14
    assert b"".join(found[0]) == (text / "val.txt").read_bytes()  # everything, nothing twice


def test_evaluated_text_is_read_in_bounded_memory():
    rng = np.random.RandomState(0)
    tokens = rng.randint(1, 300, 12_000_000).astype(np.uint16)
    tokens[rng.randint(0, len(tokens), 9000)] = tokens[0] = 0
    lengths = np.array([0] + [1 + n % 5 for n in range(299)], dtype=np.uint16)
    opened = []

    def open_shard(split, index):
        opened.append(index)
        return tokens[index * 4_000_000 : (index + 1) * 4_000_000]

    corpus = SimpleNamespace(
        name="x", bos=0, token_bytes=lengths, shards={"val": [0, 1, 2]}, open_shard=open_shard
    )
    starts = np.flatnonzero(tokens == 0)
    whole = np.split(tokens, starts[1:])
    for corpus.spread_val, eval_bytes in ((True, 10**5), (True, 10**9), (False, 10**5), (False, 10**9)):
        opened.clear()
        tracemalloc.start()
        found = dataloader.validation_tokens(corpus, eval_bytes)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if corpus.spread_val:
            count = min(
                len(starts), math.ceil(eval_bytes * len(starts) / lengths[tokens].sum(dtype=np.int64))
            )
            expected = np.concatenate([whole[i * len(starts) // count] for i in range(count)])
        else:
            expected = tokens[: np.searchsorted(np.cumsum(lengths[tokens], dtype=np.int64), eval_bytes) + 1]
        assert np.array_equal(found, expected)
        if eval_bytes == 10**5:
            assert peak < 30e6 and (corpus.spread_val or opened == [0])


def test_documents_of_up_to_16_kb_stay_whole_in_an_evaluation(text):
    (text / "val.txt").write_text(prose(5, 300))  # 14 kB
    corpus = prepare(str(text), 300)
    assert ValidationRows(corpus, 10**6, 64).tokens.tolist().count(corpus.bos) == 1


BPB = """
import os, sys
sys.path.insert(0, {repo!r})
import torch, torch.distributed as dist, dataloader, dataset, report
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
validation = dataloader.ValidationRows(dataset.prepare({data!r}, 400), 4000, 40)
if world_size > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
table = torch.randn(400, 400)
def model(tokens, targets):
    logits, targets = table[tokens].flatten(0, 1), targets.flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
for size in (1, 3, 8):
    batches = validation.batches(size, "cpu", rank, world_size)
    print(repr(report.bits_per_byte(model, batches, torch.device("cpu"))))
"""


@pytest.mark.slow
def test_bits_per_byte_are_the_same_on_1_2_3_processes(text):
    prepare(str(text), 400)
    code, values = BPB.format(repo=str(REPO), data=str(text)), []
    for world_size in (1, 2, 3):
        env = {**os.environ, "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_500 + os.getpid() % 1000 + world_size)}
        ranks = []
        for rank in range(world_size):
            pipe = {"env": {**env, "RANK": str(rank)}, "stdout": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen([sys.executable, "-c", code], **pipe))
        values += [float(value) for process in ranks for value in process.communicate()[0].split()]
    assert len(values) == 3 * (1 + 2 + 3)
    assert max(values) - min(values) < 1e-6 * min(values)
