"""
The data: text to tokens to rows, every token used once an epoch, in an order that does not know how many
processes read it.

A corpus is prepared once: documents found and split, a BPE trained on the training split (rustbpe), all of
it encoded by all cores (tiktoken), and kept in a cache folder as uint16 shards in the public GPT-2 layout.
`python dataloader.py PATH` prepares a corpus and says what it found and left out; --cache lists what is kept.
"""

import argparse
import base64
import bz2
import codecs
import csv
import errno
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import unicodedata
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import filelock
import numpy as np
import rustbpe
import tiktoken
import torch

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256  # the header of the public GPT-2-tokenized FineWeb shards
SHARD_TOKENS = 100_000_000
PIECE_CHARS = 2**16  # longer documents are encoded in pieces: the regex engines fail on a million blanks
VAL_PIECE_CHARS = 2**12  # held-out text becomes documents of this size: what is evaluated is a choice of them
LAYOUT = 3  # of what is kept in the cache; another number: all is made anew
BLOCK = 2**20  # letters or bytes that are read at once: bounds the memory
TOKENIZER_BYTES = 200_000_000  # text that a BPE is trained on, at most, from all over the corpus
THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
VAL_SHARE = 0.05
# GPT-4's split pattern, but numbers of at most 2 digits: that suits vocabularies below 100,000 (nanochat)
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
SPLIT_PATTERN += r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SUFFIXES = """
    .txt .text .md .rst .org .tex .adoc .bib .log .csv .tsv .json .xml .html .htm .css .yaml .yml .toml .py
    .pyi .c .h .cc .cpp .cxx .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .pl .sh .bash .sql .swift .kt
    .scala .hs .ml .lua .r .jl .m .lisp .el .clj .ex .erl .f90 .cs .vb .dart .zig .nim .proto
    .jsonl .ndjson .parquet""".split()
