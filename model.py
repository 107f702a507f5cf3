"""
The GPT: rows of tokens in, the sum of nats out.

What differs from GPT-2, each with its source: rotary positions (arXiv 2104.09864), RMSNorm without weights
(arXiv 1910.07467), QK-norm (arXiv 2302.08435), ReLU² (arXiv 2109.08668), an untied head with soft-capped
logits (arXiv 2408.00118), keys that look back (arXiv 2209.11895), value embeddings, residual scalars, smear,
backout (modded-nanogpt, nanochat).

`python model.py out/RUN "def main("` writes a continuation, `--score FILE` prints the bits per byte of a
text, `--export DIR` makes a folder for Hugging Face's transformers.
"""

import codecs
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROPE_BASE = 100_000
SOFTCAP = 15.0  # logits are bounded to ±15; anything from 10 to 30 works about as well
QK_SCALE = 1.2  # sharpens the normed queries and keys, each
VALUE_GATE_CHANNELS = 12  # the gates read only the first channels of the stream: nearly free, and enough
SMEAR_GATE_CHANNELS = 24
# cuDNN makes a plan for each new length, which generation would wait for
GENERATION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CPU_BLOCK, CPU_LENGTH = 128, 1024  # queries at a time in blocked_attention, and the longest rows it is for


