"""The model against independent references: roles, FLOPs, causality, attention, rotary positions, loss."""

import copy
import math
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    QK_SCALE,
    BlockedAttention,
    GPTConfig,
    ReluSquared,
    ShapeError,
    apply_rotary,
    attention_backend,
    causal_attention,
    dropout,
    look_back,
    norm,
    rotary_tables,
    spread,
)


def build(seed=0, **shape):
    small = {"vocab_size": 300, "max_seq_len": 32, "n_layer": 3, "n_head": 2, "n_embd": 64}
    config = GPTConfig(**{**small, **shape})
    config.n_look_back = config.n_head // 2
    with torch.device("meta"):
        model = GPT(config)
    model.init_weights("cpu", seed)
    return model


def wake(model):
    """Add noise to all weights, so that those that start at zero carry signal, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def tokens_of(model, B=2, T=32, seed=0):
    return torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def test_weights_depend_only_on_the_seed():
    one, same, other = build(3), build(3), build(4)
    torch.manual_seed(99)
    one.init_weights("cpu", 3)
    for (name, a), b in zip(one.named_parameters(), same.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not any(p.is_meta for p in one.parameters())


def test_initial_loss_is_that_of_a_uniform_distribution():
    model = build()
    tokens = tokens_of(model)
    assert model(tokens, tokens).item() / tokens.numel() == pytest.approx(math.log(300), abs=0.01)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_norm_and_relu_squared_and_their_gradients(dtype, rounding):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[0] = 0  # a row of zeros
    x[1:9] *= torch.logspace(-3, 4, 8)[:, None]
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ours, reference in (
        (norm, lambda x: torch.nn.functional.rms_norm(x, (64,), eps=1e-6)),
        (ReluSquared.apply, lambda x: torch.relu(x) ** 2),
    ):
        a, b = (x.detach().to(dtype).to(kind).requires_grad_() for kind in (dtype, torch.float64))
        y, expected = ours(a), reference(b)
        assert y.dtype == dtype
        (y * weight).sum().backward()
        (expected * weight.double()).sum().backward()
        for found, wanted in ((y, expected), (a.grad, b.grad)):
            error = (found.double() - wanted).norm(dim=1)
            assert (error <= rounding * wanted.norm(dim=1).clamp_min(1e-30)).all(), error
            assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    "dtype, compiled, rounding",
    [
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 5e-2),
        (torch.float16, False, 1e-2),
        pytest.param(torch.float32, True, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_the_chunked_loss_equals_the_loss(dtype, compiled, rounding):
    single = wake(build())  # 300 tokens of vocabulary, padded to 320
    single.compute_dtype = dtype
    chunked = copy.deepcopy(single)
    tokens = tokens_of(single, B=3, T=31)  # 93 rows: 7 chunks of 12 and one of 9
    targets = tokens.roll(-1, 1)
    targets[0, :7] = targets[2, -1] = -1
    if compiled:
        chunked.head.compile(dynamic=False)
    expected = single(tokens, targets)
    (expected / 93).backward()
    chunked.head.max_logits = 93 * 320 // 5  # 8 chunks
    loss = chunked(tokens, targets)
    (loss / 93).backward()
    assert compiled or "ChunkedCrossEntropy" in loss.grad_fn.name()
    assert loss.item() == pytest.approx(expected.item(), rel=rounding)
    with torch.no_grad():
        assert chunked(tokens, targets).item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, p), q in zip(single.named_parameters(), chunked.parameters()):
        difference = (p.grad - q.grad).norm() / p.grad.norm()
        assert difference < rounding, name


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_parts_equal_the_model_and_generation_compiles_nothing():
    model = wake(build())
    compiled = copy.deepcopy(model)
    compiled.compile_parts()
    tokens = tokens_of(model)
    torch.compiler.reset()  # other tests may have compiled the same graphs
    torch._dynamo.utils.counters.clear()
    for m in (model, compiled):
        m(tokens, tokens).backward()
    for (name, p), q in zip(model.named_parameters(), compiled.named_parameters()):
        rounding = 1e-5 if p.dim() > 1 else 1e-3  # a scalar's gradient is a sum of large numbers
        assert name == q[0] and (p.grad - q[1].grad).norm() < rounding * p.grad.norm(), name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4  # embedding, block, block with value embeddings, head
    assert [*compiled.generate([[1, 2, 3]], 299, 5)] == [*model.generate([[1, 2, 3]], 299, 5)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    "depth, aspect_ratio, head_dim, shape",
    [
        (1, 64, None, (1, 1, 64)),
        (1, None, None, (1, 2, 64)),
        (2, None, None, (2, 2, 64)),
        (12, None, None, (12, 6, 128)),
        (4, 64, None, (4, 4, 64)),
        (9, 64, None, (9, 5, 128)),
        (12, 64, None, (12, 6, 128)),
        (20, 64, None, (20, 10, 128)),
        (2, 32, 32, (2, 2, 32)),
        (6, 100, 64, (6, 10, 64)),
    ],
)
def test_the_shape_follows_from_depth(depth, aspect_ratio, head_dim, shape):
    config = GPTConfig.of_depth(depth, 300, 32, aspect_ratio, head_dim)
    assert (config.n_layer, config.n_head, config.head_dim) == shape
    width = depth * aspect_ratio if aspect_ratio else max(2, depth) * 64
    assert config.n_embd >= width > config.n_embd - config.head_dim
    assert (config.vocab_size, config.max_seq_len) == (300, 32)


@pytest.mark.parametrize(
    "depth, aspect_ratio, head_dim, message", [(4, 64, 33, "even"), (1, 16, 16, "width of 16")]
)
def test_invalid_shapes_raise(depth, aspect_ratio, head_dim, message):
    with pytest.raises(ShapeError, match=message) as error:
        GPTConfig.of_depth(depth, 300, 32, aspect_ratio, head_dim)
    assert error.value.exit_status == 2 and len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("n_layer", [1, 2, 3, 4])
def test_every_parameter_has_exactly_one_role(n_layer):
    model = build(n_layer=n_layer)
    roles = model.parameter_roles()
    names = [name for group in roles.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(names) == len(set(names))
    assert all(p.ndim == 2 and name.startswith("blocks.") for name, p in roles["matrix"].items())
    assert str(n_layer - 1) in model.value_embeddings  # the last layer always has one
    assert sum(model.num_params().values()) == sum(p.numel() for p in model.parameters())
    assert model.num_params()["embedding"] == 320 * 64


@pytest.mark.parametrize(
    "depth, rows, vocab_size, gigabytes",
    [
        *[(12, 64, 50_257, 32.73), (12, 32, 50_257, 16.70), (12, 16, 50_257, 9.26), (12, 4, 50_257, 4.49)],
        (20, 16, 32_768, 22.74),
    ],
)
def test_activation_bytes_match_pytorch_plans_for_an_h100(depth, rows, vocab_size, gigabytes):
    with torch.device("meta"):
        model = GPT(GPTConfig.of_depth(depth, vocab_size, 2048), torch.bfloat16)
    assert model.activation_bytes(rows * 2048) == pytest.approx(gigabytes * 1e9, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recomputed_blocks_change_no_bit(dtype):
    model, calls = wake(build()), []
    model.compute_dtype = dtype
    recomputed = copy.deepcopy(model)
    recomputed.recompute = True
    for name, m in (("kept", model), ("recomputed", recomputed)):
        m.blocks[1].mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    tokens = tokens_of(model)
    losses = [m(tokens, tokens) for m in (model, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses) and calls == ["kept", "recomputed", "recomputed"]
    for (name, p), q in zip(model.named_parameters(), recomputed.parameters()):
        assert torch.equal(p.grad, q.grad), name
    assert [*recomputed.generate([[1, 2]], 299, 3)] == [*model.generate([[1, 2]], 299, 3)]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("how", ["graph", "parts"])
def test_recomputed_blocks_compile(how):
    model = wake(build(n_layer=2))
    compiled, tokens = copy.deepcopy(model), tokens_of(model)
    compiled.recompute = True
    torch.compiler.reset()
    if how == "graph":
        compiled.compile(dynamic=False)
    else:
        compiled.compile_parts()
    for m in (model, compiled):
        m(tokens, tokens).backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters()):
        assert (p.grad - q.grad).norm() < (1e-5 if p.dim() > 1 else 1e-3) * p.grad.norm(), name


def test_activation_bytes_of_recomputed_blocks_match_pytorch_plans_for_an_h100():
    with torch.device("meta"):
        model = GPT(GPTConfig(50_257, 2048, n_layer=4, n_head=6, n_embd=768), torch.bfloat16)
    assert model.activation_bytes(16 * 2048, recompute=True) == pytest.approx(2.31e9, rel=0.05)


def test_recomputing_blocks_needs_less_memory_in_every_model():
    for depth, T in [(depth, T) for depth in (1, 2, 12, 32) for T in (64, 2048, 65_536)]:
        with torch.device("meta"):
            model = GPT(GPTConfig.of_depth(depth, 50_257, T), torch.bfloat16)
        assert model.activation_bytes(T, recompute=True) <= model.activation_bytes(T)
        assert model.training_bytes(T, 0) - model.training_bytes(T, 0, True) == pytest.approx(
            model.activation_bytes(T) - model.activation_bytes(T, True)
        )


def test_training_bytes_add_up():
    model = build(n_layer=2)
    weights = sum(4 * p.numel() for p in model.parameters())
    expected = 2 * weights + 1000 + model.activation_bytes(64)  # weights, gradients, optimizer, activations
    assert model.training_bytes(64, 1000) == expected


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_every_parameter_gets_a_gradient(n_layer):
    model = wake(build(n_layer=n_layer))
    tokens = tokens_of(model)
    model(tokens, tokens).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_flops_per_token_by_hand():
    model = build(n_layer=4, n_head=2, n_embd=128, max_seq_len=64, vocab_size=256)
    block = 4 * 128 * 128 + 2 * 128 * 512  # q, k, v, output; up, down
    weights = 4 * block + 2 * 12 * 2 + 24 + 128 * 256  # two value gates, the smear gate, the head
    assert model.num_flops_per_token() == 6 * weights + 12 * 4 * 128 * 64
    assert model.num_flops_per_token(exact_causal=True) == 6 * weights + 12 * 4 * 128 * 65 / 2


def test_flops_of_the_linear_layers_against_torch():
    model = build(n_layer=2, n_embd=128, vocab_size=256)
    tokens = tokens_of(model)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, tokens).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))  # not attention
    attention = 12 * 2 * 128 * 32
    # the smear gate looks at T - 1 positions; nothing else is approximate
    assert products == (model.num_flops_per_token() - attention) * tokens.numel() - 6 * 24 * len(tokens)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("T", [31, 32])
def test_later_tokens_never_leak(grad, T):
    model = wake(build())
    with torch.set_grad_enabled(grad):
        tokens = tokens_of(model, T=T)
        before = model(tokens)
        for place in (1, 7, T - 1):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 300
            after = model(changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place], before[:, place])


def test_attention_against_the_formula():
    q, k, v = torch.randn(3, 2, 9, 4, 8, generator=torch.Generator().manual_seed(0)).double().unbind()
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(4):
            for t in range(9):
                scores = torch.stack([q[b, t, h] @ k[b, s, h] for s in range(t + 1)])
                p = torch.softmax(scores * QK_SCALE**2 / math.sqrt(8), dim=0)
                expected[b, t, h] = p @ v[b, : t + 1, h]
    torch.testing.assert_close(causal_attention(q, k, v), expected)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_first_heads_get_the_key_of_the_previous_token(n):
    k = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = k.clone()
    for h in range(n):
        for t in range(5):
            expected[:, t, h] = k[:, t - 1, h] if t else 0
    assert torch.equal(look_back(k, n), expected)


def test_half_of_the_heads_look_back_but_none_in_old_checkpoints():
    assert [GPTConfig.of_depth(depth, 512, 64).n_look_back for depth in (1, 2, 3, 12)] == [1, 1, 1, 3]
    saved = {"vocab_size": 300, "max_seq_len": 32, "n_layer": 3, "n_head": 2, "n_embd": 64}
    assert GPTConfig(**saved).n_look_back == 0


@pytest.mark.slow
def test_one_layer_learns_to_copy():
    """Rows of 32 random tokens, twice: predicting the second half takes looking up the first."""
    model = build(n_layer=1, max_seq_len=64, n_embd=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        half = torch.randint(300, (16, 32), generator=generator)
        tokens = torch.cat([half, half], dim=1)
        targets = tokens[:, 1:].clone()
        targets[:, :32] = -1
        loss = model(tokens[:, :-1], targets) / (16 * 31)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2 * math.log(300), loss


def test_dropout_drops_a_share_at_random_and_keeps_the_mean():
    x, keys = torch.ones(4, 256, 64), torch.arange(4, dtype=torch.int32)
    y = dropout(x, 0.4, keys)
    assert torch.unique(y).tolist() == pytest.approx([0, 1 / 0.6])
    dropped = (y == 0).float()
    for share in (dropped.mean((1, 2)), dropped.mean((0, 2)), dropped.mean((0, 1))):  # rows, places, channels
        deviations = (share - 0.4) / math.sqrt(0.24 / (dropped.numel() / share.numel()))
        assert deviations.square().mean() < 2
    others = dropout(x, 0.4, keys + 4) == 0, dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(1, 2)
    for other in others:  # independent: both drop a place with probability 0.16
        assert (dropped * other.float()).mean() == pytest.approx(0.16, abs=0.005)
    assert torch.equal(dropout(x[2:], 0.4, keys[2:]), y[2:])


@pytest.mark.parametrize("T", [1, 128, 300])
def test_blocked_attention_equals_attention(T):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, T, 16, generator=generator, dtype=torch.float64).unbind()
    outcomes = []
    for attention in (
        lambda q, k, v: BlockedAttention.apply(q, k, v, 0.3),
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention(*inputs)
        (y * weight).sum().backward()
        outcomes.append([y, *(x.grad for x in inputs)])
    for found, expected in zip(*outcomes):
        torch.testing.assert_close(found, expected)


def test_rotary_products_depend_only_on_the_distance():
    cos, sin = rotary_tables(40, 16, "cpu")
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    rotated_q, rotated_k = (apply_rotary(x.expand(1, 40, 1, 16), cos, sin)[0, :, 0] for x in (q, k))
    products = rotated_q @ rotated_k.T
    for distance in (0, 3, 17):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(40))


def test_the_loss_is_a_sum_without_negative_targets():
    model = wake(build())
    tokens, targets = tokens_of(model), tokens_of(model, seed=1)
    targets[0, 5:] = -1
    logits = model(tokens).double()
    p = torch.log_softmax(logits, dim=-1)
    expected = -sum(p[b, t, targets[b, t]] for b in range(2) for t in range(32) if targets[b, t] >= 0)
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.shape == (2, 32, 300) and logits.abs().max() <= 15


def test_the_padding_of_the_vocabulary_has_no_logits():
    model = wake(build(vocab_size=257))
    assert model.head.weight.shape[0] == 320
    assert model(tokens_of(model)).shape[-1] == 257


def test_norm_has_unit_mean_square():
    x = 7 * torch.randn(5, 64)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_later_tokens_never_leak_on_cuda(grad):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    config = GPTConfig(vocab_size=300, max_seq_len=256, n_layer=2, n_head=2, n_embd=256)
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
    model.init_weights("cuda", 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    with torch.set_grad_enabled(grad):
        tokens = torch.randint(300, (2, 256), device="cuda")
        before, changed = model(tokens), tokens.clone()
        changed[:, 100] = (changed[:, 100] + 1) % 300
        assert torch.equal(model(changed)[:, :100], before[:, :100])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_backend_names_the_kernel_that_runs(head_dim):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = GPTConfig(max_seq_len=256, n_head=2, n_embd=2 * head_dim)
    name = attention_backend(config, torch.bfloat16, torch.device("cuda"))
    q, k, v = torch.randn(3, 1, 256, 2, head_dim, device="cuda", dtype=torch.bfloat16).unbind()
    only = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
    with sdpa_kernel(only):  # raises if this kernel cannot run
        heads = (x.transpose(1, 2) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=QK_SCALE**2 / head_dim**0.5
        )
    assert torch.equal(causal_attention(q, k, v), expected.transpose(1, 2))


# -----------------------------------------------------------------------------
# fp16, from 6e-8 to 65,504: each test exceeds one of these numbers where a plain computation would


def half(values):
    return values.to(torch.float16).requires_grad_()


def test_fp16_relu_squared_of_large_numbers_is_finite():
    x = half(torch.tensor([-1e4, 3.0, 255.0, 256.0, 300.0, 65_504.0, math.inf]))  # 256² = 65,536
    y = ReluSquared.apply(x)
    y.sum().backward()
    assert y.tolist() == [0, 9, 65_024, 65_024, 65_024, 65_024, 65_024]
    assert x.grad.tolist() == [0, 6, 510, 510, 510, 510, 510]
    assert ReluSquared.apply(half(torch.tensor([math.nan]))).isnan()


def test_fp16_norm_of_large_numbers_is_exact():
    x = half(torch.full((2, 64), 1000.0))  # its squares are 1e6
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.ones(2, 64).half()) and x.grad.isfinite().all()


def test_fp16_gradient_of_a_scalar_is_a_sum_in_fp32():
    x, scalars = torch.ones(8, 512, 64).half(), torch.ones(3, 2, requires_grad=True)
    first, _, last = spread(scalars, x).unbind()
    (first[0] * x + last[1] * x).float().sum().backward()
    assert scalars.grad.tolist() == [[x.numel(), 0], [0, 0], [0, x.numel()]]  # 262,144
    assert torch.equal(spread(scalars, x.bfloat16()), scalars.bfloat16())


def loss_of(x, weight, targets, dtype, factor):
    """(loss, gradient of x, gradient of the weight) of factor * the loss; the gradients / factor, in fp64."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=len(weight), n_head=1, n_embd=x.size(1)), dtype)
    head = model.head.to_empty(device="cpu")
    head.max_logits = 2**40  # a single chunk
    head.weight.data.copy_(weight)
    x = x.to(dtype, copy=True).requires_grad_()
    loss = head(x[None], targets[None])
    (loss * factor).backward()
    return loss.item(), *((g.double() / factor) for g in (x.grad, head.weight.grad))


