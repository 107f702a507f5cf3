"""Text to tokens: corpora, reading, the tokenizer, the cache, public data sets, the command line, errors."""

import base64
import bz2
import csv
import errno
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
import types
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken

os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.update(HF_HUB_ETAG_TIMEOUT="2", HF_HUB_DOWNLOAD_TIMEOUT="2")  # read when the hub is imported

from conftest import hub_server

import dataset
from dataloader import DataLoader, NotEnoughText, ValidationRows
from dataset import DataError, prepare

REPO = Path(dataset.__file__).parent
SYLLABLES = "ba de ki lo mu ra se ti vo nu pha chi gre sta lin ter mon ost und ell".split()
WORDS = np.array([a + b + c for a in SYLLABLES for b in SYLLABLES for c in ("", "s", "ing")])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache folder for each test."""
    monkeypatch.setenv("ONEDIAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def prose(seed, lines):
    chosen = np.random.RandomState(seed).choice(WORDS, (lines, 7)).tolist()
    return "".join(" ".join(words[: 3 + n % 5]) + ".\n" for n, words in enumerate(chosen))


@pytest.fixture
def text(tmp_path):
    """A folder of 60 files of text, 1 to 3 kB each."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n:02d}.txt").write_text(prose(n, 30 + n))
    return folder


def shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def shard_bytes(tmp_path, seed, count):
    shard(tmp_path / "one.bin", np.random.RandomState(seed).randint(0, 50257, count))
    return (tmp_path / "one.bin").read_bytes()


def files_in(folder):
    """The names in a folder, without those of locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def read(corpus, split):
    """The tokens of each shard of a split, read without the module under test."""
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


def read_file(file, **how):
    """The documents in a file, and the notes of the TextReader about it."""
    reader, text = dataset.TextReader(**how), dataset.Text()
    reader.read(file, text)
    return [text[begin:end].decode() for begin, end in text.documents()], list(reader.note_lines())


def documents(corpus, split):
    """The documents of a split, decoded."""
    found = split_at(sum(read(corpus, split), []), corpus.bos)
    return [corpus.tokenizer.decode_bytes(document).decode() for document in found]


def gpt2_vocabulary(home):
    """A vocabulary of GPT-2's size, put into the cache by hand: all bytes and 50,000 pairs of them."""
    tokens = [bytes([b]) for b in range(256)] + [bytes(divmod(n, 256)) for n in range(50_000)]
    home.mkdir(exist_ok=True)
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(tokens)]
    (home / "r50k_base.tiktoken").write_text("".join(lines))


def two_lines(error):
    """The message of an error that the user can fix."""
    message = str(error.value)
    assert error.value.exit_status == 2
    assert message.count("\n") == 1 and all(message.split("\n")), message
    return message


def add_files(corpus, rows, T):
    """What a Fetcher and a DataLoader do while a run trains -> the lines that they print."""
    lines = []
    while corpus.more and sum(corpus.rows_per_shard("train", T)) < rows:
        lines += dataset.add_file(corpus, "train", corpus.more.pop(0))
    return lines


def take(loader, count):
    return np.concatenate([next(loader).numpy() for _ in range(count)])


# -----------------------------------------------------------------------------
# Corpora


def test_documents_come_back_in_order_and_whole(text):
    corpus = prepare(str(text))
    found = documents(corpus, "train") + documents(corpus, "val")
    assert Counter(found) == Counter(file.read_text() for file in text.iterdir())
    for split in ("train", "val"):
        assert documents(corpus, split) == sorted(documents(corpus, split), key=found.index)
        counts = corpus.counts[split]
        assert counts["documents"] == len(documents(corpus, split))
        assert counts["bytes"] == sum(len(d.encode()) for d in documents(corpus, split))
        assert counts["tokens"] == sum(map(len, read(corpus, split)))


def test_default_is_the_standard_library(monkeypatch, tmp_path):
    library = tmp_path / "python3"
    for name in ("os.py", "json/tool.py", "site-packages/mine.py", "notes.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n" + prose(len(name), 300))
    monkeypatch.setattr(dataset.sysconfig, "get_path", lambda name: str(library))
    found = "".join(documents(prepare("stdlib"), "train"))
    assert "# os.py" in found and "# json/tool.py" in found
    assert "mine.py" not in found and "notes" not in found


@pytest.mark.parametrize("name", ["val/a.txt", "b_val.txt", "my-VAL-2.txt", "sub/x.val.jsonl"])
def test_the_word_val_in_a_name_makes_the_validation_split(text, name):
    held_out = "held out " * 300
    (text / name).parent.mkdir(exist_ok=True)
    (text / name).write_text(json.dumps({"text": held_out}) if name.endswith("jsonl") else held_out)
    (text / "values_interval.txt").write_text("this trains")
    corpus = prepare(str(text))
    assert corpus.split == "files" and documents(corpus, "val") == [held_out]
    assert "this trains" in documents(corpus, "train")


def test_held_out_documents_are_chosen_by_content(text):
    before = prepare(str(text))
    for n in range(40):
        (text / f"0-{n}.txt").write_text(prose(1000 + n, 50))
    after = prepare(str(text))
    assert before.split == after.split == "hash"
    for split in ("train", "val"):
        assert set(documents(before, split)) < set(documents(after, split))
    for document in documents(after, "val"):  # the rule itself must never change
        assert int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) < 0.05 * 2**32


@pytest.mark.parametrize("lines", [40, 8000])
def test_the_end_of_one_long_file_is_held_out(tmp_path, lines):
    content = prose(0, lines)  # 8,000 lines are 300 KB
    (tmp_path / "book.txt").write_text(content)
    corpus = prepare(str(tmp_path / "book.txt"))
    (train,), val = documents(corpus, "train"), "".join(documents(corpus, "val"))
    assert corpus.split == "tail" and train + val == content
    assert train.endswith("\n") and 0.04 < len(val) / len(content) < 0.12


@pytest.mark.parametrize("block", [2**20, 200])
def test_a_text_without_line_ends_is_cut_too(tmp_path, monkeypatch, block):
    monkeypatch.setattr(dataset, "BLOCK", block)
    (tmp_path / "line.txt").write_text("title\n" + "a b" * 5000)
    corpus = prepare(str(tmp_path / "line.txt"))
    assert 0.04 < corpus.counts["val"]["bytes"] / 15_006 < 0.06


HARD = {
    "blanks": " " * 1_000_000 + "x",
    "letter": "a" * 1_000_000,
    "lines": "\n" * 200_000,
    "tabs": "\t" * 200_000 + "x",
    "one token": "b",
    "special": "before <|bos|> after <|endoftext|>",
    "many languages": "αβγ 你好 🎉🎉 à é\r\n\u2028\u3000 done",
    "no newline": "word " * 60_000,
}


def test_hard_documents_survive(tmp_path):
    data = tmp_path / "hard.jsonl"
    documents_in = [*HARD.values(), prose(1, 500)]
    lines = [json.dumps({"text": d}) for d in documents_in]
    lines[3:3] = ["", json.dumps({"text": ""}), "   "]  # empty documents are ignored
    data.write_text("\n".join(lines))
    (tmp_path / "val.txt").write_text(prose(2, 1000))
    (tmp_path / "folder").mkdir()
    for file in (data, tmp_path / "val.txt"):
        shutil.move(file, tmp_path / "folder" / file.name)
    corpus = prepare(str(tmp_path / "folder"), 400)
    assert sorted(documents(corpus, "train")) == sorted(documents_in)
    assert corpus.counts["train"]["documents"] == len(documents_in)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pieces_have_at_most_size_characters_and_end_with_a_line_if_possible(size):
    text, expected = "né 你好 🎉\n" * 9 + "🎉" * 300 + "\nend", []
    rest = text
    while rest:
        line_end = rest[:size].rfind("\n") + 1 if len(rest) > size else 0
        expected.append(rest[: line_end or size])
        rest = rest.removeprefix(expected[-1])
    content = b"before" + text.encode() + text[:3].encode()
    places = [(6, 6 + len(text.encode())), (6 + len(text.encode()), len(content))]
    found = list(dataset.cut_into_pieces(content, places, size))
    assert [piece for _, piece in found[: len(expected)]] == expected
    assert "".join(piece for _, piece in found[len(expected) :]) == text[:3]
    assert [starts for starts, _ in found].count(True) == 2 and found[0][0] and found[len(expected)][0]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    lines = b'{"text": "half \\ud83d a pair, whole \\ud83d\\ude00"}'
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "val.txt").write_text("x" * 900)
    assert documents(prepare(str(tmp_path)), "train") == ["half ? a pair, whole 😀"]