PACKED = (".gz", ".bz2", ".xz", ".zst")  # may follow a suffix
DATA_FILES = (".txt", ".text", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".bin")
# what marks a data file as held out; the first kind that is there is the validation split
HELD_OUT = {"val": 0, "valid": 0, "validation": 0, "dev": 1, "test": 2, "eval": 3, "heldout": 4}
TEXT_FIELDS = "text content story document body article passage page_content raw_content contents".split()
STRINGS = re.compile("(large_)?string|dictionary<values=string")  # as pyarrow names the types
MEND = "Mend it, or take it out."
NAME_IT = "Name the field that is the text, a string, with --text-field NAME, or take the file out."
BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, which it begins with
    codecs.BOM_UTF8: "utf-8-sig",
    **{codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"},
    **{codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"},
}
ENCODINGS = """
    cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 cp1257 koi8_r mac_roman cp437 cp850 cp866
    cp932 euc_jp gb18030 big5 cp949""".split()
INSTEAD = "or train now with --data stdlib or --data PATH."


class DataError(Exception):
    """Something about the data that a person must mend; the message says what and how."""


@dataclass
class PublicSet:
    """A data set of the Hugging Face hub: its training files, {name: MB}, in the order of epoch 0."""

    name: str  # of its folder in the cache
    repository: str
    train: dict
    val: str | None  # None: the one training file is split like any text
    revision: str = "main"
    inside: str = ""  # the folder or file that was asked for


PUBLIC = {
    "fineweb": PublicSet(
        name="fineweb",
        repository="kjj0/fineweb10B-gpt2",
        train={f"fineweb_train_{n:06}.bin": 200 for n in range(1, 104)},
        val="fineweb_val_000000.bin",
    ),
    "climbmix": PublicSet(
        name="climbmix",
        repository="karpathy/climbmix-400b-shuffle",
        train={f"shard_{n:05}.parquet": 90 for n in range(6542)},
        val="shard_06542.parquet",
    ),
}
SHORT_NAMES = {"tinystories": "hf:roneneldan/TinyStories/data"}


def is_public(data):
    """Whether `data` names a public data set and no path."""
    return data in PUBLIC or data in SHORT_NAMES or data.startswith("hf:")


# -----------------------------------------------------------------------------
# The cache: each thing in it is made once, by one process, and is whole or not there


def cache_folder():
    """Where prepared corpora live: $ONEDIAL_HOME, or ~/.cache/onedial."""
    try:
        return Path(os.environ.get("ONEDIAL_HOME") or "~/.cache/onedial").expanduser()
    except RuntimeError:
        raise DataError("there is no home folder to keep a corpus in.\nSet ONEDIAL_HOME to one.") from None


def fingerprint(*values):
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def sha256(path):
    """The hash of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path, *contents):
    """Write bytes or arrays to a file, forced to the disk -> their sha256."""
    with open(path, "wb") as file:
        for content in contents:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return sha256(path)


def make_once(folder, make):
    """
    -> the manifest of `folder`. If there is none, make(temporary folder) fills it and returns the manifest:
    under a lock, so that others wait, and a temporary name, so that a kill leaves nothing that is trusted
    later. A folder that is there is only read. DataError if the disk fails.
    """
    manifest, temporary = folder / "manifest.json", folder.with_name(f".tmp-{folder.name}")
    try:
        if not manifest.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
                if not manifest.exists():
                    shutil.rmtree(temporary, ignore_errors=True)
                    try:
                        temporary.mkdir()
                        write(temporary / "manifest.json", json.dumps(make(temporary), indent=1).encode())
                        shutil.rmtree(folder, ignore_errors=True)
                        os.rename(temporary, folder)
                    finally:
                        shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        advice = "Make room there, or set ONEDIAL_HOME to another folder."
        raise DataError(f"{folder} cannot be written: {error.strerror or error}.\n{advice}") from None
    try:
        return json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        raise damaged(manifest, "it cannot be read as JSON") from None


def damaged(path, what):
    """The DataError for a file that is not what it should be."""
    made = cache_folder() / "checked"  # what is known of files that are not ours
    if cache_folder() in path.parents:
        made = next((folder for folder in path.parents[:2] if (folder / "manifest.json").exists()), path)
    return DataError(f"{path} is damaged: {what}.\nPut the right one back or delete {made} to begin anew.")


# -----------------------------------------------------------------------------
# Documents: find their files


@dataclass
class Found:
    """
    The files of text under a root: those to train on; those held out by name, to validate on or unused; and
    what is left out, [(path, why)].
    """

    root: Path
    train: list
    val: list = field(default_factory=list)
    unused: list = field(default_factory=list)
    left_out: list = field(default_factory=list)


def suffix_of(file):
    """The suffix that says what is in a file, compressed or not: .jsonl of a.jsonl.gz."""
    name = file.name.lower()
    return Path(name[: -len(file.suffix)] if file.suffix.lower() in PACKED else name).suffix


def held_out_word(root, file):
    """
    The word of HELD_OUT that marks a data file: the name of a folder below root, or the first or last word of
    the file's own name before its numbers (test-00000-of-00007.parquet, wiki_val_000.txt.gz). None if none.
    """
    if (suffix := suffix_of(file)) not in DATA_FILES:
        return None
    path = unicodedata.normalize("NFC", str(file.relative_to(root)).casefold())
    *folders, name = re.sub(r"held[-_ ]out", "heldout", path).split(os.sep)
    stem = re.sub(r"\W\d+-of-\d+.*", "", name[: name.rindex(suffix)])
    words = re.findall(r"[^\W_]+", re.sub(r"[\W\d_]+$", "", stem) or stem)
    return next((word for word in (*folders, *words[:1], *words[-1:]) if word in HELD_OUT), None)


def list_files(root, left_out):
    """All files under root, sorted, links followed, each once; to left_out goes what is hidden or no file."""
    files, seen = [], set()

    def is_new(path):
        status = os.stat(path)
        place = (status.st_dev, status.st_ino)
        return place not in seen and not seen.add(place)

    def failed(error):
        left_out.append((Path(error.filename), error.strerror))

    for folder in (root.resolve(), *root.resolve().parents):
        is_new(folder)  # a link to one of these is a loop
    for folder, subfolders, names in os.walk(root, onerror=failed, followlinks=True):
        left_out += [(Path(folder, name), "hidden") for name in subfolders + names if name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        subfolders[:] = [name for name in subfolders if is_new(Path(folder, name))]  # else a loop of links
    kept = []
    for file in sorted(files, key=lambda file: (file.is_symlink(), file)):  # a file before links to it
        if not file.is_file():
            left_out.append((file, "neither a file nor a link to one"))
        elif not is_new(file):
            left_out.append((file, "another name of a file that is read"))
        else:
            kept.append(file)
    return sorted(kept)


def list_sources(root):
    """The sources of Python in its own folder, sorted: this list and their reading never change."""
    files, skip = [], ("site-packages", "dist-packages")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.suffix.lower() == ".py" and file.is_file())


def part_by_name(data, root, files):
    """
    Part files under root by what their names say -> [to train on, to validate on, unused]: the first kind of
    HELD_OUT that is there is the validation split. DataError where nothing is left to train on.
    """
    kinds = {}  # {kind of HELD_OUT, or -1: files}
    for file in files:
        kinds.setdefault(HELD_OUT.get(held_out_word(root, file), -1), []).append(file)
    if len(kinds) > 1 and -1 not in kinds:
        what = f"--data {data}: all its files are held out by their names, as {kinds[min(kinds)][0].name}"
        raise DataError(f"{what}.\nGive the path of the one to train on, or rename it.")
    train, val, *unused = [kinds[kind] for kind in sorted(kinds)] + [[], []]
    return train, val, sum(unused, [])


def find_files(data):
    """
    `stdlib` or a path -> its text files, or else its .bin shards, as Found. A data file whose name marks it
    as held out is never trained on: the first kind of HELD_OUT that is there is the validation split.
    """
    root = Path(sysconfig.get_path("stdlib")) if data == "stdlib" else Path(data).expanduser()
    if data == "stdlib":
        return Found(root, list_sources(root))
    if not root.exists():
        names = ", ".join(["stdlib", *PUBLIC, *SHORT_NAMES, "hf:OWNER/NAME"])
        advice = f"Give a text file, a folder of text, or one of: {names}."
        raise DataError(f"{data}: there is no such file or folder.\n{advice}")
    if root.is_file():
        return Found(root.parent, [root])
    found = Found(root, [])
    files = list_files(root, found.left_out)
    shards = [file for file in files if file.suffix == ".bin"]
    if not any(MAGIC in np.fromfile(file, dtype="<i4", count=1) for file in shards):
        shards = []
    known = set(shards or [file for file in files if suffix_of(file) in SUFFIXES])
    found.left_out += [(file, "no kind of text that is known") for file in files if file not in known]
    files = [file for file in files if file in known]
    found.train, found.val, found.unused = part_by_name(data, root, files)
    return found


def plural(number, noun):
    """A number of things in words: `1 file`, `2,000 files`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def summary(paths):
    """Some paths in a few words: `3 files (2 .pdf, 1 .zip)`."""
    kinds = Counter(Path(path).suffix.lower() or "without a suffix" for path in paths)
    kinds = [f"{number:,} {kind}" for kind, number in kinds.most_common()]
    more = f", {len(kinds) - 6} other kinds" if len(kinds) > 6 else ""
    return f"{plural(len(paths), 'file')} ({', '.join(kinds[:6])}{more})"


# -----------------------------------------------------------------------------
# Read them, into one text


class Text:
    """
    The text of many files as one file of UTF-8 without a name in `folder`, and the places of its documents:
    text[begin:end] are its bytes. So no document has to fit into memory.
    """

    def __init__(self, folder=None):
        self.file, self.size = tempfile.TemporaryFile(dir=folder), 0
        self.places = array("Q")  # begin, end, begin, end, …

    def write(self, text):
        """Append text; a document it is once its place is added."""
        self.size += self.file.write(text.encode("utf-8", "replace"))  # JSON may hold half a surrogate pair

    def add_document(self, begin, end):
        """Add a document's place, in bytes; an empty one is none."""
        if begin < end:
            self.places.extend((begin, end))

    def documents(self):
        """Where each document begins and ends, int64 (documents, 2)."""
        return np.array(self.places, dtype=np.int64).reshape(-1, 2)

    def __getitem__(self, place):
        self.file.flush()
        return os.pread(self.file.fileno(), place.stop - place.start, place.start)


def open_bytes(file):
    """Open a file to read its bytes, decompressed if its suffix says so."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import zstandard  # an extra

        return zstandard.ZstdDecompressor().stream_reader(open(file, "rb"), read_across_frames=True)
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(file, "rb")


def open_text(file, encoding):
    """Open a file to read its text, line ends as they are."""
    return io.TextIOWrapper(open_bytes(file), encoding, "replace", newline="")


def guess_encoding(sample):
    """The encoding of bytes that are not valid UTF-8."""
    text = sample.decode("utf-8", "replace")
    if sum(letter > "\x7f" for letter in text) > 2 * text.count("\ufffd"):
        return "utf-8"  # most of it is valid, some is damaged
    import charset_normalizer  # slow to import, and seldom needed

    western, best = (
        charset_normalizer.from_bytes(sample, cp_isolation=names).best() for names in (["cp1252"], ENCODINGS)
    )
    if not best or western and western.chaos <= best.chaos + 0.02:  # it is by far the most common one
        return "cp1252"
    return best.encoding


def read_json_lines(file, stream):
    """Yield (place, value) of a file of one JSON value a line; blank lines are left out."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                what = f"{file}, line {number}: this is no JSON"
                raise DataError(f"{what}.\nMend or delete that line.") from None


def read_json(file, stream):
    """Yield (place, value) of a JSON array, or of values one after another; of anything else nothing."""
    decoder, text, count = json.JSONDecoder(), stream.read(BLOCK).lstrip(), 0
    if not text.startswith(("[", "{")):
        return
    at = int(text.startswith("["))
    while True:
        at = re.compile(r"[\s,]*").match(text, at).end()
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:  # perhaps because the rest of it is yet to be read
            text, at, more = text[at:], 0, stream.read(max(BLOCK, len(text)))
            if not more and text.strip() in ("", "]"):
                return
            if not more or len(text) > 64 * BLOCK:
                raise
            text += more
        else:
            count += 1
            yield f"value {count}", value


def read_csv(file, stream):
    """Yield (place, {column: text}) of a table with a header; , ; and tabs are known to part its columns."""
    csv.field_size_limit(2**31 - 1)
    header = stream.readline()
    lines = csv.reader(chain([header], stream), delimiter=max("\t,;", key=header.count))
    names = next(lines, [])
    for row in lines:
        if row:
            yield f"line {lines.line_num}", dict(zip(names, row))


def read_parquet(file, text_field):
    """Yield (place, {column: text}) of the one column that is the text."""
    import pyarrow.parquet as parquet  # an extra

    table, count = parquet.ParquetFile(file, buffer_size=BLOCK), 0
    types = {column.name: str(column.type) for column in table.schema_arrow}
    names = [text_field] if text_field else TEXT_FIELDS
    name = next((name for name in names if STRINGS.match(types.get(name, ""))), None)
    if name is None:
        columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        what = f"{file} has no column {text_field or 'text'} of strings, but {columns}"
        raise DataError(f"{what}.\n{NAME_IT}")
    for batch in table.iter_batches(batch_size=64, columns=[name]):
        for text in batch.column(name).cast("string").to_pylist():
            count += 1
            yield f"row {count}", {name: text}


TABLES = {".jsonl": read_json_lines, ".ndjson": read_json_lines, ".json": read_json}
TABLES |= {".csv": read_csv, ".tsv": read_csv}


def find_text_field(file, rows, text_field):
    """
    The field that is the text in these first rows, (place, value) each: the one named, or the first of
    TEXT_FIELDS that is a string. None where the file may as well be plain text, else DataError.
    """
    rows = [row for _, row in rows if isinstance(row, dict)]
    strings = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    names = [text_field] if text_field else TEXT_FIELDS
    if name := next((name for name in names if name in strings), None):
        return name
    if text_field:
        raise DataError(f"{file}: no field {text_field} is a text.\n{NAME_IT}")
    if suffix_of(file) in (".json", ".csv", ".tsv"):
        return None
    what = f"none of its fields {', '.join(rows[0])} is a text" if rows else "its lines are no JSON objects"
    for name, value in rows[0].items() if rows else ():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            what = f"its {name} are chats, lists of turns, and not one text"
    raise DataError(f"{file}: {what}.\n{NAME_IT}")


class TextReader:
    """
    Reads files of text, and keeps what is worth telling. text_field: the field or column that is the text
    (None: found); separator: what parts documents in a file of plain text (None: <|endoftext|> in .txt);
    plain: it is UTF-8, whatever comes. left_out: [(path, why)]; notes: {what: {file's name: how often}}.
    """

    def __init__(self, text_field=None, separator=None, plain=False):
        self.text_field, self.plain = text_field, plain
        self.separator = separator.replace("\\n", "\n") if separator else None  # as a shell gives it
        self.left_out, self.notes = [], {}

    def note(self, what, file, count=1):
        """Count something that a person may want to know about a file."""
        self.notes.setdefault(what, Counter())[file.name] += count

    def told(self):
        """The notes, a line each: `rows without a text: 3 (posts.csv and 2 other files)`."""
        for what, files in self.notes.items():
            more = f" and {len(files) - 1:,} other files" if len(files) > 1 else ""
            yield f"{what}: {files.total():,} ({next(iter(files))}{more})"

    def read(self, file, text):
        """Add the documents of a file to a Text. DataError names what is amiss with it."""
        suffix = suffix_of(file)
        try:
            if suffix == ".parquet":
                self.add_rows(file, read_parquet(file, self.text_field), text)
            elif encoding := self.find_encoding(file):
                if suffix in TABLES:
                    with open_text(file, encoding) as stream:
                        if self.add_rows(file, TABLES[suffix](file, stream), text):
                            return
                    if suffix in (".csv", ".tsv"):
                        self.note("tables without a known column of text, read as plain text", file)
                with open_text(file, encoding) as stream:
                    self.add_plain(file, stream, text)
        except (DataError, MemoryError):
            raise
        except ImportError as error:
            raise DataError(f"{file} takes {error.name} to read.\npip install {error.name}") from None
        except Exception as error:  # whatever the libraries that read it raise
            if getattr(error, "errno", None) == errno.ENOSPC:  # it is the Text that has no room
                raise
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
            raise DataError(f"{file} cannot be read: {reason.rstrip('.')}.\n{MEND}") from None

    def find_encoding(self, file):
        """The encoding of a file of text, which is read once for it; None if it is not text."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open_bytes(file) as stream:
            block = stream.read(BLOCK)
            mark = next((mark for mark in BYTE_ORDER_MARKS if block.startswith(mark)), None)
            if mark and not self.plain:
                return BYTE_ORDER_MARKS[mark]
            if b"\0" in block[:8192]:
                self.left_out.append((str(file), "not text: it holds a byte 0"))
                return None
            try:
                while block and not self.plain:
                    decoder.decode(block)
                    sample, block = block, stream.read(BLOCK)
                decoder.decode(b"", final=True)
                return "utf-8"
            except UnicodeDecodeError as error:
                begin = max(0, error.start - 1000)
                encoding = guess_encoding((block or sample)[begin : begin + 2**16])
        damaged = "files of UTF-8 with damage, which is U+FFFD now"
        self.note(damaged if encoding == "utf-8" else f"files read as {encoding}", file)
        return encoding

    def add_plain(self, file, stream, text):
        """Add a plain text, parted into documents at the separator; a line end beside it belongs to it."""
        begin, before = text.size, len(text.places)
        for block in iter(partial(stream.read, BLOCK), ""):
            text.write(block)
        separator = self.separator or ("<|endoftext|>" if suffix_of(file) in (".txt", ".text") else None)
        if separator and not self.plain:
            pattern, at = rb"(?:\r?\n)?%b(?:\r?\n)?" % re.escape(separator.encode()), begin
            while at < text.size:
                for match in re.finditer(pattern, text[at : at + BLOCK + len(separator.encode()) + 4]):
                    if match.start() < BLOCK:  # else it may be cut off, and is found in the next block
                        text.add_document(begin, at + match.start())
                        begin = at + match.end()
                at = max(at + BLOCK, begin)
        text.add_document(begin, text.size)
        if (documents := (len(text.places) - before) // 2) > 1:
            self.note(f"documents parted at {separator!r}", file, documents)

    def add_rows(self, file, rows, text):
        """
        Add the texts of (place, row) pairs as documents -> whether this is a table of texts. A row without
        one is counted; DataError where more than 1% are.
        """
        first, where, missing, count = [], None, 0, 0
        try:
            first += islice(rows, 16)
        except (ValueError, csv.Error):
            if suffix_of(file) == ".parquet" or find_text_field(file, first, self.text_field):
                raise
            return False
        if (name := find_text_field(file, first, self.text_field)) is None:
            return False
        for place, row in chain(first, rows):
            content, begin = row.get(name) if isinstance(row, dict) else None, text.size
            count += 1
            if isinstance(content, str):
                text.write(content)
                text.add_document(begin, text.size)
            else:
                where, missing = where or place, missing + 1
        if missing > 0.01 * count:
            what = f"{file}, {where}: no string in the field {name}, as in {missing:,} of {count:,} rows"
            raise DataError(f"{what}.\n{NAME_IT}")
        if missing:
            self.note("rows without a text", file, missing)
        if name != (self.text_field or "text"):
            self.note(f"texts from the field {name}", file, count - missing)
        return True


# -----------------------------------------------------------------------------
# Split and cut them


def choose_split(text, places, named):
    """
    How documents of `text` are held out, those from number `named` on by the names of their files, and where
    in each what is held out begins -> "files": there are such files; "hash": 5% of the documents, chosen by
    content, so that adding files moves none; "tail": the end of each, where they are few.
    """
    begins, ends = places.T
    if named < len(places):
        return "files", np.where(np.arange(len(places)) < named, ends, begins)
    held_out = np.empty(len(places), dtype=bool)
    for number, (begin, end) in enumerate(places):
        digest = hashlib.sha256()
        for at in range(begin, end, BLOCK):
            digest.update(text[at : min(end, at + BLOCK)])
        held_out[number] = int.from_bytes(digest.digest()[:4], "big") < VAL_SHARE * 2**32
    if 0.01 <= (ends - begins)[held_out].sum() / (ends - begins).sum() <= 0.20:
        return "hash", np.where(held_out, begins, ends)
    return "tail", np.array([find_cut(text, begin, end) for begin, end in places])


def find_cut(text, begin, end):
    """Where the last 5% of a document begin, at a line's start if there is one near, else a letter's."""
    cut = begin + int((1 - VAL_SHARE) * (end - begin))
    first = max(cut - BLOCK, begin + int(0.8 * (end - begin)))
    if line := text[first:cut].rfind(b"\n") + 1:
        return first + line
    while cut < end and text[cut : cut + 1][0] & 0xC0 == 0x80:  # a letter goes on here
        cut += 1
    return cut


def cut_into_pieces(text, places, size=PIECE_CHARS):
    """
    Yield documents of a Text, or of bytes, as (does it start one, piece): up to `size` letters, cut after a
    line end if there is one.
    """
    for begin, end in places:
        at = begin
        while at < end:
            # of 1 to 4 bytes a letter, and one more to see whether there are more
            piece = text[at : min(end, at + 4 * (size + 1))].decode("utf-8", "ignore")
            if len(piece) > size:
                piece = piece[: piece.rfind("\n", 0, size) + 1 or size]
            yield at == begin, piece
            at += len(piece.encode())


# -----------------------------------------------------------------------------
# The tokenizer: a tiktoken Encoding; its one special token, the last, starts each document


def train_tokenizer(pieces, vocab_size, share=1.0):
    """Train a byte-level BPE of up to vocab_size tokens, <|bos|> the last of them, on a share of the text."""
    assert vocab_size <= 2**16, "tokens are kept as uint16"

    def some_pieces():
        seen = taken = 0
        for piece in pieces:
            seen += len(piece)
            if taken < share * seen:
                taken += len(piece)
                yield piece

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(some_pieces(), vocab_size - 1, buffer_size=64, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special = {"<|bos|>": len(ranks)}
    return tiktoken.Encoding("onedial", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(encoding, folder):
    """Write tokenizer.tiktoken (lines of base64, rank) and tokenizer.json (the rest) -> {file: sha256}."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items()]
    files = {"tokenizer.tiktoken": b"".join(lines), "tokenizer.json": json.dumps(rest, indent=2).encode()}
    return {name: write(folder / name, content) for name, content in files.items()}


def load_tokenizer(folder, expected=None):
    """Read what save_tokenizer wrote; DataError for a file whose sha256 is not the expected one."""
    for name, digest in (expected or {}).items():
        if not (folder / name).exists() or sha256(folder / name) != digest:
            raise damaged(folder / name, "its sha256 has changed")
    rest = json.loads((folder / "tokenizer.json").read_text())
    pattern, special = rest["pattern"], rest["special_tokens"]
    ranks = read_ranks(folder / "tokenizer.tiktoken")
    return tiktoken.Encoding(rest["name"], pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def read_ranks(path):
    """A file of lines of base64 and rank -> {token's bytes: rank}."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def gpt2_tokenizer(vocab_size):
    """GPT-2's tokenizer, fetched by tiktoken, or from its one file, put into the cache by hand."""
    if vocab_size not in (None, 50257):
        raise DataError(f"--vocab-size {vocab_size}: this corpus has GPT-2's 50,257 tokens.\nLeave it out.")
    path = cache_folder() / "r50k_base.tiktoken"  # the name under which OpenAI publishes it
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_folder() / "tiktoken"))  # instead of /tmp
    try:
        ranks = read_ranks(path) if path.exists() else tiktoken.get_encoding("r50k_base")._mergeable_ranks
        if sorted(ranks.values()) != list(range(50256)):
            raise ValueError
    except Exception as error:  # tiktoken lets any error of the network through
        if path.exists():
            raise damaged(path, "it does not hold the ranks 0 to 50255") from None
        what = f"GPT-2's vocabulary cannot be fetched: {type(error).__name__}"
        raise DataError(f"{what}.\nPut {path.name} into {path.parent} by hand, {INSTEAD}") from None
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


