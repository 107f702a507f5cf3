"""
The data: text to tokens to rows, every token used once an epoch, in an order that does not know how many
processes read it.

A corpus is prepared once: documents found and split, a BPE trained on the training split (rustbpe), all of it
encoded by all cores (tiktoken), and kept in a cache folder as uint16 shards in the public GPT-2 layout.
`python dataloader.py PATH` prepares a corpus and says what it found.
"""

import base64
import hashlib
import json
import os
import queue
import re
import shutil
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import rustbpe
import tiktoken
import torch

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256  # the header of the public GPT-2-tokenized FineWeb shards
SHARD_TOKENS = 100_000_000
BOS = "<|bos|>"
# GPT-4's split pattern, but numbers of at most 2 digits: that suits vocabularies far below 100,000 (nanochat)
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
SPLIT_PATTERN += r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
PIECE_CHARS = (
    2**17
)  # longer documents are encoded in pieces: the regex engine fails on a million blanks in a row
TOKENIZER_CHARS = 2_000_000_000  # text that the BPE is trained on, at most
VAL_SHARE = 0.05
TEXT_SUFFIXES = set(
    ".txt .text .md .rst .org .tex .adoc .bib .log .csv .tsv .json .xml .html .htm .css .yaml .yml .toml "
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .pl .sh .bash .sql "
    ".swift .kt .scala .hs .ml .lua .r .jl .m .lisp .el .clj .ex .erl .f90 .cs .vb .dart .zig .nim .proto".split()
)


class DataError(Exception):
    """Something about the data that a person must mend; the message says what, with which value, and how."""


def cache_folder():
    """Where prepared corpora live: $ONEDIAL_HOME, or ~/.cache/onedial."""
    return Path(os.environ.get("ONEDIAL_HOME") or "~/.cache/onedial").expanduser()


# -----------------------------------------------------------------------------
# The tokenizer: a tiktoken Encoding, kept as plain text


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE of vocab_size tokens, the last of them <|bos|>, on an iterable of strings."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return tiktoken.Encoding(
        "onedial", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={BOS: len(ranks)}
    )


