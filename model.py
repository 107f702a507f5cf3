"""
The GPT: rows of tokens -> the sum of their losses.

It differs from GPT-2 in these parts: rotary positions (arXiv 2104.09864), RMSNorm without weights
(arXiv 1910.07467), QK-norm (arXiv 2302.08435), ReLU² (arXiv 2109.08668), an untied head with soft-capped
logits (arXiv 2408.00118), keys that look back (arXiv 2209.11895), value embeddings, residual scalars, smear
and backout (all four from modded-nanogpt and nanochat).

In this order: config, attention, MLP, block, head, GPT, generation, and the same mathematics, faster.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

ROPE_BASE = 100_000
SOFTCAP = 15.0  # logits are bounded to ±15; values from 10 to 30 work about equally well
QK_SCALE = 1.2  # multiplies the normed queries and the normed keys: sharper attention
VALUE_GATE_CHANNELS = 12  # the gates read only the first channels of the stream: enough, and almost free
SMEAR_GATE_CHANNELS = 24
# without cuDNN: it builds a plan for each new length, and in generation every token is a new length
GENERATION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# fp16 reaches from 6e-8 to 65,504. The gradients of the logits lie in ±1, and many are smaller than the first
FP16_GRAD_SCALE = 256
# logits at a time: on a GPU 1 GB in bf16; on a CPU what its caches hold, which is twice as fast
CPU_LOGITS, GPU_LOGITS = 2**20, 2**29
CPU_BLOCK = 128  # queries per block in BlockedAttention
CPU_LENGTH = 2048  # longest row that uses BlockedAttention


class ShapeError(ValueError):
    """Invalid model shape. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


