"""
The data: text to tokens to rows, every token used once an epoch, in an order that does not know how many
processes read it.

A corpus is prepared once: documents found and split, a BPE trained on the training split (rustbpe), all of
it encoded by all cores (tiktoken), and kept in a cache folder as uint16 shards in the public GPT-2 layout.
`python dataloader.py PATH` prepares a corpus and says what it found.
"""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
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
TOKENIZER_CHARS = 2_000_000_000  # text that a BPE is trained on, at most
VAL_SHARE = 0.05
# GPT-4's split pattern, but numbers of at most 2 digits: that suits vocabularies below 100,000 (nanochat)
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
SPLIT_PATTERN += r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SUFFIXES = """
    .txt .text .md .rst .org .tex .adoc .bib .log .csv .tsv .json .xml .html .htm .css .yaml .yml .toml .py
    .pyi .c .h .cc .cpp .cxx .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .pl .sh .bash .sql .swift .kt
    .scala .hs .ml .lua .r .jl .m .lisp .el .clj .ex .erl .f90 .cs .vb .dart .zig .nim .proto
    .jsonl .parquet .bin""".split()
FINE, MIX = "kjj0/fineweb10B-gpt2", "karpathy/climbmix-400b-shuffle"
PUBLIC = {  # name: (repository, MB in a file, validation file, training files in the order of epoch 0)
    "fineweb": (FINE, 200, "fineweb_val_000000.bin", [f"fineweb_train_{n:06}.bin" for n in range(1, 104)]),
    "climbmix": (MIX, 90, "shard_06542.parquet", [f"shard_{n:05}.parquet" for n in range(6542)]),
}
REVISION = "main"
INSTEAD = "or train now with --data stdlib or --data PATH."


class DataError(Exception):
    """Something about the data that a person must mend; the message says what and how."""


# -----------------------------------------------------------------------------
# The cache: each thing in it is made once, by one process, and is whole or not there


def cache_folder():
    """Where prepared corpora live: $ONEDIAL_HOME, or ~/.cache/onedial."""
    return Path(os.environ.get("ONEDIAL_HOME") or "~/.cache/onedial").expanduser()


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
# Documents: find them, read them, split them


def find_files(data):
    """`stdlib` or a path -> (root, its text files or else its .bin shards, in a fixed order)."""
    root, suffixes, skip = Path(data).expanduser(), SUFFIXES, ()
    if data == "stdlib":
        root, suffixes, skip = Path(sysconfig.get_path("stdlib")), [".py"], ("site-packages", "dist-packages")
    if not root.exists():
        advice = f"Give a text file, a folder of text, or one of: stdlib, {', '.join(PUBLIC)}."
        raise DataError(f"{data}: there is no such file or folder.\n{advice}")
    if root.is_file():
        return root.parent, [root]
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if file.suffix.lower() in suffixes and file.is_file())
    shards = [file for file in files if file.suffix == ".bin"]
    if any(MAGIC in np.fromfile(file, dtype="<i4", count=1) for file in shards):
        return root, shards
    return root, [file for file in files if file.suffix != ".bin"]


def read_documents(file):
    """Yield the documents of a file: strings of valid Unicode, not empty; DataError names what is amiss."""
    try:
        if file.suffix.lower() == ".jsonl":
            yield from read_jsonl(file)
        elif file.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet  # an extra

            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024, columns=["text"]):
                yield from filter(None, batch.column("text").cast("string").to_pylist())
        else:
            content = file.read_bytes()
            if content and b"\0" not in content[:8192]:  # a NUL byte: not text
                yield content.decode("utf-8", "replace")
    except ImportError:
        raise DataError(f'{file} takes pyarrow to read.\npip install "onedial[parquet]"') from None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {error}.\nMend it, or take it out.") from None