# -----------------------------------------------------------------------------
# Tokens on disk


def open_shard(path, expected=None):
    """Memory-map a shard's tokens (uint16), after checking header, size and, if given, its sha256."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
        if header[:3].tolist() != [MAGIC, VERSION, (size - 4 * HEADER_INTS) / 2]:
            raise damaged(path, f"no token shard of {size:,} bytes starts with {header[:3].tolist()}")
        if expected and sha256(path) != expected:
            raise damaged(path, "its sha256 has changed")
    except OSError as error:
        raise damaged(path, error.strerror) from None
    return np.asarray(np.memmap(path, dtype="<u2", mode="r"))[2 * HEADER_INTS :]


def encode_pieces(encoding, pieces, split):
    """Tokens (uint16) of what cut_into_pieces yields; a bos starts each text, of held-out text each piece."""
    bos, parts = np.array([encoding.n_vocab - 1], dtype=np.uint32), []
    for starts, piece in pieces:
        if starts or split == "val":
            parts.append(bos)
        parts.append(encoding.encode_to_numpy(piece, disallowed_special=()))  # <|bos|> is text here
    return np.concatenate(parts).astype("<u2")


def encode_texts(encoding, text, places, folder, split, say):
    """Encode documents of `text` with all cores into folder/SPLIT_000000.bin … -> the manifest's entry."""
    pieces = cut_into_pieces(text, places, PIECE_CHARS if split == "train" else VAL_PIECE_CHARS)
    groups = iter(lambda: list(islice(pieces, 16)), [])  # each the work of one thread
    waiting, count, shards, said = [], 0, [], time.monotonic()

    def write_shard(parts, count):
        header = np.array([MAGIC, VERSION, count] + [0] * (HEADER_INTS - 3), dtype="<i4")
        name = f"{split}_{len(shards):06}.bin"
        shards.append({"file": name, "tokens": count, "sha256": write(folder / name, header, *parts)})

    with ThreadPoolExecutor(THREADS) as pool:  # tiktoken releases the GIL
        while batch := list(islice(groups, 2 * THREADS)):  # bounds the memory
            waiting += pool.map(partial(encode_pieces, encoding, split=split), batch)
            count += sum(map(len, waiting[-len(batch) :]))
            while count >= SHARD_TOKENS:
                tokens = np.concatenate(waiting)
                write_shard([tokens[:SHARD_TOKENS]], SHARD_TOKENS)
                waiting, count = [tokens[SHARD_TOKENS:]], count - SHARD_TOKENS
            if time.monotonic() - said > 2:
                said = time.monotonic()
                say(f"{len(shards) * SHARD_TOKENS + count:,} tokens are made")
    if count:
        write_shard(waiting, count)
    sizes = places[:, 1] - places[:, 0]
    counts = {"documents": int(np.count_nonzero(sizes)), "bytes": int(sizes.sum())}
    return {**counts, "tokens": sum(shard["tokens"] for shard in shards), "shards": shards}


