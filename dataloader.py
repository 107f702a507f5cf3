"""
Tokens to rows: training batches in a fixed random order, and the rows of the validation text.

A row is <|bos|> and T tokens. In each epoch every token of the training split is a target once, except for
less than one row at the end of each shard. The order of the rows depends only on the corpus, the seed and T:
with any number of ranks and any batch size the same rows are read in the same order.

A corpus is any object with `name`, `fingerprint`, `bos`, `more`, `spread_val`, `token_bytes` (uint16
(n_vocab,)), `shards` ({split: list}), `rows_per_shard(split, T, first=0)` and `open_shard(split, index)`
(uint16 (tokens,), verified). `more` is None, or a list of the training files that will be added, in order.
Such a corpus also has `unique_tokens`, `next_file()` and `use_next_file()`.
"""

import codecs
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

FEW_BATCHES = 1000  # more than in a log interval: with so many at hand nobody asks for the next file


class NotEnoughText(Exception):
    """A split is too short. The message has two lines: what is wrong, and what to do."""

    exit_status = 2


# -----------------------------------------------------------------------------
# Training


class DataLoader:
    """
    Iterates over this rank's rows of each global batch: int64 (rows_per_batch / world_size, T + 1) on device.
    Inputs are [:, :-1], targets are [:, 1:]. A thread prepares two batches ahead. If the corpus has more
    files, call add_files() before each log interval, and next() for at most `batches_ready` batches.

    cursor: rows read so far by all ranks together
    epoch: passes over the training split so far, a float; at most 1, and an estimate, while files are missing
    wait_time: seconds that the training loop has waited for batches
    waiting_since: time.perf_counter() when the training loop began to wait for a file, or None

    NotEnoughText if the corpus is smaller than a batch; the corpus raises its own error for a damaged shard.
    """

    def __init__(self, corpus, T, rows_per_batch, seed, device, rank=0, world_size=1):
        if rows_per_batch % world_size:
            raise ValueError(f"{rows_per_batch} rows cannot be divided by {world_size} ranks")
        self.corpus, self.T, self.seed, self.device = corpus, T, seed, torch.device(device)
        self.rows_per_batch, self.rank, self.world_size = rows_per_batch, rank, world_size
        self.rows_per_shard = corpus.rows_per_shard("train", T)
        self.check_size()
        self.cursor, self.wait_time, self.waiting_since = 0, 0.0, None
        self.stream, self.ahead = self.batches(), deque()
        self.thread = ThreadPoolExecutor(max_workers=1)

    def check_size(self):
        """NotEnoughText if the corpus has all its files, and less than a batch."""
        if not self.corpus.more and self.rows_per_epoch < self.rows_per_batch:
            what = f"the training split has {self.rows_per_epoch} rows, and a batch has {self.rows_per_batch}"
            advice = "Provide more text, or a smaller --total-batch-size and --max-seq-len (from 32 on)."
            raise NotEnoughText(f"{what}.\n{advice}")

    @property
    def rows_per_epoch(self):
        if self.corpus.more:
            return max(self.cursor, self.corpus.unique_tokens / self.T)
        return sum(self.rows_per_shard)

    @property
    def epoch(self):
        return self.cursor / self.rows_per_epoch

    @property
    def batches_ready(self):
        """The number of batches that can be read now: all, once the corpus has all its files."""
        ready = (sum(self.rows_per_shard) - self.cursor) // self.rows_per_batch
        return max(0, ready) if self.corpus.more else math.inf

    def add_files(self, fetcher, all_gather, stop=0):
        """
        Use the files that have arrived on all ranks; if there is no batch without another file, wait for it
        for a tenth of a second -> (why it will not arrive, two lines, or None; stop, or 0). Both are the same
        on all ranks, and None and 0 if a batch is ready. This is a collective call: while files are missing
        and few batches are ready, all_gather(value) returns the values of all ranks.

        fetcher: has want(rows, is_waiting), and failure() -> two lines or None; say(line) prints
        stop: above 0 if this rank has got the signal to stop
        """
        fault, faults, stops = fetcher.failure(), (), ()
        while self.corpus.more and self.batches_ready < FEW_BATCHES:
            try:
                digest = self.corpus.next_file()
            except Exception as error:  # a damaged file of the cache: all ranks must learn of it
                digest, fault = None, str(error)
            digests, faults, stops = zip(*all_gather((digest, fault, stop)))
            if not all(digests):
                break
            if len(set(digests)) > 1:
                what = f"{self.corpus.more[0]} of {self.corpus.name} is not the same on all nodes"
                faults = (f"{what}.\nDelete it and its tokens in the caches of all nodes, and start again.",)
                break
            for line in self.corpus.use_next_file():
                fetcher.say(line)
            self.rows_per_shard += self.corpus.rows_per_shard("train", self.T, first=len(self.rows_per_shard))
            self.check_size()
        if self.batches_ready:
            return None, 0
        self.waiting_since = self.waiting_since or time.perf_counter()
        fetcher.want(self.cursor + self.rows_per_batch, is_waiting=True)
        time.sleep(0.1)
        return next(filter(None, faults), None), max(stops)

    def __iter__(self):
        return self

    def __next__(self):
        start, self.waiting_since = self.waiting_since or time.perf_counter(), None
        while len(self.ahead) < min(3, self.batches_ready):  # this batch and the two after it
            self.ahead.append(self.thread.submit(next, self.stream))
        batch = self.ahead.popleft().result()
        self.wait_time += time.perf_counter() - start
        self.cursor += self.rows_per_batch
        # only pinned memory is kept until an asynchronous copy is done
        return batch.to(self.device, non_blocking=batch.is_pinned())

    def batches(self):
        """Yield this rank's batches from the cursor on, in CPU memory."""
        can_grow, opened = self.corpus.more is not None, None
        order = row_order(self.rows_per_shard, self.seed, self.cursor, can_grow)
        count, on_gpu = self.rows_per_batch // self.world_size, self.device.type == "cuda"
        while True:
            batch = torch.empty((count, self.T + 1), dtype=torch.int64, pin_memory=on_gpu)
            rows = batch.numpy()
            rows[:, 0] = self.corpus.bos
            places = list(islice(order, self.rows_per_batch))[self.rank * count : (self.rank + 1) * count]
            for j, (shard, row) in enumerate(places):
                if shard != opened:  # only one shard is mapped at a time
                    opened, tokens = shard, self.corpus.open_shard("train", shard)
                rows[j, 1:] = tokens[row * self.T : (row + 1) * self.T]
            yield batch

    def state_dict(self):
        """The position in the global order, as plain values, valid for any world size and batch size."""
        fingerprint = self.corpus.fingerprint
        return {"cursor": self.cursor, "fingerprint": fingerprint, "T": self.T, "seed": self.seed}

    def load_state_dict(self, state):
        """Continue with the next row. ValueError if corpus, row length or seed differ."""
        for key, mine in self.state_dict().items():
            if key != "cursor" and mine != state[key]:
                raise ValueError(f"the data differs from the checkpoint's: {key} is {mine}, was {state[key]}")
        assert not self.ahead, "load the state before the first batch"
        self.cursor = state["cursor"]