def save_tokenizer(encoding, folder):
    """Write tokenizer.tiktoken (base64 token and rank on a line) and tokenizer.json (pattern, specials)."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    with open(folder / "tokenizer.tiktoken", "wb") as file:
        for token in range(encoding.n_vocab):
            if token not in special.values():
                file.write(base64.b64encode(encoding.decode_single_token_bytes(token)) + b" %d\n" % token)
    pattern = {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(pattern, indent=2))


def load_tokenizer(folder):
    """Read what save_tokenizer wrote."""
    meta = json.loads((folder / "tokenizer.json").read_text())
    lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding(
        meta["name"], pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=meta["special_tokens"]
    )


def gpt2_tokenizer():
    """GPT-2's vocabulary: from the cache folder's gpt2/ if put there by hand, else fetched by tiktoken."""
    folder = cache_folder() / "gpt2"
    try:
        if (folder / "vocab.bpe").exists() and (folder / "encoder.json").exists():
            ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
                str(folder / "vocab.bpe"), str(folder / "encoder.json")
            )
            pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
            special = {"<|endoftext|>": 50256}
            return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets any network error through
        raise DataError(
            f"GPT-2's vocabulary is neither in {folder} nor to be fetched ({type(error).__name__}).\n"
            f"Put vocab.bpe and encoder.json of GPT-2 into {folder}, or train on --data stdlib or a path."
        ) from None


def bytes_per_token(encoding):
    """int64 array (n_vocab,): the number of bytes that each token stands for, 0 for special tokens."""
    special = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    lengths = [
        0 if token in special else len(encoding.decode_single_token_bytes(token))
        for token in range(encoding.n_vocab)
    ]
    return np.array(lengths, dtype=np.int64)


# -----------------------------------------------------------------------------
# Documents: find them, read them, split them


def find_files(data):
    """`stdlib` or a path -> (root, its text files in a fixed order)."""
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "__pycache__"}
        return root, sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
    root = Path(data).expanduser()
    if not root.exists():
        raise DataError(
            f"--data {data}: there is no such file or folder.\n"
            "Give a text file, a folder of text, or one of: stdlib, fineweb."
        )
    if root.is_file():
        return root.parent, [root]
    suffixes = TEXT_SUFFIXES | {".jsonl", ".parquet"}
    hidden = lambda f: any(part.startswith(".") for part in f.relative_to(root).parts)  # noqa: E731
    return root, sorted(
        f for f in root.rglob("*") if f.suffix.lower() in suffixes and f.is_file() and not hidden(f)
    )


def read_documents(file):
    """Yield (share of the file that came before, text) for each document of a file; text is never empty."""
    if file.suffix == ".jsonl":
        size, place = file.stat().st_size, 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        text = json.loads(line.decode("utf-8", "replace"))["text"]
                    except (ValueError, KeyError, TypeError):
                        raise DataError(
                            f'{file}, line {number}: no JSON object with a "text" field.'
                        ) from None
                    if text:
                        yield place / size, text
                place += len(line)
    elif file.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise DataError(
                f'{file}: reading parquet needs pyarrow: pip install "onedial[parquet]"'
            ) from None
        table = parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise DataError(f'{file}: there is no "text" column, only {", ".join(table.schema_arrow.names)}.')
        number, count = 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield number / count, text
                number += 1
    else:
        content = file.read_bytes()
        if content and b"\0" not in content[:8192]:  # a NUL byte: not text
            yield 0.0, content.decode("utf-8", "replace")


def split_documents(root, files, split):
    """
    Yield ("train" or "val", text) over all documents. `split` decides: "files": by the word val in name or
    folder; "hash": 5% of the documents by content, so that adding files moves none; "tail": each file's end.
    """
    for file in files:
        named_val = bool(re.search(r"(?<![a-z])val(?![a-z])", str(file.relative_to(root)).lower()))
        for place, text in read_documents(file):
            if split == "files":
                yield ("val" if named_val else "train"), text
            elif split == "hash":
                digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
                yield ("val" if int.from_bytes(digest[:4], "big") < VAL_SHARE * 2**32 else "train"), text
            elif file.suffix in (".jsonl", ".parquet"):
                yield ("val" if place >= 1 - VAL_SHARE else "train"), text
            else:
                cut = int(len(text) * (1 - VAL_SHARE))
                cut = text.rfind("\n", 0, cut) + 1 or cut
                yield from (
                    (name, part) for name, part in (("train", text[:cut]), ("val", text[cut:])) if part
                )


def choose_split(root, files):
    """-> (split, {"train": bytes, "val": bytes} of UTF-8 text), trying files, then hash, then tail."""
    for split in ("files", "hash", "tail"):
        sizes = {"train": 0, "val": 0}
        for name, text in split_documents(root, files, split):
            sizes[name] += len(text.encode("utf-8", "replace"))
        share = sizes["val"] / max(1, sum(sizes.values()))
        if (split == "files" and 0 < share < 1) or (split == "hash" and 0.01 <= share <= 0.20):
            break
    return split, sizes


# -----------------------------------------------------------------------------
# Tokens on disk


def write_shard(path, tokens):
    """Write uint16 tokens behind the public header -> the shard's entry in the manifest."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    content = header.tobytes() + tokens.astype("<u2").tobytes()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"file": path.name, "tokens": len(tokens), "sha256": hashlib.sha256(content).hexdigest()}


def open_shard(path, sha256=None):
    """Memory-map a shard's tokens (uint16), after checking header, size and, if given, its sha256."""
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
            raise DataError(f"{path} is no token shard: its first numbers are {header[:3].tolist()}.")
        expected = 4 * HEADER_INTS + 2 * int(header[2])
        if path.stat().st_size != expected:
            raise DataError(
                f"{path} is damaged: {path.stat().st_size:,} bytes instead of {expected:,}.\nDelete it."
            )
        if sha256:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise DataError(
                        f"{path} is damaged: its sha256 has changed.\nDelete its folder; it is made anew."
                    )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(int(header[2]),))