def read_jsonl(file):
    """Yield the texts in a file of one JSON object a line, blank lines and empty texts left out."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line.decode("utf-8", "replace"))["text"] if line.strip() else ""
                text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
            except (ValueError, KeyError, TypeError, AttributeError):
                what = f'{file}, line {number}: no JSON object with a "text" string'
                raise DataError(f"{what}.\nMend or delete that line.") from None
            if text:
                yield text


def split_by_name(root, file):
    """val where that is a word in the name of the file, or of a folder between it and root, else train."""
    return "val" if re.search(r"(?<![a-z])val(?![a-z])", str(file.relative_to(root)).lower()) else "train"


def split_documents(root, files, split):
    """
    Yield ("train" or "val", text) over all documents. `split` decides: "files": by the word val in name or
    folder; "hash": 5% of the documents by content, so that adding files moves none; "tail": each one's end.
    """
    for file in files:
        for text in read_documents(file):
            cut = len(text)  # what is before it trains, what is after it is held out
            if split == "files" and split_by_name(root, file) == "val":
                cut = 0
            elif split == "hash":
                place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
                cut = 0 if place < VAL_SHARE else cut
            elif split == "tail":
                cut = int((1 - VAL_SHARE) * len(text))
                cut = text.rfind("\n", int(0.8 * len(text)), cut) + 1 or cut
            if text[:cut]:
                yield "train", text[:cut]
            if text[cut:]:
                yield "val", text[cut:]


def choose_split(root, files):
    """-> (the first of the splits files, hash, tail that will do, {"train" or "val": bytes of UTF-8})."""
    named = len({split_by_name(root, file) for file in files}) > 1
    for split in ("files", "hash", "tail") if named else ("hash", "tail"):
        sizes = Counter()
        for name, text in split_documents(root, files, split):
            sizes[name] += len(text.encode())
        share = sizes["val"] / max(1, sizes.total())
        will_do = {"files": 0 < share < 1, "hash": 0.01 <= share <= 0.20, "tail": True}
        if will_do[split]:
            return split, sizes


def cut_into_pieces(texts, size=PIECE_CHARS):
    """Yield (does it start a text, piece): of at most `size` letters, cut after a line end if it has one."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + size
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield start == 0, text[start:end]
            start = end