def test_a_document_longer_than_a_shard_runs_on(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_TOKENS", 1000)
    (tmp_path / "long.txt").write_text(prose(0, 2000))
    (tmp_path / "short.txt").write_text(prose(1, 5))
    (tmp_path / "val.txt").write_text(prose(2, 50))
    corpus = prepare(str(tmp_path), 300)
    sizes = [len(tokens) for tokens in read(corpus, "train")]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert Counter(documents(corpus, "train")) == Counter([prose(0, 2000), prose(1, 5)])


def test_parquet(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    texts = [prose(n, 20) for n in range(120)] + ["", None]
    (tmp_path / "d").mkdir()
    parquet.write_table(arrow.table({"id": range(122), "text": texts}), tmp_path / "d" / "a.parquet")
    corpus = prepare(str(tmp_path / "d"))
    assert Counter(documents(corpus, "train") + documents(corpus, "val")) == Counter(texts[:120])
    parquet.write_table(arrow.table({"words": texts}), tmp_path / "d" / "b.parquet")
    with pytest.raises(DataError) as error:
        prepare(str(tmp_path / "d"))
    assert "b.parquet" in two_lines(error) and "text" in str(error.value)
    (tmp_path / "d" / "b.parquet").write_bytes((tmp_path / "d" / "a.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match="b.parquet"):
        prepare(str(tmp_path / "d"))


NO_TEXT = ["{}", '{"text": 3}', '{"text": null}', '"text"', "[1]", "{broken", '{"txt": "a"}']


@pytest.mark.parametrize("line", NO_TEXT)
def test_a_line_without_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + f"{line}\n" * 3)
    with pytest.raises(DataError) as error:
        prepare(str(tmp_path / "a.jsonl"))
    assert "a.jsonl" in two_lines(error) and "line 3" in str(error.value)


@pytest.mark.parametrize("size, trained, held_out", [(300, 0.7, 0.25), (1000, 0.8, 0.2), (4000, 0.9, 0.1)])
def test_most_of_a_short_text_is_trained_on(tmp_path, size, trained, held_out):
    (tmp_path / "a.txt").write_text((REPO / "README.md").read_text()[:size])
    corpus = prepare(str(tmp_path / "a.txt"))
    T = corpus.row_length(512)
    rows = {split: sum(corpus.rows_per_shard(split, T)) for split in ("train", "val")}
    tokens = {split: count["tokens"] for split, count in corpus.counts.items()}
    assert rows["train"] * T >= trained * sum(tokens.values()) and rows["val"] >= 1
    assert tokens["val"] <= held_out * sum(tokens.values())


def test_a_text_of_less_than_a_row_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(prose(0, 12))
    corpus = prepare(str(tmp_path / "a.txt"))
    with pytest.raises(DataError) as error:
        corpus.rows_per_shard("val", corpus.row_length(512))
    assert two_lines(error).endswith("Provide more text.")  # a smaller T is not possible


def test_an_unreadable_file_is_not_called_a_full_cache(text, monkeypatch):
    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(dataset, "file_sha256", fails)
    with pytest.raises(DataError) as error:
        prepare(str(text))
    assert two_lines(error) == f"{text / '00.txt'}: Permission denied.\nFix this and start again."


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.txt").write_bytes(b"\0\1\2" * 99)
    (tmp_path / "binary" / ".hidden.txt").write_text("hidden")
    (tmp_path / "binary" / "photo.jpg").write_text("not text by its name")
    (tmp_path / "none.txt").write_text("")
    for name in ("empty", "binary", "none.txt", "missing"):
        with pytest.raises(DataError, match=name):
            prepare(str(tmp_path / name))
    for name, why in (("empty", "no text"), ("missing", "no such"), ("binary", "3 files .*unknown type")):
        with pytest.raises(DataError, match=why) as error:
            prepare(str(tmp_path / name))
        two_lines(error)


def test_too_little_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n" * 30)
    corpus = prepare(str(tmp_path / "a.txt"))
    with pytest.raises(DataError) as error:
        DataLoader(corpus, 512, 1, 0, "cpu")
    assert "512" in two_lines(error)
    ValidationRows(corpus, 10**6, 512)  # any amount of validation text is enough
    corpus.shards["val"].clear()
    with pytest.raises(NotEnoughText) as error:
        ValidationRows(corpus, 10**6, 512)
    assert "no validation text" in two_lines(error)


def test_ready_shards(tmp_path, home):
    gpt2_vocabulary(home)
    tokens = np.random.RandomState(0).randint(0, 50257, (3, 5000))
    for name, values in zip(("a_train_1.bin", "a_train_2.bin", "a_val_0.bin"), tokens):
        shard(tmp_path / "d" / name, values)
    (tmp_path / "d" / "README.md").write_text("not part of it")
    corpus = prepare(str(tmp_path / "d"))
    assert corpus.bos == 50256 and corpus.tokenizer.n_vocab == 50257
    assert read(corpus, "train") == tokens[:2].tolist() and read(corpus, "val") == tokens[2:].tolist()
    lengths = [1 if token < 256 else 2 if token < 50256 else 0 for token in tokens[2]]
    validation = ValidationRows(corpus, 601, 100)
    assert validation.tokens.tolist() == tokens[2][: len(validation.tokens)].tolist()
    assert 601 <= sum(lengths[: len(validation.tokens)]) <= 602
    assert validation.beginnings(4, 5, 3) == [([50256, *tokens[2][:4]], tokens[2][4:7].tolist())]
    with pytest.raises(DataError, match="4096"):
        prepare(str(tmp_path / "d"), 4096)
    assert prepare(str(tmp_path / "d"), 50257).fingerprint == corpus.fingerprint  # as on --resume
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    assert prepare(str(tmp_path / "e")).fingerprint == corpus.fingerprint  # the content counts, not the place
    shard(tmp_path / "e" / "a_train_2.bin", tokens[1] // 2)
    with pytest.raises(DataError, match="a_train_2.bin is damaged"):  # the same size, another content
        take(DataLoader(prepare(str(tmp_path / "e")), 100, 100, 0, "cpu"), 1)
    shard(tmp_path / "f" / "train.bin", [60_000] * 500)
    (tmp_path / "f" / "manifest.json").write_text("{}")  # the user's own file
    with pytest.raises(DataError, match="60,000") as error:
        prepare(str(tmp_path / "f"))
    assert f"delete {home / 'checked'} to start over" in two_lines(error)


def test_gpt2_vocabulary_can_be_copied_into_the_cache(tmp_path, home, monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError) as error:
        prepare("fineweb")
    message = two_lines(error)
    assert "r50k_base.tiktoken" in message and str(home) in message and "--data stdlib" in message
    gpt2_vocabulary(home)
    encoding = dataset.gpt2_tokenizer(None)
    assert encoding.encode("ab", disallowed_special=()) == [256 + 256 * ord("a") + ord("b")]
    lines = (home / "r50k_base.tiktoken").read_text()
    (home / "r50k_base.tiktoken").write_text(lines[:-100])
    with pytest.raises(DataError, match="r50k_base.tiktoken is damaged"):
        prepare("fineweb")


# -----------------------------------------------------------------------------
# Any text: nothing is left out silently, nothing that is held out is trained on


def rows_of(count, start=0):
    return [prose(start + n, 8) for n in range(count)]


def json_lines(texts, name="text"):
    return "\n".join(json.dumps({"id": n, name: text}) for n, text in enumerate(texts)).encode()


def everything(corpus):
    return Counter(documents(corpus, "train") + documents(corpus, "val"))


LETTERS = {
    "utf-16": "Ünïcödé, 你好 🎉\r\n",
    "utf-16-be": "zwei\r\n",
    "utf-32": "Привет 🎉\n",
    "utf-8-sig": "é\n",
    "utf-8": "Привет, 你好 🎉 ça va\n",
    "latin-1": "Où était l'été, ça, là, né à Orléans ? Größe über Äpfel.\n",
    "cp1252": "It’s “£5” – naïve café à la crème…\n",
    "cp1251": "В лесу родилась ёлочка, в лесу она росла, зимой и летом стройная.\n",
    "koi8_r": "В лесу родилась ёлочка, в лесу она росла, зимой и летом стройная.\n",
    "cp1250": "Zażółć gęślą jaźń, proszę pana, któż to wie, gdzie są źródła rzeki.\n",
    "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "gb18030": "红楼梦是中国古典小说，描写了贾宝玉与林黛玉的爱情故事。\n",
}


@pytest.mark.parametrize("encoding", LETTERS)
def test_any_encoding_is_read(tmp_path, encoding):
    content = prose(1, 30) + LETTERS[encoding] * 40 + prose(2, 30)
    mark = "\ufeff".encode(encoding) if encoding.endswith("be") else b""  # the other codecs write it
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in (content, prose(3, 9)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(mark + content.encode(encoding))
    (tmp_path / "d" / "val.jsonl").write_bytes(mark + lines.encode(encoding))
    corpus = prepare(str(tmp_path / "d"))
    assert documents(corpus, "train") == [content]
    assert "".join(documents(corpus, "val")) == content + prose(3, 9)
    guessed = not encoding.startswith("utf")
    assert any(line.startswith("files read as ") and "a.txt" in line for line in corpus.notes) == guessed


def test_one_invalid_byte_does_not_change_the_encoding(tmp_path):
    content = (prose(1, 30) + "Привет, ça va 🎉\n" * 100).encode()
    (tmp_path / "a.txt").write_bytes(content + b"\xff\n" + content)
    corpus = prepare(str(tmp_path / "a.txt"))
    assert "".join(everything(corpus)).count("\ufffd") == 1
    assert "unreadable characters (U+FFFD): 1 (a.txt)" in corpus.notes


def test_text_is_the_same_for_any_block_size(tmp_path, monkeypatch):
    content = "\r\n".join("né à Où 🎉你" * (n % 7) for n in range(4000)) + "\n<|endoftext|>\r\n" * 3 + "end"
    expected = [part for part in re.split(r"(?:\r?\n)?<\|endoftext\|>(?:\r?\n)?", content) if part]
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / f"{encoding}.txt").write_bytes(content.encode(encoding))
        for block in (5, 17, 1000):
            monkeypatch.setattr(dataset, "BLOCK", block)
            assert read_file(tmp_path / f"{encoding}.txt")[0] == expected


@pytest.mark.parametrize("separator", [None, "%%", "\\n\\n\\n"])
def test_documents_in_one_file_are_separated(tmp_path, separator):
    between = {None: "\n<|endoftext|>\n", "%%": "%%", "\\n\\n\\n": "\n\n\n"}[separator]
    texts = [text.strip() for text in rows_of(400)]
    (tmp_path / "stories.txt").write_text(between.join(texts) + between)
    corpus = prepare(str(tmp_path / "stories.txt"), separator=separator)
    assert everything(corpus) == Counter(texts) and corpus.split == "hash"
    assert any("separated by" in line and "400" in line for line in corpus.notes)
    (tmp_path / "code.py").write_text("MARKER = '<|endoftext|>'\n" * 90)  # only .txt files are split
    assert len("".join(everything(prepare(str(tmp_path / "code.py"))))) == 90 * 25


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_compressed_text_is_read_and_damage_is_named(tmp_path, ending):
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    pack = packers[ending] if ending != "zst" else pytest.importorskip("zstandard").compress
    folder, texts = tmp_path / "d", rows_of(300)
    folder.mkdir()
    halves = json_lines(texts[:99]) + b"\n", json_lines(texts[99:200])
    (folder / f"a.jsonl.{ending}").write_bytes(b"".join(map(pack, halves)))  # like `cat a.gz b.gz`
    (folder / f"B.TXT.{ending.upper()}").write_bytes(pack("\n<|endoftext|>\n".join(texts[200:]).encode()))
    corpus = prepare(str(folder), 400)
    assert everything(corpus) == Counter(texts) and not corpus.left_out
    whole = pack(json_lines(texts))
    for damaged in (whole[: len(whole) // 2], whole[:99] + b"\0\0\0\0" + whole[103:], b"no archive at all"):
        (folder / f"a.jsonl.{ending}").write_bytes(damaged)
        with pytest.raises(DataError, match=f"a.jsonl.{ending}"):
            prepare(str(folder), 400)


def csv_bytes(name, delimiter=","):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([["id", name], *enumerate(rows_of(120, 7))])
    return file.getvalue().encode()


TABLES = {
    "a.csv": csv_bytes("body"),
    "semicolons.csv": csv_bytes("text", ";"),
    "a.tsv": csv_bytes("story", "\t"),
    "a.jsonl": json_lines(rows_of(120, 7), "content"),
    "a.json": json.dumps([{"id": n, "text": text} for n, text in enumerate(rows_of(120, 7))]).encode(),
    "pretty.json": json.dumps([{"document": text} for text in rows_of(120, 7)], indent=2).encode(),
    "lines.json": json_lines(rows_of(120, 7)),
    "lines.json.gz": gzip.compress(json_lines(rows_of(120, 7), "story")),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_field_with_the_text_is_found(tmp_path, name, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", 700)  # JSON is read in blocks too
    (tmp_path / name).write_bytes(TABLES[name])
    corpus = prepare(str(tmp_path / name))
    assert everything(corpus) == Counter(rows_of(120, 7))
    assert any("texts read from the field" in line for line in corpus.notes) == (
        b"text" not in TABLES[name][:400]
    )


def test_the_field_can_be_named_and_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows_of(120), "poem"))
    with pytest.raises(DataError, match="a.jsonl: none of its fields.*: id, poem") as error:
        prepare(str(tmp_path / "a.jsonl"))
    assert "--text-field" in two_lines(error)
    assert everything(prepare(str(tmp_path / "a.jsonl"), text_field="poem")) == Counter(rows_of(120))
    with pytest.raises(DataError, match="no field verse with strings") as error:
        prepare(str(tmp_path / "a.jsonl"), text_field="verse")
    two_lines(error)
    turns = [{"role": "user", "content": "hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="its field messages contains chats"):
        prepare(str(tmp_path / "chat.jsonl"))


@pytest.mark.parametrize("name", ["package.json", "list.json", "broken.json", "numbers.csv", "one.json"])
def test_files_that_are_not_tables_of_texts_are_read_as_plain_text(tmp_path, name):
    contents = {
        "package.json": json.dumps({"name": "x", "files": list(range(2000))}, indent=1),
        "list.json": json.dumps(list(range(3000))),
        "broken.json": "[1, 2, {" * 900,
        "numbers.csv": "x,y\n" + "1,2\n" * 900,
        "one.json": '{"lines": ["' + "a" * 3000 + '"]}',
    }
    (tmp_path / name).write_text(contents[name])
    corpus = prepare(str(tmp_path / name))
    assert "".join(documents(corpus, "train") + documents(corpus, "val")) == contents[name]


def test_rows_without_a_text_are_counted(tmp_path):
    rows = [{"text": text} for text in rows_of(300)]
    rows[5], rows[17] = {"text": None}, {"other": 1}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = prepare(str(tmp_path / "a.jsonl"))
    assert "rows without a text: 2 (a.jsonl)" in corpus.notes and everything(corpus).total() == 298
    rows[100:110] = [{"text": 3}] * 10
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="12 rows without a text, of 300; the first is line 6") as error:
        prepare(str(tmp_path / "a.jsonl"))
    two_lines(error)


def test_parquet_columns_that_are_not_text_are_named(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    texts = rows_of(120)
    columns = {"list": [[t] for t in texts], "struct": [{"a": t} for t in texts], "number": range(120)}
    for name, column in columns.items():
        parquet.write_table(arrow.table({"text": column}), tmp_path / f"{name}.parquet")
        for options in ({}, {"text_field": "text"}):
            with pytest.raises(DataError, match=f"{name}.parquet has no column text of strings") as error:
                prepare(str(tmp_path / f"{name}.parquet"), **options)
            assert "--text-field" in two_lines(error)
    for kind in (arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())):
        table = arrow.table({"text": range(120), "story": arrow.array(texts).cast(kind)})
        parquet.write_table(table, tmp_path / "good.parquet")
        assert everything(prepare(str(tmp_path / "good.parquet"))) == Counter(texts)


HELD_OUT_NAMES = """
    validation-00000-of-00001.jsonl  wiki-valid.txt  dev.tsv  test-00000-of-00002-2d5a14.jsonl.gz  eval_3.json
    x.test.txt  heldout.txt  held-out/a.txt  Test/deep/a.jsonl  corpus_val_000001.txt  VAL.txt  holdout.txt
    hold_out/a.txt  testset.txt  my_test_set.txt  wiki.test.tokens.txt  wiki.valid.raw.txt
    news.dev.en.txt""".split()
OTHER_NAMES = """
    valéry.txt  val\u0301ka.txt  values.txt  interval.txt  contest.txt  developer.txt  latest.jsonl
    testament.txt  my_test_case.txt  test.py  test/a.py  val/notes.md  tests/a.txt  evaluation.rs""".split()


@pytest.mark.parametrize("name", HELD_OUT_NAMES)
def test_held_out_files_are_never_trained_on(text, name):
    file, secret = text / name, ["never to be trained on " * 90] * 3
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"jsonl": json_lines(secret), "json": json_lines(secret), "tsv": b"text\n" + secret[0].encode()}
    content = content.get(re.search("jsonl|json|tsv|txt", name)[0], secret[0].encode())
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for other in OTHER_NAMES:
        (text / other).parent.mkdir(parents=True, exist_ok=True)
        (text / other).write_bytes(json_lines([other]) if other.endswith("jsonl") else other.encode())
    corpus = prepare(str(text))
    assert corpus.split == "files" and set(documents(corpus, "val")) == {secret[0]}
    found = documents(corpus, "train")
    assert set(OTHER_NAMES) <= set(found) and secret[0] not in found
    assert corpus.notes[0] == f"held out: {file.name}"


def test_the_first_kind_is_the_validation_split_and_others_are_not_used(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, count in (("train", 400), ("test", 40), ("dev", 40), ("validation", 40), ("valid", 3)):
        texts = [f"{name} {n}" for n in range(count)]
        (folder / f"{name}-00000-of-00001.jsonl").write_bytes(json_lines(texts))

    def kinds(corpus, split):
        return {text.split()[0] for text in documents(corpus, split)}

    corpus = prepare(str(folder), 300)
    assert kinds(corpus, "train") == {"train"} and kinds(corpus, "val") == {"validation", "valid"}
    assert "2 files" in corpus.notes[0] and "not used, such as dev-0" in corpus.notes[0]
    for name in ("validation", "valid"):
        (folder / f"{name}-00000-of-00001.jsonl").unlink()
    corpus = prepare(str(folder), 300)
    assert kinds(corpus, "train") == {"train"} and kinds(corpus, "val") == {"dev"}
    (folder / "train-00000-of-00001.jsonl").unlink()
    with pytest.raises(DataError, match="all files are held out") as error:
        prepare(str(folder), 300)
    two_lines(error)
    (folder / "dev-00000-of-00001.jsonl").unlink()
    assert kinds(prepare(str(folder), 300), "train") == {"test"}  # all of one kind: the names mean nothing
    assert kinds(prepare(str(folder / "test-00000-of-00001.jsonl"), 300), "train") == {"test"}


def test_the_standard_library_is_read_as_before(tmp_path, monkeypatch):
    library = tmp_path / "python3"
    for n in range(120):
        (library / "test").mkdir(parents=True, exist_ok=True)
        (library / "test" / f"test_{n}.py").write_text(f"# {n} <|endoftext|>\n" + "x = 1\n" * n)
    (library / "test" / "odd.py").write_bytes(b"\xef\xbb\xbf# caf\xe9\r\n")
    (library / "link").symlink_to(library / "test")
    monkeypatch.setattr(dataset.sysconfig, "get_path", lambda name: str(library))
    corpus = prepare("stdlib", 300)
    assert corpus.split == "hash" and corpus.fingerprint == "c96c14e7b245"  # of layout 4


def test_links_are_followed_without_loops_and_nothing_is_read_twice(tmp_path):
    disk, corpus = tmp_path / "disk", tmp_path / "corpus"
    (disk / "deep").mkdir(parents=True)
    corpus.mkdir()
    for n, text in enumerate(texts := rows_of(40)):
        (disk / "deep" / f"{n}.txt").write_text(text)
    (corpus / "books").symlink_to("../disk")
    (corpus / "again").symlink_to("../disk/deep")
    (disk / "deep" / "up").symlink_to("../..")
    (corpus / "parent").symlink_to("..")
    (tmp_path / "outside.txt").write_text("outside " * 99)
    (corpus / "one.txt").symlink_to("books/deep/1.txt")
    (corpus / "nowhere.txt").symlink_to("gone.txt")
    found = prepare(str(corpus))
    assert everything(found) == Counter(texts)
    assert {Path(path).name for path, _ in found.left_out} >= {"nowhere.txt", "one.txt"}


def test_files_left_out_are_one_note_and_a_list(tmp_path, text):
    for name in ("a.pdf", "b.pdf", "c.zip", "LICENSE", ".hidden", "binary.txt"):
        (text / name).write_bytes(b"\0\1\2" * 99)
    said = []
    corpus = prepare(str(text), say=said.append)
    assert any(line.startswith("60 files with 60 documents, ") for line in said)
    for again in (corpus, prepare(str(text))):  # and again from the cache
        (line,) = [line for line in again.notes if line.startswith("left out")]
        assert "6 files" in line and "2 .pdf" in line and "such as binary.txt: not text" in line
    result = command(text)
    listed = [line for line in result.stdout.splitlines() if line.startswith("left out: /")]
    assert len(listed) == 6 and any("binary.txt: not text" in line for line in listed)
    assert not any(line.startswith("left out") for line in prepare(str(text / "00.txt")).notes)


def test_empty_files_are_counted(text):
    for name in ("empty.txt", "__init__.py"):
        (text / name).write_text("")
    (text / "binary.txt").write_bytes(b"\0")  # left out, so not counted as empty
    said = []
    prepare(str(text), 300, said.append)
    assert said[0].startswith("62 files (2 empty) with 60 documents, ")


def test_no_memory_and_no_home_are_two_lines(text, monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(dataset.Text, "write", full)
    with pytest.raises(DataError, match="not enough memory") as error:
        prepare(str(text))
    two_lines(error)
    monkeypatch.delenv("ONEDIAL_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    with pytest.raises(DataError, match="no home") as error:
        prepare(str(text))
    assert "ONEDIAL_HOME" in two_lines(error)


def test_only_content_decides_what_is_prepared_again(text, tmp_path):
    said = []
    first = prepare(str(text))
    for file in text.iterdir():
        os.utime(file, (1, 1))
    assert prepare(str(text), say=said.append).fingerprint == first.fingerprint and not said
    shutil.copytree(text, tmp_path / "elsewhere" / "text")
    assert prepare(str(tmp_path / "elsewhere" / "text"), say=said.append).fingerprint == first.fingerprint
    assert not said
    content, status = (text / "00.txt").read_text(), (text / "00.txt").stat()
    (text / "00.txt").write_text(content.swapcase())
    os.utime(text / "00.txt", ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size, the same time
    assert prepare(str(text), say=said.append).fingerprint != first.fingerprint and said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name, monkeypatch):
    content = prose(0, 2000) + "🎉"
    text = (content + "\n") * 150  # 12 MB; as one str in memory it would take 50 MB
    if name == "a.json":
        text = json.dumps([{"text": content}] * 150)
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(dataset, "THREADS", 2)
    del text
    tracemalloc.start()
    prepare(str(tmp_path / name), 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_documents_are_shuffled_over_the_whole_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_TOKENS", 5000)
    folder = tmp_path / "d"
    folder.mkdir()
    for kind in ("books", "code", "wiki"):
        (folder / f"{kind}.jsonl").write_bytes(json_lines([f"{kind} {text}" for text in rows_of(300, 900)]))
    corpus = prepare(str(folder), 300)
    kinds = [document.split()[0] for document in documents(corpus, "train")]
    assert len(corpus.shards["train"]) > 5
    for part in np.array_split(kinds, 8):
        assert min(Counter(part.tolist()).values()) > 20 and len(set(part)) == 3
    monkeypatch.setenv("ONEDIAL_HOME", str(tmp_path / "fresh"))
    assert documents(prepare(str(folder), 300), "train") == documents(corpus, "train")


def test_long_documents_are_shuffled_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PART_BYTES", 10_000)
    (tmp_path / "d").mkdir()
    texts = [prose(n, 2000) for n in range(3)]
    for name, text in zip(("a.txt", "b.txt", "c.txt", "test.txt"), [*texts, "🎉" * 20_000]):
        (tmp_path / "d" / name).write_text(text)
    corpus = prepare(str(tmp_path / "d"), 300)
    parts = documents(corpus, "train")
    assert corpus.counts["train"]["documents"] == 3 and max(map(len, parts)) < 15_000
    joined = "\0".join(texts)
    ordered = sorted(parts, key=joined.index)
    assert "".join(ordered) == "".join(texts) and ordered != parts


def test_a_held_out_name_with_almost_no_text_is_no_validation_split(text):
    (text / "requirements-dev.txt").write_text("pytest\nruff\n")
    for name in ("dev", "val"):
        (text / name).mkdir()
        (text / name / "test.json").write_text('{"a": "secret"}')
    corpus = prepare(str(text))
    assert corpus.split == "hash"
    assert not any("pytest" in document or "secret" in document for document in everything(corpus))
    held_out = corpus.notes[0]
    assert "5% of the documents" in held_out and "test.json by name, too small to validate on" in held_out
    assert "not used" in held_out  # the other kind


def test_a_folder_of_test_files_only_says_so(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "test.txt").write_text(prose(1, 200))
    assert any(
        "all files are named as held out (test)" in note for note in prepare(str(tmp_path / "d")).notes
    )


def test_what_onedial_writes_is_no_text(text, monkeypatch):
    expected = prepare(str(text)).fingerprint
    monkeypatch.setenv("ONEDIAL_HOME", str(text / "cache"))
    config = {"settings": {}, "corpus": {}, "versions": {}}
    for name in ("out/a", "elsewhere/b", "elsewhere/c"):
        (text / name).mkdir(parents=True)
    for name in ("out/a", "elsewhere/b"):
        (text / name / "config.json").write_text(json.dumps(config))
        (text / name / "log.jsonl").write_text('{"kind": "step", "text": "a log"}')
    for name in ("lock", "lock.json"):  # a run that has just been claimed
        (text / "elsewhere" / "c" / name).write_text("{}")
    (text / "out" / "compare.md").write_text("a report")
    for _ in range(2):
        corpus = prepare(str(text), out_dir=text / "out")
        assert corpus.fingerprint == expected
        reasons = {str(Path(path).relative_to(text)): why for path, why in corpus.left_out}
        assert reasons.pop("cache", None) in (None, "a folder that onedial writes")
        runs = {"elsewhere/b": "a run of onedial", "elsewhere/c": "a run of onedial"}
        assert reasons == {"out": "a folder that onedial writes"} | runs
    assert (text / "cache" / "corpora").exists()
    monkeypatch.setenv("ONEDIAL_HOME", str(text.parent / "another"))  # and another cache than the current one
    assert prepare(str(text), out_dir=text / "out").fingerprint == expected
    (text / "mine").mkdir()
    (text / "mine" / "config.json").write_text('{"text": "a file of the user"}')
    (text / "mine" / "log.jsonl").write_text('{"text": "rows of the user"}')
    assert "rows of the user" in everything(prepare(str(text), out_dir=text / "out"))


def test_a_folder_in_the_manner_of_nanogpt_says_what_is_read(tmp_path):
    (tmp_path / "prepare.py").write_text("import tiktoken\n" * 200)
    (tmp_path / "train.bin").write_bytes(np.arange(5000, dtype="<u2").tobytes())
    corpus = prepare(str(tmp_path), 300)
    what = "train.bin has no header of a token shard"
    assert f"{what}; text files are read, such as prepare.py" in corpus.notes
    assert [Path(path).name for path, _ in corpus.left_out] == ["train.bin"]


def test_held_out_text_that_is_also_trained_on_is_reported(tmp_path):
    texts = rows_of(400)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "d" / "test.jsonl").write_bytes(json_lines(texts[:40]))
    what = "of the held-out text also occurs in the training text"
    assert any(note.startswith(f"100% {what}") for note in prepare(str(tmp_path / "d"), 300).notes)
    (tmp_path / "d" / "test.jsonl").write_bytes(json_lines(texts[:40] + rows_of(40, 900)))
    assert any(re.match(rf"(4\d|5\d)% {what}", note) for note in prepare(str(tmp_path / "d"), 300).notes)
    # long texts: pieces of about 1 kB are found wherever they stand
    half = prose(50, 1000) + prose(51, 1000)
    (tmp_path / "d" / "train.jsonl").write_bytes(
        json_lines([prose(7, 501) + prose(51, 1000) + prose(8, 99)] * 3)
    )
    (tmp_path / "d" / "test.jsonl").write_bytes(json_lines([half]))
    assert any(
        re.match(rf"(3[5-9]|4\d|5\d)% {what}", note) for note in prepare(str(tmp_path / "d"), 300).notes
    )
    (tmp_path / "d" / "test.jsonl").write_bytes(json_lines([prose(50, 1000)]))
    assert not any(what in note for note in prepare(str(tmp_path / "d"), 300).notes)


@pytest.mark.parametrize("size", [300, 1000, 4000])
def test_a_short_text_is_enough(tmp_path, size):
    (tmp_path / "a.txt").write_text(prose(3, 300)[:size])
    corpus = prepare(str(tmp_path / "a.txt"))
    T, tokens = corpus.row_length(512), corpus.counts["train"]["tokens"]
    rows = corpus.rows_per_shard("train", T)
    assert 32 <= T < 512 and sum(rows) * T > (0.75 if size == 300 else 0.93) * tokens
    next(DataLoader(corpus, T, 4, 0, "cpu"))
    assert len(ValidationRows(corpus, 10**6, T)) >= 1
    assert corpus.row_length(32) == 32


def test_an_unreadable_folder_is_left_out(text, monkeypatch):
    (text / "locked").mkdir()
    stat = os.stat

    def refused(path, *arguments, **options):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(dataset.os, "stat", refused)
    assert [(Path(path).name, why) for path, why in prepare(str(text)).left_out] == [
        ("locked", "Permission denied")
    ]


def test_names_in_nfd_and_nfc_are_the_same(tmp_path):
    made = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form / "d"
        folder.mkdir(parents=True)
        for n, name in enumerate(("é", "z", "ê", "f")):
            (folder / (unicodedata.normalize(form, name) + ".txt")).write_text(prose(n, 40))
        made.append(prepare(str(folder), 300).fingerprint)
    assert made[0] == made[1]


def test_a_file_that_changes_while_it_is_read_is_an_error(text, monkeypatch):
    read = dataset.TextReader.read

    def changing(self, file, *arguments):
        if file.name == "30.txt" and "more" not in file.read_text():
            file.write_text(file.read_text() + "more")
        read(self, file, *arguments)

    monkeypatch.setattr(dataset.TextReader, "read", changing)
    with pytest.raises(DataError, match="has changed while it was read") as error:
        prepare(str(text))
    two_lines(error)
    assert any("more" in document for document in everything(prepare(str(text))))


def test_a_folder_named_like_a_public_set_is_mentioned(hub_files, monkeypatch, tmp_path):
    hub_files(parts(["a.jsonl", "b.jsonl"]))
    monkeypatch.setitem(dataset.SHORT_NAMES, "stories", "hf:some/set")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    assert any("--data ./stories" in note for note in prepare("stories").notes)


# -----------------------------------------------------------------------------
# The tokenizer


def test_tokenizer_sees_only_the_training_split(text):
    (text / "val.txt").write_text(prose(99, 100))
    first = prepare(str(text)).tokenizer
    (text / "val.txt").write_text("zyzzyva " * 2000)
    second = prepare(str(text)).tokenizer
    assert first._mergeable_ranks == second._mergeable_ranks
    (text / "00.txt").write_text("zyzzyva " * 2000)
    assert prepare(str(text)).tokenizer._mergeable_ranks != first._mergeable_ranks


def test_tokenizer_is_saved_as_text(text, tmp_path):
    corpus = prepare(str(text), 500)
    encoding = corpus.tokenizer
    assert encoding.n_vocab == 500 and encoding.decode([499]) == "<|bos|>"
    dataset.save_tokenizer(encoding, tmp_path / "t")
    again = dataset.load_tokenizer(tmp_path / "t")
    sample = prose(5, 40) + "".join(HARD.values())[-2000:]
    assert again.encode_ordinary(sample) == encoding.encode_ordinary(sample)
    assert again.special_tokens_set == {"<|bos|>"} and again.n_vocab == 500
    for file in (tmp_path / "t").iterdir():
        file.read_text("ascii")
    lengths = dataset.token_bytes(corpus.tokenizer)
    assert lengths[499] == 0 and len(lengths) == 500
    assert lengths[encoding.encode_ordinary(sample)].sum() == len(sample.encode())


def test_vocabulary_follows_the_size(text, tmp_path):
    assert prepare(str(text)).tokenizer.n_vocab <= 512
    numbers = "".join(f"{n * 7919} " for n in range(150_000))
    (text / "big.txt").write_text(numbers + prose(0, 20_000))  # 2.3 MB
    assert prepare(str(text)).tokenizer.n_vocab == 2048
    (text / "big.txt.gz").write_bytes(gzip.compress((text / "big.txt").read_bytes()))
    (text / "big.txt").unlink()
    assert prepare(str(text)).tokenizer.n_vocab == 2048  # the size of the text, not of the file


def test_slow_work_is_not_silent(text, monkeypatch):
    said, train = [], dataset.train_tokenizer

    def slow(*arguments):
        while not any("so far" in line for line in said):
            time.sleep(0.01)
        return train(*arguments)

    class Impatient(threading.Event):
        def wait(self, seconds=None):
            return super().wait(seconds and seconds / 100)

    monkeypatch.setattr(dataset.threading, "Event", Impatient)
    monkeypatch.setattr(dataset, "train_tokenizer", slow)
    prepare(str(text), 300, said.append)
    assert "training the BPE: 0 s so far" in said
    assert "so far" not in said[-1]
    said.clear()
    for blank in ("", " "):  # a text without blanks takes minutes, and rustbpe lets no thread print
        pieces = (("abcdefghi" + blank) * 1000 for _ in range(300))
        train(pieces, 260, 1.0, said.append)
    assert said == ["the BPE may take another 5 s"]
    said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(dataset.time, "monotonic", iter((0, 20)).__next__)  # the words are counted in 20 s
        train(("a few words " * 9 for _ in range(30)), 260, 1.0, said.append)
    assert said == ["the BPE may take another 8 s"]


def test_tokenizer_reads_a_limited_amount_from_all_over_the_corpus(text, monkeypatch):
    seen, said = [], []

    class Listener:
        def train_from_iterator(self, pieces, *arguments, **options):
            seen.extend(pieces)

        def get_mergeable_ranks(self):
            return [(bytes([b]), b) for b in range(256)]

    monkeypatch.setattr(dataset, "TOKENIZER_BYTES", 30_000)
    monkeypatch.setattr(dataset.rustbpe, "Tokenizer", Listener)
    train = documents(prepare(str(text), 400, said.append), "train")
    size = len("".join(train))
    assert 30_000 <= len("".join(seen)) < 34_000 < size / 2 and "400 tokens on 0.0 MB" in "".join(said)
    in_files = [document for document in everything(prepare(str(text), 400)) if document in train]
    in_files.sort(key=[file.read_text() for file in sorted(text.iterdir())].index)
    places = [in_files.index(document) / len(train) for document in seen]
    assert places == sorted(places) and max(np.diff([0.0, *places, 1.0])) < 0.1


# -----------------------------------------------------------------------------
# The cache


def test_a_corpus_is_built_once_and_again_when_it_changes(text, home, monkeypatch, tmp_path):
    said = []
    first = prepare(str(text), say=said.append)
    assert any("BPE" in line for line in said)
    said.clear()
    assert prepare(str(text), say=said.append).fingerprint == first.fingerprint and not said
    assert prepare(str(text), first.tokenizer.n_vocab).fingerprint == first.fingerprint  # as on --resume
    (text / "00.txt").write_text("changed " * 100)
    changed = prepare(str(text), say=said.append)
    assert said and changed.fingerprint != first.fingerprint
    monkeypatch.setenv("ONEDIAL_HOME", str(tmp_path / "elsewhere"))
    shutil.copytree(text, tmp_path / "copy")
    assert prepare(str(tmp_path / "copy")).fingerprint == changed.fingerprint  # time does not count


def test_a_table_without_a_text_column_is_noted_and_one_without_the_named_column_is_an_error(tmp_path):
    table = tmp_path / "reviews.csv"
    table.write_text("id,review\n" + "1,good\n" * 40)
    found, notes = read_file(table)
    assert found == [table.read_text()] and "read as plain text: 1 (reviews.csv)" in notes[0]
    with pytest.raises(DataError, match="no field nofield with strings"):
        read_file(table, text_field="nofield")


def test_changes_since_a_checkpoint_are_named_and_the_old_corpus_can_be_used(text, home, tmp_path):
    first = prepare(str(text), 400)
    dataset.check_same(first, first.fingerprint)
    for n in range(3):
        (text / f"new {n}.txt").write_text(prose(900 + n, 30))
    (text / "05.txt").write_text("changed " * 99)
    (text / "06.txt").unlink()
    with pytest.raises(DataError, match="files: 3 added, 1 removed, 1 changed") as error:
        dataset.check_same(prepare(str(text), 400), first.fingerprint)
    kept = two_lines(error).split("--data ")[1].split(", or start")[0]
    again = prepare(kept, 400)  # as the message says
    assert again.fingerprint == first.fingerprint and everything(again) == everything(first)
    with pytest.raises(DataError, match="unknown"):
        dataset.check_same(first, "unknown")


def test_shards_have_the_public_layout(text):
    corpus = prepare(str(text))
    for split in ("train", "val"):
        for (path, digest), tokens in zip(corpus.shards[split], read(corpus, split)):
            content = path.read_bytes()
            assert np.frombuffer(content[:1024], "<i4").tolist() == [20240520, 1, len(tokens)] + [0] * 253
            assert len(content) == 1024 + 2 * len(tokens)
            assert hashlib.sha256(content).hexdigest() == digest
    manifest = json.loads((corpus.shards["train"][0][0].parent / "manifest.json").read_text())
    assert [f"{n:02d}.txt" for n in range(60)] == [name for name, _ in manifest["sources"]]


def use(data):
    """Read everything that a run reads from a corpus."""
    corpus = prepare(str(data))
    ValidationRows(corpus, 10**6, 32)
    batches = DataLoader(corpus, 32, 4, 0, "cpu").batches()  # without its thread
    for _ in range(sum(corpus.rows_per_shard("train", 32)) // 4 + 1):
        next(batches)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", ["train_000002.bin", "val_000000.bin", "tokenizer.tiktoken"])
def test_damage_is_named(text, home, monkeypatch, name, harm):
    monkeypatch.setattr(dataset, "SHARD_TOKENS", 10_000)
    use(text)
    (path,) = home.rglob(name)
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-3] ^= 1
    path.unlink() if harm == "delete" else path.write_bytes(content[:-1] if harm == "truncate" else content)
    with pytest.raises(DataError) as error:
        use(text)
    folder = next(folder for folder in path.parents if (folder / "manifest.json").exists())
    assert str(path) in two_lines(error) and str(folder) in str(error.value)
    shutil.rmtree(folder)  # as the message says
    use(text)


def test_an_empty_bin_file_is_not_a_shard(text):
    (text / "x.bin").write_bytes(b"")
    assert len(prepare(str(text), 300).shards["train"]) == 1


def test_a_damaged_shard_is_found_without_its_sha256(tmp_path):
    path = tmp_path / "a.bin"
    shard(path, range(100))
    good = path.read_bytes()
    assert dataset.open_shard(path).tolist() == list(range(100))
    changed = np.frombuffer(good, "<i4").copy()
    changed[1] = 2  # another version
    for bad in (good[:-1], good + b"\0\0", b"", good[:900], b"\0" * 2000, good[4:], changed.tobytes()):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="a.bin is damaged"):
            dataset.open_shard(path)
    shard(path, [])
    assert len(dataset.open_shard(path)) == 0


def test_a_corpus_of_the_layout_before_is_used_by_its_folder(text, home):
    first = prepare(str(text), 400)
    (folder,) = home.glob("corpora/text-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["layout"]  # as version 0.1.0 wrote it
    manifest["fingerprint"] = "of before"
    old = folder.with_name("text-0123456789ab")
    shutil.copytree(folder, old)
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="prepared by another version of onedial") as error:
        dataset.check_same(first, "of before")
    assert f"--data {old}" in two_lines(error)
    again = prepare(str(old), 400)
    dataset.check_same(again, "of before")
    assert again.name == "text" and documents(again, "train") == documents(first, "train")


def test_a_damaged_manifest_is_named(text, home):
    use(text)
    (manifest,) = home.glob("corpora/*/manifest.json")
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(DataError, match="manifest.json is damaged"):
        use(text)


BUILD = """
import os, sys, time
sys.path.insert(0, {repo!r})
import dataset
dataset.SHARD_TOKENS = 5000
{more}
corpus = dataset.prepare({data!r}, say=lambda line: print(line, flush=True))
print("fingerprint", corpus.fingerprint, flush=True)
"""


def build(data, more=""):
    code = BUILD.format(repo=str(REPO), data=str(data), more=more)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


KILL = """
write, left = dataset.write, [{stage}]
def write_and_die(path, *contents):
    left[0] -= 1
    if not left[0]:
        open(path, "wb").write(contents[-1][: len(contents[-1]) // 2])
        os.kill(os.getpid(), 9)
    return write(path, *contents)
dataset.write = write_and_die
"""
DIE_AT_RENAME = "dataset.os.rename = lambda *paths: os.kill(os.getpid(), 9)"


def test_a_kill_leaves_nothing_that_is_used_later(text, home, tmp_path, monkeypatch):
    for stage in (KILL.format(stage=1), KILL.format(stage=5), DIE_AT_RENAME):
        process = build(text, stage)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert list(home.rglob(".tmp-*"))  # it was killed while it built the corpus
        assert not [path for path in home.glob("corpora/*/manifest.json") if ".tmp-" not in str(path)]
    process = build(text)
    output = process.communicate()[0]
    assert not list(home.rglob(".tmp-*"))
    monkeypatch.setenv("ONEDIAL_HOME", str(tmp_path / "fresh"))
    assert build(text).communicate()[0].split()[-1] == output.split()[-1]


def test_processes_that_start_together_build_once(text):
    slow = "encode = dataset.encode_texts\ndef later(*a): time.sleep(0.7); return encode(*a)\n"
    processes = [build(text, slow + "dataset.encode_texts = later") for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert sum("BPE" in output for output in outputs) == 1
    assert len({output.split()[-1] for output in outputs}) == 1
    assert all("fingerprint" in output for output in outputs)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A file system of 400 kB as the cache folder; small_disk(option) remounts it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if os.getuid() != 0 or not mount("size=400k"):
        pytest.skip("a small file system can only be mounted as root")
    monkeypatch.setenv("ONEDIAL_HOME", str(folder / "home"))
    mount.folder = folder
    yield mount
    subprocess.run(["umount", "-l", str(folder)])


@pytest.mark.parametrize("name", ["長" * 83 + ".txt", "x" * 250 + ".txt"])  # 253, 254 bytes
def test_a_text_with_the_longest_possible_name(tmp_path, name):
    (tmp_path / name).write_text(prose(0, 20_000))
    corpus = prepare(str(tmp_path / name), 300)
    assert 0 < len(os.fsencode(corpus.name)) <= 100 and corpus.name == name[: len(corpus.name)]
    assert prepare(str(tmp_path / name), 300).fingerprint == corpus.fingerprint


def test_full_disk(small_disk, tmp_path):
    (tmp_path / "book.txt").write_text(prose(0, 20_000))
    with pytest.raises(DataError) as error:
        prepare(str(tmp_path / "book.txt"), 300)
    assert "No space left" in two_lines(error) and "ONEDIAL_HOME" in str(error.value)
    corpora = small_disk.folder / "home" / "corpora"
    left = [path for path in corpora.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not [path for path in left if path.stat().st_size]
    assert small_disk("remount", "size=8m")
    assert sum(prepare(str(tmp_path / "book.txt"), 300).rows_per_shard("train", 64)) > 1000


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_full_disk_while_fetching(small_disk, hub, tmp_path):
    assert small_disk("remount", "size=2m")
    gpt2_vocabulary(small_disk.folder / "home")
    hub.listing = False  # else the size is known before
    hub.files["fineweb_train_000001.bin"] = shard_bytes(tmp_path, 0, 1_000_000)
    with pytest.raises(DataError) as error:
        prepare("fineweb")
    assert "No space left" in two_lines(error)
    assert files_in(small_disk.folder / "home" / "fineweb") == ["fineweb_val_000000.bin"]


def test_read_only_cache(small_disk, text, tmp_path):
    fingerprint = prepare(str(text)).fingerprint
    assert small_disk("remount", "ro")
    assert prepare(str(text)).fingerprint == fingerprint
    use(text)
    (tmp_path / "new.txt").write_text(prose(0, 100))
    with pytest.raises(DataError) as error:
        prepare(str(tmp_path / "new.txt"))
    assert "Read-only" in two_lines(error) and "ONEDIAL_HOME" in str(error.value)


# -----------------------------------------------------------------------------
# Public data sets


PATH = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def hub(monkeypatch, tmp_path, home):
    """A local hub with three small FineWeb shards; waiting is skipped."""
    from huggingface_hub import constants

    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{n:06}.bin" for n in range(1, 104)]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    gpt2_vocabulary(home)
    with hub_server() as server:
        server.files.update({name: shard_bytes(tmp_path, n, 4000) for n, name in enumerate(names[:5])})
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + PATH)
        yield server


def test_fineweb_is_fetched_file_by_file(hub, home):
    hub.listing = False  # names and rough sizes are known
    said, partial = [], home / "fineweb" / ".tmp-fineweb_train_000001.bin" / "half"
    partial.mkdir(parents=True)  # left by a process that was killed
    corpus = prepare("fineweb", say=said.append)
    assert files_in(home / "fineweb") == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert hub.log == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert any("fineweb_train_000001.bin" in line and "200 MB" in line for line in said)
    rows = take(DataLoader(corpus, 50, 8, 0, "cpu"), 10)  # all of the first shard
    first = corpus.fingerprint
    assert corpus.unique_tokens == 103 * 4000  # estimated: all files have the same size in the listing
    add_files(corpus, 170, 50)
    assert hub.log[2:] == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    assert corpus.fingerprint == first and corpus.counts["train"]["tokens"] == 12_000
    more = take(DataLoader(corpus, 50, 8, 0, "cpu"), 30)
    assert np.array_equal(more[:80], rows)  # earlier rows keep their places
    assert [read(corpus, "train")[n] for n in range(3)] == [
        np.frombuffer(hub.files[f"fineweb_train_00000{n}.bin"][1024:], "<u2").tolist() for n in (1, 2, 3)
    ]
    again = prepare("fineweb", say=said.clear)
    assert again.fingerprint == first and len(hub.log) == 4
    corpus.more = []
    late = take(DataLoader(corpus, 50, 80, 0, "cpu"), 6)[240:]  # in epoch 1 shards are shuffled too
    assert Counter(map(tuple, late.tolist())) == Counter(map(tuple, more.tolist()))


@pytest.mark.parametrize("mode", ["404", "429", "500", "500 on GET", "truncates", "short", "drops", "gone"])
def test_a_failing_hub_is_an_error_of_two_lines(hub, home, monkeypatch, mode):
    from huggingface_hub import constants

    hub.mode = mode
    if mode == "gone":
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + PATH)
    with pytest.raises(DataError) as error:
        prepare("fineweb")
    message = two_lines(error)
    assert "fineweb_val_000000.bin of kjj0/fineweb10B-gpt2" in message and str(home / "fineweb") in message
    assert "--data stdlib" in message and (not mode[:3].isdigit() or mode[:3] in message)
    assert not files_in(home / "fineweb")
    hub.mode = "good"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + PATH)
    assert sum(prepare("fineweb").rows_per_shard("train", 50)) == 80


def test_a_damaged_download_is_not_kept(hub, home):
    hub.listing, good = False, hub.files["fineweb_train_000001.bin"]
    for bad in (good[:-2], b"<html>" + good[6:], b""):
        hub.files["fineweb_train_000001.bin"] = bad
        with pytest.raises(DataError, match="fineweb_train_000001.bin is damaged"):
            prepare("fineweb")
        assert files_in(home / "fineweb") == ["fineweb_val_000000.bin"]
    hub.files["fineweb_train_000001.bin"] = good
    prepare("fineweb")


def test_public_shards_can_be_copied_into_the_cache(hub, home):
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        (home / "fineweb").mkdir(exist_ok=True)
        (home / "fineweb" / name).write_bytes(hub.files[name])
    hub.mode = "500"
    corpus = prepare("fineweb")
    ValidationRows(corpus, 1000, 50)
    take(DataLoader(corpus, 50, 8, 0, "cpu"), 3)
    assert not hub.log
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        path = home / "fineweb" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError) as error:
            corpus = prepare("fineweb")
            ValidationRows(corpus, 1000, 50)
            take(DataLoader(corpus, 50, 8, 0, "cpu"), 3)
        assert f"{path} is damaged" in two_lines(error) and f"delete {path}" in str(error.value)
        path.unlink()
        hub.mode = "good"
        prepare("fineweb")  # fetches it again
        assert path.read_bytes() == content


@pytest.fixture
def climbmix(hub, tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    texts = {}
    for n, name in enumerate(["shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"]):
        texts[name] = [prose(100 * n + i, 30) for i in range(20)]
        parquet.write_table(arrow.table({"text": texts[name]}), tmp_path / name)
        hub.files[name] = (tmp_path / name).read_bytes()
    return texts


def test_climbmix_is_tokenized_file_by_file(hub, climbmix, home):
    corpus = prepare("climbmix", 500)
    assert hub.log == ["shard_00000.parquet", "shard_06542.parquet"]
    assert Counter(documents(corpus, "train")) == Counter(climbmix["shard_00000.parquet"])
    assert documents(corpus, "val") == climbmix["shard_06542.parquet"]
    only_first = dataset.train_tokenizer(climbmix["shard_00000.parquet"], 500)
    assert corpus.tokenizer._mergeable_ranks == only_first._mergeable_ranks
    rows = take(DataLoader(corpus, 32, 4, 0, "cpu"), 20)
    first, have = corpus.fingerprint, sum(corpus.rows_per_shard("train", 32))
    add_files(corpus, have + 1, 32)
    assert corpus.fingerprint == first and corpus.counts["train"]["documents"] == 40
    found = documents(corpus, "train")
    assert Counter(found[:20]) == Counter(climbmix["shard_00000.parquet"])  # shuffled within each file
    assert Counter(found[20:]) == Counter(climbmix["shard_00001.parquet"])
    assert found[:20] != climbmix["shard_00000.parquet"]
    assert np.array_equal(take(DataLoader(corpus, 32, 4, 0, "cpu"), 20), rows)
    assert not list(home.rglob("*.parquet"))  # the text is not needed any more
    hub.mode = "500"
    assert prepare("climbmix", 500).fingerprint == first
    with pytest.raises(DataError, match="shard_00000.parquet"):
        prepare("climbmix", 600)
    (home / "climbmix").mkdir()
    (home / "climbmix" / "shard_00000.parquet").write_bytes(hub.files["shard_00000.parquet"][:-100])
    with pytest.raises(DataError, match="shard_00000.parquet cannot be read"):
        prepare("climbmix", 600)
    (path, _), *_ = corpus.shards["train"]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError) as error:
        take(DataLoader(corpus, 32, 4, 0, "cpu"), 1)
    assert f"{path} is damaged" in two_lines(error) and f"delete {path.parent}" in str(error.value)


def test_a_short_name_keeps_its_commit(hub, home, monkeypatch):
    corpus = prepare("fineweb")
    assert corpus.data == f"fineweb@{hub.commit}" and corpus.public.revision == hub.commit
    assert corpus.unique_tokens > 103 * 4000  # files that are not listed have their rough size
    first, hub.commit = hub.commit, "f" * 40
    assert prepare("fineweb").public.revision == prepare(corpus.data).public.revision == first
    monkeypatch.setenv("ONEDIAL_HOME", str(home / "new"))  # on another machine
    gpt2_vocabulary(home / "new")
    assert prepare("fineweb").public.revision == "f" * 40
    assert prepare(corpus.data).fingerprint == corpus.fingerprint  # and without a listing:
    hub.listing = False
    monkeypatch.setenv("ONEDIAL_HOME", str(home / "newer"))
    gpt2_vocabulary(home / "newer")
    assert prepare("fineweb").fingerprint == corpus.fingerprint and prepare("fineweb").data is None


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "shard_00000.parquet"])
def test_a_file_that_is_not_the_listed_one_is_not_kept(hub, climbmix, home, name):
    data, good = "fineweb" if name.endswith(".bin") else "climbmix", hub.files[name]
    hub.changed[name] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DataError, match=f"{name} of .* cannot be downloaded: its sha256 is not that"):
        prepare(data)
    assert not list(home.rglob(name))
    hub.changed.clear()
    prepare(data)


def test_files_in_the_cache_of_the_hub_or_put_there_by_hand_are_used_and_stay(
    hub, climbmix, home, monkeypatch
):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf"))
    for data, names in (
        ("fineweb", ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]),
        ("climbmix", ["shard_06542.parquet", "shard_00000.parquet"]),
    ):
        for name in names:  # another program fetches them
            repository = dataset.PUBLIC[data].repository
            path = Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset"))
        hub.log.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        corpus = prepare(data)
        take(DataLoader(corpus, 32, 8, 0, "cpu"), 2)
        assert path.exists() and not list((home / data).glob("*.*")) and not hub.log
        next_file = corpus.more[0]
        with pytest.raises(DataError, match=f"{next_file} of .* cannot be downloaded: .*[Oo]ffline"):
            dataset.add_file(corpus, "train", next_file)
        (home / data).mkdir(exist_ok=True)
        (home / data / next_file).write_bytes(hub.files[next_file])
        dataset.add_file(corpus, "train", next_file)
        assert (home / data / next_file).exists() and not hub.log
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.slow  # the process gets only what other programs leave of the CPU
def test_a_fetcher_is_a_process_that_ends_with_the_run(hub, climbmix, home, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    corpus, said, pause = prepare("climbmix", 500), [], threading.Event()
    have = sum(corpus.rows_per_shard("train", 32))
    fetcher = dataset.Fetcher(corpus, 32, said.append)
    fetcher.want(have)
    assert fetcher.process is None and fetcher.failure() is None  # nothing to do
    fetcher.want(have + 1)
    assert "about 1 more file of climbmix" in said[0]
    process, nice = fetcher.process.pid, os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process) == 19
    assert os.sched_getscheduler(process) == os.SCHED_IDLE
    assert os.getsid(process) == os.getsid(0)  # in another session its priority would not count
    fetcher.want(have + 1, is_waiting=True)  # no other program can starve it now
    if os.getuid() == 0:
        assert os.getpriority(os.PRIO_PROCESS, process) == nice
        assert os.sched_getscheduler(process) == os.SCHED_OTHER
    while not corpus.next_file():
        assert fetcher.failure() is None and not pause.wait(0.05)
    corpus.use_next_file()
    assert corpus.counts["train"]["documents"] == 40 and corpus.more[0] == "shard_00002.parquet"
    os.kill(process, signal.SIGTERM)  # a batch system signals all processes
    assert pause.wait(0.3) or fetcher.process.poll() is None
    fetcher.process.stdin.close()  # the run has ended
    assert fetcher.process.wait(20) == 0
    killed = dataset.Fetcher(corpus, 32, said.append)
    killed.want(10**6)
    killed.process.kill()
    killed.process.wait()
    assert "ended with status -9" in killed.failure() and killed.failure().count("\n") == 1


# fetch_files in a process of its own, without its pauses
FETCH = """
import sys, dataset
dataset.FIRST_PAUSE = dataset.LONGEST_PAUSE = 0.01
dataset.fetch_files(sys.stdin.buffer.read(int(sys.argv[1])))
"""


def test_a_file_that_fails_is_tried_without_end_while_the_run_has_rows(hub, climbmix, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    corpus, pause = prepare("climbmix", 500), threading.Event()
    hub.mode, content = {"shard_00001.parquet": "404"}, pickle.dumps((corpus, 32))
    command = [sys.executable, "-c", FETCH, str(len(content))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO)
    process.stdin.write(content + b"[1000000, false]\n")
    process.stdin.flush()
    for _ in range(dataset.TRIES + 2):
        error, seconds = json.loads(process.stdout.readline())
        assert "404" in error and seconds > 0
    hub.mode = "good"
    while not corpus.next_file():
        assert process.poll() is None and not pause.wait(0.05)
    process.communicate(timeout=60)  # closes stdin: the run has ended
    assert process.returncode == 0


COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def hub_files(hub, monkeypatch):
    """hub_files({file: content}) sets the files of hf:some/set and returns the revisions asked for."""
    import huggingface_hub
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    asked = []

    hub.card = None

    def dataset_info(self, repository, revision=None, timeout=None, files_metadata=False):
        asked.append(revision)
        if hub.mode[:3].isdigit():
            response = types.SimpleNamespace(status_code=int(hub.mode[:3]), headers={}, request=None)
            error = huggingface_hub.errors.HfHubHTTPError.__new__(huggingface_hub.errors.HfHubHTTPError)
            error.response = response
            raise error
        files = [types.SimpleNamespace(rfilename=name, size=len(content)) for name, content in listed.items()]
        return types.SimpleNamespace(sha=COMMIT, siblings=files, card_data=hub.card)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    listed = {}

    def set_files(files):
        listed.clear()
        listed.update(files)
        hub.files.update({name.split("/")[-1]: content for name, content in files.items()})
        return asked

    return set_files


def parts(names, count=150):
    return {
        name: json_lines([f"{name} {text}" for text in rows_of(count, n)]) for n, name in enumerate(names)
    }


def first_words(corpus, split):
    return sorted({text.split()[0] for text in documents(corpus, split)})


def test_any_data_set_of_the_hub_by_its_name(hub_files, hub, home):
    asked = hub_files(
        {"README.md": b"x" * 99_000, "dataset_infos.json": b"{}"}
        | parts(
            [
                "data/train-00000-of-00002.jsonl",
                "data/train-00001-of-00002.jsonl",
                "data/test.jsonl",
                "data/validation.jsonl",
            ]
        )
    )
    said = []
    corpus = prepare("hf:some/set", say=said.append)
    assert hub.log == ["train-00000-of-00002.jsonl", "validation.jsonl"] and asked == [None]
    assert first_words(corpus, "train") == ["data/train-00000-of-00002.jsonl"]
    assert first_words(corpus, "val") == ["data/validation.jsonl"] and "validation.jsonl" in corpus.notes[0]
    assert any("downloading data/train-0" in line and "MB" in line for line in said)
    estimate = corpus.unique_tokens
    add_files(corpus, sum(corpus.rows_per_shard("train", 32)) + 1, 32)
    assert first_words(corpus, "train")[1] == "data/train-00001-of-00002.jsonl" and corpus.more == []
    # once all files are fetched their tokens are known, so a limit of epochs can hold
    assert corpus.unique_tokens == sum(map(len, read(corpus, "train")))
    assert 0.9 < estimate / corpus.unique_tokens < 1.1
    assert corpus.data == f"hf:some/set@{COMMIT}"
    hub.mode = "500"  # commit and files are in the cache
    assert prepare("hf:some/set").fingerprint == prepare(corpus.data).fingerprint == corpus.fingerprint


def test_a_data_set_without_a_validation_split(hub_files, home):
    hub_files(parts(["a.txt", "b.txt", "c.txt"]))
    corpus = prepare("hf:some/set")
    assert (first_words(corpus, "train")[0], first_words(corpus, "val")[0]) == ('{"id":', '{"id":')
    assert corpus.public.val == "c.txt" and list(corpus.public.train) == ["a.txt", "b.txt"]
    hub_files(parts(["only/one.jsonl"]))
    corpus = prepare("hf:some/other/only")
    assert corpus.split == "hash" and corpus.more is None and corpus.data == f"hf:some/other@{COMMIT}/only"
    assert everything(corpus).total() == 150
    assert corpus.unique_tokens == corpus.counts["train"]["tokens"]


def test_a_data_set_that_cannot_be_used_is_an_error_of_two_lines(hub_files, hub, home, monkeypatch):
    def refused(data, *words):
        with pytest.raises(DataError) as error:
            prepare(data)
        message = two_lines(error)
        assert all(word in message for word in words), message

    for hub.mode in ("401", "404"):
        refused(
            "hf:some/set", "hf:some/set cannot be listed", hub.mode if hub.mode == "401" else "", "auth login"
        )
    hub.mode = "good"
    hub_files({"README.md": b"x", "a.png": b"y"})
    refused("hf:some/set", "no parquet, JSONL or text files", "1 .png")
    hub_files(parts(["en/train.jsonl", "fr/train.jsonl"]))
    refused("hf:some/set", "several data sets: en, fr", "hf:some/set/en")
    refused("hf:nothing", "OWNER/NAME")
    hub_files(parts(["a.jsonl", "b.jsonl"]))
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: usage)
    refused("hf:some/set", "are free", "ONEDIAL_HOME")
    assert not hub.log


@pytest.mark.slow
def test_the_vocabulary_of_a_hub_data_set_follows_the_time(hub_files, monkeypatch):
    hub_files(parts(["a.jsonl", "b.jsonl", "c.jsonl"], 4000))  # 2.7 MB: 2,048 by its size
    said = []
    assert prepare("hf:some/set", None, said.append, 1024).tokenizer.n_vocab == 1024
    assert prepare("hf:some/set").tokenizer.n_vocab == 2048
    monkeypatch.setattr(dataset, "TOKENIZER_BYTES", 100_000)
    prepare("hf:some/set", 700, said.append)
    assert "training a BPE of 700 tokens on 0.1 MB" in said


def test_other_options_do_not_return_the_old_tokens_of_a_public_set(hub_files, text, monkeypatch):
    rows = [{"text": f"{n} one %% {n} two", "other": f"{n} other"} for n in range(300)]
    content = "\n".join(map(json.dumps, rows)).encode()
    hub_files({"a.jsonl": content, "b.jsonl": content})
    tokenizer = prepare(str(text), 300).tokenizer
    first = prepare("hf:some/set", tokenizer=tokenizer)
    assert "%%" in documents(first, "val")[0]
    other = prepare("hf:some/set", tokenizer=tokenizer, text_field="other")
    assert documents(other, "val")[0] == "0 other" and other.fingerprint != first.fingerprint
    hub_files({name: f"{prose(n, 9)}%%\n{prose(n, 8)}".encode() for n, name in enumerate(("a.txt", "b.txt"))})
    assert len(documents(prepare("hf:some/texts", 300), "val")) == 1
    assert len(documents(prepare("hf:some/texts", 300, separator="%%"), "val")) == 2
    monkeypatch.setattr(dataset, "LAYOUT", dataset.LAYOUT + 1)
    assert prepare("hf:some/set", tokenizer=tokenizer).fingerprint != first.fingerprint


def test_what_a_public_set_leaves_out_is_reported(hub_files):
    names = ["train-0.jsonl", "train-1.jsonl", "test.jsonl", "validation.jsonl", "dev.jsonl"]
    pdf_and_more = {
        "a.pdf": b"x",
        "other.csv": b"text\na\n" * 50,
        "small.parquet": b"PAR1",
        "../up.jsonl": b"{}",
    }
    hub_files(parts(names) | pdf_and_more)
    corpus = prepare("hf:some/set")
    assert first_words(corpus, "train") == ["train-0.jsonl"] and first_words(corpus, "val") == [
        "validation.jsonl"
    ]
    held_out, left_out, *_ = corpus.notes
    assert held_out == "held out: validation.jsonl; 2 files (2 .jsonl) not used, such as dev.jsonl"
    assert left_out.startswith("left out: 4 files") and len(corpus.left_out) == 4
    assert dict(corpus.left_out)["../up.jsonl"] == "its path leads out of the data set"
    assert dict(corpus.left_out)["other.csv"] == "not .jsonl, the format with most text"
    hub_files({"train-0.txt": b"a text " * 900, "train-1.txt": b"\0" * 900, "val.txt": prose(1, 99).encode()})
    for _ in range(2):  # and again from the cache
        again = prepare("hf:some/texts", 300)
        assert any("left out: " in line and "train-1.txt" in line for line in add_files(again, 10**6, 16))
        assert [Path(path).name for path, _ in again.left_out] == ["train-1.txt"]


def test_held_out_text_of_a_public_set_that_is_also_trained_on_is_reported(hub_files):
    texts = rows_of(300)
    files = [texts[:100], texts[100:200] + texts[250:], texts[200:]]
    hub_files({name: json_lines(rows) for name, rows in zip(("a.jsonl", "b.jsonl", "val.jsonl"), files)})
    for _ in range(2):  # and again from the cache
        corpus = prepare("hf:some/set", 300)
        assert not any("also occurs" in note for note in corpus.notes)
        said = add_files(corpus, 10**6, 16)
        assert any(re.match(r"(4|5)\d% of the held-out text also occurs in b.jsonl", line) for line in said)


def test_a_tiny_held_out_file_of_a_public_set_is_no_validation_split(hub_files):
    hub_files(
        parts(["a.jsonl", "b.jsonl", "c.jsonl"])
        | {"requirements-dev.txt": b"x", "dev.jsonl": b'{"text": "x"}'}
    )
    corpus = prepare("hf:some/set", 300)
    assert corpus.public.val == "c.jsonl" and corpus.public.unused == ["dev.jsonl"]


def test_several_sets_on_any_level_are_not_mixed(hub_files):
    hub_files(parts([f"data/{language}/{n}.jsonl" for language in ("de", "en") for n in range(3)]))
    with pytest.raises(DataError, match="several data sets: data/de, data/en") as error:
        prepare("hf:some/set")
    assert "hf:some/set/data/de" in two_lines(error)
    assert first_words(prepare("hf:some/set/data/en"), "train") == ["data/en/0.jsonl"]
    hub_files(parts([f"data/{kind}/dump-{n}/0.jsonl" for kind in ("train", "test") for n in (2023, 2024)]))
    corpus = prepare("hf:some/dumps")  # folders that differ by a number are one set
    assert list(corpus.public.train) == ["data/train/dump-2023/0.jsonl", "data/train/dump-2024/0.jsonl"]


def test_a_folder_beside_training_files_is_left_out_and_reported(hub_files):
    hub_files(parts(["a.jsonl", "b.jsonl", "test/c.jsonl"]) | parts(["old/a.jsonl"], 20))
    public = prepare("hf:some/set", 300).public
    assert list(public.train) == ["a.jsonl", "b.jsonl"] and public.val == "test/c.jsonl"
    assert public.left_out == [["old/a.jsonl", "most of the training text is in another folder"]]
    assert list(prepare("hf:some/set/old", 300).public.train) == ["old/a.jsonl"]
    hub_files(parts(["sample.jsonl"], 20) | parts(["test.jsonl", "data/train/a.jsonl", "data/train/b.jsonl"]))
    public = prepare("hf:some/sample", 300).public
    assert list(public.train) == ["data/train/a.jsonl", "data/train/b.jsonl"] and public.val == "test.jsonl"
    assert [path for path, _ in public.left_out] == ["sample.jsonl"]


def test_the_configurations_of_a_data_card_are_used(hub_files, hub):
    names = [
        "de/x-train.jsonl",
        "de/y.jsonl",
        "en/x-train.jsonl",
        "en/deep/more.jsonl",
        "en/y.jsonl",
        "z.jsonl",
    ]
    hub_files(parts(names))
    hub.card = {
        "configs": [
            {"config_name": "german", "data_files": "de/*.jsonl"},
            {
                "config_name": "english",
                "data_files": [
                    {"split": "train", "path": ["en/*-train.jsonl", "en/**/m[a-o]re.jsonl"]},
                    {"split": "validation", "path": "en/y.jsonl"},
                ],
            },
        ]
    }
    with pytest.raises(DataError, match="several data sets: english, german") as error:
        prepare("hf:some/set")
    assert "hf:some/set/english" in two_lines(error)
    english = prepare("hf:some/set/english").public
    assert list(english.train) == ["en/deep/more.jsonl", "en/x-train.jsonl"] and english.val == "en/y.jsonl"
    assert list(prepare("hf:some/set/german").public.train) == ["de/x-train.jsonl"]
    hub.card["configs"][1]["default"] = True
    assert prepare("hf:some/other").public.train == english.train
    hub.card["configs"] = [{"config_name": "gone", "data_files": "gone/*"}, {"config_name": "default"}, "odd"]
    assert list(prepare("hf:some/third/de").public.train) == ["de/x-train.jsonl"]


def test_pyarrow_that_runs_pickles_of_a_parquet_file_is_not_accepted():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [entry for entries in extras.values() for entry in entries if entry.startswith("pyarrow")]
    assert needed == ["pyarrow>=14.0.1"] * 2


# -----------------------------------------------------------------------------
# The command line


def command(*arguments, **env):
    process = [sys.executable, str(REPO / "dataset.py"), *map(str, arguments)]
    return subprocess.run(process, env={**os.environ, **env}, capture_output=True, text=True)


def test_command_line_describes_a_corpus(text, home):
    result = command(text)
    corpus = prepare(str(text))
    assert result.returncode == 0 and "training a BPE" in result.stderr and "BPE" not in result.stdout
    for split in ("train", "val"):
        (line,) = re.findall(rf"^{split} .*", result.stdout, re.MULTILINE)
        counts = corpus.counts[split]
        for key in ("documents", "bytes", "tokens"):
            assert f"{counts[key]:,} {key}" in line
        assert f"{sum(corpus.rows_per_shard(split, 128)):,} rows" in line
        assert f"{counts['bytes'] / counts['tokens']:.2f} bytes per token" in line
    assert "split by hash" in result.stdout and corpus.fingerprint in result.stdout
    row = result.stdout.split("the first tokens:\n")[1].strip()
    assert row.startswith("<|bos|>")
    assert row[7:].split("<|bos|>")[0].strip() in "".join(documents(corpus, "train"))


def test_command_line_lists_the_cache(text, home):
    prepare(str(text))
    (corpus,) = home.glob("corpora/text-*")
    (line,) = [line for line in command("--cache").stdout.splitlines() if str(corpus) in line]
    os.utime(corpus, (0, 0))
    prepare(str(text))
    assert time.time() - corpus.stat().st_mtime < 60  # listed with the day of its last use
    size = sum(file.stat().st_size for file in corpus.rglob("*") if file.is_file())
    assert line.split()[0] == f"{size / 1e6:,.1f}" and time.strftime("%Y-%m-%d") in line


def test_command_line_errors_have_two_lines(tmp_path, text):
    result = command(tmp_path / "nothing")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 2 and "nothing" in result.stderr
    prepare(str(text))
    reader = f"{sys.executable} {REPO / 'dataset.py'} {text} | true"
    result = subprocess.run(["bash", "-c", reader], capture_output=True, text=True)
    assert result.stderr == ""


def test_command_line_prints_into_any_output(text, tmp_path):
    (text / "00.txt").write_text("ü \x1b[2J \x07 " * 90)
    (text / "a\x1b[2Jü.pdf").write_text("left out")
    command(text)
    name = f"{sys.executable} {REPO / 'dataset.py'} {text}"
    for where, code, message in (
        ("", 0, ""),
        ("> /dev/full", 1, "error: the output cannot be read or written: No space left on device.\n"),
        (">&-", 0, ""),
        ("2>&- >&-", 0, ""),
        ("2> /dev/full > /dev/null", 0, ""),
    ):
        env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        result = subprocess.run(["bash", "-c", f"{name} {where}"], capture_output=True, text=True, env=env)
        assert result.returncode == code and result.stderr.startswith(message), (where, result.stderr)
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr
        assert "\x1b" not in result.stdout and "\x07" not in result.stdout
    (tmp_path / "line.txt").write_text("x")
    result = command(tmp_path / "line.txt")  # too short for anything, but described
    assert result.returncode == 0 and "1 byte;" in result.stdout, result.stderr


@pytest.mark.slow
def test_command_line_without_network_and_with_a_mirror(hub, climbmix, home, tmp_path):
    offline = command("climbmix", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "Traceback" not in offline.stderr
    assert "--data stdlib" in offline.stderr and str(home / "climbmix") in offline.stderr
    mirrored = command("climbmix", HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "hf"))
    assert mirrored.returncode == 0, mirrored.stderr
    assert "20 documents" in mirrored.stdout


# -----------------------------------------------------------------------------
# The lock of the cache


@pytest.mark.slow
def test_after_five_seconds_it_says_which_process_holds_the_lock(tmp_path):
    code = "import dataset, os, signal; from pathlib import Path; "
    code += f"held = dataset.locked(Path({str(tmp_path / 'lock')!r}), print); held.__enter__(); "
    code += "print(1, flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    said, begin = [], time.monotonic()

    def say(line):
        said.append(line)
        holder.kill()

    with dataset.locked(tmp_path / "lock", say) as is_locked:
        assert is_locked and 5 < time.monotonic() - begin < 20
    holder.communicate()
    host = socket.gethostname()
    assert said == [f"waiting for process {holder.pid} on {host}, which holds {tmp_path / 'lock'}"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_cache_on_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def limited(file, operation):
        raise OSError(number, os.strerror(number))

    def make(temporary):
        if not built:  # another process builds the same meanwhile, and is faster
            built.append("other")
            dataset.make_once(tmp_path / "a", make)
        (temporary / "file").write_text("text")
        return {"is": "complete"}

    built = []
    monkeypatch.setattr(fcntl, "flock", limited)
    monkeypatch.setattr(os, "getpid", iter(range(1000, 2000)).__next__)
    assert dataset.make_once(tmp_path / "a", make) == {"is": "complete"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", "a"]


def test_a_cache_of_another_user_is_an_error_that_names_the_owner(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(dataset.DataError, match="cannot be written: Permission denied.\nAsk its owner"):
        dataset.make_once(tmp_path / "corpora" / "a", None)