def row_order(rows_per_shard, seed, cursor=0, can_grow=False):
    """
    Yield (shard, row) without end, starting at position `cursor` of the global order. In each epoch the
    shards are shuffled, and the rows within each shard. If can_grow, epoch 0 takes the shards in the order of
    the list, and others can be added to its end until the first row of epoch 1 is taken.
    """
    epoch, skip = (0, cursor) if can_grow else divmod(cursor, sum(rows_per_shard))
    while True:
        if epoch == 0 and can_grow:
            shards = (shard for shard, _ in enumerate(rows_per_shard))  # also those that are added meanwhile
        else:
            shards = shuffled(len(rows_per_shard), seed, epoch)
        for shard in shards:
            if skip < rows_per_shard[shard]:
                rows = shuffled(rows_per_shard[shard], seed, epoch, shard)
                yield from ((shard, row) for row in rows[skip:])
            skip = max(0, skip - rows_per_shard[shard])
        epochs, skip = divmod(skip, sum(rows_per_shard))
        epoch += 1 + epochs


def shuffled(n, *seed):
    """A permutation of range(n) that depends only on the seeds. numpy never changes RandomState's stream."""
    return np.random.RandomState([s % 2**32 for s in seed]).permutation(n)


# -----------------------------------------------------------------------------
# Validation