# -----------------------------------------------------------------------------
# The tokenizer: a tiktoken Encoding; its one special token, the last, starts each document


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE of at most vocab_size tokens, <|bos|> the last of them, on strings."""
    assert vocab_size <= 2**16, "tokens are kept as uint16"

    def pieces():
        left = TOKENIZER_CHARS
        for _, piece in cut_into_pieces(texts):
            yield piece
            left -= len(piece)
            if left <= 0:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(pieces(), vocab_size - 1, buffer_size=1024, pattern=SPLIT_PATTERN)
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
    for first, piece in pieces:
        if first or split == "val":
            parts.append(bos)
        parts.append(encoding.encode_to_numpy(piece, disallowed_special=()))  # <|bos|> is text here
    return np.concatenate(parts).astype("<u2")


def encode_texts(encoding, texts, folder, split, say):
    """Encode texts with all cores into folder/SPLIT_000000.bin … -> the manifest's entry for the split."""
    documents, size, waiting, shards, said = 0, 0, [], [], time.monotonic()
    encode = partial(encode_pieces, encoding, split=split)

    def write_shard(tokens):
        header = np.array([MAGIC, VERSION, len(tokens)] + [0] * (HEADER_INTS - 3), dtype="<i4")
        name = f"{split}_{len(shards):06}.bin"
        digest = write(folder / name, header, tokens)
        shards.append({"file": name, "tokens": len(tokens), "sha256": digest})

    pieces = cut_into_pieces(texts, PIECE_CHARS if split == "train" else VAL_PIECE_CHARS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken releases the GIL
        while batch := list(islice(pieces, 256 * os.cpu_count())):  # bounds the memory
            waiting += pool.map(encode, (batch[i : i + 16] for i in range(0, len(batch), 16)))
            documents += sum(first for first, _ in batch)
            size += sum(len(piece.encode()) for _, piece in batch)
            while sum(map(len, waiting)) >= SHARD_TOKENS:
                tokens = np.concatenate(waiting)
                write_shard(tokens[:SHARD_TOKENS])
                waiting = [tokens[SHARD_TOKENS:]]
            if time.monotonic() - said > 2:
                said = time.monotonic()
                say(f"{size / 1e6:,.0f} MB are tokenized")
    if any(map(len, waiting)):
        write_shard(np.concatenate(waiting))
    tokens = sum(shard["tokens"] for shard in shards)
    return {"documents": documents, "bytes": size, "tokens": tokens, "shards": shards}


# -----------------------------------------------------------------------------
# A corpus: tokens with their tokenizer


@dataclass
class Corpus:
    """
    A tokenized corpus. fingerprint: names its content; split: how train and val were told apart; shards:
    {"train" or "val": [(path, sha256)]}; counts: {"train" or "val": {"tokens": …}}; spread_val: validation
    rows are from all over; more: training files of a public data set not yet in use; else None.
    """

    name: str
    fingerprint: str
    tokenizer: tiktoken.Encoding
    split: str = "files"
    spread_val: bool = False
    more: list | None = None
    shards: dict = field(default_factory=lambda: {"train": [], "val": []})
    counts: dict = field(default_factory=lambda: {"train": Counter(), "val": Counter()})

    @property
    def bos(self):
        """The token that starts each document and each row."""
        return self.tokenizer.n_vocab - 1

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


def prepare(data, vocab_size=None, say=lambda line: None, largest_vocab=2**15):
    """
    Find, split, tokenize and cache the text of `data` ("stdlib", a name in PUBLIC, or a path) -> a Corpus.
    Where vocab_size is None it follows from the size of the text, up to largest_vocab.
    The work is done once, by whichever process comes first; the others wait. Of a public data set only the
    first training file is taken, fetch_more takes the next ones. Raises DataError.
    """
    try:
        if data in PUBLIC:
            return prepare_public(data, vocab_size, say)
        root, files = find_files(data)
        if files and files[0].suffix == ".bin":
            corpus = Corpus(Path(data).resolve().stem, "", gpt2_tokenizer(vocab_size))
            for file in files:
                take(corpus, split_by_name(root, file), file, say)
            digests = [[digest for _, digest in corpus.shards[part]] for part in ("train", "val")]
            corpus.fingerprint = fingerprint(digests)
            return corpus
        return prepare_text(data, root, files, vocab_size, say, largest_vocab)
    except OSError as error:
        raise DataError(f"{error.filename or data} cannot be read: {error.strerror}.\nMend that.") from None


def prepare_text(data, root, files, vocab_size, say, largest_vocab):
    """A corpus of text files: split, BPE and tokens are made anew whenever a file has changed."""
    sources = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    total = sum(size for _, size, _ in sources)
    # √bytes to the nearest power of two: 4,096 for 20 MB, 32,768 for 1 GB
    vocab_size = vocab_size or min(largest_vocab, int(2 ** max(9, round(np.log2(max(1, total)) / 2))))

    def make(temporary):
        say(f"reading {len(files):,} files, {total / 1e6:,.1f} MB")
        split, sizes = choose_split(root, files)
        if not sizes.total():
            known = ".txt, .md, .py and other sources, .jsonl and .parquet with a text field, .bin shards"
            raise DataError(f"--data {data}: there is no text in it.\nKnown are {known}.")

        def texts(part):
            return (text for name, text in split_documents(root, files, split) if name == part)

        say(f"training a BPE of {vocab_size:,} tokens on {sizes['train'] / 1e6:,.1f} MB")
        encoding = train_tokenizer(texts("train"), vocab_size)
        manifest = {"split": split, "sources": [[name, size] for name, size, _ in sources]}
        manifest["tokenizer"] = save_tokenizer(encoding, temporary / "tokenizer")
        for part in ("train", "val"):
            say(f"tokenizing {sizes[part] / 1e6:,.1f} MB of the {part} split")
            manifest[part] = encode_texts(encoding, texts(part), temporary, part, say)
        return manifest

    name = Path(data).resolve().stem
    identity = fingerprint(LAYOUT, str(root.resolve()), vocab_size, SPLIT_PATTERN, sources)
    folder = cache_folder() / "corpora" / f"{name}-{identity}"
    manifest = make_once(folder, make)
    encoding = load_tokenizer(folder / "tokenizer", manifest["tokenizer"])
    corpus = Corpus(name, fingerprint(manifest), encoding, manifest["split"], spread_val=True)
    for part in ("train", "val"):
        corpus.add(folder, part, manifest[part])
    return corpus


def prepare_public(name, vocab_size, say):
    """A public data set: its validation file and its first training file."""
    repository, _, val, train = PUBLIC[name]
    folder = cache_folder() / name
    if val.endswith(".bin"):
        encoding, identity = gpt2_tokenizer(vocab_size), "gpt2"
    else:
        vocab_size = vocab_size or 32_768

        def make(temporary):
            fetch(folder / train[0], temporary, say)
            say(f"training a BPE of {vocab_size:,} tokens on {train[0]}")
            return save_tokenizer(train_tokenizer(read_documents(folder / train[0]), vocab_size), temporary)

        tokenizer = cache_folder() / "tokens" / f"{name}-tokenizer-{vocab_size}"
        identity = make_once(tokenizer, make)
        encoding = load_tokenizer(tokenizer, identity)
    corpus = Corpus(name, fingerprint(name, repository, REVISION, identity), encoding, more=list(train))
    take(corpus, "val", folder / val, say)
    take(corpus, "train", folder / corpus.more.pop(0), say)
    return corpus


def fetch_more(corpus, rows, T, say=lambda line: None):
    """
    Have a public data set hold `rows` training rows of T tokens, or all that there are: its next files are
    taken in their order, so that rows already there keep their places in epoch 0. Others stay as they are.
    """
    have = corpus.rows("train", T)
    if corpus.more and sum(have) < rows:
        files = min(len(corpus.more), math.ceil((rows - sum(have)) * len(have) / sum(have)))
        size = files * PUBLIC[corpus.name][1] / 1000
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
        if corpus.more is not None:
            fetch(path, temporary, say)
        if not ready:
            say(f"tokenizing {path.name}")
            return encode_texts(corpus.tokenizer, read_documents(path), temporary, split, say)
        say(f"checking {path.name}")
        tokens, digest = open_shard(path), sha256(path)
        if len(tokens) and tokens.max() > corpus.bos:
            raise damaged(path, f"it has a token {tokens.max():,}, and GPT-2's last is {corpus.bos:,}")
        return {"tokens": len(tokens), "shards": [{"file": path.name, "sha256": digest}]}

    corpus.add(path.parent if ready else folder, split, make_once(folder, make))


def fetch(path, temporary, say):
    """Have `path`, a file of a public data set, in the cache: whole, its header valid, or not at all."""
    if path.exists():
        return
    import huggingface_hub  # slow to import, and seldom needed

    repository, megabytes, *_ = PUBLIC[path.parent.name]
    say(f"fetching {path.name} of {repository}, about {megabytes} MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"repo_type": "dataset", "revision": REVISION, "local_dir": temporary / "fetched"}
    try:
        fetched = Path(huggingface_hub.hf_hub_download(repository, path.name, **options))  # checks the size
    except Exception as error:  # the hub lets any error of the network through
        if type(error) in (OSError, PermissionError) and error.errno:
            raise  # the disk failed
        reason = str(error.__cause__ or error).split("\n")[0].rstrip(".") or type(error).__name__
        advice = f"Put it (and those after it, for a long run) into {path.parent} by hand, {INSTEAD}"
        raise DataError(f"{path.name} of {repository} cannot be fetched: {reason}.\n{advice}") from None
    if path.suffix == ".bin":
        open_shard(fetched)
    os.rename(fetched, path)
    shutil.rmtree(temporary / "fetched")


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


def encode_held_out(encoding, texts, whole=False):
    """Texts as tokens (uint16): in pieces, as held-out text is kept, or whole, each with one bos."""
    size, split = (PIECE_CHARS, "train") if whole else (VAL_PIECE_CHARS, "val")
    return encode_pieces(encoding, cut_into_pieces(texts, size), split)


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


def describe(data):
    """Prepare a corpus and print what it holds."""
    corpus = prepare(data, say=lambda line: print(line, file=sys.stderr))
    for split, count in corpus.counts.items():
        facts = [f"{value:,} {key}" for key, value in count.items()]
        facts.append(f"{sum(corpus.rows(split, 128)):,} rows of 128")
        if "bytes" in count:
            facts.append(f"{count['bytes'] / count['tokens']:.2f} bytes per token")
        print(f"{split:6}{' · '.join(facts)}")
    print(f"split by {corpus.split} · vocabulary of {corpus.tokenizer.n_vocab:,} · {corpus.fingerprint}")
    row = next(DataLoader(corpus, 128, 1, seed=0, device="cpu"))[0]
    print(f"an example row:\n{corpus.tokenizer.decode(row.tolist())}", flush=True)


if __name__ == "__main__":
    try:
        describe(sys.argv[1] if len(sys.argv) > 1 else "stdlib")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as in `python dataloader.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