@dataclass
class GPTConfig:
    """The shape of a GPT. n_embd is n_head * head_dim, and head_dim is even."""

    vocab_size: int = 4096
    max_seq_len: int = 512  # T, the longest row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256  # C, the width
    n_look_back: int = 0  # number of heads whose keys look back; 0 in checkpoints older than this feature

    @classmethod
    def of_depth(cls, depth, vocab_size, max_seq_len, aspect_ratio=None, head_dim=None):
        """
        The shape for a depth: the width is depth * aspect_ratio, rounded up to a multiple of head_dim.
        Depth 4 -> 4 heads of 64, width 256; depth 12 -> 6 heads of 128, width 768; depth 1 -> 2 heads of 64,
        like depth 2. Raises ShapeError for an odd head_dim or a width below 32.
        """
        aspect_ratio = aspect_ratio or (128 if depth == 1 else 64)
        head_dim = head_dim or (128 if depth >= 8 else 64)
        n_head = math.ceil(depth * aspect_ratio / head_dim)
        if head_dim % 2:
            problem = f"--head-dim {head_dim}: rotary positions rotate pairs of channels"
            raise ShapeError(f"{problem}.\nUse an even number.")
        if n_head * head_dim < 32:
            problem = f"depth {depth}: a width of {n_head * head_dim} is too small, the minimum is 32"
            raise ShapeError(f"{problem}.\nIncrease --depth, --aspect-ratio or --head-dim.")
        return cls(vocab_size, max_seq_len, depth, n_head, n_head * head_dim, n_head // 2)

    def check_same(self, saved):
        """ValueError if a saved config, a dict, describes another model; older ones have fewer names."""
        different = {k: v for k, v in asdict(GPTConfig(**saved)).items() if v != getattr(self, k)}
        if different:
            raise ValueError(f"its model has {', '.join(f'{k} {v}' for k, v in different.items())}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self):
        return -(-self.vocab_size // 64) * 64  # tensor cores need multiples of 64


class Linear(nn.Linear):
    """A linear layer without bias. It casts its fp32 weight to the dtype of x, so autocast is not needed."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def norm(x):
    """RMSNorm over the last dimension, without weights, computed in fp32 (arXiv 1910.07467)."""
    return RMSNorm.apply(x)


def spread(scalars, x):
    """
    fp32 scalars (...) -> in x's dtype; for x (B, T, C) in fp16 a copy for each position (..., T, 1). The
    gradient of a scalar is a sum over all of x, the first to exceed 65,504. With copies it is summed in fp32.
    """
    if x.dtype == torch.float16:
        scalars = scalars[..., None, None].expand(*scalars.shape, x.size(1), 1)
    return scalars.to(x.dtype)


# -----------------------------------------------------------------------------
# Attention


class CausalSelfAttention(nn.Module):
    """
    Attention with a residual connection: x -> x + c_proj(attention(q, k, v)). In every second layer a gated
    value embedding is added to the values: a second embedding of the token, read straight from a table.
    """

    def __init__(self, config, has_value_embedding):
        super().__init__()
        self.n_head = config.n_head
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.n_embd)
        self.c_v = Linear(config.n_embd, config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.value_gate = Linear(VALUE_GATE_CHANNELS, config.n_head) if has_value_embedding else None

    def forward(self, x, value_embedding, cos, sin, attention):
        """attention: a RotaryAttention, or a CachedAttention in generation."""
        B, T, C = x.shape
        y = norm(x)
        q, k, v = (c(y).view(B, T, self.n_head, -1) for c in (self.c_q, self.c_k, self.c_v))
        if self.value_gate is not None:
            gate = 3 * torch.sigmoid(self.value_gate(y[..., :VALUE_GATE_CHANNELS]))  # (B, T, n_head)
            v = v + gate[..., None] * value_embedding.view_as(v)
        return x + self.c_proj(attention(q, k, v, cos, sin).reshape(B, T, C))


class RotaryAttention(nn.Module):
    """
    The part of attention without weights: look-back of the keys, rotary positions, QK-norm, attention.
    q, k, v and the result: (B, T, n_head, head_dim).
    """

    def __init__(self, n_look_back):
        super().__init__()
        self.n_look_back = n_look_back

    def forward(self, q, k, v, cos, sin):
        k = look_back(k, self.n_look_back)
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        return causal_attention(q, k, v)


def look_back(k, n):
    """
    In the first n heads, replace each key by that of the previous token, and by 0 at the start of a row.
    k and the result: (B, T, n_head, head_dim). A single layer can then look up what followed the same token
    earlier in the row. Without it this takes two layers, which learn it after about 2 million tokens
    (induction heads, arXiv 2209.11895, which calls this a "smeared key").
    """
    previous = F.pad(k[:, :-1, :n], (0, 0, 0, 0, 1, 0))
    return torch.cat([previous, k[:, :, n:]], dim=2)


def rotary_tables(length, head_dim, device):
    """cos and sin of arXiv 2104.09864, with base 100,000: two fp32 tensors (length, 1, head_dim / 2)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rotary(x, cos, sin):
    """
    Rotate pairs of channels of x (B, T, n_head, head_dim) by the angles of their position, in x's dtype.
    A pair is channel i and channel i + head_dim / 2.
    """
    halves = x.unflatten(-1, (2, -1))  # (B, T, n_head, 2, head_dim / 2)
    cos, sin = cos.to(x.dtype)[..., None, :], sin.to(x.dtype)
    # a single expression without `cat`, so that the compiler fuses it with the norm of q and k
    return (halves * cos + halves.flip(-2) * torch.stack([sin, -sin], dim=-2)).flatten(-2)


def causal_attention(q, k, v, mask=None):
    """
    Each position attends to itself and to earlier ones; q and k are normed, the scale is 1.2² / √head_dim.
    q, k, v and the result: (B, T, n_head, head_dim), in one dtype. q may be the last position alone, or the
    last ones with a mask: True where position T of q attends to S of k, (B, 1, T, S).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, head_dim)
    scale = QK_SCALE**2 / math.sqrt(q.size(-1))
    if mask is not None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    elif q.device.type == "cpu" and 1 < q.size(2) <= CPU_LENGTH:
        y = BlockedAttention.apply(q, k, v, scale)
    else:  # PyTorch picks the fastest kernel: cuDNN on Hopper, flash attention on other GPUs
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, scale=scale)
    return y.transpose(1, 2)


# -----------------------------------------------------------------------------
# MLP, block, head


class MLP(nn.Module):
    """x -> x + c_proj(ReLU²(c_fc(norm(x)))), four times as wide inside; x: (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return x + self.c_proj(ReluSquared.apply(self.c_fc(norm(x))))


class Block(nn.Module):
    """
    One layer. First the stream x and the embedding x0 are mixed: lambdas[0] * x + lambdas[1] * x0. With keys
    a share `dropout` of the stream is dropped, and twice that of the value embeddings, which memorize first.
    """

    dropout = 0.0

    def __init__(self, config, has_value_embedding):
        super().__init__()
        self.attn = CausalSelfAttention(config, has_value_embedding)
        self.mlp = MLP(config)

    def forward(self, x, x0, lambdas, tokens, value_table, cos, sin, attention, keys=None):
        x = lambdas[0] * x + lambdas[1] * x0  # (B, T, C)
        values = F.embedding(tokens, value_table).to(x.dtype) if value_table is not None else None
        if keys is not None:
            x = dropout(x, self.dropout, keys)
            values = dropout(values, 2 * self.dropout, keys + 1) if values is not None else None
        return self.mlp(self.attn(x, values, cos, sin, attention))


def dropout(x, p, keys):
    """
    Dropout (JMLR 15, p. 1929): each element of x (B, T, C) becomes 0 with probability p, and the others are
    multiplied by 1 / (1 - p). The mask depends only on keys, (B,) int32, one for each row. So it is the same
    on any device, for any number of ranks and any micro-batch.
    """
    places = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device).view_as(x[0])
    bits = mix_bits(places + mix_bits(keys)[:, None, None])
    keep = (bits & 0xFFFF) >= p * 2**16
    return x * (keep.to(x.dtype) / (1 - p))


def mix_bits(numbers):
    """int32 -> int32 whose bits look random: a hash. The products may wrap around."""
    for _ in range(2):
        numbers = (numbers ^ (numbers >> 16)) * 0x45D9F3B
    return numbers ^ (numbers >> 16)


class Head(Linear):
    """
    The last norm and the untied head. Without targets it returns fp32 logits, bounded to ±SOFTCAP; with
    targets the sum of the losses. A batch with more than `max_logits` logits is processed in chunks.
    """

    max_logits = None  # CPU_LOGITS or GPU_LOGITS

    def __init__(self, config):
        super().__init__(config.n_embd, config.padded_vocab_size)
        self.vocab_size = config.vocab_size

    def num_chunks(self, tokens):
        """Number of chunks for the loss of `tokens` tokens: a power of two, except on a CPU at most 8."""
        on_cpu = self.weight.device.type == "cpu"
        max_logits = self.max_logits or (CPU_LOGITS if on_cpu else GPU_LOGITS)
        chunks = 2 ** max(0, math.ceil(math.log2(tokens * self.out_features / max_logits)))
        # with 16 chunks Inductor keeps the gradients of seven chunks until the end: 5 GB more on an H100
        return chunks if on_cpu else min(8, chunks)

    def forward(self, x, targets=None):
        x = norm(x)  # (B, T, C)
        chunks = self.num_chunks(targets.numel()) if targets is not None else 1
        # in fp16 cross_entropy's gradients, p * loss scale / number of targets, would be rounded to zero
        if chunks > 1 or (targets is not None and x.dtype == torch.float16):
            rows, training = x.flatten(0, 1), torch.is_grad_enabled()
            arguments = targets.flatten(), self.vocab_size, chunks, training
            return ChunkedCrossEntropy.apply(rows, self.weight, *arguments)
        logits = softcap(super().forward(x)[..., : self.vocab_size].float())  # (B, T, vocab_size)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def softcap(logits):
    """Bound fp32 logits smoothly to ±SOFTCAP (arXiv 2408.00118, section 2)."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


# -----------------------------------------------------------------------------
# The model


class GPT(nn.Module):
    """
    A decoder-only transformer. Build it under `torch.device("meta")`, then call `init_weights(device, seed)`.
    Parameters are fp32, activations have `compute_dtype`, and the loss is computed in fp32. With `recompute`
    the backward pass computes each block's forward pass again, instead of keeping its activations: a third
    more operations, for a fraction of the memory.
    """

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.recompute = config, False
        self.compute_dtype, self.has_compiled_parts = compute_dtype, False
        # every second layer has value embeddings, and the last layer is always one of them
        value_layers = range((config.n_layer - 1) % 2, config.n_layer, 2)

        def table():  # nn.Embedding(...) would draw random values, which on "meta" imports the slow compiler
            values = torch.empty(config.padded_vocab_size, config.n_embd)
            return nn.Embedding.from_pretrained(values, freeze=False)

        self.embedding = table()
        self.value_embeddings = nn.ModuleDict({str(i): table() for i in value_layers})
        self.blocks = nn.ModuleList(Block(config, i in value_layers) for i in range(config.n_layer))
        self.attention = RotaryAttention(config.n_look_back)  # shared by all layers: it has no weights
        self.head = Head(config)
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
        """Allocate on `device` if still on meta. Draw all weights; they depend only on `seed`."""
        if self.head.weight.is_meta:
            self.to_empty(device=device)
        self.cos, self.sin = rotary_tables(self.config.max_seq_len, self.config.head_dim, device)
        generator = torch.Generator(device=device).manual_seed(seed)
        # uniform in ±bound has a standard deviation of bound / √3, and unlike a normal no outliers
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

    def forward(self, tokens, targets=None, keys=None):
        """
        tokens: (B, T) integers, T ≤ max_seq_len. Without targets: fp32 logits (B, T, vocab_size).
        With targets (B, T), int64: the sum of -ln p (nats) over all targets ≥ 0, a 0-D fp32 tensor.
        keys: int32 (B,), with dropout: another number for each row and epoch.
        """
        T, attentions = tokens.size(1), [self.attention] * self.config.n_layer
        x = self.run_blocks(self.embed(tokens), tokens, self.cos[:T], self.sin[:T], attentions, keys)
        return self.head(x, targets)

    def embed(self, tokens):
        """tokens (B, T) -> input of the first block (B, T, C), in the compute dtype."""
        x = norm(self.embedding(tokens).to(self.compute_dtype))
        gate = torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_GATE_CHANNELS]))
        smear = spread(self.smear_lambda, x[:, 1:]) * gate
        return torch.cat([x[:, :1], x[:, 1:] + smear * x[:, :-1]], dim=1)  # add some of the previous token

    def run_blocks(self, x, tokens, cos, sin, attentions, keys=None):
        """x = embed(tokens) -> input of the head (B, T, C). attentions: one per layer; keys: see forward."""
        x0 = x.view_as(x)  # a new tensor object: torch.compile makes a separate graph for the same one twice
        lambdas = spread(torch.stack([self.resid_lambdas, self.x0_lambdas], dim=1), x).unbind()
        for i, (block, attention) in enumerate(zip(self.blocks, attentions)):
            value_table = self.value_embeddings[str(i)].weight if str(i) in self.value_embeddings else None
            block_keys = mix_bits(keys + i) if keys is not None else None  # another mask in each layer
            arguments = x, x0, lambdas[i], tokens, value_table, cos, sin, attention, block_keys
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
            if i == (self.config.n_layer - 1) // 2:
                middle = x
        # backout: remove some of what only the later layers needed, before the head reads the stream
        return x - spread(self.backout_lambda, x) * middle

    def compile_parts(self):
        """
        Compile embedding, blocks and head, each once for all layers. This takes less time than to compile the
        complete graph (`model.compile`), on a GPU 0.4 of it at depth 12 and 0.2 at depth 20; 7% more memory
        traffic, 1.5% of a step. The backward pass finishes each layer's gradients before it begins the next.
        """
        self.has_compiled_parts = True
        for module in self.modules():
            if isinstance(module, (Block, Head)):
                module.compile(dynamic=False)
        self.embed = torch.compile(self.embed, dynamic=False)

    def parameter_roles(self):
        """
        {role: {name: parameter}}, with each parameter in exactly one role (asserted). Roles: matrix (all
        weights of the blocks), head, embedding, value_embedding, resid_scalar, x0_scalar, smear.

        To add a role, add a line here and one to the table in train.py. The first matching line counts.
        """
        role_of = {  # part of the parameter's name -> role
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
        roles = {role: {} for role in role_of.values()}
        for name, parameter in self.named_parameters():
            role = next(role for part, role in role_of.items() if part in name.split("."))
            roles[role][name] = parameter
        assert sum(map(len, roles.values())) == len(list(self.parameters()))
        return roles

    def num_params(self):
        """{role: number of parameters}, including the padding of the vocabulary."""
        roles = self.parameter_roles().items()
        return {role: sum(p.numel() for p in parameters.values()) for role, parameters in roles}

    def num_scaling_params(self):
        """Number of parameters for scaling laws, as in nanochat: without embeddings and scalars."""
        counts = self.num_params()
        return counts["matrix"] + counts["head"]

    def num_flops_per_token(self, exact_causal=False):
        """
        Floating-point operations per trained token, forward and backward, without recomputation:
        6 per weight of every matrix product + 12 * n_embd * keys per layer (PaLM, arXiv 2204.02311,
        appendix B). keys is max_seq_len by PaLM's convention, (max_seq_len + 1) / 2 for exact causality.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        keys = (self.config.max_seq_len + 1) / 2 if exact_causal else self.config.max_seq_len
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * keys

    def activation_bytes(self, tokens, recompute=False):
        """
        Peak memory in bytes of a compiled forward and backward pass over `tokens` tokens, without weights,
        gradients and optimizer state. Fitted to PyTorch's memory plans for an H100; a real H100 used the
        same. Depth 12, width 768, 32 rows of 2,048 tokens, vocabulary 50,257 -> 16.7 GB.

        Recomputed blocks keep their inputs. In the backward pass the new gradients of all parameters come
        on top of those of the micro-steps before. Depth 4, width 768, 16 rows, recomputed -> 2.3 GB.
        """
        logits = tokens * self.head.out_features
        chunks = self.head.num_chunks(tokens)
        n_layer, counts = self.config.n_layer, self.num_params()
        kept, one_block = (n_layer, min(14, 10.5 * n_layer)) if recompute else (11.5 * n_layer, 0)
        width = tokens * self.config.n_embd
        forward = width * (kept + 10) + counts["matrix"] + logits / chunks * (2 if chunks > 1 else 3)
        backward = width * (kept + one_block)
        itemsize = self.compute_dtype.itemsize
        return max(forward * itemsize, backward * itemsize + 4 * sum(counts.values()))

    def training_bytes(self, tokens, optimizer_bytes, recompute=False):
        """
        Estimated memory in bytes that training needs on one device, with micro-batches of `tokens` tokens and
        `optimizer_bytes` of optimizer state there: fp32 weights and gradients + state + activations.
        """
        activations = self.activation_bytes(tokens, recompute)
        return 8 * sum(self.num_params().values()) + optimizer_bytes + activations

    @torch.inference_mode()
    def next_token_logits(self, tokens, caches):
        """
        fp32 logits (B, vocab_size) of the token after `tokens` (B, T). `caches`, one CachedAttention per
        layer, hold the positions that earlier calls have read; this call reads only the new ones.
        """
        start, T = caches[0].length, tokens.size(1)
        # torch.compile would compile again for each new length
        uncompiled = torch.compiler.set_stance("force_eager") if self.has_compiled_parts else nullcontext()
        with uncompiled:
            x = self.embed(tokens[:, max(0, start - 1) :])[:, -(T - start) :]  # smear: one token back
            x = self.read(x, tokens[:, start:], torch.arange(start, T, device=x.device), caches)
            return self.head(x[:, -1:])[:, 0]

    def read(self, x, tokens, positions, caches):
        """
        Run the blocks on new tokens and add their keys and values to the caches, one for each layer. x, their
        embeddings, and the result: (B, T, C); tokens: (B, T); positions in the row: (T,) or (B, T).
        """
        heads, T = torch.arange(2 * self.config.n_head, device=x.device), self.config.max_seq_len
        # of the heads of k and q, side by side; a key that looks back belongs to the next position
        places = positions[..., None] + (heads < self.config.n_look_back)  # (…, T, 2 * n_head)
        cos, sin = (table[places.clamp(max=T - 1), 0] for table in (self.cos, self.sin))
        with sdpa_kernel(GENERATION_BACKENDS):
            return self.run_blocks(x, tokens, cos, sin, caches)

    def generate(self, rows, bos, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=0):
        """
        Continue B rows of token ids, all of the same length. Yields max_new_tokens times a list of B new ids
        (see sample_next_token). When a row gets longer than max_seq_len, it is cut to `bos` and its last
        max_seq_len / 2 ids, and the cache is filled again.
        """
        device, T = self.head.weight.device, self.config.max_seq_len
        generator = torch.Generator(device=device).manual_seed(seed)
        tokens, caches = torch.tensor([row[-(T + 1) :] for row in rows], device=device), None
        for _ in range(max_new_tokens):
            if tokens.size(1) > T:
                tokens, caches = F.pad(tokens[:, -(T // 2) :], (1, 0), value=bos), None
            if caches is None:
                sizes = self.config, len(tokens), self.compute_dtype, device
                caches = [CachedAttention(*sizes) for _ in self.blocks]
            logits = self.next_token_logits(tokens, caches)
            ids = sample_next_token(logits, temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, ids[:, None]], dim=1)
            yield ids.tolist()


# -----------------------------------------------------------------------------
# Generation


class CachedAttention:
    """
    The KV cache of one layer. It computes the same as RotaryAttention, for rows that are read in pieces: the
    first piece may have several tokens, every later piece has one. A key of a head that looks back is stored
    for the next token: rotated by its position, and in its place.
    """

    mask = None

    def __init__(self, config, B, dtype, device):
        shape = (B, config.max_seq_len + 1, config.n_head, config.head_dim)
        self.n_look_back, self.length = config.n_look_back, 0
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def __call__(self, q, k, v, cos, sin):
        """As in RotaryAttention, but cos and sin are those of GPT.read."""
        k, q = norm(apply_rotary(torch.cat([k, q], dim=2), cos, sin)).chunk(2, dim=2)
        return causal_attention(q, *self.store(k, v), self.mask)  # (B, T, n_head, head_dim)

    def store(self, k, v):
        """Add keys and values (B, T, n_head, head_dim). Returns all that the cache holds, after look_back."""
        start, end, n = self.length, self.length + k.size(1), self.n_look_back
        self.keys[:, start + 1 : end + 1, :n], self.keys[:, start:end, n:] = k[:, :, :n], k[:, :, n:]
        self.values[:, start:end], self.length = v, end
        return self.keys[:, :end], self.values[:, :end]


def sample_next_token(logits, temperature, top_k, top_p, generator):
    """
    logits (B, V) -> one id per row (B,). Drawn from the top_k most likely ids (0: from all), and among them
    from the smallest set whose probability reaches top_p (nucleus sampling, arXiv 1904.09751).
    Temperature 0 takes the most likely id, and so does one that is too small for fp32.
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # the most likely id first
    p = torch.softmax((logits - logits[:, :1]) / temperature, dim=-1)
    p[:, 1:] = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)[:, 1:]  # never drop the most likely id
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


# -----------------------------------------------------------------------------
# The same mathematics, faster


class RMSNorm(torch.autograd.Function):
    """norm(x). The backward pass uses the result, which the next layer saves anyway, instead of x."""

    @staticmethod
    def forward(ctx, x):
        x_float = x.float()
        scale = (x_float.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        y = (x_float * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors  # only once: recomputed blocks do not keep them for a second time
        dtype, grad, y = y.dtype, grad.float(), y.float()
        return ((grad - y * (grad * y).mean(-1, keepdim=True)) * scale).to(dtype)


class ReluSquared(torch.autograd.Function):
    """
    y = relu(x)² (arXiv 2109.08668). The backward pass needs only y: the derivative is 2 * √y.
    In fp16, whose largest number is 65,504, x is clamped to 255.
    """

    @staticmethod
    def forward(ctx, x):
        y = (x.clamp(0, 255) if x.dtype == torch.float16 else F.relu(x)).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 2 * grad * y.sqrt()


class BlockedAttention(torch.autograd.Function):
    """
    Causal attention as plain matrix products, CPU_BLOCK queries at a time, each block with the keys up to its
    end. On a CPU it takes half the time of PyTorch's flash kernel. Shapes: (B, n_head, T, head_dim).
    """

    @staticmethod
    def forward(ctx, q, k, v, scale):
        shape = q.shape
        q, k, v = (scale * q).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * n_head, T, head_dim)
        future = torch.ones(CPU_BLOCK, CPU_BLOCK, dtype=torch.bool, device=q.device).triu(1)
        y, probabilities = torch.empty_like(q), []
        for start, end in blocks(q.size(1)):
            scores = q[:, start:end] @ k[:, :end].mT  # (B * n_head, queries, end)
            scores[:, :, start:].masked_fill_(future[: end - start, : end - start], -math.inf)
            probabilities.append(scores.softmax(-1))
            y[:, start:end] = probabilities[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale = scale
        return y.view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *probabilities = ctx.saved_tensors
        shape, grad = grad.shape, grad.flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), p in zip(blocks(q.size(1)), probabilities):
            grad_p = grad[:, start:end] @ v[:, :end].mT
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:end] = grad_scores @ k[:, :end]
            grad_k[:, :end].baddbmm_(grad_scores.mT, q[:, start:end])
            grad_v[:, :end].baddbmm_(p.mT, grad[:, start:end])
        return (ctx.scale * grad_q).view(shape), grad_k.view(shape), grad_v.view(shape), None


def blocks(T):
    """[(first query, end), …]: T queries in blocks of CPU_BLOCK."""
    return [(start, min(start + CPU_BLOCK, T)) for start in range(0, T, CPU_BLOCK)]


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    The loss of GPT.forward without ever storing all N × V logits: one chunk of rows after the other, and the
    forward pass computes each chunk's gradients at once (arXiv 2410.10989, section 3.2).
    x: (N, C) in the compute dtype; weight: the head's, fp32 (padded V, C); targets: (N,).

    In fp16 the gradients of the logits are scaled before they are cast, by a number that does not depend on
    the loss scale: so none of these products overflows at a loss scale that suits the other layers.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunks, training):
        w, losses, grad_x, grad_w = weight.to(x.dtype), [], [], 0.0
        is_half = x.dtype == torch.float16
        in_place = x.device.type == "cpu" and not torch.compiler.is_compiling()
        loss_and_grad = loss_and_grad_in_place if in_place else loss_and_grad_fused
        for rows, target in zip(x.chunk(chunks), targets.chunk(chunks)):
            loss, grad = loss_and_grad((rows @ w.T).float(), target[:, None], vocab_size)
            losses.append(loss)
            if training:
                grad = (grad * FP16_GRAD_SCALE if is_half else grad).to(x.dtype)
                grad_x.append(grad @ w)
                grad_w = grad_w + (product_in_fp32(grad.T, rows) if is_half else (grad.T @ rows).float())
        if training:
            ctx.save_for_backward(torch.cat(grad_x), grad_w)
        return torch.cat(losses).sum()  # only here: Inductor delays a sum per chunk and keeps N × V logits

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        if grad_x.dtype == torch.float16:
            grad_loss = grad_loss / FP16_GRAD_SCALE
        return (grad_x.float() * grad_loss).to(grad_x.dtype), grad_w * grad_loss, None, None, None, None


def product_in_fp32(a, b):
    """a @ b for fp16 matrices, with an fp32 result: a sum over thousands of rows may exceed 65,504."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # CPUs have no such product


def loss_and_grad_fused(logits, targets, vocab_size):
    """
    Uncapped fp32 logits (n, padded V) and targets (n, 1) -> (loss of each row in nats (n, 1), gradient of the
    sum of the losses with respect to the logits (n, padded V)).

    Written for torch.compile, which fuses it into one or two passes. It uses powers of 2 and square roots,
    because a GPU has one instruction for each: 45 instructions per logit on an H100; tanh and exp take 99.
    SOFTCAP * tanh(x / SOFTCAP) = SOFTCAP * (2 * s - 1) with s = sigmoid(2 x / SOFTCAP); the -1 is left out,
    because a constant added to all logits does not change the softmax.
    """
    columns = torch.arange(logits.size(1), dtype=torch.int32, device=logits.device)
    targets, counted = targets.int(), targets >= 0
    s = (1 + (logits * (-2 / SOFTCAP / math.log(2))).exp2()).rsqrt().square()
    capped = (s * (2 * SOFTCAP / math.log(2))).masked_fill(columns >= vocab_size, -math.inf)  # in bits
    log_sum = capped.exp2().sum(-1, keepdim=True).log2()  # the sum is below 2^(44 + 16): no overflow
    loss = (log_sum - capped.gather(1, targets.clamp_min(0).long())) * counted * math.log(2)
    grad = (capped - log_sum).exp2() - (columns == targets).float()  # with respect to the capped logits
    return loss, grad * counted * (4 * s * (1 - s))


def loss_and_grad_in_place(logits, targets, vocab_size):
    """The same for uncompiled CPU code: in place, in few passes. Overwrites logits."""
    chosen, counted = targets.clamp_min(0), targets >= 0
    s = logits.mul_(2 / SOFTCAP).sigmoid_()
    capped = 2 * SOFTCAP * s
    capped[:, vocab_size:] = -math.inf
    p = torch.softmax(capped, dim=-1)  # at least e^-30 / V: no underflow
    p_chosen = p.gather(1, chosen)
    p.scatter_(1, chosen, p_chosen - 1)  # the gradient with respect to the capped logits
    grad = torch.ops.aten.sigmoid_backward.grad_input(p, s, grad_input=p)  # p * s * (1 - s)
    return -p_chosen.log() * counted, grad.mul_(4 * counted)


def attention_backend(config, dtype, device):
    """Name of the kernel that causal_attention uses for this shape: "blocked", "flash", "cudnn" and so on."""
    if device.type == "cpu" and config.max_seq_len <= CPU_LENGTH:
        return "blocked"
    if device.type == "mps":
        return "Metal"
    shape = (1, config.n_head, config.max_seq_len, config.head_dim)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return chosen.name.removesuffix("_ATTENTION").lower()
