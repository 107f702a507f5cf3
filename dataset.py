"""
Text to tokens: find or fetch files, read them, split off validation text, train a tokenizer, tokenize.

A corpus is prepared once. A byte-level BPE is trained on its training split (rustbpe), all cores encode the
text (tiktoken), and the tokens are kept in the cache folder ($ONEDIAL_HOME, or ~/.cache/onedial) as uint16
shards in the layout of the public GPT-2-tokenized FineWeb.

    python dataset.py PATH       prepare a corpus; print what it contains and what was left out
    python dataset.py --cache    list what the cache folder contains
"""

import _thread
import argparse
import base64
import bz2
import codecs
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

# Token shards: the layout of the public GPT-2-tokenized FineWeb (kjj0/fineweb10B-gpt2)
MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256  # the header is 256 little-endian int32
SHARD_TOKENS = 100_000_000

# Limits
BLOCK = 2**20  # characters or bytes read at a time, so that memory does not grow with a file
PIECE_CHARS = 2**16  # longer documents are encoded in pieces: the regex engines fail on a million spaces
VAL_PIECE_CHARS = 2**14  # longer validation documents are cut into documents: evaluations read some of them
TOKENIZER_BYTES = 200_000_000  # a BPE is trained on at most this much text, taken evenly from the corpus
VAL_FRACTION = 0.05  # of a text that has no validation files
THREADS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
PART_BYTES = 2**22  # longer documents are shuffled in parts of this size
LAYOUT = 4  # version of the cache's content; with another number every corpus is built again