def test_fp16_logits_that_overflow_before_the_softcap_saturate():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 64, generator=generator), 6e3 * torch.randn(64, 64, generator=generator)
    assert (x.half() @ weight.half().T).isinf().any()
    loss, *grads = loss_of(x, weight, torch.arange(4), torch.float16, 1.0)
    assert math.isfinite(loss) and all(g.isfinite().all() for g in grads)


def test_fp16_weight_gradient_of_the_head_is_a_sum_in_fp32():
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.1 * torch.randn(4096, 64, generator=generator)  # alike, and all with the same target
    weight, targets = 0.01 * torch.randn(128, 64, generator=generator), torch.zeros(4096, dtype=torch.int64)
    _, _, exact = loss_of(x, weight, targets, torch.float32, 1.0)
    _, _, found = loss_of(x, weight, targets, torch.float16, 64.0)
    assert 64 * exact.abs().max() > 65_504
    assert (found - exact).norm() < 2e-3 * exact.norm()


def test_fp16_gradients_of_50257_small_probabilities_are_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, generator=generator)
    weight = torch.randn(50_304, 32, generator=generator) * 0.5
    targets = torch.randint(50_304, (16,), generator=generator)
    factor = 2.0**16 / 2**21  # loss scale / number of targets: a probability of 2e-5 becomes 6e-7
    _, exact_x, exact_w = loss_of(x, weight, targets, torch.float32, factor)
    _, found_x, found_w = loss_of(x, weight, targets, torch.float16, factor)
    others = torch.ones(50_304, dtype=torch.bool)
    others[targets] = False
    assert (found_w - exact_w)[others].norm() < 1e-2 * exact_w[others].norm()
    assert (found_x - exact_x).norm() < 1e-2 * exact_x.norm()