def encode_documents(encoding, documents, folder, total_bytes, say):
    """Encode ("train" or "val", text) documents with all cores into shards -> the manifest's entries."""
    bos = encoding.encode_single_token(BOS)
    counts = {name: {"documents": 0, "bytes": 0, "tokens": 0} for name in ("train", "val")}
    waiting, shards = {"train": [], "val": []}, {"train": [], "val": []}

    def encode(piece):
        return encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16)

    def flush(name, final):
        while waiting[name] and (final or sum(map(len, waiting[name])) >= SHARD_TOKENS):
            tokens = np.concatenate(waiting[name])
            path = folder / f"{name}_{len(shards[name]):06d}.bin"
            shards[name].append(write_shard(path, tokens[:SHARD_TOKENS]))
            waiting[name] = [tokens[SHARD_TOKENS:]] if len(tokens) > SHARD_TOKENS else []

    def encode_block(pool, block):
        pieces = [(name, start, p) for name, text in block for start, p in cut_into_pieces(text)]
        for (name, start, piece), tokens in zip(pieces, pool.map(encode, (p for _, _, p in pieces))):
            waiting[name] += [np.array([bos], dtype=np.uint16), tokens] if start else [tokens]
            counts[name]["documents"] += start
            counts[name]["bytes"] += len(piece.encode("utf-8", "replace"))
            counts[name]["tokens"] += len(tokens) + start
        for name in waiting:
            flush(name, final=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken releases the GIL
        block, size, said = [], 0, time.monotonic()
        for name, text in documents:
            block.append((name, text))
            size += len(text)
            if size > 2**24:
                encode_block(pool, block)
                block, size = [], 0
                if time.monotonic() - said > 2:
                    said = time.monotonic()
                    done = sum(count["bytes"] for count in counts.values())
                    say(f"tokenizing {done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB")
        encode_block(pool, block)
    for name in waiting:
        flush(name, final=True)
    return {"counts": counts, "shards": shards}


def cut_into_pieces(text):
    """Yield (is it the first, piece): at most PIECE_CHARS each, cut after a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start == 0, text[start:end]
        start = end


@dataclass
class Corpus:
    """
    A tokenized corpus. fingerprint: names its content; shards: {"train" or "val": [(path, sha256 or None)]};
    bos: the token that starts each document and each row; spread_val: take validation rows from all over.
    """

    name: str
    fingerprint: str
    tokenizer: tiktoken.Encoding
    bos: int
    shards: dict
    counts: dict
    split: str
    spread_val: bool


def prepare(data, vocab_size=None, say=lambda line: None):
    """
    Find, split, tokenize and cache the text of `data` ("stdlib", "fineweb" or a path) -> a Corpus. The work
    is done once, under a file lock, by whichever process comes first; the others wait. Raises DataError.
    """
    path = Path(data).expanduser()
    shards = [path] if path.suffix == ".bin" else sorted(path.glob("*.bin")) if path.is_dir() else []
    if data == "fineweb" or shards:
        return ready_made(data, shards)
    root, files = find_files(data)
    stats = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if not sum(size for _, size, _ in stats):
        raise DataError(
            f"--data {data}: there is no text in it.\n"
            "Known are .txt, .md, .py and other sources, .jsonl and .parquet with a text field, .bin shards."
        )
    identity = json.dumps(
        [1, data if data == "stdlib" else str(root.resolve()), vocab_size, SPLIT_PATTERN, stats]
    )
    name = f"{Path(data).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder = cache_folder() / "corpora" / name
    if not (folder / "manifest.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_name(f"{name}.lock")):
                if not (folder / "manifest.json").exists():
                    build(folder, root, files, vocab_size, say)
        except OSError as error:
            raise DataError(
                f"the corpus cannot be written to {folder.parent}: {error.strerror}.\n"
                "Make room there or set ONEDIAL_HOME to another folder."
            ) from None
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    shards = {
        split: [(folder / s["file"], s["sha256"]) for s in manifest["shards"][split]]
        for split in ("train", "val")
    }
    encoding = load_tokenizer(folder / "tokenizer")
    return Corpus(
        name=Path(data).name,
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:12],
        tokenizer=encoding,
        bos=encoding.encode_single_token(BOS),
        shards=shards,
        counts=manifest["counts"],
        split=manifest["split"],
        spread_val=True,
    )


def build(folder, root, files, vocab_size, say):
    """Make the corpus under a temporary name and rename it, so that a kill leaves nothing half-made."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    say(f"reading {len(files):,} files")
    split, sizes = choose_split(root, files)
    if vocab_size is None:  # √bytes to the nearest power of two: 4,096 for 20 MB, 32,768 for 1 GB
        vocab_size = 2 ** min(15, max(9, round(np.log2(max(1, sizes["train"])) / 2)))
    say(f"training a BPE of {vocab_size:,} tokens on {sizes['train'] / 1e6:,.1f} MB")

    def training_texts():
        chars = 0
        for name, text in split_documents(root, files, split):
            if name == "train" and chars < TOKENIZER_CHARS:
                chars += len(text)
                yield text

    encoding = train_tokenizer(training_texts(), vocab_size)
    save_tokenizer(encoding, temporary / "tokenizer")
    say(f"tokenizing {sum(sizes.values()) / 1e6:,.1f} MB")
    manifest = encode_documents(
        encoding, split_documents(root, files, split), temporary, sum(sizes.values()), say
    )
    manifest = {"format": 1, "split": split, "files": len(files), "vocab_size": encoding.n_vocab, **manifest}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def ready_made(data, shards):
    """A Corpus of .bin shards in the public GPT-2 format: the given ones, or FineWeb's in the cache."""
    if data == "fineweb":
        folder = cache_folder() / "fineweb"
        shards = sorted(folder.glob("fineweb_*.bin"))
        if not shards:
            raise DataError(
                f"the FineWeb shards are not in {folder}.\n"
                "Put fineweb_val_000000.bin and fineweb_train_000001.bin … of the public data set "
                "kjj0/fineweb10B-gpt2 there, or train on --data stdlib or a path."
            )
    split = {"train": [], "val": []}
    for shard in shards:
        split["val" if re.search(r"(?<![a-z])val(?![a-z])", shard.name.lower()) else "train"].append(
            (shard, None)
        )
    for name in split:
        if not split[name]:
            raise DataError(
                f"--data {data}: no .bin shard for the {name} split ({name} must stand in its name)."
            )
    encoding = gpt2_tokenizer()
    counts = {name: {"tokens": sum(len(open_shard(path)) for path, _ in split[name])} for name in split}
    identity = (
        "fineweb10B-gpt2" if data == "fineweb" else json.dumps([(s.name, s.stat().st_size) for s in shards])
    )
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Corpus(Path(data).name, fingerprint, encoding, encoding.eot_token, split, counts, "files", False)


# -----------------------------------------------------------------------------
# Rows and their order


def shuffled(n, *seed):
    """A permutation of range(n) that depends on the seeds alone; RandomState's stream is frozen for good."""
    return np.random.RandomState([s % 2**32 for s in seed]).permutation(n)


class RowOrder:
    """
    The global order of rows: shards follow one another in an order drawn from seed and epoch, the rows of
    each are shuffled likewise. locate(i): (shard, row) of the i-th row that training sees, over all epochs.
    """

    def __init__(self, rows_per_shard, seed):
        self.rows_per_shard, self.seed = rows_per_shard, seed
        self.rows_per_epoch = sum(rows_per_shard)
        self.epoch = self.shard = None

    def locate(self, i):
        epoch, place = divmod(i, self.rows_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.shard = epoch, None
            self.shard_order = shuffled(len(self.rows_per_shard), self.seed, epoch)
            self.ends = np.cumsum([self.rows_per_shard[s] for s in self.shard_order])
        position = int(np.searchsorted(self.ends, place, side="right"))
        shard = int(self.shard_order[position])
        if shard != self.shard:
            self.shard, self.row_order = shard, shuffled(self.rows_per_shard[shard], self.seed, epoch, shard)
        return shard, int(self.row_order[place - (self.ends[position] - self.rows_per_shard[shard])])


class DataLoader:
    """
    Iterate over this rank's rows of each global batch: int64 tensors (rows_per_batch / world_size, T + 1) on
    `device`, inputs in [:, :-1] and targets in [:, 1:]. A thread stays two batches ahead. wait_time: seconds
    that the loop has waited. Raises DataError for a damaged shard, ValueError for rows that do not divide.
    """

    def __init__(self, corpus, T, rows_per_batch, seed, device, rank=0, world_size=1, threaded=True):
        if rows_per_batch % world_size:
            raise ValueError(f"{rows_per_batch} rows do not divide by {world_size} ranks")
        self.corpus, self.T, self.seed, self.device = corpus, T, seed, torch.device(device)
        self.rows_per_batch, self.world_size, self.rank, self.threaded = (
            rows_per_batch,
            world_size,
            rank,
            threaded,
        )
        self.paths = corpus.shards["train"]
        self.order = RowOrder([len(open_shard(path)) // T for path, _ in self.paths], seed)
        if self.order.rows_per_epoch < 1:
            raise DataError(f"the training split has fewer than {T} tokens: no row of --max-seq-len {T}.")
        self.open = {}  # shard -> its tokens; the checksum is verified when a shard is opened
        self.cursor = self.produced = 0
        self.wait_time = 0.0
        self.queue = self.thread = None

    @property
    def epoch(self):
        """Passes over the training split so far, a fraction."""
        return self.cursor / self.order.rows_per_epoch

    def make_batch(self, cursor):
        count = self.rows_per_batch // self.world_size
        batch = torch.empty(count, self.T + 1, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        rows = batch.numpy()
        rows[:, 0] = self.corpus.bos
        for j in range(count):
            shard, row = self.order.locate(cursor + self.rank * count + j)
            if shard not in self.open:
                self.open[shard] = open_shard(*self.paths[shard])
            rows[j, 1:] = self.open[shard][row * self.T : (row + 1) * self.T]
        return batch

    def produce(self):
        try:
            while True:
                self.queue.put(self.make_batch(self.produced))
                self.produced += self.rows_per_batch
        except Exception as error:  # raised where the batch is asked for
            self.queue.put(error)

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        if not self.threaded:
            batch = self.make_batch(self.cursor)
        else:
            if self.thread is None:
                self.queue, self.produced = queue.Queue(maxsize=2), self.cursor
                self.thread = threading.Thread(target=self.produce, daemon=True)
                self.thread.start()
            batch = self.queue.get()
            if isinstance(batch, Exception):
                raise batch
        self.wait_time += time.perf_counter() - start
        self.cursor += self.rows_per_batch
        return batch.to(self.device, non_blocking=True)

    def state_dict(self):
        """The place in the global order, a few plain values that hold for any world size and batch size."""
        return {"cursor": self.cursor, "fingerprint": self.corpus.fingerprint, "T": self.T, "seed": self.seed}

    def load_state_dict(self, state):
        """Go on with exactly the next row; ValueError names a corpus, row length or seed that differs."""
        mine = {**self.state_dict(), "cursor": state["cursor"]}
        for key in ("fingerprint", "T", "seed"):
            if mine[key] != state[key]:
                raise ValueError(
                    f"the data differs from the checkpoint's: {key} is {mine[key]}, was {state[key]}"
                )
        assert self.thread is None, "load before the first batch"
        self.cursor = state["cursor"]


class ValidationRows:
    """
    A fixed, ordered set of rows of the validation split, at most eval_tokens targets (but one row), the same
    for any batch size and world size.
    """

    def __init__(self, corpus, T, eval_tokens):
        self.corpus, self.T = corpus, T
        self.token_bytes = bytes_per_token(corpus.tokenizer)
        self.shards = [open_shard(path, sha256) for path, sha256 in corpus.shards["val"]]
        places = [(s, row) for s, shard in enumerate(self.shards) for row in range(len(shard) // T)]
        if not places:
            raise DataError(f"the validation split has fewer than {T} tokens: no row of --max-seq-len {T}.")
        count = min(len(places), max(1, eval_tokens // T))
        self.places = [places[k * len(places) // count if corpus.spread_val else k] for k in range(count)]

    def prompt(self, length):
        """The bos and first tokens of the first validation row, a list of ids to sample from."""
        shard, row = self.places[0]
        return [self.corpus.bos, *self.shards[shard][row * self.T :][: length - 1].tolist()]

    def batches(self, batch_size, device, rank=0, world_size=1):
        """
        Yield (tokens, targets, number of bytes) for this rank's batches: two int64 tensors (batch_size, T),
        special tokens and the last batch's padding with target -1, and the bytes of the other targets.
        """
        for start in range(rank * batch_size, len(self.places), world_size * batch_size):
            rows = np.zeros((batch_size, self.T + 1), dtype=np.int64)
            rows[:, 0] = self.corpus.bos
            targets = np.full((batch_size, self.T), -1, dtype=np.int64)
            for j, (shard, row) in enumerate(self.places[start : start + batch_size]):
                targets[j] = rows[j, 1:] = self.shards[shard][row * self.T : (row + 1) * self.T]
            lengths = np.where(targets >= 0, self.token_bytes[targets], 0)
            targets[lengths == 0] = -1
            yield (
                torch.from_numpy(rows[:, :-1]).to(device),
                torch.from_numpy(targets).to(device),
                int(lengths.sum()),
            )


if __name__ == "__main__":
    try:
        corpus = prepare(sys.argv[1] if len(sys.argv) > 1 else "stdlib", say=lambda line: print(f"  {line}"))
    except DataError as error:
        sys.exit(f"{error}")
    for split in ("train", "val"):
        count = corpus.counts[split]
        print(f"{split:6}" + " · ".join(f"{value:,} {key}" for key, value in count.items()), end="")
        print(f" · {count['bytes'] / count['tokens']:.2f} bytes per token" if "bytes" in count else "")
    print(f"split by {corpus.split} · {corpus.tokenizer.n_vocab:,} tokens · fingerprint {corpus.fingerprint}")
    row = next(DataLoader(corpus, 128, 1, seed=0, device="cpu", threaded=False))[0].tolist()
    print(f"an example row of 128 tokens:\n{corpus.tokenizer.decode(row)}")