@dataclass
class GPTConfig:
    """The shape of a GPT, in integers; n_embd is n_head times an even head_dim."""

    vocab_size: int = 4096
    max_seq_len: int = 512  # T, the longest row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256  # C, the width
    n_look_back: int = 0  # heads whose keys look back; none in runs of before they did

    @classmethod
    def of_depth(cls, depth, vocab_size, max_seq_len, aspect_ratio=None, head_dim=None):
        """
        The shape that follows from depth: a width of depth · aspect_ratio, rounded up to whole heads. Depth 4
        -> 4 heads of 64, width 256; depth 12 -> 6 heads of 128, width 768; but depth 1 -> 2 heads of 64, as
        depth 2. ValueError for what cannot be.
        """
        aspect_ratio = aspect_ratio or (128 if depth == 1 else 64)
        head_dim = head_dim or (128 if depth >= 8 else 64)
        n_head = math.ceil(depth * aspect_ratio / head_dim)
        if head_dim % 2:
            what = f"--head-dim {head_dim}: rotary positions turn pairs of channels"
            raise ValueError(f"{what}.\nGive an even number.")
        if n_head * head_dim < 32:
            what = f"depth {depth} and the other settings make a width of {n_head * head_dim}"
            raise ValueError(f"{what}.\nThe least is 32.")
        return cls(vocab_size, max_seq_len, depth, n_head, n_head * head_dim, n_head // 2)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self):
        return -(-self.vocab_size // 64) * 64  # tensor cores want multiples of 64


def norm(x):
    """RMSNorm over the last dimension, without weights, in fp32 inside (arXiv 1910.07467)."""
    return RMSNorm.apply(x)


class Linear(nn.Linear):
    """A bias-free linear layer that casts its fp32 weight to the activations' dtype: no autocast needed."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotary_tables(length, head_dim, device):
    """cos and sin of arXiv 2104.09864 with base 100,000: two fp32 tensors (length, 1, head_dim / 2)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rotary(x, cos, sin):
    """Rotate the half-split pairs of x (B, T, n_head, head_dim) by their position's angles, in x's dtype."""
    halves = x.unflatten(-1, (2, -1))  # (B, T, n_head, 2, head_dim / 2)
    cos, sin = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)
    # one expression and no `cat`, so that it is fused with the norm of q and k
    return (halves * cos + halves.flip(-2) * torch.stack([sin, -sin], dim=-2)).flatten(-2)


def look_back(k, n):
    """
    The first n heads get the key of the token before, 0 at the start of a row. k and the result:
    (B, T, n_head, head_dim). So one layer can look up what followed the same token earlier in a row; else it
    takes two, which find each other after some 2 million tokens (arXiv 2209.11895, "smeared key").
    """
    before = F.pad(k[:, :-1, :n], (0, 0, 0, 0, 1, 0))
    return torch.cat([before, k[:, :, n:]], dim=2)


class RotaryAttention(nn.Module):
    """Keys look back, queries and keys get their positions and are normed; then attention. No weights."""

    def __init__(self, n_look_back):
        super().__init__()
        self.n_look_back = n_look_back

    def forward(self, q, k, v, cos, sin):
        k = look_back(k, self.n_look_back)
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        return causal_attention(q, k, v)  # (B, T, n_head, head_dim)


class CachedAttention:
    """
    What RotaryAttention does, for a layer that reads its rows piece by piece, first several tokens and then
    one at a time: the keys and values of the earlier pieces are kept. Of `rows` rows, on a device.
    """

    def __init__(self, config, rows, dtype, device):
        shape = (rows, config.max_seq_len, config.n_head, config.head_dim)
        self.n_look_back, self.length = config.n_look_back, 0
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.last_key = torch.zeros_like(self.keys[:, :1])  # as it was before look_back and positions

    def __call__(self, q, k, v, cos, sin):
        start, end = self.length, self.length + q.size(1)
        with_last = torch.cat([self.last_key, k], dim=1)
        self.last_key, self.length = k[:, -1:], end
        k = look_back(with_last, self.n_look_back)[:, 1:]
        q, k = norm(apply_rotary(torch.stack([q, k]), cos, sin))  # in one go: its few tokens cost nothing
        self.keys[:, start:end], self.values[:, start:end] = k, v
        return causal_attention(q, self.keys[:, :end], self.values[:, :end])  # (B, T, n_head, head_dim)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, has_value_embedding):
        super().__init__()
        self.n_head = config.n_head
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.n_embd)
        self.c_v = Linear(config.n_embd, config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.value_gate = Linear(VALUE_GATE_CHANNELS, config.n_head) if has_value_embedding else None

    def forward(self, x, value_embedding, cos, sin, attention):
        B, T, C = x.shape
        y = norm(x)
        q, k, v = (c(y).view(B, T, self.n_head, -1) for c in (self.c_q, self.c_k, self.c_v))
        if self.value_gate is not None:
            gate = 3 * torch.sigmoid(self.value_gate(y[..., :VALUE_GATE_CHANNELS]))  # (B, T, n_head)
            v = v + gate[..., None] * value_embedding.view_as(v)
        return x + self.c_proj(attention(q, k, v, cos, sin).reshape(B, T, C))


def causal_attention(q, k, v):
    """
    Each position attends to itself and to what came before, with normed q and k and scale 1.2² / √head_dim.
    q, k, v and the result: (B, T, n_head, head_dim), one dtype. Of q there may be the last position alone.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, head_dim)
    scale = QK_SCALE**2 / math.sqrt(q.size(-1))
    if q.device.type == "cpu" and torch.compiler.is_compiling() and q.size(2) <= CPU_LENGTH:
        y = blocked_attention(q, k, v, scale)
    else:  # by cuDNN on Hopper, by flash attention on other cards: PyTorch knows which is faster
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, scale=scale)
    return y.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return x + self.c_proj(ReluSquared.apply(self.c_fc(norm(x))))


class Block(nn.Module):
    def __init__(self, config, has_value_embedding):
        super().__init__()
        self.attn = CausalSelfAttention(config, has_value_embedding)
        self.mlp = MLP(config)

    def forward(self, x, x0, lambdas, tokens, value_table, cos, sin, attention):
        x = lambdas[0] * x + lambdas[1] * x0  # the stream and the embedding
        values = F.embedding(tokens, value_table).to(x.dtype) if value_table is not None else None
        return self.mlp(self.attn(x, values, cos, sin, attention))


class Head(Linear):
    """
    The untied head: the last norm, and fp32 logits bounded to ±SOFTCAP (arXiv 2408.00118, section 2), or
    with targets the sum of their losses, made in chunks where a batch has more than `max_logits` logits.
    """

    def __init__(self, config, max_logits):
        super().__init__(config.n_embd, config.padded_vocab_size)
        self.vocab_size, self.max_logits = config.vocab_size, max_logits

    def chunks(self, tokens):
        """In how many chunks the loss of so many tokens is made, a power of two; 8 at most but on a CPU."""
        chunks = 2 ** max(0, math.ceil(math.log2(tokens * self.out_features / self.max_logits)))
        # of 16 chunks seven's gradients wait for the end in Inductor's plan for an H100: 5 GB more
        return chunks if self.weight.device.type == "cpu" else min(8, chunks)

    def forward(self, x, targets=None):
        x = norm(x)  # (B, T, C)
        chunks = self.chunks(targets.numel()) if targets is not None else 1
        if chunks > 1:
            rows, training = x.flatten(0, 1), torch.is_grad_enabled()
            arguments = targets.flatten(), self.vocab_size, chunks, training
            return ChunkedCrossEntropy.apply(rows, self.weight, *arguments)
        logits = softcap(super().forward(x)[..., : self.vocab_size].float())
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def softcap(logits):
    """Bound fp32 logits smoothly to ±SOFTCAP (arXiv 2408.00118, section 2)."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


class GPT(nn.Module):
    """
    A decoder-only transformer; build it under `torch.device("meta")`, then call `init_weights(device, seed)`.
    Parameters are fp32; activations have `compute_dtype`; the loss is computed in fp32, of at most
    `max_logits` logits at a time.
    """

    def __init__(self, config, compute_dtype=torch.float32, max_logits=2**29):
        super().__init__()
        self.config = config
        self.compute_dtype, self.has_compiled_parts = compute_dtype, False
        # every second layer, counted from the last, mixes a second embedding of the token into its values
        value_layers = range((config.n_layer - 1) % 2, config.n_layer, 2)

        def table():  # a plain nn.Embedding draws values, which imports the compiler on the meta device
            values = torch.empty(config.padded_vocab_size, config.n_embd)
            return nn.Embedding.from_pretrained(values, freeze=False)

        self.embedding = table()
        self.value_embeddings = nn.ModuleDict({str(i): table() for i in value_layers})
        self.blocks = nn.ModuleList(Block(config, i in value_layers) for i in range(config.n_layer))
        self.attention = RotaryAttention(config.n_look_back)  # of all layers
        self.head = Head(config, max_logits)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))  # weight of the stream, per layer
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))  # weight of the embedding, per layer
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        for name in ("cos", "sin"):
            angles = torch.empty(config.max_seq_len, 1, config.head_dim // 2)
            self.register_buffer(name, angles, persistent=False)

    @torch.no_grad()
    def init_weights(self, device, seed):
        """Allocate on `device` if still on meta, and draw every weight from `seed` alone."""
        if self.head.weight.is_meta:
            self.to_empty(device=device)
        self.cos, self.sin = rotary_tables(self.config.max_seq_len, self.config.head_dim, device)
        generator = torch.Generator(device=device).manual_seed(seed)
        # bounds of uniform distributions: √3 times the standard deviation, without a normal's outliers
        bound = math.sqrt(3 / self.config.n_embd)
        self.embedding.weight.normal_(0, 0.8, generator=generator)
        self.head.weight.normal_(0, 0.001, generator=generator)
        for table in self.value_embeddings.values():
            table.weight.uniform_(-bound, bound, generator=generator)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound, generator=generator)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            block.attn.c_proj.weight.zero_()  # every block starts as the identity
            block.mlp.c_proj.weight.zero_()
            if block.attn.value_gate is not None:
                block.attn.value_gate.weight.uniform_(0, 0.02, generator=generator)
        depth = torch.linspace(0, 1, self.config.n_layer, device=device)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        self.smear_gate.weight.uniform_(0, 0.02, generator=generator)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    def forward(self, tokens, targets=None):
        """
        tokens: (B, T) integers, T ≤ max_seq_len. Without targets: fp32 logits (B, T, vocab_size).
        With targets (B, T), int64: the sum of -ln p over targets ≥ 0, in nats, a 0-D fp32 tensor.
        """
        T, attentions = tokens.size(1), [self.attention] * self.config.n_layer
        x = self.run_blocks(self.embed(tokens), tokens, self.cos[:T], self.sin[:T], attentions)
        return self.head(x, targets)

    def embed(self, tokens):
        """(B, T) integers -> what enters the blocks, (B, T, C) in the compute dtype."""
        x = norm(self.embedding(tokens).to(self.compute_dtype))
        smear = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_GATE_CHANNELS]))
        return torch.cat([x[:, :1], x[:, 1:] + smear * x[:, :-1]], dim=1)  # a little of the previous token

    def run_blocks(self, x, tokens, cos, sin, attentions):
        """From what `embed` made of tokens to what the head reads, (B, T, C); an attention for each layer."""
        x0 = x.view_as(x)  # of one tensor, given twice, the compiler would make a case of its own
        lambdas = torch.stack([self.resid_lambdas, self.x0_lambdas], dim=1).to(x.dtype).unbind()
        for i, (block, attention) in enumerate(zip(self.blocks, attentions)):
            value_table = self.value_embeddings[str(i)].weight if str(i) in self.value_embeddings else None
            x = block(x, x0, lambdas[i], tokens, value_table, cos, sin, attention)
            if i == (self.config.n_layer - 1) // 2:
                middle = x
        return x - self.backout_lambda.to(x.dtype) * middle  # the head need not see what fed later layers

    def compile_parts(self, blocks=False):
        """
        Compile what all layers share, once each: attention, MLP and head; or `blocks`, embedding and head.

        On a CPU the first takes 30 s where the whole graph, `compile`, takes 70 s, and a step is 5% slower
        (depth 4, 2 cores). For a GPU blocks take 0.4 of its time at depth 12 and 0.2 at 20, and move 7% more
        bytes, 1.5% of a step; but during the backward pass each layer's gradients are there before the next.
        """
        self.has_compiled_parts = True
        for module in self.modules():
            if isinstance(module, (Block, Head) if blocks else (RotaryAttention, MLP, Head)):
                module.compile(dynamic=False)
        if blocks:
            self.embed = torch.compile(self.embed, dynamic=False)

    def parameter_roles(self):
        """
        {role: {name: parameter}}; each parameter stands in exactly one role (asserted).
        A new role is a line here, before those whose parameters it takes, and one in train.py's table.
        Roles: matrix (all of the blocks), head, embedding, value_embedding, resid_scalar, x0_scalar, smear.
        """
        places = {  # a part of the parameter's name: its role
            "blocks": "matrix",
            "head": "head",
            "embedding": "embedding",
            "value_embeddings": "value_embedding",
            "resid_lambdas": "resid_scalar",
            "x0_lambdas": "x0_scalar",
            "smear_gate": "smear",
            "smear_lambda": "smear",
            "backout_lambda": "smear",
        }
        roles = {role: {} for role in places.values()}
        for name, parameter in self.named_parameters():
            role = next(role for place, role in places.items() if place in name.split("."))
            roles[role][name] = parameter
        assert sum(map(len, roles.values())) == len(list(self.parameters()))
        return roles

    def num_params(self):
        """{role: number of parameters}, padding of the vocabulary included."""
        roles = self.parameter_roles().items()
        return {role: sum(p.numel() for p in parameters.values()) for role, parameters in roles}

    def num_scaling_params(self):
        """The parameters that count in scaling laws (nanochat): of matrix products, not of embeddings."""
        counts = self.num_params()
        return counts["matrix"] + counts["head"]

    def num_flops_per_token(self, exact_causal=False):
        """
        Floating-point operations per trained token, forward and backward, recomputation not counted:
        6 per weight of every matrix product + 12 · n_embd · keys per layer (arXiv 2204.02311, appendix B).
        `keys` is max_seq_len in that convention; the exact causal mean is (max_seq_len + 1) / 2.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        keys = (self.config.max_seq_len + 1) / 2 if exact_causal else self.config.max_seq_len
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * keys

    def activation_bytes(self, tokens):
        """
        The memory that forward and backward of so many tokens take beside weights, gradients and optimizer,
        compiled, at their peak. Fitted to PyTorch's plans for an H100, of which the real card took the same:
        depth 12, width 768, 32 rows of 2,048 tokens and 50,257 in the vocabulary -> 16.7 GB.
        """
        logits = tokens * self.head.out_features
        chunks = self.head.chunks(tokens)
        values = tokens * self.config.n_embd * (11.5 * self.config.n_layer + 10)
        values += self.num_params()["matrix"] + logits / chunks * (2 if chunks > 1 else 3)
        return values * self.compute_dtype.itemsize

    @torch.inference_mode()
    def read(self, tokens, caches):
        """
        The fp32 logits (B, vocab_size) of what follows `tokens` (B, T), of which the `caches`, one
        CachedAttention a layer, have read the beginning; the rest is read now.
        """
        start, T = caches[0].length, tokens.size(1)
        # each new length would compile anew
        uncompiled = torch.compiler.set_stance("force_eager") if self.has_compiled_parts else nullcontext()
        with uncompiled, sdpa_kernel(GENERATION_BACKENDS):
            x = self.embed(tokens[:, max(0, start - 1) :])[:, -(T - start) :]  # smear takes the token before
            x = self.run_blocks(x, tokens[:, start:], self.cos[start:T], self.sin[start:T], caches)
            return self.head(x[:, -1:])[:, 0]

    def generate(self, rows, bos, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=0):
        """
        Continue B rows of ids, all of one length: yields max_new_tokens times a list of B new ids, drawn by
        `sample`. A row longer than max_seq_len goes on as `bos` and its last max_seq_len / 2 ids, which are
        read anew.
        """
        device, T = self.head.weight.device, self.config.max_seq_len
        generator = torch.Generator(device=device).manual_seed(seed)
        tokens, caches = torch.tensor(rows, device=device), None
        for _ in range(max_new_tokens):
            if tokens.size(1) > T:
                tokens, caches = F.pad(tokens[:, -(T // 2) :], (1, 0), value=bos), None
            if caches is None:
                sizes = self.config, len(tokens), self.compute_dtype, device
                caches = [CachedAttention(*sizes) for _ in self.blocks]
            ids = sample(self.read(tokens, caches), temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, ids[:, None]], dim=1)
            yield ids.tolist()


def sample(logits, temperature, top_k, top_p, generator):
    """
    One id for each row of logits (B, V) -> (B,): drawn from the top_k likeliest, or from all for 0, and of
    these from the fewest that hold top_p of the probability (arXiv 1904.09751). Temperature 0 takes the
    likeliest.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # the likeliest first
    p = torch.softmax((logits - logits[:, :1]) / temperature, dim=-1)
    p[:, 1:] = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)[:, 1:]  # the likeliest always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