# -----------------------------------------------------------------------------
# A corpus: tokens with their tokenizer


@dataclass
class Corpus:
    """
    A tokenized corpus. fingerprint: names its content; split: how train and val were told apart; shards:
    {"train" or "val": [(path, sha256)]}; counts: {"train" or "val": {"tokens": …}}; spread_val: validation
    rows are from all over; more: the training files of `public` that are not yet in use; else None; reader:
    how those are read; digests: {file: sha256}; notes: what a person should know of it, a line each;
    left_out: [(path, why)].
    """

    name: str
    fingerprint: str
    tokenizer: tiktoken.Encoding
    split: str = "files"
    spread_val: bool = False
    more: list | None = None
    public: PublicSet | None = None
    reader: TextReader = field(default_factory=TextReader)
    digests: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    left_out: list = field(default_factory=list)
    shards: dict = field(default_factory=lambda: {"train": [], "val": []})
    counts: dict = field(default_factory=lambda: {"train": Counter(), "val": Counter()})

    @property
    def bos(self):
        """The token that starts each document and each row."""
        return self.tokenizer.n_vocab - 1

    @property
    def data(self):
        """What names the same commit of a data set of the hub another time; None for all others."""
        if self.public and self.public.revision != "main":
            return f"hf:{self.public.repository}@{self.public.revision}/{self.public.inside}".rstrip("/")

    def add(self, root, split, entry):
        """Take in a manifest's entry for a split: its counts, and its shards, which lie in root."""
        self.shards[split] += [(root / shard["file"], shard["sha256"]) for shard in entry["shards"]]
        self.counts[split].update({key: count for key, count in entry.items() if key != "shards"})

    def rows(self, split, T):
        """The number of rows of T tokens in each shard of a split, a list; DataError if there is none."""
        rows = [len(open_shard(path)) // T for path, _ in self.shards[split]]
        if not any(rows):
            advice = "Give more text, or a smaller --max-seq-len."
            raise DataError(f"the {split} split of {self.name} has no row of {T} tokens.\n{advice}")
        return rows


def prepare(data, vocab_size=None, say=lambda line: None, largest_vocab=2**15, tokenizer=None, **reading):
    """
    Find, split, tokenize and cache the text of `data` ("stdlib", the name of a public set, or a path) -> a
    Corpus. Where vocab_size is None it follows from the size of the text, up to largest_vocab; tokenizer: one
    that is there, instead of a new one; reading: text_field and separator of TextReader. The work is done
    once, by whichever process comes first; others wait. Of a public data set only the first training file is
    taken, fetch_more takes the next ones. Raises DataError.
    """
    reader, folder = TextReader(**reading, plain=data == "stdlib"), Path(data).expanduser()
    try:
        public = find_public(data) if is_public(data) else None
        if (folder / "manifest.json").exists() and (folder / "tokenizer").exists():  # of the cache
            corpus = load_prepared(folder)
        elif public and public.val:
            corpus = prepare_public(public, vocab_size, say, reader, tokenizer)
        else:
            if public:  # its one file is split like any text
                file = fetch(public, *public.train, say)
                found = Found(file.parent, [file])
            else:
                found = find_files(data)
            if found.train and found.train[0].suffix == ".bin":
                corpus = prepare_shards(data, found, vocab_size, say)
            else:
                corpus = prepare_text(data, found, reader, vocab_size, say, largest_vocab, tokenizer)
            corpus.public, corpus.left_out = public, corpus.left_out + found.left_out
            corpus.notes[:0] = describe_split(found, corpus)
    except OSError as error:
        raise DataError(f"{error.filename or data}: {error.strerror}.\nMend that.") from None
    except MemoryError:
        advice = "Cut the largest files or rows into smaller ones."
        raise DataError(f"{data} takes more memory than there is.\n{advice}") from None
    if tokenizer and tokenizer_id(corpus.tokenizer) != tokenizer_id(tokenizer):
        what = f"{corpus.name} is there in other tokens than those of the run to start from"
        raise DataError(f"{what}.\nGive its text, or leave --init-from out.")
    return corpus


def prepare_shards(data, found, vocab_size, say):
    """A corpus of ready shards, in GPT-2's tokens."""
    corpus = Corpus(Path(data).resolve().stem, "", gpt2_tokenizer(vocab_size))
    for split, files in (("train", found.train), ("val", found.val)):
        for file in files:
            take(corpus, split, file, say)
    corpus.fingerprint = fingerprint([[d for _, d in corpus.shards[split]] for split in ("train", "val")])
    return corpus


def fitting_vocab(size):
    """The vocabulary for so many bytes of text: √bytes, to a power of two; 20 MB: 4,096, 1 GB: 32,768."""
    return int(2 ** max(9, round(np.log2(max(1, size)) / 2)))


def identify(name, found):
    """-> [[file's name below root, size, sha256], ...]: read anew only where a file was written since."""
    stats = []
    for file in sorted(found.train + found.val):
        path, status = str(file.relative_to(found.root)), file.stat()
        stats.append([path, status.st_size, status.st_mtime_ns, status.st_ctime_ns])

    def make(temporary):
        try:
            return [[name, size, sha256(found.root / name)] for name, size, *_ in stats]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.\n{MEND}") from None

    identity = fingerprint(str(found.root.resolve()), stats)
    return make_once(cache_folder() / "seen" / f"{name}-{identity}", make)


def prepare_text(data, found, reader, vocab_size, say, largest_vocab, tokenizer):
    """A corpus of text files: split, BPE and tokens are made anew when the content of a file has changed."""
    name = Path(data).resolve().stem
    sources = identify(name, found)
    total = sum(size * (4 if Path(path).suffix.lower() in PACKED else 1) for path, size, _ in sources)
    vocab_size = tokenizer.n_vocab if tokenizer else vocab_size or min(largest_vocab, fitting_vocab(total))

    def make(temporary):
        text = Text(temporary)
        for file in found.train:
            reader.read(file, text)
        named = len(text.documents())
        for file in found.val:
            reader.read(file, text)
        if not named:
            known = ".txt, .md, .py and other sources, .jsonl, .json, .csv, .tsv, .parquet, .bin shards"
            left_out = found.left_out + reader.left_out
            what = f"--data {data}: there is no text in it to train on"
            what += f"; left out: {describe_left_out(left_out)}" if left_out else ""
            raise DataError(f"{what}.\nKnown are {known}.")
        places = text.documents()
        split, cuts = choose_split(text, places, named)
        train, val = np.stack([places[:, 0], cuts], axis=1), np.stack([cuts, places[:, 1]], axis=1)
        train_size = int((train[:, 1] - train[:, 0]).sum())
        files = len(sources) - len(reader.left_out)
        say(f"{plural(files, 'file')} with {plural(len(places), 'document')}, {text.size / 1e6:,.1f} MB")
        encoding = tokenizer
        if encoding is None:
            share = min(1.0, TOKENIZER_BYTES / max(1, train_size))
            say(f"training a BPE of {vocab_size:,} tokens on {share * train_size / 1e6:,.1f} MB")
            pieces = (piece for _, piece in cut_into_pieces(text, train))
            encoding = train_tokenizer(pieces, vocab_size, share)
        manifest = {"split": split, "sources": [[path, size] for path, size, _ in sources]}
        manifest["tokenizer"] = save_tokenizer(encoding, temporary / "tokenizer")
        say(f"tokenizing {text.size / 1e6:,.1f} MB")
        manifest["train"] = encode_texts(encoding, text, train, temporary, "train", say)
        manifest["val"] = encode_texts(encoding, text, val, temporary, "val", say)
        manifest["fingerprint"] = fingerprint(manifest)
        manifest["digests"] = {path: digest for path, _, digest in sources}
        return manifest | {"left_out": reader.left_out, "notes": list(reader.told())}

    how = [LAYOUT, vocab_size, SPLIT_PATTERN, reader.plain, reader.text_field, reader.separator]
    how += [tokenizer_id(tokenizer)] if tokenizer else []
    folder = cache_folder() / "corpora" / f"{name}-{fingerprint(how, len(found.val), sources)}"
    make_once(folder, make)
    return load_prepared(folder)


def tokenizer_id(encoding):
    """A short name for the tokens of an encoding and how it parts text."""
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return fingerprint(encoding._pat_str, [token.hex() for token in tokens])


def load_prepared(folder):
    """The corpus that is kept in a folder of the cache."""
    manifest = make_once(folder, None)
    encoding = load_tokenizer(folder / "tokenizer", manifest["tokenizer"])
    name = folder.name.rpartition("-")[0]
    corpus = Corpus(name, manifest["fingerprint"], encoding, manifest["split"], spread_val=True)
    corpus.notes, corpus.left_out = manifest["notes"], manifest["left_out"]
    corpus.digests = manifest["digests"]
    for part in ("train", "val"):
        corpus.add(folder, part, manifest[part])
    return corpus


def check_same(corpus, wanted):
    """DataError if a corpus has not the wanted fingerprint: it says what has changed, and how to go on."""
    if corpus.fingerprint == wanted:
        return
    what = f"{corpus.name} is not the checkpoint's corpus: fingerprint {corpus.fingerprint}, was {wanted}"
    for path in (cache_folder() / "corpora").glob("*/manifest.json"):
        manifest = json.loads(path.read_bytes())
        if manifest.get("fingerprint") == wanted:
            before, now = manifest["digests"], corpus.digests
            changed = sum(before[name] != now[name] for name in before.keys() & now.keys())
            counts = {"more": len(now.keys() - before.keys()), "fewer": len(before.keys() - now.keys())}
            counts = [f"{count:,} {word}" for word, count in {**counts, "changed": changed}.items() if count]
            changes = f"of its files {', '.join(counts)}" if counts else "it is read in another way"
            what = f"{corpus.name} has changed since the checkpoint: {changes}"
            advice = f"Go on with what it was, --data {path.parent}, or start a run with --init-from"
            raise DataError(f"{what}.\n{advice}.")
    raise DataError(f"{what}.\nGive the --data of its run, or put its files back.")


def describe_split(found, corpus):
    """How the split was made and what was left out, a line each."""
    how = {"hash": "5% of the documents, chosen by content", "tail": "the last 5% of each document"}
    how["files"] = f"{summary(found.val)} by name, as {found.val[0].name}" if found.val else "nothing"
    unused = f"; {summary(found.unused)} not used, as {found.unused[0].name}" if found.unused else ""
    yield f"held out: {how[corpus.split]}{unused}"
    if corpus.left_out:
        yield f"left out: {describe_left_out(corpus.left_out)}"


def describe_left_out(left_out):
    """How many files of which kinds, and why one of them: `2 files (1 .pdf, 1 .zip), as a.pdf: …`."""
    path, why = min(left_out, key=lambda entry: entry[1] == "hidden")
    return f"{summary([path for path, _ in left_out])}, as {Path(path).name}: {why}"


# -----------------------------------------------------------------------------
# Public data sets: listed once, fetched file by file as far as the horizon needs


def find_public(data):
    """
    The name of a public data set, or hf:OWNER/NAME[@COMMIT][/FOLDER-OR-FILE] -> its PublicSet. Which commit
    is the newest is asked once, then kept. DataError if it cannot be listed, or holds no text, or several.
    """
    if data in PUBLIC:
        return PUBLIC[data]
    data = SHORT_NAMES.get(data, data)
    if not (match := re.fullmatch(r"hf:([^/@]+/[^/@]+)(@[^/]+)?(/.+)?", data.rstrip("/"))):
        raise DataError(f"--data {data} is no name of a data set.\nGive hf:OWNER/NAME[/FOLDER-OR-FILE].")
    repository, commit, inside = (part.strip("@/") for part in match.groups(""))
    name = repository.replace("/", "--")

    def make(temporary):
        import huggingface_hub  # slow to import, and seldom needed

        try:
            options = {"revision": commit or None, "timeout": 60, "files_metadata": True}
            info = huggingface_hub.HfApi().dataset_info(repository, **options)
        except Exception as error:  # the hub lets any error of the network through
            advice = "Look at its name; log in with `hf auth login` if it is private"
            raise DataError(f"{data} cannot be listed: {why_not(error)}.\n{advice}, {INSTEAD}") from None
        sizes = {file.rfilename: (file.size or 0) / 1e6 for file in info.siblings}
        train, val = choose_files(data, inside, sizes)
        return {"commit": info.sha, "train": {name: sizes[name] for name in train}, "val": val}

    def listed(commit, make):
        folder = cache_folder() / "listed" / f"{name}-{fingerprint(repository, commit, inside)}"
        return make_once(folder, make)

    found = listed(commit, make)
    commit = found["commit"]
    listed(commit, lambda temporary: found)  # for a run that is resumed
    return PublicSet(f"{name}-{commit[:12]}", repository, found["train"], found["val"], commit, inside)


def choose_files(data, inside, sizes):
    """Of {file: MB} on the hub -> (those to train on, the one to validate on or None). DataError."""
    kinds = {}  # {suffix: files}
    for name in sorted(sizes):
        if f"{name}/".startswith(f"{inside}/" if inside else "") and suffix_of(Path(name)) in DATA_FILES:
            kinds.setdefault(suffix_of(Path(name)), []).append(Path(name))
    kinds.pop(".bin", None)
    if not kinds:
        what = f"{data} holds no parquet, JSONL or text files, but {summary(sizes)}"
        raise DataError(f"{what}.\nChoose another data set, or another folder of it.")
    files = kinds.get(".parquet") or max(
        kinds.values(), key=lambda kind: sum(sizes[str(file)] for file in kind)
    )
    folders = {file.parts[0] for file in files if len(file.parts) > 1} - {"train", *HELD_OUT}
    if len(folders) > 1:
        what = f"{data} holds several data sets: {', '.join(sorted(folders)[:9])}"
        raise DataError(f"{what}.\nGive one of them, as {data}/{min(folders)}.")
    train, val, _ = part_by_name(data, Path(inside).parent if inside in sizes else Path(inside), files)
    if not val and len(train) > 1:
        val = [train.pop()]
    return [str(file) for file in train], str(val[0]) if val else None


def why_not(error):
    """Why the hub did not do what was asked, in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{status}, it is private or not there, or this login may not read it"
    return str(error.__cause__ or error).split("\n")[0].rstrip(".") or type(error).__name__


def prepare_public(public, vocab_size, say, reader, tokenizer):
    """A public data set: its validation file and its first training file."""
    first, *more = public.train
    if first.endswith(".bin"):
        encoding, identity = gpt2_tokenizer(vocab_size), "gpt2"
    elif tokenizer:
        encoding, identity = tokenizer, tokenizer_id(tokenizer)
    else:
        vocab_size = vocab_size or min(32_768, fitting_vocab(1e6 * sum(public.train.values())))

        def make(temporary):
            text = Text(temporary)
            reader.read(fetch(public, first, say), text)
            say(f"training a BPE of {vocab_size:,} tokens on {first}")
            pieces = (piece for _, piece in cut_into_pieces(text, text.documents()))
            return save_tokenizer(train_tokenizer(pieces, vocab_size), temporary)

        kept = f"{public.name}-tokenizer-{vocab_size}{reader.text_field or ''}"
        identity = make_once(cache_folder() / "tokens" / kept, make)
        encoding = load_tokenizer(cache_folder() / "tokens" / kept, identity)
    content = fingerprint(public.name, public.repository, public.revision, identity)
    corpus = Corpus(public.name, content, encoding, more=more, public=public, reader=reader)
    take(corpus, "val", cache_folder() / public.name / public.val, say)
    take(corpus, "train", cache_folder() / public.name / first, say)
    corpus.notes = [f"held out: {public.val}", *reader.told()]
    return corpus


def fetch_more(corpus, rows, T, say=lambda line: None):
    """
    Have a public data set hold `rows` training rows of T tokens, or all that there are: its next files are
    taken in their order, so that rows already there keep their places in epoch 0. Others stay as they are.
    """
    have = corpus.rows("train", T)
    if corpus.more and sum(have) < rows:
        files = min(len(corpus.more), math.ceil((rows - sum(have)) * len(have) / sum(have)))
        size = sum(corpus.public.train[name] for name in corpus.more[:files]) / 1000
        say(f"{files} more files of {corpus.name} are needed, {size:.1f} GB in all")
    while corpus.more and sum(corpus.rows("train", T)) < rows:
        take(corpus, "train", cache_folder() / corpus.name / corpus.more.pop(0), say)


def take(corpus, split, path, say):
    """Add a file to a corpus: .bin shards as they are, but checked once; text as tokens, made once."""
    ready = path.suffix == ".bin"
    place = os.path.relpath(path.resolve(), cache_folder().resolve())
    identity = fingerprint(LAYOUT, place, corpus.fingerprint)
    folder = cache_folder() / ("checked" if ready else "tokens") / f"{path.stem}-{identity}"
    if ready and not path.exists():  # what was known of it holds no more
        shutil.rmtree(folder, ignore_errors=True)

    def make(temporary):
        if corpus.public:
            fetch(corpus.public, str(path.relative_to(cache_folder() / corpus.name)), say)
        if not ready:
            say(f"tokenizing {path.name}")
            text = Text(temporary)
            corpus.reader.read(path, text)
            return encode_texts(corpus.tokenizer, text, text.documents(), temporary, split, say)
        say(f"checking {path.name}")
        tokens, digest = open_shard(path), sha256(path)
        if len(tokens) and tokens.max() > corpus.bos:
            raise damaged(path, f"it has a token {tokens.max():,}, and GPT-2's last is {corpus.bos:,}")
        return {"tokens": len(tokens), "shards": [{"file": path.name, "sha256": digest}]}

    corpus.add(path.parent if ready else folder, split, make_once(folder, make))


def fetch(public, name, say):
    """-> the path of a file of a public data set, which is then in the cache: whole, and its header valid."""
    path = cache_folder() / public.name / name
    temporary = path.with_name(f".tmp-{path.name}")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():  # by another process, meanwhile
            try:
                download(public, name, temporary, say)
                if path.suffix == ".bin":
                    open_shard(temporary / name)
                os.rename(temporary / name, path)
            finally:  # what a killed start has left goes too
                shutil.rmtree(temporary, ignore_errors=True)
    return path


def download(public, name, folder, say):
    """Download a file of a public data set to folder/name. DataError says why it cannot be had."""
    import huggingface_hub  # slow to import, and seldom needed

    place = cache_folder() / public.name
    megabytes = public.train.get(name) or max(public.train.values())
    free = shutil.disk_usage(place).free / 1e6
    say(f"fetching {name} of {public.repository}, about {megabytes:,.0f} MB")
    if public.revision != "main" and megabytes > free:  # a size that was asked for, and no estimate
        what = f"{place / name} takes {megabytes:,.0f} MB, and {free:,.0f} MB are free"
        raise DataError(f"{what}.\nMake room there, or set ONEDIAL_HOME to another folder.")
    try:
        options = {"repo_type": "dataset", "revision": public.revision, "local_dir": folder}
        huggingface_hub.hf_hub_download(public.repository, name, **options)  # checks the size
    except Exception as error:  # the hub lets any error of the network through
        if type(error) in (OSError, PermissionError) and error.errno:
            raise  # the disk failed
        what = f"{name} of {public.repository} cannot be fetched: {why_not(error)}"
        advice = f"Put it (and those after it, for a long run) into {place} by hand, {INSTEAD}"
        raise DataError(f"{what}.\n{advice}") from None


# -----------------------------------------------------------------------------
# Rows and their order


def shuffled(n, *seed):
    """A permutation of range(n) that depends on the seeds only; RandomState's stream is frozen for good."""
    return np.random.RandomState([s % 2**32 for s in seed]).permutation(n)


def row_order(rows_per_shard, seed, cursor=0, growing=False):
    """
    Yield (shard, row) for ever, from the place `cursor` of the global order on: shards follow one another in
    an order drawn from seed and epoch, the rows of each are shuffled likewise. If `growing`, the shards of
    epoch 0 stand as listed: more can follow later.
    """
    epoch, skip = divmod(cursor, sum(rows_per_shard))
    while True:
        shards = shuffled(len(rows_per_shard), seed, epoch)
        for shard in range(len(shards)) if growing and epoch == 0 else shards:
            if skip < rows_per_shard[shard]:
                rows = shuffled(rows_per_shard[shard], seed, epoch, shard)
                yield from ((shard, row) for row in rows[skip:])
            skip = max(0, skip - rows_per_shard[shard])
        epoch += 1


def largest_divisor(number, limit):
    """The largest divisor of a number that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def split_batch(total_batch_size, T, world_size, device_batch_size):
    """
    Share a batch of so many tokens -> (its whole rows, the rows of a rank, those of a micro-step: the largest
    divisor that is at most device_batch_size). DataError names the nearest sizes that can be shared.
    """
    rows = max(1, round(total_batch_size / T))
    if rows % world_size:
        below, above = (max(1, rows // world_size + n) * world_size * T for n in (0, 1))
        what = f"--total-batch-size {total_batch_size}: {world_size} processes cannot share {rows} rows"
        raise DataError(f"{what}.\nThe nearest sizes that they can share: {below} and {above}.")
    per_rank = rows // world_size
    return rows, per_rank, largest_divisor(per_rank, min(per_rank, device_batch_size))


class DataLoader:
    """
    Iterate over this rank's rows of each global batch: int64 tensors (rows_per_batch / world_size, T + 1)
    on `device`, inputs in [:, :-1] and targets in [:, 1:]. A thread stays two batches ahead. wait_time: the
    seconds that the loop has waited. DataError for a damaged shard, ValueError for rows that do not divide.
    """

    def __init__(self, corpus, T, rows_per_batch, seed, device, rank=0, world_size=1):
        if rows_per_batch % world_size:
            raise ValueError(f"{rows_per_batch} rows do not divide by {world_size} ranks")
        self.corpus, self.T, self.seed, self.device = corpus, T, seed, torch.device(device)
        self.rows_per_batch, self.rank, self.world_size = rows_per_batch, rank, world_size
        self.rows_per_shard = corpus.rows("train", T)
        self.rows_per_epoch = sum(self.rows_per_shard)
        if self.rows_per_epoch < rows_per_batch:
            what = f"the corpus has {self.rows_per_epoch} rows to train on, a batch {rows_per_batch}"
            raise DataError(f"{what}.\nGive more text, a smaller --total-batch-size or --max-seq-len.")
        self.cursor, self.wait_time = 0, 0.0
        self.source, self.ahead, self.thread = self.batches(), deque(), ThreadPoolExecutor(max_workers=1)

    @property
    def epoch(self):
        """Passes over the training split so far, a fraction."""
        return self.cursor / self.rows_per_epoch

    def batches(self):
        """Yield this rank's batches from the cursor on, in host memory."""
        growing, opened = self.corpus.more is not None, None
        order = row_order(self.rows_per_shard, self.seed, self.cursor, growing)
        count, on_gpu = self.rows_per_batch // self.world_size, self.device.type == "cuda"
        while True:
            batch = torch.empty((count, self.T + 1), dtype=torch.int64, pin_memory=on_gpu)
            rows = batch.numpy()
            rows[:, 0] = self.corpus.bos
            places = list(islice(order, self.rows_per_batch))[self.rank * count : (self.rank + 1) * count]
            for j, (shard, row) in enumerate(places):
                if shard != opened:  # one at a time is mapped, its sha256 verified
                    opened, tokens = shard, open_shard(*self.corpus.shards["train"][shard])
                rows[j, 1:] = tokens[row * self.T : (row + 1) * self.T]
            yield batch

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        while len(self.ahead) < 3:  # the batch asked for, and two ahead
            self.ahead.append(self.thread.submit(next, self.source))
        batch = self.ahead.popleft().result()
        self.wait_time += time.perf_counter() - start
        self.cursor += self.rows_per_batch
        return batch.to(self.device, non_blocking=batch.is_pinned())  # else it could go before it is copied

    def state_dict(self):
        """The place in the global order, a few plain values that hold for any world size and batch size."""
        fingerprint = self.corpus.fingerprint
        return {"cursor": self.cursor, "fingerprint": fingerprint, "T": self.T, "seed": self.seed}

    def load_state_dict(self, state):
        """Go on with exactly the next row; ValueError names a corpus, row length or seed that differs."""
        for key, mine in self.state_dict().items():
            if key != "cursor" and mine != state[key]:
                raise ValueError(f"the data is not the checkpoint's: {key} is {mine}, was {state[key]}")
        assert not self.ahead, "load before the first batch"
        self.cursor = state["cursor"]


def validation_tokens(corpus, eval_bytes):
    """
    The held-out text that evaluations read, as tokens (uint16): about eval_bytes bytes, or all there is.
    Which bytes depends on the corpus alone, so that models of any vocabulary and row length can be compared:
    documents from all over the split, or the beginning of ready shards and public data sets. DataError if
    there is none.
    """
    tokens = [open_shard(path, digest) for path, digest in corpus.shards["val"]]
    tokens = np.concatenate([np.empty(0, dtype="<u2"), *tokens])
    if not len(tokens):
        advice = "Give more text, or a file with val in its name."
        raise DataError(f"{corpus.name} has no text to validate on.\n{advice}")
    lengths = token_bytes(corpus.tokenizer)[tokens]
    if not corpus.spread_val:
        return tokens[: np.searchsorted(np.cumsum(lengths, dtype=np.uint32), eval_bytes) + 1]
    starts = np.flatnonzero(tokens == corpus.bos)
    count = min(len(starts), math.ceil(eval_bytes * len(starts) / lengths.sum(dtype=np.int64)))
    documents = np.split(tokens, starts[1:])
    return np.concatenate([documents[i * len(starts) // count] for i in range(count)])


def read_documents(data):
    """Yield the documents in a file or folder, whatever its names say, as strings."""
    found, reader, text = find_files(data), TextReader(), Text()
    for file in found.train + found.val + found.unused:
        reader.read(file, text)
    yield from (text[begin:end].decode() for begin, end in text.documents())


def encode_held_out(encoding, texts, whole=False):
    """Texts as tokens (uint16): in pieces, as held-out text is kept, or whole, each with one bos."""
    size, split = (PIECE_CHARS, "train") if whole else (VAL_PIECE_CHARS, "val")
    texts = [text.encode() for text in texts]
    pieces = (piece for text in texts for piece in cut_into_pieces(text, [(0, len(text))], size))
    return encode_pieces(encoding, pieces, split)


def token_bytes(encoding):
    """The length of each token in bytes, uint16 (n_vocab,); 0 for the special one."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.uint16)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


class ValidationRows:
    """
    Tokens of held-out text as rows of T, in their order, the same for any batch size and world size; the last
    one is filled up with tokens that do not count.
    """

    def __init__(self, encoding, tokens, T):
        self.tokens, self.T, self.bos = tokens, T, encoding.n_vocab - 1
        self.token_bytes = token_bytes(encoding)

    def __len__(self):
        return math.ceil(len(self.tokens) / self.T)

    def beginnings(self, count, length, more):
        """
        At most `count` documents from all over the text, to sample from: [(the bos and its first tokens,
        `length` ids; the `more` ids that follow)]. Where none is so long, the beginning of the text.
        """
        starts = np.flatnonzero(self.tokens == self.bos)
        starts = starts[np.diff(starts, append=len(self.tokens)) >= length + more]
        starts = starts[:: max(1, len(starts) // count)][:count]
        texts = [self.tokens[start : start + length + more].tolist() for start in starts]
        if not texts:
            text = self.tokens[: length + more].tolist()
            texts = [text if text[0] == self.bos else [self.bos, *text[:-1]]]
        return [(text[:length], text[length:]) for text in texts]

    def batches(self, batch_size, device, rank=0, world_size=1):
        """
        Yield (tokens, targets, number of bytes) for this rank's batches: two int64 tensors (batch_size, T),
        special tokens and the last batch's padding with target -1, and the bytes of the other targets.
        """
        for start in range(rank * batch_size, len(self), world_size * batch_size):
            rows = np.full((batch_size, self.T + 1), self.bos, dtype=np.int64)  # padding is all bos
            text = self.tokens[start * self.T : (start + batch_size) * self.T]
            for j in range(math.ceil(len(text) / self.T)):
                row = text[j * self.T : (j + 1) * self.T]
                rows[j, 1 : len(row) + 1] = row
            lengths = self.token_bytes[rows]
            masked = torch.from_numpy(np.where(lengths > 0, rows, -1)).to(device)
            # cut on the device, like training's batches: the same strides, so the same compiled graph
            yield torch.from_numpy(rows).to(device)[:, :-1], masked[:, 1:], int(lengths.sum(dtype=np.int64))


def describe(data, **reading):
    """Prepare a corpus and print what it holds."""
    corpus = prepare(data, say=lambda line: print(line, file=sys.stderr), **reading)
    for split, count in corpus.counts.items():
        facts = [f"{value:,} {key}" for key, value in count.items()]
        facts.append(f"{sum(corpus.rows(split, 128)):,} rows of 128")
        if "bytes" in count:
            facts.append(f"{count['bytes'] / count['tokens']:.2f} bytes per token")
        print(f"{split:6}{' · '.join(facts)}")
    for line in [*corpus.notes, *(f"left out: {path}: {why}" for path, why in corpus.left_out)]:
        print(line)
    print(f"split by {corpus.split} · vocabulary of {corpus.tokenizer.n_vocab:,} · {corpus.fingerprint}")
    row = next(DataLoader(corpus, 128, 1, seed=0, device="cpu"))[0]
    print(f"an example row:\n{corpus.tokenizer.decode(row.tolist())}", flush=True)


def list_cache():
    """Print what the cache folder holds, the largest first: what is deleted is made or fetched anew."""
    kept = []
    for folder in cache_folder().glob("*/*"):
        files = [file.stat() for file in (folder, *folder.rglob("*")) if file.is_file()]
        if not folder.name.startswith("."):
            day = time.strftime("%Y-%m-%d", time.localtime(folder.stat().st_mtime))
            kept.append((sum(file.st_size for file in files), day, folder))
    for size, day, folder in sorted(kept, reverse=True):
        print(f"{size / 1e6:10,.1f} MB  {day}  {folder}")
    print(f"{sum(size for size, *_ in kept) / 1e6:10,.1f} MB in all; any of it may be deleted", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Prepare a corpus, and say what it holds and what is left out."
    )
    parser.add_argument("data", nargs="?", default="stdlib", help="as of train.py [stdlib]")
    parser.add_argument("--text-field", help="field or column with the text [auto]")
    parser.add_argument(
        "--document-separator", dest="separator", help="what parts documents in a file [auto]"
    )
    parser.add_argument("--cache", action="store_true", help="list what the cache holds instead")
    options = vars(parser.parse_args())
    try:
        list_cache() if options.pop("cache") else describe(**options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as in `python dataloader.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