# GPT-4's split pattern, but numbers have at most 2 digits: better for vocabularies below 100,000 (nanochat)
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
SPLIT_PATTERN += r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Files of text; READERS has the suffixes of tables
TEXT_SUFFIXES = """
    .txt .text .md .rst .org .tex .adoc .bib .log .xml .html .htm .css .yaml .yml .toml .py
    .pyi .c .h .cc .cpp .cxx .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .pl .sh .bash .sql .swift .kt
    .scala .hs .ml .lua .r .jl .m .lisp .el .clj .ex .erl .f90 .cs .vb .dart .zig .nim .proto""".split()
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # may follow another suffix
PROSE = (".txt", ".text")  # hold data like tables do; the other texts may be sources of a program
# Words in a data file's name that mark it as held out. The lowest number present is the validation split.
HELD_OUT = {"val": 0, "valid": 0, "validation": 0, "dev": 1, "test": 2, "eval": 3, "heldout": 4, "holdout": 4}
HELD_OUT |= {f"{word}set": kind for word, kind in HELD_OUT.items()}
# Words that may stand beside those
FILLERS = "set split data dataset text texts tokens raw clean full small part shard".split()
TEXT_FIELDS = "text content story document body article passage page_content raw_content contents".split()
TEXT_TYPE = re.compile(r"(dictionary<values=)?(large_)?(string|binary)\b")  # pyarrow's names of types
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    **{codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"},
    **{codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"},
}
# Encodings other than UTF-8, and for each of their languages its letters beyond ASCII, the most frequent
# first. Of the encodings in one key the first is the most common. Escapes are vowel signs.
LETTERS = {
    "cp1252 mac_roman cp437 cp850": """éèàêçùôâîûïëœ óíáéñúü¿¡ ãçáéíõóêâúôà èàùòéì üäößé öäåé æøåé áíðöéóþúæý
        éëïèü ëç äõüöšž""",  # French Spanish Portuguese Italian German Swedish Danish Icelandic Dutch …
    "cp1250 iso8859_2 cp852": """łóęążśćńź áíéěýřžčšůúťňďó áíčéýžšúľťôňóäď áéöóüőíúű ăîâşţșț
        čšžćđ""",  # Polish Czech Slovak Hungarian Romanian Croatian
    "cp1254": "ışğüçöâî",
    "cp1257": "ėšįųūžčąę āīēšūņģļķčž äõüöšž",  # Lithuanian Latvian Estonian
    "cp1251 koi8_r koi8_u cp866 iso8859_5 mac_cyrillic": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъёіїєґјљњћђџѓќѕў",
    "cp1253 iso8859_7": "αοιετσνηυρπκμλςίόάέγύδήθφώβχξζψϊϋ",
    "cp1255": "יוהלאתרמבשנםכדעחקפגטצןזסףךץ\u05b7\u05b8\u05b0\u05bc\u05b4\u05b6\u05b5\u05b9",
    "cp1256 iso8859_6": "اليمنرتبوةدعسفهكقحجأشطصىخإضذئزثءغظؤآ،پچژگ\u064e\u0650\u064f\u0651\u0652\u064b",
    "cp874": "านรอก่เงมยลวด้ทสตะปบคัีิแหจพโช็ขไใผณุูศธซถญฟฉษฝภึ์ืำ",
    "cp932 euc_jp": "のいるをにたがはてとしでなれかさもっすらこまりうあけよくんーンス、。",
    "gb18030": "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你，。",
    "big5": "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你，。",
    "cp949": "이다는을가의에고지하로한은도를기리사자어시나대해아인라서정일과수그보으니제",
}
MARKS = "’“”–…—\u00a0«»„‚‘°€£§©®™²³·•±µ×½─│┌┐└┘═║░▒▓█"  # in any language
# Two letters that no word contains: of two scripts, or an upper-case letter after a lower-case one
ODD_PAIR = "[A-Za-zß-ɏ][Ͱ-\u0fff]|[Ͱ-\u0fff][A-Za-zß-ɏ]|[a-zß-ÿα-ωа-џ][A-ZÀ-ÞΑ-ΩЀ-Я]"
MISFIT = "with another number of cells than the header"  # a fault of a row of a table

# Advice that several errors share
FIX_FILE = "Fix the file, or remove it."
NAME_FIELD = "Name the field with the text with --text-field NAME, or remove the file."
ASK_OWNER = "Ask its owner for the right to write, or set ONEDIAL_HOME to another folder."
FREE_SPACE = "Free some space there, or set ONEDIAL_HOME to another folder."
OTHER_TEXT = "or train on other text: --data stdlib or --data PATH."


class DataError(Exception):
    """A problem with the data that the user can fix. The message has two lines: what is wrong, what to do."""

    exit_status = 2


@dataclass
class PublicSet:
    """A data set of the Hugging Face hub."""

    name: str  # of its folder in the cache
    repository: str
    train: dict  # {file: size in MB}, in the order of epoch 0
    val: str | None  # None: the only training file is split like local text
    revision: str = "main"  # a commit, once the set has been listed
    sha256: dict = field(default_factory=dict)  # {file: sha256}, where the listing has one
    inside: str = ""  # the folder, file or configuration of the repository that was asked for
    unused: list = field(default_factory=list)  # held-out files besides `val`
    left_out: list = field(default_factory=list)  # [(file, reason)]


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
    """Whether `data` names a public data set; otherwise it is a path or `stdlib`."""
    return data.partition("@")[0] in PUBLIC or data in SHORT_NAMES or data.startswith("hf:")


# -----------------------------------------------------------------------------
# A corpus: tokens and their tokenizer


@dataclass
class Corpus:
    """A tokenized corpus. Splits are named "train" and "val"."""

    name: str
    fingerprint: str  # short hash of the content
    tokenizer: tiktoken.Encoding
    split: str = "files"  # how the splits were made: see choose_split
    spread_val: bool = False  # evaluations read from all over the validation split, not its beginning
    more: list | None = None  # training files of `public` that are not used yet; None for other corpora
    public: PublicSet | None = None
    reading: dict = field(default_factory=dict)  # options of the TextReader for the files of `public`
    held_out: Counter = field(default_factory=Counter)  # some of sum_pieces of the held-out text of `public`
    digests: dict = field(default_factory=dict)  # {file: sha256}
    notes: list = field(default_factory=list)  # lines that a user should see
    left_out: list = field(default_factory=list)  # [(path, reason)]
    shards: dict = field(default_factory=lambda: {"train": [], "val": []})  # {split: [(path, sha256)]}
    # {split: {"documents", "bytes", "tokens": number}}
    counts: dict = field(default_factory=lambda: {"train": Counter(), "val": Counter()})

    @property
    def bos(self):
        """The token that starts each document and each row."""
        return self.tokenizer.n_vocab - 1

    @cached_property
    def token_bytes(self):
        """The length of each token in bytes, uint16 (n_vocab,)."""
        return token_bytes(self.tokenizer)

    @property
    def data(self):
        """The value of --data that names the same commit of a hub data set; None for other corpora."""
        if self.public and self.public.revision != "main":
            if self.public.name in PUBLIC:
                return f"{self.public.name}@{self.public.revision}"
            return f"hf:{self.public.repository}@{self.public.revision}/{self.public.inside}".rstrip("/")

    @property
    def unique_tokens(self):
        """
        Training tokens once all files are fetched. While some are missing this is an estimate from the sizes
        in the listing and the tokens of the files used so far. Epochs are counted with it, and the limit of
        epochs of a timed run is planned with it before step 1, when at every start the first file is used.
        """
        tokens = self.counts["train"]["tokens"]
        if not self.more:
            return tokens
        total = sum(self.public.train.values())  # MB
        fetched = total - sum(self.public.train[name] for name in self.more)
        return round(tokens * total / fetched) if fetched > 0 else math.inf  # inf: no sizes are known

    def row_length(self, longest):
        """The tokens of a row: `longest`, or less for at least 16 training rows and a validation row."""
        shards = [[len(open_shard(path)) for path, _ in self.shards[split]] for split in ("train", "val")]
        rows = lambda T: [sum(size // T for size in sizes) for sizes in shards]  # noqa: E731
        while longest > 32 and (rows(longest)[0] < 16 or rows(longest)[1] < 1):
            longest //= 2
        return longest

    def rows_per_shard(self, split, T, first=0):
        """
        The number of rows of T tokens in each shard of a split, or from shard `first` on, a list. DataError
        if the split has no rows.
        """
        rows = [len(open_shard(path)) // T for path, _ in self.shards[split][first:]]
        if not first and not any(rows):
            what = f"{self.name}: the {split} split is shorter than one row of {T} tokens"
            smaller = ", or a smaller --max-seq-len (from 32 on) and --total-batch-size" if T > 32 else ""
            raise DataError(f"{what}.\nProvide more text{smaller}.")
        return rows

    def open_shard(self, split, index):
        """The tokens of a shard, memory-mapped uint16 (tokens,), sha256 verified. Raises DataError."""
        return open_shard(*self.shards[split][index])

    def add(self, root, split, entry):
        """
        Add a manifest's entry for a split: its counts, and its shards, which are in the folder `root`
        -> lines about it that a user should see.
        """
        self.shards[split] += [(root / shard["file"], shard["sha256"]) for shard in entry["shards"]]
        self.counts[split].update(
            {key: n for key, n in entry.items() if key in ("documents", "bytes", "tokens")}
        )
        self.held_out.update({checksum: size for checksum, size in entry.get("pieces", [])})
        left_out = list(map(tuple, entry.get("left_out", [])))
        notes = [note for note in entry.get("notes", []) if note not in self.notes]
        self.left_out, self.notes = self.left_out + left_out, self.notes + notes
        return notes + [f"left out: {path}: {why}" for path, why in left_out]

    def content(self):
        """A short hash of all shards: the same on two nodes only if both have the same tokens."""
        return fingerprint(self.fingerprint, [[sha256 for _, sha256 in self.shards[k]] for k in self.shards])

    def next_file(self):
        """A hash of the next training file's tokens, None until they are in the cache. Raises DataError."""
        found = find_entry(self, self.more[0])
        if found:
            root, entry = found
            for shard in entry["shards"]:
                open_shard(root / shard["file"])
            return fingerprint([shard["sha256"] for shard in entry["shards"]])

    def use_next_file(self):
        """Add the next training file, which is in the cache -> lines about it that a user should see."""
        root, entry = find_entry(self, self.more.pop(0))
        return self.add(root, "train", entry)


def prepare(
    data, vocab_size=None, say=lambda line: None, largest_vocab=2**15, tokenizer=None, out_dir=None, **reading
):
    """
    Find, split, tokenize and cache the text of `data` -> Corpus. Raises DataError.

    data: "stdlib", the name of a public data set, a path, or a corpus folder of the cache
    vocab_size: size of the BPE; None: chosen by the size of the text, at most largest_vocab
    say: called with each line about the progress
    tokenizer: an existing tokenizer to use instead of training one
    out_dir: folder of the runs, left out of any data folder
    reading: text_field and separator of TextReader

    One process does the work and the others wait. Of a public data set only the validation file and the
    first training file are fetched; a Fetcher fetches the others while the run trains.
    """
    folder, public = Path(data).expanduser(), None
    options = reading | {"plain": data == "stdlib"}, vocab_size, say, largest_vocab, tokenizer
    try:
        if (folder / "manifest.json").exists() and (folder / "tokenizer").exists():
            corpus, found = load_corpus(folder), None
        elif is_public(data):
            public = find_public(data)
            found = files_of(public, say)
        else:
            found = find_files(data, out_dir)
        if found:
            if public and public.val:
                corpus = prepare_public(public, *options)
            elif found.train and found.train[0].suffix == ".bin":
                corpus = prepare_shards(data, found, vocab_size, say)
            else:
                corpus = prepare_text(data, found, *options)
            corpus.public, corpus.left_out = public, corpus.left_out + found.left_out
            corpus.notes[:0] = describe_split(found, corpus)
    except OSError as error:
        raise DataError(f"{error.filename or data}: {error.strerror}.\nFix this and start again.") from None
    except MemoryError:
        advice = "Split its largest files or rows into smaller ones."
        raise DataError(f"there is not enough memory to prepare {data}.\n{advice}") from None
    if public and folder.exists():
        corpus.notes.append(f"{data} is the public data set; the folder of this name is --data ./{data}")
    if tokenizer and tokenizer_fingerprint(corpus.tokenizer) != tokenizer_fingerprint(tokenizer):
        what = f"{corpus.name} is already tokenized, with another tokenizer than that of --init-from"
        raise DataError(f"{what}.\nPass its text as --data, or remove --init-from.")
    return corpus


def prepare_shards(data, found, vocab_size, say):
    """The corpus of local .bin shards, which contain GPT-2's tokens. They are used where they are."""
    corpus = Corpus(short_name(Path(data).resolve()), "", gpt2_tokenizer(vocab_size))
    for split, files in (("train", found.train), ("val", found.val)):
        for file in files:
            add_file(corpus, split, file, say)
    digests = [[digest for _, digest in corpus.shards[split]] for split in ("train", "val")]
    corpus.fingerprint = fingerprint(digests)
    return corpus


def prepare_text(data, found, reading, vocab_size, say, largest_vocab, tokenizer):
    """The corpus of local text files. It is built again when the content of a file or an option changes."""
    name, reader, stats = short_name(Path(data).resolve()), TextReader(**reading), stat_files(found)
    sources = hash_files(name, found, stats, say)
    if tokenizer:
        vocab_size = tokenizer.n_vocab
    vocab_size = vocab_size or default_vocab_size({path: size for path, size, _ in sources}, largest_vocab)

    def make(temporary):
        with still_running(say, "reading the text"):
            text, places, num_train = read_files(data, found, reader, temporary)
            if stat_files(found) != stats:
                what = f"--data {data} has changed while it was read"
                raise DataError(f"{what}.\nStart again when no program writes into it.")
            split, train, val = choose_split(text, places, num_train)
            shared = list(describe_shared(text, train, sum_pieces(text, val), "the training text"))
        files = plural(len(sources) - len(reader.left_out), "file")
        empty = f" ({reader.empty_files:,} empty)" if reader.empty_files else ""
        say(f"{files}{empty} with {plural(len(places), 'document')}, {text.size / 1e6:,.1f} MB")
        encoding = tokenizer or train_on_split(text, train, vocab_size, say)
        manifest = {"layout": LAYOUT, "split": split, "sources": [[path, size] for path, size, _ in sources]}
        manifest["tokenizer"] = save_tokenizer(encoding, temporary / "tokenizer")
        say(f"tokenizing {text.size / 1e6:,.1f} MB")
        manifest["train"] = encode_texts(encoding, text, train, temporary, "train", say)
        manifest["val"] = encode_texts(encoding, text, val, temporary, "val", say)
        manifest["fingerprint"] = fingerprint(manifest)
        manifest["digests"] = {path: digest for path, _, digest in sources}
        return manifest | {"left_out": reader.left_out, "notes": [*reader.note_lines(), *shared]}

    options = [LAYOUT, vocab_size, SPLIT_PATTERN, reader.plain, reader.text_field, reader.separator]
    options += [tokenizer_fingerprint(tokenizer)] if tokenizer else []
    folder = cache_folder() / "corpora" / f"{name}-{fingerprint(options, len(found.val), sources)}"
    make_once(folder, make, say)
    return load_corpus(folder)


def stat_files(found):
    """[[path below root, size in bytes, mtime, ctime, file], ...] of all files to read, sorted."""
    stats = []
    for file in found.train + found.val:
        status, name = file.stat(), composed(file.relative_to(found.root))
        stats.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, str(file)])
    return sorted(stats)


def composed(path):
    """A path with / and composed letters: file systems differ in how they write é (NFC or NFD)."""
    return unicodedata.normalize("NFC", path.as_posix())


@contextlib.contextmanager
def still_running(say, what):
    """While the `with` block runs, say every 5 seconds for how long it has been running."""
    done, start = threading.Event(), time.monotonic()

    def repeat():
        while not done.wait(5):
            say(f"{what}: {time.monotonic() - start:.0f} s so far")

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def hash_files(name, found, stats, say):
    """[[path below root, size in bytes, sha256], ...]. The hashes are kept until a file is written again."""

    def make(temporary):
        with still_running(say, "hashing the files"):
            return [[path, size, file_sha256(file)] for path, size, *_, file in stats]

    identity = fingerprint(str(found.root.resolve()), stats)
    return make_once(cache_folder() / "seen" / f"{name}-{identity}", make)


def read_files(data, found, reader, folder):
    """
    Read all files -> (Text, the places of its documents, number of documents to train on, which come first).
    If the held-out text is too small to validate on, its places are left out. DataError if there is nothing
    to train on.
    """
    text = Text(folder)
    for file in found.train:
        reader.read(file, text)
    num_train, train_size = text.num_documents, text.size
    for file in found.val:
        reader.read(file, text)
    if not num_train:
        left_out = found.left_out + reader.left_out
        reasons = f" (left out: {describe_left_out(left_out)})" if left_out else ""
        known = f".txt, .md, .py and other sources, {', '.join(READERS)}, .bin shards"
        raise DataError(f"--data {data} has no text to train on{reasons}.\nSupported files: {known}.")
    too_small = is_too_small(text.size - train_size, text.size)
    return text, text.documents()[: num_train if too_small else None], num_train


def is_too_small(held_out, total):
    """Whether this many held-out bytes are too few to validate on: a `requirements-dev.txt` among sources."""
    return held_out < min(128_000, 0.005 * total)


def uncompressed_size(path, size):
    """About the size of the text in a file of `size`, in the same unit."""
    return size * (4 if Path(path).suffix.lower() in (*COMPRESSED, ".parquet") else 1)


def default_vocab_size(sizes, largest):
    """
    √bytes of the text in files, {path: bytes}, rounded to a power of two, at most `largest`: 4,096 for 20 MB
    of text, 32,768 for 1 GB, 320 for 4 kB.
    """
    num_bytes = max(1, sum(uncompressed_size(path, size) for path, size in sizes.items()))
    return int(min(largest, max(min(512, 257 + num_bytes // 64), 2 ** round(np.log2(num_bytes) / 2))))


def load_corpus(folder):
    """The corpus in a folder of the cache, whose time becomes that of its last use."""
    with contextlib.suppress(OSError):  # who may only read it can use it, too
        os.utime(folder)
    manifest = read_manifest(folder)
    facts = {key: manifest[key] for key in ("fingerprint", "split", "digests", "notes", "left_out")}
    encoding = load_tokenizer(folder / "tokenizer", manifest["tokenizer"])
    corpus = Corpus(folder.name.rpartition("-")[0], tokenizer=encoding, spread_val=True, **facts)
    for split in ("train", "val"):
        corpus.add(folder, split, manifest[split])
    return corpus


def check_same(corpus, expected):
    """DataError if the corpus has another fingerprint than the expected one: what changed, and what to do."""
    if corpus.fingerprint == expected:
        return
    for path in (cache_folder() / "corpora").glob("*/manifest.json"):
        manifest = json.loads(path.read_bytes())
        if manifest.get("fingerprint") == expected:
            what = describe_changes(manifest["digests"], corpus.digests)
            if manifest.get("layout") != LAYOUT:
                what = "it was prepared by another version of onedial"
            advice = f"Resume with the old text, --data {path.parent}, or start a new run with --init-from"
            raise DataError(f"{corpus.name} has changed since the checkpoint: {what}.\n{advice}.")
    what = f"the checkpoint's corpus has fingerprint {expected}, and {corpus.name} has {corpus.fingerprint}"
    advice = "Pass the --data of that run, restore its files, or use the version of onedial that began it"
    raise DataError(f"{what}.\n{advice}.")


def describe_changes(before, now):
    """What differs between two {file: sha256}: `files: 3 added, 1 removed`."""
    counts = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(before[name] != now[name] for name in before.keys() & now.keys()),
    }
    changes = [f"{count:,} {word}" for word, count in counts.items() if count]
    return f"files: {', '.join(changes)}" if changes else "its files are read with other options"


def describe_split(found, corpus):
    """Lines that say how the split was made and what was left out."""
    how = {"hash": "5% of the documents, chosen by content", "tail": "the last 5% of each document"}
    if corpus.split == "files":
        parts = such_as(found.val) or ["nothing"]
    else:
        parts = [how[corpus.split], *such_as(found.val, " by name, too small to validate on")]
    yield f"held out: {'; '.join(parts + such_as(found.unused, ' not used'))}"
    yield from found.notes
    if corpus.left_out:
        yield f"left out: {describe_left_out(corpus.left_out)}"


def describe_left_out(left_out):
    """How many files of which types, with the reason of one: `2 files (1 .pdf, 1 .zip), such as a.pdf: …`."""
    path, reason = min(left_out, key=lambda entry: entry[1] == "hidden")
    return f"{summarize([path for path, _ in left_out])}, such as {Path(path).name}: {reason}"


def such_as(paths, what=""):
    """[`3 files (3 .txt) not used, such as a.txt`], [`a.txt not used`] or []."""
    if len(paths) > 1:
        return [f"{summarize(paths)}{what}, such as {Path(paths[0]).name}"]
    return [f"{Path(path).name}{what}" for path in paths]


def summarize(paths):
    """Count paths by suffix: `3 files (2 .pdf, 1 .zip)`."""
    kinds = Counter(Path(path).suffix.lower() or "without a suffix" for path in paths)
    kinds = [f"{number:,} {kind}" for kind, number in kinds.most_common()]
    more = f", {len(kinds) - 6} other types" if len(kinds) > 6 else ""
    return f"{plural(len(paths), 'file')} ({', '.join(kinds[:6])}{more})"


def plural(number, noun):
    """`1 file`, `2,000 files`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


# -----------------------------------------------------------------------------
# Find the files of a corpus


@dataclass
class FoundFiles:
    """Files below a root. `val` and `unused` are held out by their names; left_out is [(path, reason)]."""

    root: Path
    train: list
    val: list = field(default_factory=list)
    unused: list = field(default_factory=list)
    left_out: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # lines that a user should see


def find_files(data, out_dir=None):
    """
    The text files of `stdlib` or of a path; if a folder has .bin shards, only those -> FoundFiles. Data files
    whose names mark them as held out are never trained on, and what onedial has written (runs in `out_dir` or
    elsewhere, its cache) is left out. Raises DataError.
    """
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return FoundFiles(root, list_stdlib(root))
    root = Path(data).expanduser()
    if not root.exists():
        names = ", ".join(["stdlib", *PUBLIC, *SHORT_NAMES, "hf:OWNER/NAME"])
        advice = f"Pass a text file, a folder of text, or one of: {names}."
        raise DataError(f"{data}: no such file or folder.\n{advice}")
    if root.is_file():
        return FoundFiles(root.parent, [root])
    found = FoundFiles(root, [])
    files = list_files(root, found.left_out, out_dir)
    binary = [file for file in files if file.suffix == ".bin"]
    texts = [file for file in files if suffix_of(file) in (*TEXT_SUFFIXES, *READERS)]
    has_shards = any(MAGIC in np.fromfile(file, dtype="<i4", count=1) for file in binary)
    no_header = "has no header of a token shard"  # nanoGPT's .bin files have none
    reasons = dict.fromkeys(files, "not a token shard" if has_shards else "unknown type of file")
    reasons |= dict.fromkeys(binary, no_header)
    kept = binary if has_shards else texts
    for file in kept:
        del reasons[file]
    found.left_out += reasons.items()
    if has_shards and texts:
        found.notes.append(f"only token shards are read, no text files such as {texts[0].name}")
    elif binary and texts:
        found.notes.append(f"{binary[0].name} {no_header}; text files are read, such as {texts[0].name}")
    words = {file: held_out_word(root, file) for file in kept}
    found.train, found.val, found.unused = split_by_word(data, words)
    if found.train and (word := words[found.train[0]]):
        found.notes.append(f"all files are named as held out ({word}), and are split like any other text")
    return found


def list_stdlib(root):
    """The .py files of Python's standard library, sorted. Changing this list changes the default corpus."""
    files, skip = [], ("site-packages", "dist-packages")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.suffix.lower() == ".py" and file.is_file())


def list_files(root, left_out, out_dir=None):
    """All files below root, sorted; links are followed, no file is listed twice. Others go to left_out."""
    files, seen, ours = [], set(), {cache_folder().resolve()}
    if out_dir and Path(out_dir).resolve() != root.resolve():
        ours.add(Path(out_dir).resolve())

    def is_new(path):
        try:
            status = os.stat(path)  # of the target of a link
        except OSError as error:
            return failed(error)
        identity = (status.st_dev, status.st_ino)
        return identity not in seen and not seen.add(identity)

    def failed(error):
        left_out.append((Path(error.filename), error.strerror))

    for folder in (root.resolve(), *root.resolve().parents):
        is_new(folder)  # a link to one of these is a loop
    for folder, subfolders, names in os.walk(root, onerror=failed, followlinks=True):
        if why := written_by_us(Path(folder), {*subfolders, *names}, ours):
            left_out.append((Path(folder), why))
            subfolders.clear()
            continue
        left_out += [(Path(folder, name), "hidden") for name in subfolders + names if name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        subfolders[:] = [name for name in subfolders if is_new(Path(folder, name))]
    kept = []
    for file in sorted(files, key=lambda file: (file.is_symlink(), file)):  # files before links to them
        if not os.path.isfile(file):
            left_out.append((file, "not a file, a broken link, or not readable"))
        elif not is_new(file):
            left_out.append((file, "a link to a file that is already read"))
        else:
            kept.append(file)
    return sorted(kept, key=composed)


def written_by_us(folder, names, ours):
    """Why a folder with these names in it is left out, if onedial has written it; `ours` are such folders."""
    if folder.resolve() in ours or {"corpora", "seen"} <= names:
        return "a folder that onedial writes"
    if {"manifest.json", "tokenizer"} <= names:
        return "a corpus of onedial"
    if {"lock", "lock.json"} <= names or {"config.json", "log.jsonl"} <= names and is_run(folder):
        return "a run of onedial"


def is_run(folder):
    """Whether a folder's config.json is that of a run."""
    try:
        return {"settings", "corpus", "versions"} <= json.loads((folder / "config.json").read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def split_by_word(data, words):
    """
    Split files by their words of HELD_OUT, {file: word or None} -> (train, val, unused), three lists. The
    lowest kind present is the validation split. DataError if no file is left to train on.
    """
    kinds = {}  # {kind of HELD_OUT, or -1 for training: files}
    for file, word in words.items():
        kinds.setdefault(HELD_OUT.get(word, -1), []).append(file)
    if len(kinds) > 1 and -1 not in kinds:
        what = f"--data {data}: all files are held out by their names, such as {kinds[min(kinds)][0].name}"
        raise DataError(f"{what}.\nPass the path of the file to train on, or rename it.")
    train, val, *unused = [kinds[kind] for kind in sorted(kinds)] + [[], []]
    return train, val, sum(unused, [])


def held_out_word(root, file):
    """
    The word of HELD_OUT that marks a data file, or None. It is the name of a folder below root, a part of the
    file name between dots (wiki.test.tokens.txt), or its first or last word without numbers and FILLERS
    (test-00000-of-00007.parquet, wiki_val_000.txt.gz, my_test_set.txt).
    """
    suffix = suffix_of(file)
    if suffix not in (*PROSE, *READERS, ".bin"):
        return None
    path = unicodedata.normalize("NFC", str(file.relative_to(root)).casefold())
    *folders, name = re.sub(r"(held|hold)[-_ ]out", r"\1out", path).split(os.sep)
    stem = re.sub(r"\W\d+-of-\d+.*", "", name[: name.rindex(suffix)])
    words = [re.sub(r"\d+$", "", word) for word in re.findall(r"[^\W_]+", stem)]
    words = [word for word in words if word and word not in FILLERS]
    words = [*folders, *words[:1], *words[-1:], *stem.split(".")]
    return next((word for word in words if word in HELD_OUT), None)


def suffix_of(file):
    """The suffix of the uncompressed file, in lower case: .jsonl for a.jsonl.gz."""
    name = file.name.lower()
    return Path(name[: -len(file.suffix)] if file.suffix.lower() in COMPRESSED else name).suffix


# -----------------------------------------------------------------------------
# Read files into one text


class Text:
    """
    The text of many files, as UTF-8 in one temporary file in `folder`, with the places of its documents.
    text[begin:end] reads bytes, so no document has to fit into memory.
    """

    def __init__(self, folder=None):
        self.file = tempfile.TemporaryFile(dir=folder)
        self.size = 0  # bytes
        self.places = array("Q")  # begin, end, begin, end, …

    def write(self, text):
        """Append text. It becomes a document with add_document."""
        self.size += self.file.write(text.encode("utf-8", "replace"))  # JSON can contain half surrogate pairs

    def add_document(self, begin, end):
        """Add a document by its place in bytes. Empty documents are ignored."""
        if begin < end:
            self.places.extend((begin, end))

    @property
    def num_documents(self):
        """The number of documents."""
        return len(self.places) // 2

    def documents(self):
        """The (begin, end) of each document in bytes, int64 (documents, 2)."""
        return np.array(self.places, dtype=np.int64).reshape(-1, 2)

    def __getitem__(self, place):
        self.file.flush()
        return os.pread(self.file.fileno(), place.stop - place.start, place.start)


class TextReader:
    """
    Reads text files of any supported type.

    text_field: field or column that contains the text, even if many rows lack it; None: one of TEXT_FIELDS
    separator: separates documents in a plain text file; None: <|endoftext|> in .txt files
    plain: every file is UTF-8 and one document
    left_out: [(path, reason)]; notes: {note: {file name: count}}; empty_files: number without a document
    """

    def __init__(self, text_field=None, separator=None, plain=False):
        self.text_field, self.plain = text_field, plain
        separator = (separator or "").replace("\\r", "\r").replace("\\n", "\n")  # a shell passes two letters
        self.separator = re.sub("\r\n?", "\n", separator) or None
        self.left_out, self.notes, self.empty_files = [], {}, 0

    def note(self, what, file, count=1):
        """Count something about a file that the user should see."""
        self.notes.setdefault(what, Counter())[file.name] += count

    def note_lines(self):
        """One line per note: `rows without a text: 3 (posts.csv and 2 other files)`."""
        for what, files in self.notes.items():
            more = f" and {plural(len(files) - 1, 'other file')}" if len(files) > 1 else ""
            yield f"{what}: {files.total():,} ({next(iter(files))}{more})"

    def read(self, file, text):
        """Append the documents of a file to a Text. DataError if the file cannot be read."""
        before = text.num_documents, len(self.left_out)
        try:
            self.add_documents(file, text)
        except (DataError, MemoryError):
            raise
        except ImportError as error:
            what = f"reading {file} needs the package {error.name}"
            raise DataError(f"{what}.\nRun `pip install {error.name}`.") from None
        except Exception as error:  # the libraries that read files raise many types
            error_number = getattr(error, "errno", None)
            if error_number == errno.ENOSPC:  # the disk of the Text is full
                raise
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
            what, advice = f"{file} cannot be read: {reason.rstrip('.')}", FIX_FILE
            if file.suffix.lower() in COMPRESSED and not error_number and not isinstance(error, ValueError):
                what = f"{file} is cut off or damaged: {reason.rstrip('.')}"
                advice = "Copy or download it again, or remove it."
            raise DataError(f"{what}.\n{advice}") from None
        self.empty_files += (text.num_documents, len(self.left_out)) == before

    def add_documents(self, file, text):
        """Append the documents of a file to a Text, or list it in left_out if it is not text."""
        if self.plain:
            begin = text.size
            with open_text(file, "utf-8") as stream:
                text.write(stream.read())
            return text.add_document(begin, text.size)
        read_table = READERS.get(suffix_of(file))
        encoding = "binary" if suffix_of(file) in BINARY else self.find_encoding(file)
        if not encoding:
            return
        if read_table:
            with open(file, "rb") if encoding == "binary" else open_text(file, encoding) as stream:
                if table := read_table(file, stream, self):
                    return self.add_rows(file, *table, text)
            self.note("files without a known text field, read as plain text", file)
        self.add_plain_text(file, encoding, text)

    def find_encoding(self, file):
        """The encoding of a text file; None, and an entry in left_out, if it is not text. Reads it once."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        valid, invalid, sample = 0, 0, b""  # characters beyond ASCII; words that contain them
        with open_bytes(file) as stream:
            block = first_block = stream.read(BLOCK)
            beginning, encoding = block[:8192], None
            for mark, encoding_of_mark in BYTE_ORDER_MARKS.items():
                if block.startswith(mark):
                    return encoding_of_mark
            if b"\0" in beginning:
                encoding = guess_utf16(beginning)
                if not encoding:
                    self.left_out.append((str(file), "not text: contains a zero byte"))
                    return None
            while block and not encoding:
                try:
                    text = decoder.decode(block)
                except UnicodeDecodeError:
                    decoder.errors = "replace"
                    text = decoder.decode(block)
                    decoder.errors = "strict"
                    invalid += text.count("\ufffd")
                    if len(sample) < 2**14:  # the first word of a later block may begin inside a character
                        words = block.split()[block is not first_block :]
                        sample += b" ".join(word for word in words if not word.isascii())[: 2**12] + b"\n"
                if not text.isascii():
                    valid += len(text) - len(block.translate(None, bytes(range(128, 256))))
                block = stream.read(BLOCK)
        if b"\x1b$" in beginning and not invalid:  # bytes that switch to other characters
            encoding = "iso2022_kr" if b"\x1b$)C" in beginning else "iso2022_jp_ext"
        if not encoding and invalid <= valid - invalid:  # mostly valid; some bytes may be damaged
            return "utf-8"
        encoding = encoding or guess_utf16(beginning) or guess_encoding(sample)
        self.note(f"files read as {encoding}", file)
        return encoding

    def write(self, content, file, text):
        """Append a string to a Text. Byte order marks are removed; files that were joined contain some."""
        if "\ufffd" in content:
            self.note("unreadable characters (U+FFFD)", file, content.count("\ufffd"))
        if "\ufeff" in content:
            self.note("byte order marks inside a text, removed", file, content.count("\ufeff"))
        text.write(content.replace("\ufeff", ""))

    def add_plain_text(self, file, encoding, text):
        """Append plain text, split into documents at the separator and one line end on each side of it."""
        begin, before = text.size, text.num_documents
        with open_text(file, encoding) as stream:
            for block in iter(partial(stream.read, BLOCK), ""):
                self.write(block, file, text)
        separator = self.separator or ("<|endoftext|>" if suffix_of(file) in PROSE else None)
        if separator:
            line_end = rb"(?>\r\n?|\n)"  # of any kind; the atomic group never ends inside of \r\n
            parts, at = [re.escape(part.encode()) for part in separator.split("\n")], begin
            pattern = line_end.join(parts) + line_end + b"?"  # fast if it begins with a letter
            while at < text.size:
                block = text[at : at + BLOCK + 2 * len(separator.encode()) + 2]
                for match in re.finditer(pattern, block):
                    if match.start() < BLOCK:  # later ones may be cut off; the next block finds them
                        end = at + match.start()
                        end -= len(re.search(rb"(\r\n?|\n)?\Z", text[max(begin, end - 2) : end])[0])
                        text.add_document(begin, end)
                        begin = at + match.end()
                at = max(at + BLOCK, begin)
        text.add_document(begin, text.size)
        if (documents := text.num_documents - before) > 1:
            self.note(f"documents separated by {separator!r}", file, documents)
        elif self.separator and documents:
            self.note(f"files that {separator!r} does not split", file)

    def add_rows(self, file, name, rows, text):
        """
        Append the texts of a table as documents. rows: (place, text or None, *other faults) of each row, as
        read from the field `name`. Faults are counted. DataError if more than 1% of the rows, and more than
        2, have the same one, unless the user has named the field.
        """
        count, bad = 0, {}  # {fault: [number of rows, place of the first one]}
        for place, content, *faults in rows:
            count += 1
            if content is None:
                faults.append("without a text")
            else:
                begin = text.size
                self.write(content, file, text)
                text.add_document(begin, text.size)
            for fault in faults:
                bad.setdefault(fault, [0, place])[0] += 1
        without = bad.get("without a text", [0])[0]
        if without == count > 0:
            raise no_field(file, name)
        for fault, (number, first) in bad.items():
            if number > max(2, 0.01 * count) and not self.text_field:
                what = f"{file} has {number:,} rows {fault}, of {count:,}; the first is {first}"
                raise DataError(f"{what}.\nFix them, or pass --text-field {name} to accept them.")
            self.note(f"rows {fault}", file, number)
        if name != (self.text_field or "text"):
            self.note(f"texts read from the field {name}", file, count - without)


def no_field(file, name):
    """The DataError for a table without the field that contains the text."""
    return DataError(f"{file} has no field {name} with strings.\n{NAME_FIELD}")


def read_json_lines(file, stream, reader):
    """Read the texts of JSON lines. DataError if a line is not JSON or no field is known."""
    values = parse_lines(file, stream)
    first = list(islice(values, 16))
    name = reader.text_field or find_text_field(first) or ("text" if not first else None)
    if not name:
        raise DataError(f"{file}: {describe_fields(first)}.\n{NAME_FIELD}")
    return name, texts_of(name, chain(first, values))


def parse_lines(file, stream):
    """Yield (place, value) for each line that is not blank."""
    for number, line in enumerate(stream, 1):
        if line := line.strip().strip("\ufeff"):  # files with byte order marks may have been joined
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                what = f"{file}, line {number}: not valid JSON"
                raise DataError(f"{what}.\nFix or delete that line.") from None


def texts_of(name, values):
    """Yield (place, text or None) for each (place, value): the string in its field `name`."""
    for place, row in values:
        content = row.get(name) if isinstance(row, dict) else None
        yield place, content if isinstance(content, str) else None


def find_text_field(values, names=TEXT_FIELDS):
    """The first of the names that is a field with a string in one of the (place, value) pairs, or None."""
    return next((name for name in names if any(text is not None for _, text in texts_of(name, values))), None)


def describe_fields(values):
    """Why the (place, value) pairs have no known text."""
    rows = [row for _, row in values if isinstance(row, dict)]
    for name, value in rows[0].items() if rows else ():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"its field {name} contains chats (lists of turns), not texts"
    if rows:
        return f"none of its fields is known to contain the text: {', '.join(rows[0])}"
    return "its lines are not JSON objects"


def read_json(file, stream, reader):
    """
    Read the texts of a JSON array, or of values one after another. If the only value has no text, read the
    one list with texts in it.
    """
    names = [reader.text_field] if reader.text_field else TEXT_FIELDS
    values, first = parse_values(file, stream), []
    try:
        first += islice(values, 16)
    except (ValueError, RecursionError):  # not JSON; an error if it has texts
        if reader.text_field or find_text_field(first):
            raise
        return None
    if len(first) == 1 and not find_text_field(first, names):
        lists = [rows for rows in find_lists(first[0][1]) if find_text_field(enumerate(rows), names)]
        if len(lists) == 1:
            reader.note("rows read from a list inside a JSON object", file, len(lists[0]))
            first = [(f"row {number}", row) for number, row in enumerate(lists[0], 1)]
    name = reader.text_field or find_text_field(first)
    return (name, texts_of(name, chain(first, values))) if name and first else None


def find_lists(value):
    """Yield the lists in a JSON object and in the objects in it."""
    if isinstance(value, list):
        yield value
    for child in value.values() if isinstance(value, dict) else ():
        yield from find_lists(child)


def parse_values(file, stream):
    """Yield (place, value) for each value of a JSON array, or of values one after another; else nothing."""
    decoder, text, count = json.JSONDecoder(), stream.read(BLOCK).lstrip(), 0
    if not text.startswith(("[", "{")):
        return
    at = int(text.startswith("["))
    while True:
        at = re.compile(r"[\s,\ufeff]*").match(text, at).end()
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # invalid, or not read to its end yet
            if error.pos < len(text) - 16 and not error.msg.startswith("Unterminated"):
                raise
            text, at, more = text[at:], 0, stream.read(max(BLOCK, len(text)))
            if not more and text.strip() in ("", "]"):
                return
            if not more:
                raise
            if len(text) > 256 * BLOCK:
                what = f"{file}: value {count + 1} is longer than {256 * BLOCK:,} characters"
                raise DataError(f"{what}.\nWrite its rows as JSON lines, or remove the file.") from None
            text += more
        else:
            count += 1
            yield f"value {count}", value


def read_csv(file, stream, reader):
    """
    Read the texts of a table with a header, separated by , or ; or tabs. In .tsv files quotes belong to the
    text and in others they enclose cells, unless more rows have as many cells as the header in the other way.
    """
    csv.field_size_limit(2**31 - 1)
    header, usual, other = stream.readline(), csv.QUOTE_MINIMAL, csv.QUOTE_NONE
    if suffix_of(file) == ".tsv":
        usual, other = other, usual
    delimiter = max("\x1f\t,;", key=header.count)  # a table of one column has none, so 1F
    table = partial(read_table, file, stream.encoding, delimiter)
    if (misfits := count_misfits(table(usual))) and count_misfits(table(other)) < misfits:
        usual, how = other, "without" if other == csv.QUOTE_NONE else "with"
        reader.note(f"tables read {how} quotes around cells", file)
    rows = table(usual, strict=not reader.text_field)
    names = [name.strip() for name in next(rows, (0, []))[1]]
    name = reader.text_field or next((name for name in TEXT_FIELDS if name in names), None)
    if name in names:
        return name, texts_of_column(names.index(name), len(names), delimiter, rows)
    if header and reader.text_field:
        raise no_field(file, name)
    return None if header else ("text", [])


def texts_of_column(column, width, delimiter, rows):
    """Yield (place, text or None, *faults) for each row of read_table."""
    for line, cells in rows:
        surplus = max(0, len(cells) - width)  # surplus cells come from separators in the text
        text = delimiter.join(cells[column : column + 1 + surplus]) if column < len(cells) else None
        yield f"line {line}", text, *[MISFIT] * (len(cells) != width)


def read_table(file, encoding, delimiter, quoting, strict=True):
    """Yield (line number, cells) for each row of a table; a row with misplaced quotes has no cells."""
    with open_text(file, encoding) as stream:
        lines = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=strict)
        while True:
            try:
                for cells in filter(None, lines):
                    yield lines.line_num, cells
                return
            except csv.Error:
                yield lines.line_num, []


def count_misfits(rows):
    """The number of rows of read_table that have another number of cells than the first row."""
    width = len(next(rows, (0, []))[1])
    return sum(len(cells) != width for _, cells in rows)


def read_parquet(file, stream, reader):
    """Read a column of strings. Raises DataError."""
    import pyarrow  # optional dependency
    import pyarrow.parquet as parquet

    if [int(number) for number in re.findall(r"\d+", pyarrow.__version__)[:3]] < [14, 0, 1]:
        what = f"pyarrow {pyarrow.__version__} can run code that a Parquet file contains (CVE-2023-47248)"
        raise DataError(f"{what}.\nRun `pip install --upgrade pyarrow`.")
    table = parquet.ParquetFile(file, buffer_size=BLOCK)
    types = {column.name: str(column.type) for column in table.schema_arrow}
    names = [reader.text_field] if reader.text_field else TEXT_FIELDS
    name = next((name for name in names if TEXT_TYPE.match(types.get(name, ""))), None)
    if name is None:
        columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        what = f"{file} has no column {reader.text_field or 'text'} of strings; its columns are {columns}"
        raise DataError(f"{what}.\n{NAME_FIELD}")
    batches = table.iter_batches(batch_size=64, columns=[name])
    rows = (row for batch in batches for row in batch.column(0).cast("binary").to_pylist())
    return name, ((f"row {number}", decoded(row)) for number, row in enumerate(rows, 1))


def decoded(content):
    """The string of UTF-8 bytes; None for None and for bytes that are no UTF-8."""
    with suppress(AttributeError, UnicodeDecodeError):
        return content.decode()


# A new format is one entry here. Its reader gets the file, the open stream and the TextReader. It returns the
# name of the field with the text and an iterator of (place, text or None, *faults) over the rows. If it
# returns None, the file is read as plain text.
READERS = {".jsonl": read_json_lines, ".ndjson": read_json_lines, ".json": read_json}
READERS |= {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
BINARY = (".parquet",)  # not text: their streams yield bytes, and the encoding is not guessed


def open_bytes(file):
    """Open a file to read bytes; it is decompressed according to its suffix."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(ZstdFile(file))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(file, "rb")


class ZstdFile(io.RawIOBase):
    """Reads a .zst file of any window size. EOFError if it is cut off; zstandard ignores that."""

    def __init__(self, file):
        self.file, self.frame, self.content = open(file, "rb"), None, b""
        import zstandard  # optional dependency

        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # as `zstd --long=31` needs

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.content:
            block = self.frame and self.frame.unused_data or self.file.read(2**14)
            if not block:
                if self.frame and not self.frame.eof:
                    raise EOFError("the last frame is incomplete")
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.decompressor.decompressobj()
            self.content = memoryview(self.frame.decompress(block))
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count

    def close(self):
        self.file.close()
        super().close()


def open_text(file, encoding):
    """Open a file to read text; line ends are not changed."""
    return io.TextIOWrapper(open_bytes(file), encoding, "replace", newline="")


def guess_utf16(sample):
    """`utf-16-le` or `utf-16-be` if the bytes are UTF-16 without a byte order mark, otherwise None."""
    letters, languages = min(1024, len(sample) // 2), " ".join(LETTERS.values())
    orders = ("utf-16-le", "utf-16-be")
    scores = [log_likelihood(sample[: 2 * letters].decode(order, "replace"), languages) for order in orders]
    # in the wrong byte order most letters are rare, -9 each; if it is not UTF-16, they are rare in both
    is_utf16 = max(scores) > max(min(scores) + letters, -8.6 * letters)
    return orders[scores.index(max(scores))] if is_utf16 else None


def guess_encoding(sample):
    """
    The most likely encoding of bytes that are not UTF-8, by the frequencies of letters in LETTERS. Right for
    94% of 54 translations of Django (100 kB each, some with a damaged byte) and 99% of chardet's test files;
    charset-normalizer: 61% and 76%.
    """
    scores = {}
    for encodings, languages in LETTERS.items():
        for encoding in encodings.split():
            text = sample.decode(encoding, "replace")
            odd = len(re.findall(ODD_PAIR, text))
            scores[encoding] = log_likelihood(text, languages) - 5 * odd
    scores["cp1252"] += 10  # by far the most common
    return max(scores, key=scores.get)


def log_likelihood(text, languages):
    """
    The logarithm of the probability of a text in the most likely of some languages of LETTERS. The frequency
    of a letter falls as 1 / (rank + 2) in its language; the constants are logarithms of rough frequencies.
    """
    counts, best, common = Counter(text.lower()), -math.inf, 0
    for letter in filter(str.isascii, list(counts)):
        common += counts.pop(letter) * (-3 if letter.isprintable() or letter.isspace() else -12)
    for language in languages.split():
        is_asian, total = language > "\u3000", common
        share = 0.1 if language < "ɐ" else 0.5 if is_asian else 1.0  # of these letters in a text
        share /= sum(1 / (rank + 2) for rank in range(len(language)))
        known = {letter: math.log(share / (rank + 2)) for rank, letter in enumerate(language)}
        known = dict.fromkeys(MARKS, -7) | known
        for letter, count in counts.items():
            rare = -9 if is_asian and "\u3000" <= letter <= "\ud7a3" else -12
            total += count * known.get(letter, rare)
        best = max(best, total)
    return best


# -----------------------------------------------------------------------------
# Split documents into train and val, and cut them into pieces


def choose_split(text, places, num_train):
    """
    Choose the validation text -> (how, places of the training documents, places of the validation documents).

    "files": the documents from number num_train on, which come from files held out by their names
    "hash": 5% of the documents, chosen by a hash of the content, so that adding files moves no other document
    "tail": the last 5% of each document, if there are too few documents for "hash"
    """
    if num_train < len(places):
        return "files", places[:num_train], places[num_train:]
    held_out = np.empty(len(places), dtype=bool)
    for number, (begin, end) in enumerate(places):
        digest = hashlib.sha256()
        for at in range(begin, end, BLOCK):
            digest.update(text[at : min(end, at + BLOCK)])
        held_out[number] = int.from_bytes(digest.digest()[:4], "big") < VAL_FRACTION * 2**32
    sizes = places[:, 1] - places[:, 0]
    if 0.01 <= sizes[held_out].sum() / sizes.sum() <= 0.20:
        return "hash", places[~held_out], places[held_out]
    lasts = places[:, 1] - (VAL_FRACTION * sizes).astype(np.int64)
    firsts = np.maximum(lasts - BLOCK, places[:, 0] + (0.8 * sizes).astype(np.int64))
    cuts = [find_cut(text, first, last) for first, last in zip(firsts.tolist(), lasts.tolist())]
    train, val = np.stack([places[:, 0], cuts], axis=1), np.stack([cuts, places[:, 1]], axis=1)
    return "tail", train[train[:, 0] < train[:, 1]], val[val[:, 0] < val[:, 1]]


def find_cut(text, first, cut):
    """Where to cut a document: after the last line end from byte `first` to `cut`, else at a character."""
    if line := text[first:cut].rfind(b"\n") + 1:
        return first + line
    while first < cut and (text[cut : cut + 1] or b"a")[0] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def sum_pieces(text, places):
    """{checksum of a piece of similar_pieces: its bytes, in all places}"""
    sizes = Counter()
    for piece in similar_pieces(text, places):
        sizes[zlib.crc32(piece)] += len(piece)
    return sizes


def describe_shared(text, train, held_out, where):
    """Lines that say which share of held-out text, given by sum_pieces, also occurs in training documents."""
    checksums = map(zlib.crc32, similar_pieces(text, train))
    found = {checksum for checksum in checksums if checksum in held_out}
    shared = sum(held_out[checksum] for checksum in found) / max(1, held_out.total())
    if shared >= 0.01:
        yield f"{shared:.0%} of the held-out text also occurs in {where}: val_bpb is lower than on new text"


def similar_pieces(text, places):
    """
    Yield the bytes of documents, given in the order of the text, in pieces of about 1 kB. A piece ends with
    its document, or where a hash of 4 bytes is small, so that equal texts are cut into equal pieces.
    """
    begins, ends = np.ascontiguousarray(places.T)
    for start in range(0, text.size, BLOCK):
        some = slice(np.searchsorted(ends, start, "right"), np.searchsorted(begins, start + BLOCK))
        if some.start == some.stop:
            continue
        content = text[start : start + BLOCK]
        padded, cuts = content + bytes(4), []
        for first in range(4):
            words = np.frombuffer(padded, "<u4", len(content) // 4, first)
            cuts.append(4 * np.flatnonzero(words * np.uint32(0x9E3779B1) < 2**22) + first)  # 2^22: 1 in 1,024
        cuts = np.sort(np.concatenate(cuts))
        cuts = cuts[np.diff(cuts, prepend=-100) > 32]  # one cut for a run of the same byte
        cuts = np.concatenate([[0], cuts, begins[some] - start, ends[some] - start])
        cuts = np.unique(np.clip(cuts, 0, len(content)))
        document = np.searchsorted(begins[some], cuts[:-1] + start, "right") - 1  # -1: between documents
        inside = (document >= 0) & (cuts[:-1] + start < ends[some][document])
        for at, end in zip(cuts[:-1][inside].tolist(), cuts[1:][inside].tolist()):
            yield content[at:end]


def shuffle_documents(text, places):
    """
    Shuffle training documents over the whole corpus, always in the same way: otherwise a run would train on
    books first, then on code. Documents of more than PART_BYTES are shuffled in parts. Ten million documents
    take 0.8 GB of memory here, 80 bytes each.
    """
    is_long = places[:, 1] - places[:, 0] > PART_BYTES
    parts = [places[~is_long]]
    for begin, end in places[is_long].tolist():
        ends = range(begin + PART_BYTES, end, PART_BYTES)
        cuts = [begin, *(find_cut(text, cut - PART_BYTES // 2, cut) for cut in ends), end]
        parts.append(np.stack([cuts[:-1], cuts[1:]], axis=1))
    places = np.concatenate(parts) if len(parts) > 1 else places
    return places[np.random.RandomState(0).permutation(len(places))]


def cut_into_pieces(text, places, size=PIECE_CHARS):
    """
    Cut documents of a Text, or of bytes -> yield (whether the piece starts a document, piece). A piece has at
    most `size` characters and ends after a line end if it contains one.
    """
    for begin, end in places:
        at = begin
        while at < end:
            # a character has 1 to 4 bytes; one more character shows whether the document goes on
            piece = text[at : min(end, at + 4 * (size + 1))].decode("utf-8", "ignore")
            if len(piece) > size:
                piece = piece[: piece.rfind("\n", 0, size) + 1 or size]
            yield at == begin, piece
            at += len(piece.encode())


def read_documents(data, **reading):
    """
    Yield the documents in a file or folder as strings, held out by name or not. reading: text_field and
    separator, see TextReader. Raises DataError.
    """
    found, reader, text = find_files(data), TextReader(**reading), Text()
    for file in found.train + found.val + found.unused:
        reader.read(file, text)
    yield from (text[begin:end].decode() for begin, end in text.documents())


# -----------------------------------------------------------------------------
# The tokenizer: a tiktoken Encoding. Its only special token, the last one, starts each document


def train_on_split(text, train, vocab_size, say):
    """Train a BPE on the training split, or on TOKENIZER_BYTES of it from all over the corpus."""
    size = int((train[:, 1] - train[:, 0]).sum())
    fraction = min(1.0, TOKENIZER_BYTES / max(1, size))
    say(f"training a BPE of {vocab_size:,} tokens on {fraction * size / 1e6:,.1f} MB")
    pieces = (piece for _, piece in cut_into_pieces(text, train))
    with still_running(say, "training the BPE"):
        return train_tokenizer(pieces, vocab_size, fraction, say)


def train_tokenizer(pieces, vocab_size, fraction=1.0, say=lambda line: None):
    """Train a byte-level BPE of at most vocab_size tokens, <|bos|> included, on a fraction of the pieces."""
    assert vocab_size <= 2**16, "tokens are stored as uint16"

    def some_pieces():
        seen = used = blanks = 0
        start = time.monotonic()
        for piece in pieces:
            seen += len(piece)
            if used < fraction * seen:
                used += len(piece)
                blanks += piece.count(" ") + piece.count("\n")
                yield piece
        seconds = used / 5e5 if used > 50 * blanks else 0.4 * (time.monotonic() - start)
        if seconds > 5:  # rustbpe merges now and holds the GIL: no thread can print meanwhile
            say(f"the BPE may take another {seconds:.0f} s")

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(some_pieces(), vocab_size - 1, buffer_size=64, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    special = {"<|bos|>": len(ranks)}
    return tiktoken.Encoding("onedial", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(encoding, folder):
    """Write tokenizer.tiktoken (lines of base64 and rank) and tokenizer.json (the rest) -> {file: sha256}."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items()]
    files = {"tokenizer.tiktoken": b"".join(lines), "tokenizer.json": json.dumps(rest, indent=2).encode()}
    return {name: write(folder / name, content) for name, content in files.items()}


def load_tokenizer(folder, expected=None):
    """Read what save_tokenizer wrote. expected: {file: sha256}; DataError if a file differs from it."""
    for name, digest in (expected or {}).items():
        if not (folder / name).exists() or file_sha256(folder / name) != digest:
            raise damaged(folder / name, "its sha256 has changed")
    rest = json.loads((folder / "tokenizer.json").read_text())
    pattern, special = rest["pattern"], rest["special_tokens"]
    ranks = read_ranks(folder / "tokenizer.tiktoken")
    return tiktoken.Encoding(rest["name"], pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def read_ranks(path):
    """Read lines of base64 and rank -> {bytes of the token: rank}."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def gpt2_tokenizer(vocab_size):
    """GPT-2's tokenizer, downloaded by tiktoken or read from a file in the cache folder. Raises DataError."""
    if vocab_size not in (None, 50257):
        what = f"--vocab-size {vocab_size}: this corpus is tokenized with GPT-2's 50,257 tokens"
        raise DataError(f"{what}.\nRemove --vocab-size.")
    path = cache_folder() / "r50k_base.tiktoken"  # the file name that OpenAI uses
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_folder() / "tiktoken"))  # instead of /tmp
    try:
        ranks = read_ranks(path) if path.exists() else tiktoken.get_encoding("r50k_base")._mergeable_ranks
        if sorted(ranks.values()) != list(range(50256)):
            raise ValueError
    except Exception as error:  # tiktoken raises any network error
        if path.exists():
            raise damaged(path, "its ranks are not 0 to 50255") from None
        what = f"GPT-2's vocabulary cannot be downloaded: {type(error).__name__}"
        raise DataError(f"{what}.\nCopy {path.name} into {path.parent} yourself, {OTHER_TEXT}") from None
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def tokenizer_fingerprint(encoding):
    """A short hash of an encoding's tokens and split pattern."""
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return fingerprint(encoding._pat_str, [token.hex() for token in tokens])


def token_bytes(encoding):
    """The length of each token in bytes, uint16 (n_vocab,); 0 for the special token."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.uint16)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# -----------------------------------------------------------------------------
# Tokenize


def encode_texts(encoding, text, places, folder, split, say):
    """Encode documents of a Text on all cores into folder/SPLIT_000000.bin … -> the manifest's entry."""
    in_order = shuffle_documents(text, places) if split == "train" else places
    pieces = cut_into_pieces(text, in_order, PIECE_CHARS if split == "train" else VAL_PIECE_CHARS)
    groups = iter(lambda: list(islice(pieces, 16)), [])  # each is encoded by one thread
    waiting, count, shards, last_line = [], 0, [], time.monotonic()

    def write_shard(parts, count):
        header = np.array([MAGIC, VERSION, count] + [0] * (HEADER_INTS - 3), dtype="<i4")
        name = f"{split}_{len(shards):06}.bin"
        shards.append({"file": name, "tokens": count, "sha256": write(folder / name, header, *parts)})

    with ThreadPoolExecutor(THREADS) as pool:  # tiktoken releases the GIL
        while batch := list(islice(groups, 2 * THREADS)):  # a limited number of groups, to limit the memory
            waiting += pool.map(partial(encode_pieces, encoding, split=split), batch)
            count += sum(map(len, waiting[-len(batch) :]))
            while count >= SHARD_TOKENS:
                tokens = np.concatenate(waiting)
                write_shard([tokens[:SHARD_TOKENS]], SHARD_TOKENS)
                waiting, count = [tokens[SHARD_TOKENS:]], count - SHARD_TOKENS
            if time.monotonic() - last_line > 2:
                last_line = time.monotonic()
                say(f"{len(shards) * SHARD_TOKENS + count:,} tokens so far")
    if count:
        write_shard(waiting, count)
    sizes = places[:, 1] - places[:, 0]
    counts = {"documents": len(places), "bytes": int(sizes.sum())}
    return {**counts, "tokens": sum(shard["tokens"] for shard in shards), "shards": shards}


def encode_pieces(encoding, pieces, split):
    """Encode pieces of cut_into_pieces -> uint16 (tokens,). A bos starts each document, or piece of "val"."""
    bos, parts = np.array([encoding.n_vocab - 1], dtype=np.uint32), []
    for starts_document, piece in pieces:
        if starts_document or split == "val":
            parts.append(bos)
        parts.append(encoding.encode_to_numpy(piece, disallowed_special=()))  # "<|bos|>" in text is text
    return np.concatenate(parts).astype("<u2")


def encode_held_out(encoding, texts, whole=False):
    """Encode texts as a validation split does, or whole, with one bos each -> uint16 (tokens,)."""
    size, split = (PIECE_CHARS, "train") if whole else (VAL_PIECE_CHARS, "val")
    texts = [text.encode() for text in texts]
    pieces = (piece for text in texts for piece in cut_into_pieces(text, [(0, len(text))], size))
    return encode_pieces(encoding, pieces, split)


def open_shard(path, expected=None):
    """Memory-map the tokens of a shard, uint16 (tokens,). DataError if header, size or sha256 is wrong."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
        if header[:3].tolist() != [MAGIC, VERSION, (size - 4 * HEADER_INTS) / 2]:
            raise damaged(path, f"the header {header[:3].tolist()} is not that of a shard of {size:,} bytes")
        if expected and file_sha256(path) != expected:
            raise damaged(path, "its sha256 has changed")
    except OSError as error:
        raise damaged(path, error.strerror) from None
    return np.asarray(np.memmap(path, dtype="<u2", mode="r"))[2 * HEADER_INTS :]


# -----------------------------------------------------------------------------
# Public data sets: listed once, then fetched file by file, as far as the horizon needs them


def find_public(data):
    """
    The PublicSet of NAME[@COMMIT] or of hf:OWNER/NAME[@COMMIT][/FOLDER-OR-FILE]. The newest commit is looked
    up once and kept. DataError if the set cannot be listed, contains no text, or contains several sets.
    """
    known, _, commit = data.partition("@")
    public = PUBLIC.get(known)
    if public:
        name, repository, inside = public.name, public.repository, ""
    else:
        data = SHORT_NAMES.get(data, data)
        match = re.fullmatch(r"hf:([^/@]+/[^/@]+)(@[^/]+)?(/.+)?", data.rstrip("/"))
        if not match:
            raise DataError(f"--data {data} is not a data set's name.\nUse hf:OWNER/NAME[/FOLDER-OR-FILE].")
        repository, commit, inside = (part.strip("@/") for part in match.groups(""))
        name = repository.replace("/", "--")

    def make(temporary):
        import huggingface_hub  # slow to import and rarely needed

        try:
            options = {"revision": commit or None, "timeout": 60, "files_metadata": True}
            info = huggingface_hub.HfApi().dataset_info(repository, **options)
        except Exception as error:  # the hub raises any network error
            advice = f"Check its name, log in with `hf auth login` if it is private, {OTHER_TEXT}"
            raise DataError(f"{data} cannot be listed: {hub_reason(error)}.\n{advice}") from None
        sizes = {file.rfilename: (file.size or 0) / 1e6 for file in info.siblings}
        configs = (getattr(info, "card_data", None) or {}).get("configs") or []
        if public:
            train = {file: sizes.get(file, size) for file, size in public.train.items()}
            chosen = {"train": train, "val": public.val, "unused": [], "left_out": []}
        else:
            chosen = choose_files(data, inside, sizes, configs)
        large = {file.rfilename: file.lfs for file in info.siblings if getattr(file, "lfs", None)}
        sha256 = {file: large[file].sha256 for file in [*chosen["train"], chosen["val"]] if file in large}
        return {"commit": info.sha, **chosen, "sha256": sha256}

    def listed(commit, make):
        folder = cache_folder() / "listed" / f"{name}-{fingerprint(LAYOUT, repository, commit, inside)}"
        return make_once(folder, make)

    try:
        found = listed(commit, make)
    except DataError:
        if public:  # its files are known, and may be in the cache
            return replace(public, revision=commit or "main")
        raise
    commit = found["commit"]
    listed(commit, lambda temporary: found)  # a resumed run asks for this commit
    rest = {key: found[key] for key in ("train", "val", "unused", "left_out", "sha256") if key in found}
    name = name if public else f"{name}-{commit[:12]}"
    return PublicSet(name, repository, revision=commit, inside=inside, **rest)


def choose_files(data, inside, sizes, configs=()):
    """
    Choose files of a hub data set, {file: MB} -> the fields train, val, unused and left_out of a PublicSet.
    `configs` of its data card come first, then the names of files. The format with most text is taken.
    """
    sizes = {Path(name): size for name, size in sorted(sizes.items())}
    safe = [file for file in sizes if not {"..", "/"} & {*file.parts}]
    # {file: why it is left out}
    reasons = dict.fromkeys(sizes.keys() - safe, "its path leads out of the data set")
    root = Path(inside).parent if Path(inside) in sizes else Path(inside)
    configured = choose_config(data, inside, safe, configs)
    words = configured or {file: held_out_word(root, file) for file in safe if file.is_relative_to(inside)}

    def amount(files):  # MB of text
        return sum(uncompressed_size(file, sizes[file]) for file in files)

    formats = {suffix: [] for suffix in (*PROSE, *READERS)}
    for file in safe:
        if file in words:
            formats.get(suffix_of(file), []).append(file)
    best = max(formats, key=lambda suffix: (amount(formats[suffix]), len(formats[suffix])))
    files = formats[best]
    if not files:
        what = f"{data} contains no parquet, JSONL or text files, only {summarize(words or sizes)}"
        raise DataError(f"{what}.\nChoose another data set, or another folder of it.")
    others = [file for file in words.keys() - files if not file.name.startswith(".")]
    reasons |= dict.fromkeys(others, f"not {best}, the format with most text")
    if not configured:
        groups = [[file for file in group if not words[file]] for group in by_place(data, root, files)]
        others = min(groups, key=lambda group: (amount(group), len(group)))
        reasons |= dict.fromkeys(others, "most of the training text is in another folder")
    train, val, unused = split_by_word(data, {file: words[file] for file in files if file not in reasons})
    if is_too_small(1e6 * amount(val), 1e6 * amount(train + val)):
        val, unused = [], val + unused
    if not val and len(train) > 1:
        val = [train.pop()]
    return {
        "train": {str(file): sizes[file] for file in train},
        "val": str(val[0]) if val else None,
        "unused": [str(file) for file in val[1:] + unused],
        "left_out": sorted((str(file), reason) for file, reason in reasons.items()),
    }


def choose_config(data, inside, files, configs):
    """
    The files of the configuration of a data card that `inside` names, or of its default one -> {file: word of
    HELD_OUT or None}, empty if there is none. DataError if the card has several and no default.
    """
    found, default = {}, "default"  # {name: files}
    for config in configs:
        if isinstance(config, dict) and (words := config_files(config, files)):
            name = str(config.get("config_name", "default"))
            found[name], default = words, name if config.get("default") else default
    if not inside and len(found) > 1 and default not in found:
        raise several_sets(data, found)
    return found.get(inside or (default if default in found else next(iter(found), None)), {})


def config_files(config, files):
    """The files of a configuration of a data card, with the word of HELD_OUT of their split or name."""
    folder, entries, words = config.get("data_dir") or "", config.get("data_files") or [], {}
    if folder and not entries:
        entries = "**"
    for entry in entries if isinstance(entries, list) else [entries]:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        paths, split = entry.get("path") or [], str(entry.get("split") or "")
        for path in paths if isinstance(paths, list) else [paths]:
            pattern = glob_pattern(os.path.normpath(f"{folder}/{path}").lstrip("/"))
            for file in files:
                if pattern.fullmatch(file.as_posix()):
                    words.setdefault(file, held_out_word(Path(), Path(f"{split}.txt") if split else file))
    return words


def glob_pattern(pattern):
    """The regular expression of a pattern of file names: * and ? stay in one folder, ** does not."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\[[^]]+\]|.", pattern)
    groups = (part.replace("[!", "[^") if part[1:] else re.escape(part) for part in parts)
    return re.compile("".join(wild.get(part, group) for part, group in zip(parts, groups)))


def by_place(data, root, files):
    """
    The files in `root` and those in folders of it, on any level; folders named like a split do not count.
    DataError if there are folders whose names differ by more than a number: those are several data sets.
    """
    folders, splits, groups = {}, {"train", *HELD_OUT}, ([], [])
    for file in files:
        parts = [part for part in file.relative_to(root).parts[:-1] if part.casefold() not in splits]
        groups[bool(parts)].append(file)
        if parts:
            folders.setdefault(tuple(re.sub(r"[\W\d_]+", "", part) for part in parts), "/".join(parts))
    if len(folders) > 1:
        raise several_sets(data, folders.values())
    return groups


def several_sets(data, names):
    """The DataError for a repository of several data sets."""
    what = f"{data} contains several data sets: {', '.join(sorted(names)[:9])}"
    return DataError(f"{what}.\nChoose one of them, for example {data}/{min(names)}.")


def files_of(public, say):
    """The FoundFiles of a public data set. A training file that has to be split is fetched."""
    root, val, unused = cache_folder() / public.name, [], [Path(name) for name in public.unused]
    if public.val:
        train, val = [root / name for name in public.train], [root / public.val]
    else:
        train = [fetch_file(public, *public.train, say)]
        root = train[0].parents[len(Path(*public.train).parents) - 1]
    return FoundFiles(root, train, val, unused, public.left_out)


def prepare_public(public, reading, vocab_size, say, largest_vocab, tokenizer):
    """The corpus of a public data set, with its validation file and its first training file."""
    reader, (first, *more) = TextReader(**reading), public.train
    options = [LAYOUT, reader.text_field, reader.separator]
    if first.endswith(".bin"):
        encoding, identity, options = gpt2_tokenizer(vocab_size), "gpt2", []
    elif tokenizer:
        encoding, identity = tokenizer, tokenizer_fingerprint(tokenizer)
    else:
        sizes = {name: 1e6 * size for name, size in public.train.items()}
        vocab_size = vocab_size or default_vocab_size(sizes, largest_vocab)

        def make(temporary):
            text = Text(temporary)
            reader.read(fetch_file(public, first, say), text)
            return save_tokenizer(train_on_split(text, text.documents(), vocab_size, say), temporary)

        folder = cache_folder() / "tokens" / f"{public.name}-tokenizer-{vocab_size}-{fingerprint(options)}"
        identity = make_once(folder, make, say)
        encoding = load_tokenizer(folder, identity)
    # of fineweb and climbmix the same for every commit: a run that began without a network has none
    revision = "main" if public.name in PUBLIC else public.revision
    content = fingerprint(public.name, public.repository, revision, identity, *options)
    corpus = Corpus(public.name, content, encoding, more=more, public=public, reading=reading)
    add_file(corpus, "val", public.val, say)
    add_file(corpus, "train", first, say)
    return corpus


def add_file(corpus, split, file, say=lambda line: None):
    """
    Add a file to a split -> lines about it that a user should see. `file` is the name of a public data set's
    file, which is fetched first if it is not on this machine, or the path of a local shard. A .bin shard is
    checked once and used where it is; a text file is tokenized once into the cache. Raises DataError.
    """
    place, folder, public = *places_of(corpus, file), corpus.public
    is_shard = place.suffix == ".bin"
    if is_shard and not find_entry(corpus, file):  # it was checked, and then deleted
        shutil.rmtree(folder, ignore_errors=True)

    def make(temporary):
        path = fetch_file(public, file, say) if public else place
        if is_shard:
            say(f"checking {place.name}")
            return check_shard(path, corpus.bos)
        say(f"tokenizing {place.name}")
        text, reader = Text(temporary), TextReader(**corpus.reading)
        reader.read(path, text)
        places = text.documents()
        entry = encode_texts(corpus.tokenizer, text, places, temporary, split, say)
        if split == "val":  # the smallest checksums are a random sample
            entry["pieces"] = sorted(sum_pieces(text, places).items())[:10_000]
        shared = describe_shared(text, places, corpus.held_out, place.name)
        return entry | {"left_out": reader.left_out, "notes": [*reader.note_lines(), *shared]}

    make_once(folder, make, say)
    if public and not is_shard:
        with suppress(OSError):  # its tokens are all that is needed
            download_path(public, file).unlink()
    root, entry = find_entry(corpus, file)
    return corpus.add(root, split, entry)


def places_of(corpus, file):
    """Where add_file looks for a file first, and the folder of the cache for what it finds out about it."""
    place = cache_folder() / corpus.name / file if corpus.public else file
    relative = os.path.relpath(place.resolve(), cache_folder().resolve())
    identity = fingerprint(LAYOUT, relative, corpus.fingerprint)
    kind = "checked" if place.suffix == ".bin" else "tokens"
    return place, cache_folder() / kind / f"{short_name(place)}-{identity}"


def find_entry(corpus, file):
    """(folder of the shards, manifest's entry) of a file that has been checked or tokenized, else None."""
    place, folder = places_of(corpus, file)
    if not (folder / "manifest.json").exists():
        return None
    if place.suffix != ".bin":
        return folder, read_manifest(folder)
    path = find_file(corpus.public, file) if corpus.public else place
    return (path.parent, read_manifest(folder)) if path else None


def check_shard(path, bos):
    """Check a shard of GPT-2's tokens -> the manifest's entry. DataError if it is damaged."""
    tokens, digest = open_shard(path), file_sha256(path)
    if len(tokens) and tokens.max() > bos:
        raise damaged(path, f"it contains the token {tokens.max():,}, and GPT-2's last token is {bos:,}")
    return {"tokens": len(tokens), "shards": [{"file": path.name, "sha256": digest}]}


def find_file(public, name):
    """The path of a public data set's file, put into the cache or fetched by any program, or None."""
    for path in (cache_folder() / public.name / name, download_path(public, name)):
        if path.exists():
            return path
    import huggingface_hub  # slow to import and rarely needed

    options = {"revision": public.revision, "repo_type": "dataset"}
    path = huggingface_hub.try_to_load_from_cache(public.repository, name, **options)
    return Path(path) if isinstance(path, str) else None


def download_path(public, name):
    """Where a file is downloaded to. Text has a folder of its own: only what lies there is ever deleted."""
    folder = cache_folder() if name.endswith(".bin") else cache_folder() / "downloads"
    return folder / public.name / name


def fetch_file(public, name, say):
    """The path of a public data set's file; downloaded if it is not on this machine. Raises DataError."""
    path = find_file(public, name)
    if path:
        return path
    path = download_path(public, name)

    def make(temporary):
        download(public, name, temporary, say)
        if path.suffix == ".bin":
            open_shard(temporary / name)
        return temporary / name

    build_once(path, path, make, say)
    return path


def download(public, name, folder, say):
    """Download a file of a public data set to folder/name. DataError says why it failed."""
    import huggingface_hub  # slow to import and rarely needed

    place = cache_folder() / public.name
    megabytes = public.train.get(name) or max(public.train.values())
    free = shutil.disk_usage(folder).free / 1e6
    say(f"downloading {name} of {public.repository}, about {megabytes:,.0f} MB")
    if public.revision != "main" and megabytes > free:  # the sizes in PUBLIC are rough
        what = f"{place / name} needs {megabytes:,.0f} MB of disk space, and {free:,.0f} MB are free"
        raise DataError(f"{what}.\n{FREE_SPACE}")
    try:
        options = {"repo_type": "dataset", "revision": public.revision, "local_dir": folder}
        huggingface_hub.hf_hub_download(public.repository, name, **options)  # checks the size
        why = "its sha256 is not that of the listing"
        failed = name in public.sha256 and file_sha256(folder / name) != public.sha256[name]
    except Exception as error:  # the hub raises any network error
        if type(error) in (OSError, PermissionError) and error.errno:
            raise  # an error of the disk
        why, failed = hub_reason(error), True
    if failed:
        advice = f"Copy it (and the next files, for a long run) into {place} yourself, {OTHER_TEXT}"
        raise DataError(f"{name} of {public.repository} cannot be downloaded: {why}.\n{advice}")


def hub_reason(error):
    """Why a request to the hub failed, in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"status {status}: it is private, does not exist, or your login may not read it"
    return str(error.__cause__ or error).split("\n")[0].rstrip(".") or type(error).__name__


# Limits of a Fetcher
TRIES = 5  # of a file that the run waits for, at least
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # seconds between two tries of a file; each pause is twice as long


class Fetcher:
    """
    Fetches and tokenizes further files of a public data set while the run trains, in the order of the list.
    One rank on each node has an active one; all ranks find the tokens in the cache.

    This is a process of its own with the lowest priority: a thread would hold up the training loop, because
    only one thread of a process at a time can run Python. It ends with the run, however that ends. While the
    run waits for a file the process has the run's priority, where the user may raise one (as root).
    """

    def __init__(self, corpus, T, say, is_active=True):
        self.corpus, self.T, self.say, self.is_active = corpus, T, say, is_active and bool(corpus.more)
        self.request = sum(corpus.rows_per_shard("train", T)), False  # (rows, is_waiting); these are there
        self.process, self.fault = None, None

    def want(self, rows, is_waiting=False):
        """
        Fetch until there are `rows` training rows of T tokens. is_waiting: the run waits for the next file.
        """
        rows = max(rows, self.request[0])
        if not self.is_active or self.request == (rows, is_waiting):
            return
        if not self.process:
            self.start(rows / self.request[0])
        self.request = rows, is_waiting
        self.set_priority(is_waiting)
        with suppress(OSError):  # the process may have ended
            self.process.stdin.write(json.dumps(self.request).encode() + b"\n")

    def set_priority(self, is_waiting):
        """The lowest priority while the run trains. With it, other programs could hold up one that waits."""
        nice = os.getpriority(os.PRIO_PROCESS, 0) if is_waiting else 19
        with suppress(AttributeError, OSError):  # macOS has only the first; raising is for root
            os.setpriority(os.PRIO_PROCESS, self.process.pid, nice)
            # on two cores, tokenizing all the time makes a training step 3% slower; 12% with nice alone
            policy = os.SCHED_OTHER if is_waiting else os.SCHED_IDLE
            os.sched_setscheduler(self.process.pid, policy, os.sched_param(0))

    def start(self, factor):
        """Start the process. `factor` times as many rows are wanted as there are."""
        sizes, more = self.corpus.public.train, self.corpus.more
        more = more[: math.ceil((factor - 1) * (len(sizes) - len(more)))]
        size = f"{plural(len(more), 'more file')} of {self.corpus.name}, {sum(map(sizes.get, more)):,.0f} MB"
        self.say(f"while the run trains: about {size}")
        content = pickle.dumps((self.corpus, self.T))
        code = "import sys; sys.path[0] = sys.argv[1]; "
        code += "content = sys.stdin.buffer.read(int(sys.argv[2])); "  # before the import, which is slow
        code += "import dataset; dataset.fetch_files(content)"
        command = [sys.executable, "-c", code, str(Path(__file__).absolute().parent), str(len(content))]
        quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}
        pipe = subprocess.PIPE
        options = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.STDOUT, "bufsize": 0, "env": quiet}
        # Ctrl-C and a batch system signal all processes, so signals are blocked. Not in a session of its own:
        # Linux gives each session the same share of the CPU, whatever the priority of its processes
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.process = subprocess.Popen(command, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.process.stdin.write(content)
        for end in (self.process.stdin, self.process.stdout):  # training never waits for the process
            os.set_blocking(end.fileno(), False)

    def failure(self):
        """Why the next file will not arrive, two lines; None as long as it may. Prints failed tries."""
        if self.process:
            for line in (self.process.stdout.read() or b"").decode(errors="replace").splitlines():
                try:
                    error, pause = json.loads(line)
                except (ValueError, TypeError):  # a warning of a library, or the traceback of a bug
                    self.say(line)
                    continue
                if pause:
                    self.say(f"{error.splitlines()[0]} Next try in {pause:.0f} s")
                else:
                    self.fault = error
            if self.process.poll() and not self.fault:
                what = f"the process that fetches {self.corpus.name} has ended with status"
                self.fault = f"{what} {self.process.returncode}.\nContinue with --resume."
        return self.fault


def fetch_files(content):
    """
    The process of a Fetcher: add files to a pickled (corpus, T) until it has the rows that the last line of
    stdin asks for. A file that fails is tried again without end while the run has other rows; when it waits,
    TRIES times at least. Prints [error, seconds until the next try, or 0] for each try that fails.
    """
    corpus, T = pickle.loads(content)
    wanted, is_needed = [0], threading.Event()

    def listen():
        for line in sys.stdin:
            wanted[0], is_waiting = json.loads(line)
            is_needed.set() if is_waiting else is_needed.clear()
        _thread.interrupt_main()  # the run has ended: leave no unfinished file behind
        time.sleep(5)
        os._exit(0)  # the download did not notice

    def fetch(file):
        """Add a file, in as many tries as it takes. SystemExit after the last one."""
        tries, pause = 0, FIRST_PAUSE
        while True:
            tries, is_last = tries + 1, is_needed.is_set() and tries + 1 >= TRIES
            try:
                return add_file(corpus, "train", file)
            except Exception as error:
                message = str(error) if isinstance(error, DataError) else f"{file}: {error}.\n{FIX_FILE}"
            os.write(1, json.dumps([message, 0 if is_last else pause]).encode() + b"\n")
            if is_last:
                sys.exit()
            is_needed.wait(pause) if tries >= TRIES else time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    threading.Thread(target=listen, daemon=True).start()
    with suppress(KeyboardInterrupt):
        rows, shards = sum(corpus.rows_per_shard("train", T)), len(corpus.shards["train"])
        for file in corpus.more:
            while rows >= wanted[0]:
                time.sleep(0.1)
            fetch(file)
            rows += sum(corpus.rows_per_shard("train", T, first=shards))
            shards = len(corpus.shards["train"])


# -----------------------------------------------------------------------------
# The cache: each folder in it is built once, by one process, and is either complete or absent

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def cache_folder():
    """The folder of prepared corpora: $ONEDIAL_HOME, or ~/.cache/onedial. DataError if there is no home."""
    try:
        return Path(os.environ.get("ONEDIAL_HOME") or "~/.cache/onedial").expanduser()
    except RuntimeError:
        what = "there is no home folder for the cache of prepared corpora"
        raise DataError(f"{what}.\nSet ONEDIAL_HOME to a folder.") from None


def short_name(path):
    """The name of a file or folder without its suffix, cut to 100 bytes: names made of it must fit 255."""
    name = os.fsencode(path.stem)
    return path.stem if len(name) <= 100 else name[:100].decode("utf-8", "ignore")


def make_once(folder, make, say=lambda line: None):
    """
    Build a folder of the cache unless it exists -> its manifest. make(temporary folder) fills the folder and
    returns the manifest. DataError if the disk fails.
    """

    def make_folder(temporary):
        write(temporary / "manifest.json", json.dumps(make(temporary), indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
        return temporary

    try:
        build_once(folder, folder / "manifest.json", make_folder, say)
    except OSError as error:
        if error.filename and cache_folder() not in Path(error.filename).parents:
            raise  # a file of the user
        advice = ASK_OWNER if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else FREE_SPACE
        raise DataError(f"{folder} cannot be written: {error.strerror or error}.\n{advice}") from None
    return read_manifest(folder)


def build_once(path, marker, make, say):
    """
    Create a file or folder unless `marker` exists. make(temporary folder) returns what becomes `path`. A lock
    makes other processes wait; the rename comes last, so a kill leaves nothing that is used later.
    """
    if marker.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), say) as is_locked:
        if marker.exists():  # another process has built it while this one waited
            return
        # without locks another process may build the same at the same time
        own = "" if is_locked else f"-{socket.gethostname()}-{os.getpid()}"
        temporary = path.with_name(f".tmp-{path.name}{own}")
        shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left it
        try:
            temporary.mkdir()
            os.rename(make(temporary), path)
        except OSError:
            if is_locked or not marker.exists():  # else the other process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path, say):
    """
    Hold a lock; after waiting for five seconds, say who holds it. Yields False if the file system has no
    locks. (There filelock leaves a marker file, and after a crash of another host a start waits forever.)
    """
    import fcntl  # here, because Windows does not have it: machine.py prints what to do there

    with open(path, "a+") as file:
        is_locked, next_line = True, time.monotonic() + 5
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > next_line:
                    file.seek(0)
                    say(f"waiting for {file.read() or 'another process'}, which holds {path}")
                    next_line += 60
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                is_locked = False
                break
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield is_locked


def read_manifest(folder):
    """The manifest of a folder of the cache. DataError if it is damaged."""
    try:
        return json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        raise damaged(folder / "manifest.json", "it is not valid JSON") from None


def damaged(path, reason):
    """The DataError for a damaged file. It names the folder of the cache that can be deleted."""
    folder = cache_folder() / "checked"  # the results of checks of files outside the cache
    if cache_folder() in path.parents:
        folder = next((parent for parent in path.parents[:2] if (parent / "manifest.json").exists()), path)
    return DataError(f"{path} is damaged: {reason}.\nRestore the file, or delete {folder} to start over.")


def write(path, *contents):
    """Write bytes or arrays to a file and force them to disk -> their sha256."""
    with open(path, "wb") as file:
        for content in contents:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return file_sha256(path)


def file_sha256(path):
    """The sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*values):
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


# -----------------------------------------------------------------------------
# The command line


def describe(data, **reading):
    """Prepare a corpus and print what it contains."""

    def say(line):
        with contextlib.suppress(OSError):  # stderr is full or closed
            print(printable(line), file=sys.stderr, flush=True)

    corpus = prepare(data, say=say, **reading)
    for split, count in corpus.counts.items():
        facts = [plural(number, key.removesuffix("s")) for key, number in count.items()]
        T = corpus.row_length(128)
        rows = sum(len(open_shard(path)) // T for path, _ in corpus.shards[split])
        facts.append(f"{plural(rows, 'row')} of {T}")
        if "bytes" in count and count["tokens"]:
            facts.append(f"{count['bytes'] / count['tokens']:.2f} bytes per token")
        print(f"{split:6}{'; '.join(facts)}")
    for line in [*corpus.notes, *(f"left out: {path}: {reason}" for path, reason in corpus.left_out)]:
        print(printable(line))
    print(f"split by {corpus.split}; vocabulary of {corpus.tokenizer.n_vocab:,}; {corpus.fingerprint}")
    tokens = corpus.open_shard("train", 0)[:129].tolist() if corpus.shards["train"] else []
    print(f"the first tokens:\n{printable(corpus.tokenizer.decode(tokens))}", flush=True)


def printable(text):
    """Text without characters that control a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def list_cache():
    """Print what the cache folder contains, with the day of its last use, the largest first."""
    entries = []
    for folder in cache_folder().glob("*/*"):
        files = [file.stat() for file in (folder, *folder.rglob("*")) if file.is_file()]
        if not folder.name.startswith("."):
            day = time.strftime("%Y-%m-%d", time.localtime(folder.stat().st_mtime))
            entries.append((sum(file.st_size for file in files), day, folder))
    for size, day, folder in sorted(entries, reverse=True):
        print(printable(f"{size / 1e6:10,.1f} MB  {day}  {folder}"))
    total = sum(size for size, *_ in entries) / 1e6
    print(f"{total:10,.1f} MB in total. What you delete is built again from its text when it is needed.")
    print("Keep the folders that a run continues with (--data FOLDER).", flush=True)


if __name__ == "__main__":
    if sys.platform == "win32":
        print("error: onedial does not run on Windows.\nRun it in WSL, Windows' own Linux.", file=sys.stderr)
        sys.exit(2)
    about = "Prepare a corpus; print what it contains and what was left out."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("data", nargs="?", default="stdlib", help="like --data of train.py [stdlib]")
    parser.add_argument("--text-field", help="field or column with the text [auto]")
    text = "separates documents in a plain text file [auto]"
    parser.add_argument("--document-separator", dest="separator", help=text)
    parser.add_argument("--cache", action="store_true", help="list what the cache folder contains instead")
    options = vars(parser.parse_args())
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # for a terminal that knows only ASCII
    try:
        list_cache() if options.pop("cache") else describe(**options)
    except DataError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else flushing it fails at the end
        if not isinstance(error, BrokenPipeError):  # as in `python dataset.py | head -1`
            what = error.filename or "the output"
            sys.exit(f"error: {what} cannot be read or written: {error.strerror}.\nFix this and start again.")
    except KeyboardInterrupt:
        sys.exit(130)