class ValidationRows:
    """
    About eval_bytes bytes of validation text as rows of T tokens, in the order of the text. The rows are the
    same for any batch size and world size; the last one is padded; len() counts them. Raises NotEnoughText.
    """

    def __init__(self, corpus, eval_bytes, T):
        self.tokens = validation_tokens(corpus, eval_bytes)
        self.T, self.bos, self.token_bytes = T, corpus.bos, corpus.token_bytes

    def __len__(self):
        return math.ceil(len(self.tokens) / self.T)

    def batches(self, batch_size, device, rank=0, world_size=1):
        """
        Yield this rank's batches (inputs, targets, bytes): two int64 tensors (batch_size, T), and the number
        of bytes of the targets. Special tokens and padding have target -1 and 0 bytes.
        """
        for start in range(rank * batch_size, len(self), world_size * batch_size):
            text = self.tokens[start * self.T : (start + batch_size) * self.T]
            padded = np.full(batch_size * self.T, self.bos, dtype=np.int64)
            padded[: len(text)] = text
            rows = np.full((batch_size, self.T + 1), self.bos, dtype=np.int64)
            rows[:, 1:] = padded.reshape(batch_size, self.T)
            lengths = self.token_bytes[rows]
            masked = torch.from_numpy(np.where(lengths > 0, rows, -1)).to(device)
            # slices of tensors on the device, as in training: the same strides, so the same compiled graph
            yield torch.from_numpy(rows).to(device)[:, :-1], masked[:, 1:], int(lengths.sum(dtype=np.int64))

    def beginnings(self, count, prompt_length, more):
        """
        At most `count` beginnings of documents from all over the text, to sample from -> [(prompt, ids that
        follow it)]: a list of prompt_length ids that starts with bos, and a list of `more` ids. If all
        documents are shorter, the beginning of the text.
        """
        length = prompt_length + more
        starts = np.flatnonzero(self.tokens == self.bos)
        starts = starts[np.diff(starts, append=len(self.tokens)) >= length]
        starts = starts[:: max(1, len(starts) // count)][:count]
        texts = [self.tokens[start : start + length].tolist() for start in starts]
        if not texts:
            text = self.tokens[:length].tolist()
            texts = [text if text[0] == self.bos else [self.bos, *text[:-1]]]
        return [(text[:prompt_length], text[prompt_length:]) for text in texts]


def sample_texts(tokenizer, prompt, *continuations):
    """
    Decode the ids of a prompt, and of texts that continue it -> their strings. A token may end inside a
    character: the first bytes of such a character count to the continuations, and at their end are left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.decode_bytes(prompt))]
    incomplete = decoder.getstate()
    for ids in continuations:
        decoder.setstate(incomplete)
        texts.append(decoder.decode(tokenizer.decode_bytes(ids)))
    return texts


def validation_tokens(corpus, eval_bytes):
    """
    The text that evaluations read, uint16 (tokens,): about eval_bytes bytes, or the whole validation split.
    Which bytes depends only on the corpus, so that models with any vocabulary and row length can be compared:
    documents from all over the split, or its beginning (.bin shards, public data sets). Raises NotEnoughText.
    """
    parts, size, num_documents = [], 0, 0
    for tokens in validation_blocks(corpus):
        if corpus.spread_val:
            size += int(corpus.token_bytes[tokens].sum(dtype=np.int64))
            num_documents += np.count_nonzero(tokens == corpus.bos)
        else:
            ends = size + np.cumsum(corpus.token_bytes[tokens], dtype=np.int64)
            parts.append(tokens[: np.searchsorted(ends, eval_bytes) + 1])
            size = ends[-1]
            if size >= eval_bytes:
                break
    if num_documents:
        count = min(num_documents, math.ceil(eval_bytes * num_documents / size))
        chosen, seen = np.zeros(num_documents, dtype=bool), 0
        chosen[np.arange(count) * num_documents // count] = True
        for tokens in validation_blocks(corpus):
            document = seen + np.cumsum(tokens == corpus.bos) - 1  # of each token
            parts.append(tokens[chosen[document]])
            seen = document[-1] + 1
    if not parts:
        advice = 'Provide more text, or a file with "val" in its name.'
        raise NotEnoughText(f"{corpus.name} has no validation text.\n{advice}")
    return np.concatenate(parts)


def validation_blocks(corpus, block=2**20):
    """Yield the tokens of the validation split in blocks, uint16 (at most `block`,)."""
    for index in range(len(corpus.shards["val"])):
        tokens = corpus.open_shard("val", index)
        for start in range(0, len(tokens), block):
            yield tokens[start : start + block]