# -----------------------------------------------------------------------------
# The same mathematics, faster


class RMSNorm(torch.autograd.Function):
    """norm(x), whose backward pass needs the result, which the next layer keeps anyway, and not x."""

    @staticmethod
    def forward(ctx, x):
        x_float = x.float()
        scale = (x_float.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        y = (x_float * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        grad, y = grad.float(), y.float()
        return ((grad - y * (grad * y).mean(-1, keepdim=True)) * scale).to(ctx.saved_tensors[0].dtype)


class ReluSquared(torch.autograd.Function):
    """relu(x)² (arXiv 2109.08668), whose backward pass needs the result alone: its slope is 2 · √relu(x)²."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 2 * grad * y.sqrt()


def blocked_attention(q, k, v, scale):
    """
    Causal attention as plain products: CPU_BLOCK queries at a time, on the keys up to their end. Compiled for
    a CPU it is faster than the flash kernel there. q, k, v and the result: (B, n_head, T, head_dim).
    """
    blocks = []
    for start in range(0, q.size(2), CPU_BLOCK):
        queries = q[:, :, start : start + CPU_BLOCK]
        end = start + queries.size(2)
        scores = scale * (queries @ k[:, :, :end].mT).float()  # (B, n_head, queries, end)
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(start + 1)
        p = scores.masked_fill(future, -math.inf).softmax(-1)
        blocks.append(p.to(q.dtype) @ v[:, :, :end])
    return torch.cat(blocks, dim=2)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    The loss of GPT.forward, from x (N, C) in the compute dtype, the head's fp32 weight (padded V, C) and
    targets (N,), for one chunk of rows after the other. Each chunk's gradients are made at once, in the
    forward pass (arXiv 2410.10989, section 3.2): the N × V logits never exist together.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunks, training):
        w, nats, grad_x, grad_w = weight.to(x.dtype), [], [], 0.0
        in_place = x.device.type == "cpu" and not torch.compiler.is_compiling()
        loss_and_grad = loss_and_grad_in_place if in_place else loss_and_grad_fused
        for rows, target in zip(x.chunk(chunks), targets.chunk(chunks)):
            loss, grad = loss_and_grad((rows @ w.T).float(), target[:, None], vocab_size)
            nats.append(loss)
            if training:
                grad = grad.to(x.dtype)
                grad_x.append(grad @ w)
                grad_w = grad_w + (grad.T @ rows).float()
        if training:
            ctx.save_for_backward(torch.cat(grad_x), grad_w)
        return torch.cat(nats).sum()  # at the end: a sum per chunk is put off by Inductor, which keeps N × V

    @staticmethod
    def backward(ctx, grad_nats):
        grad_x, grad_w = ctx.saved_tensors
        return (grad_x.float() * grad_nats).to(grad_x.dtype), grad_w * grad_nats, None, None, None, None


def loss_and_grad_fused(logits, targets, vocab_size):
    """
    Uncapped fp32 logits (n, padded V), targets (n, 1) -> (each row's loss in nats (n, 1), the gradient of
    their sum with respect to the logits). For a compiler, which makes a pass or two of all this: in powers of
    2 and roots, for which GPUs have one instruction each, 45 in all per logit on an H100 where tanh and exp
    come to 99. SOFTCAP · tanh(x / SOFTCAP) = SOFTCAP · (2 · share - 1), and the -1 is the same for all.
    """
    columns = torch.arange(logits.size(1), dtype=torch.int32, device=logits.device)
    targets, counted = targets.int(), targets >= 0
    share = (1 + (logits * (-2 / SOFTCAP / math.log(2))).exp2()).rsqrt().square()  # sigmoid(2 x / SOFTCAP)
    bits = (share * (2 * SOFTCAP / math.log(2))).masked_fill(columns >= vocab_size, -math.inf)
    log_sum = bits.exp2().sum(-1, keepdim=True).log2()  # bounded by 2^(44 + 16): it cannot overflow
    loss = (log_sum - bits.gather(1, targets.clamp_min(0).long())) * counted * math.log(2)
    grad = (bits - log_sum).exp2() - (columns == targets).float()  # of the capped logits
    return loss, grad * counted * (4 * share * (1 - share))


def loss_and_grad_in_place(logits, targets, vocab_size):
    """The same uncompiled: in place, in few passes, 2 to 3 times as fast on a CPU. Overwrites logits."""
    chosen, counted = targets.clamp_min(0), targets >= 0
    capped = logits.div_(SOFTCAP).tanh_()
    logits = SOFTCAP * capped
    logits[:, vocab_size:] = -math.inf
    log_p = torch.log_softmax(logits, dim=-1)
    loss = -log_p.gather(1, chosen) * counted
    grad = log_p.exp_()
    grad.scatter_(1, chosen, grad.gather(1, chosen) - 1)  # of the capped logits
    return loss, grad.mul_(capped.square_().neg_().add_(1)).mul_(counted)


def attention_backend(config, dtype, device, compiled):
    """The name of the kernel that causal_attention runs for this shape, for the run's header."""
    if device.type == "cpu" and compiled and config.max_seq_len <= CPU_LENGTH:
        return "blocked"
    if device.type == "mps":
        return "Metal"
    shape = (1, config.n_head, config.max_seq_len, config.head_dim)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return chosen.name.removesuffix("_ATTENTION").lower()


# -----------------------------------------------------------------------------
# The command line: write, score, export


def letters(chunks):
    """A stream of bytes -> a stream of strings; the bytes of an unfinished letter wait for the rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def scoring_batches(tokens, token_bytes, T, stride, batch_size=8):
    """
    Yield (tokens, targets, bytes) as report.bits_per_byte takes them: a text, 1-D int64 from its bos on, in
    rows of T, each `stride` tokens after the one before. Every token is a target once, in the first row that
    has it: all but the first T with T - stride tokens or more before them. Bos and padding never count.
    """
    bos, count = tokens[0].item(), 1 + max(0, math.ceil((len(tokens) - T) / stride))
    rows = F.pad(tokens, (0, T + (count - 1) * stride - len(tokens)), value=bos).unfold(0, T, stride)
    for start in range(0, count, batch_size):
        targets = rows[start : start + batch_size].clone()  # (B, T)
        inputs = F.pad(targets[:, :-1], (1, 0), value=bos)
        targets[int(start == 0) :, : T - stride] = bos  # of the very first row all
        lengths = token_bytes[targets]
        yield inputs, targets.masked_fill(lengths == 0, -1), int(lengths.sum())


if __name__ == "__main__":
    import argparse
    import contextlib
    import json
    import os
    import sys
    from pathlib import Path

    import checkpoint
    import dataloader
    import machine
    import report

    def refuse(message):
        """argparse's errors, told like all others."""
        print(f"error: {message}.\n`python model.py --help` lists what can be given.", file=sys.stderr)
        sys.exit(2)

    def number(kind, low, high):
        """The function that reads a number of that kind and range."""

        def read(text):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high:,}")
            return kind(text)

        read.__name__ = kind.__name__  # argparse's errors name it
        return read

    def find_run(words):
        """[RUN] [PROMPT] -> (the run's folder, by default of the one that saved last; the prompt or None)."""
        first = words[0] if words else ""
        is_path = os.path.isdir(first) or ("/" in first and os.path.isdir(os.path.dirname(first)))
        if len(words) == 2 or is_path:
            return Path(first), words[1] if len(words) == 2 else None
        manifests = Path("out").glob("*/checkpoints/*/manifest.json")
        newest = max(manifests, key=os.path.getmtime, default=None)
        if newest is None:
            what = "no run is given, and out/ holds none that has saved"
            raise checkpoint.CheckpointError(f"{what}.\nTrain one with `python train.py`.")
        return newest.parents[2], first if words else None

    def load(run, device):
        """The best checkpoint of a run -> (its model, its tokenizer, a line about them)."""
        if not (run / "config.json").exists():
            what = f"{run} is no run: it holds no config.json" if run.exists() else f"there is no run {run}"
            raise checkpoint.CheckpointError(f"{what}.\nGive the folder of one, such as out/NAME.")
        folder, faults = checkpoint.best(run / "checkpoints")
        if folder is None:
            what = f"{run} holds no valid checkpoint" + "".join(f"; {fault}" for fault in faults[:1])
            raise checkpoint.CheckpointError(f"{what}.\nGive another run, or --resume its training.")
        try:
            config = json.loads((run / "config.json").read_text())
            tokenizer = dataloader.load_tokenizer(run / "tokenizer")
            # one row at a time, as when it writes, a CPU multiplies in fp32 as fast as in bf16
            fast = machine.has_fast_bf16(device) and (device.type != "cpu" or given.score is not None)
            dtype = config["settings"]["dtype"] if fast else "float32"
            with torch.device("meta"):
                model = GPT(GPTConfig(**config["model"]), machine.find_dtype(device, dtype))
            model.init_weights(device, seed=0)
            model.load_state_dict(checkpoint.load(folder, "model"))
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            if machine.is_out_of_memory(error):
                raise
            what = f"{run} is damaged: {type(error).__name__}: {str(error).splitlines()[0]}"
            raise checkpoint.CheckpointError(f"{what}.\nPut its files back as they were.") from None
        state, depth = checkpoint.load(folder, "state"), model.config.n_layer
        about = f"{folder}, {state['val_bpb']:.4f} bits per byte · depth {depth} · {device.type} · {dtype}"
        return model, tokenizer, about + "".join(f" · passed over: {fault}" for fault in faults)

    def write(prompt, seed):
        """Write continuations of a prompt: the first as it comes, then those that were made beside it."""
        prompt = os.fsencode(prompt).decode("utf-8", "replace")
        ids, texts = [bos, *tokenizer.encode_ordinary(prompt)], [[] for _ in range(given.num_samples)]
        if len(ids) > model.config.max_seq_len:
            print(f"the prompt has {len(ids):,} tokens: only its end is read", file=sys.stderr)
        settings = {name: getattr(given, name) for name in ("temperature", "top_k", "top_p")}

        def first_of(stream, ended=()):
            """The bytes of the first text, while all are gathered in `texts`; a bos ends a text."""
            for new in stream:
                ended = {*ended, *(n for n, token in enumerate(new) if token == bos)}
                for n, (text, token) in enumerate(zip(texts, new)):
                    text.append(b"" if n in ended else tokenizer.decode_single_token_bytes(token))
                if len(ended) == len(texts):
                    return
                yield texts[0][-1]

        print(prompt, end="", flush=True)
        stream = model.generate([ids] * len(texts), bos, given.tokens, seed=seed, **settings)
        for part in letters(first_of(stream)):
            print(part, end="", flush=True)
        for n, text in enumerate(texts[1:], 2):
            print(f"\n--- {n}\n{prompt}{b''.join(text).decode('utf-8', 'replace')}", end="")
        print(flush=True)

    def talk():
        """Continue each line that is typed or piped in, with a seed of its own, until there is none."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  from now on input() has a history
        by_hand, seed = sys.stdin.isatty(), given.seed
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(EOFError):
            while True:
                prompt = input("> " if by_hand else "")
                try:
                    write(prompt, seed)
                except KeyboardInterrupt:
                    if not by_hand:
                        raise
                    print()  # it ends the text; where nothing is written, it ends all
                seed += 1
        if by_hand:
            print()

    def texts_in(name):
        """The documents in a file or folder, or for - in the standard input."""
        if name == "-":
            texts = [sys.stdin.buffer.read().decode("utf-8", "replace")]
        else:
            texts = list(dataloader.read_documents(name))
        if not any(texts):
            raise dataloader.DataError(f"{name}: there is no text in it.\nGive a file or a folder of text.")
        return texts

    def score(name, texts):
        """Print the score of texts, and return what scores are added up from: (nats, tokens, bytes)."""
        tokens = dataloader.encode_held_out(tokenizer, texts, whole=given.stride is not None)
        tokens = torch.from_numpy(tokens.astype("int64")).to(device)
        T, lengths = model.config.max_seq_len, token_bytes[tokens]
        batches = scoring_batches(tokens, token_bytes, T, min(T, given.stride or T))
        with torch.set_grad_enabled(device.type == "mps"):  # without, attention there has looked ahead
            bpb = report.bits_per_byte(model, batches, device)
        size = int(lengths.sum())
        return tell_score(name, bpb * math.log(2) * size, int((lengths > 0).sum()), size)

    def tell_score(name, nats, tokens, size):
        bpb, perplexity = nats / (math.log(2) * size), math.exp(nats / tokens)
        about = f"{perplexity:.2f} per token, {tokens:,} tokens, {size:,} bytes"
        print(f"{bpb:.6f} bits per byte, perplexity {about}  {name}", flush=True)
        return nats, tokens, size

    def score_all(names):
        """Score files, of a .jsonl each document too, and if there are several all together."""
        total = []
        for name in names:
            texts = texts_in(name)
            documents = texts if name.endswith(".jsonl") else []
            scores = [score(f"{name}:{n}", [text]) for n, text in enumerate(documents, 1)]
            if documents:
                tell_score(name, *map(sum, zip(*scores)))
            total += scores or [score(name, texts)]
        if len(names) > 1:
            tell_score("together", *map(sum, zip(*total)))

    report.open_console()
    usage = 'python model.py [out/RUN] ["PROMPT"] [--NAME VALUE ...]'
    about = "Without a run it takes the one that saved last; without a prompt it asks for them, one a line."
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("words", nargs="*", metavar="", help=argparse.SUPPRESS)
    for name, kind, low, high, default, text in (
        ("tokens", int, 1, 10**6, 200, "how many to write, at most"),
        ("temperature", float, 0, 100, 0.8, "0 takes the likeliest token"),
        ("top-k", int, 0, 10**6, 50, "sample from the k likeliest; 0: from all"),
        ("top-p", float, 0, 1, 1.0, "sample from the fewest that hold this share of the probability"),
        ("num-samples", int, 1, 1024, 1, "how many texts, made side by side"),
        ("seed", int, 0, 2**31, 0, "another seed, another text"),
    ):
        options = {"type": number(kind, low, high), "default": default, "metavar": "N"}
        parser.add_argument(f"--{name}", help=f"{text} [{default}]", **options)
    text = "instead: bits per byte of files or folders of text, or - for the standard input"
    parser.add_argument("--score", nargs="+", metavar="FILE", help=text)
    text = "score whole documents, each token with max_seq_len - N or more before it"
    parser.add_argument("--stride", type=number(int, 1, 10**6), metavar="N", help=text)
    text = "instead: write a folder for Hugging Face's transformers"
    parser.add_argument("--export", type=Path, metavar="DIR", help=text)
    parser.add_argument("--device-type", help="cuda, mps or cpu [the first of them that is there]")
    given = parser.parse_args()
    if given.stride and given.score is None:
        refuse("--stride needs --score")
    if len(given.words) > 2:
        refuse(f"there is more than a run and a prompt: {given.words[2]!r}. Put the prompt into quotes")
    try:
        run, prompt = find_run(given.words)
        device = machine.find_device(given.device_type)
        model, tokenizer, about = load(run, device)
        print(about, file=sys.stderr, flush=True)
        bos, token_bytes = tokenizer.n_vocab - 1, dataloader.token_bytes(tokenizer)
        token_bytes = torch.from_numpy(token_bytes.astype("int64")).to(device)
        if given.export is not None:
            from runs.export import export

            print(export(given.export, model, tokenizer, run))
            sys.exit()
        model.to(model.compute_dtype)  # once, and not in each layer for each token
        if given.score is not None:
            score_all(given.score)
        elif prompt is not None:
            write(prompt, given.seed)
        elif sys.stdin is not None:
            talk()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except (checkpoint.CheckpointError, dataloader.DataError, machine.MachineError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of what is written: a closed pipe, as of `| head`, is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            where = error.filename or "the output"
            print(f"error: {where} cannot be written: {error.strerror}.\nMake room.", file=sys.stderr)
            sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        print("error: the device has too little memory.\nGive fewer --num-samples.", file=sys.stderr)
        sys.exit(2)
