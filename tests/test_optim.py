"""
The optimizer against independent references, and several gloo processes against one process.

References: torch.optim.AdamW, torch.optim.Muon, and `Reference`: Muon for one matrix at a time in float64.
"""

import copy
import functools
import itertools
import math
import multiprocessing
import os
import shutil
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import optim_muon
from optim_muon import (
    POLAR_EXPRESS,
    QUINTIC,
    MuonAdamW,
    checksums,
    equilibrate_rows,
    optimizer_state_bytes,
    orthogonalize,
)

torch.set_num_threads(1)
TEXTBOOK = {"orthogonalizer": "quintic", "beta2": None, "equilibrate": False, "cautious": False}
SHAPES = {"tall": (24, 10), "wide": (8, 20), "square": (12, 12), "column": (9, 1)}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(shapes, seed=0, dtype=torch.float32):
    values = [randn(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes.values())]
    return dict(zip(shapes, map(torch.nn.Parameter, values)))


def set_gradients(params, step):
    for i, p in enumerate(params.values()):
        p.grad = (randn(*p.shape, seed=1000 * (step + 1) + i) * 10 ** (i % 3 - 2)).to(p.dtype)


def lr_multiplier(step, steps):
    """A schedule for the tests: two steps of warm-up, then linearly down."""
    return min(1, (step + 1) / 2) * (1 - 0.9 * step / steps)


def snapshot(optimizer):
    """Copies of all weights and all state, for comparison bit by bit."""
    weights = {n: p.detach().clone() for b in optimizer.buckets for n, p in zip(b.names, b.params)}
    state = {f"{b.names} {k}": t.clone() for b in optimizer.buckets for k, t in b.state.items()}
    return weights | state


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# -----------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("reference_dtype", [torch.float32, torch.float64])
def test_adamw_equals_torch_with_schedules_on(reference_dtype):
    shapes = {"table": (50, 8), "vector": (17,), "scalar": ()}
    ours = parameters(shapes)
    theirs = {name: torch.nn.Parameter(p.detach().to(reference_dtype)) for name, p in ours.items()}
    big = dict(betas=(0.8, 0.995), eps=1e-10, weight_decay=0.1)
    small = dict(betas=(0.96, 0.95), eps=1e-8, weight_decay=0.0)
    split = [(["table"], big), (["vector", "scalar"], small)]
    groups = [dict(kind="adamw", lr=0.03, params={n: ours[n] for n in names}, **h) for names, h in split]
    optimizer = MuonAdamW(groups)
    groups = [dict(params=[theirs[n] for n in names], **h) for names, h in split]
    reference = torch.optim.AdamW(groups, lr=0.03, foreach=False, fused=False)
    for step in range(50):
        set_gradients(ours, step)
        for name, p in ours.items():
            theirs[name].grad = p.grad.to(reference_dtype)
        for group in optimizer.param_groups + reference.param_groups:
            group["lr"] = 0.03 * lr_multiplier(step, 50)
        optimizer.step()
        reference.step()
    for name, p in ours.items():
        torch.testing.assert_close(p.to(reference_dtype), theirs[name], rtol=1e-6, atol=1e-6)


def test_adamw_computes_in_fp32_for_any_dtype():
    ours = parameters({"table": (40, 6)}, dtype=torch.bfloat16)
    reference_weight = torch.nn.Parameter(ours["table"].detach().float())
    optimizer = MuonAdamW([dict(kind="adamw", lr=0.01, params=ours)])
    reference = torch.optim.AdamW([reference_weight], lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0)
    for step in range(20):
        set_gradients(ours, step)
        reference_weight.grad = ours["table"].grad.float()
        optimizer.step()
        reference.step()
        reference_weight.data.copy_(reference_weight.bfloat16())  # only the stored weight is rounded
    assert optimizer.state_dict()["state"]["table"]["exp_avg_sq"].dtype == torch.float32
    assert ours["table"].dtype == torch.bfloat16
    assert torch.equal(ours["table"].float(), reference_weight)


def test_memory_layout_does_not_matter():
    contiguous = parameters({"table": (40, 6), "matrix": (6, 10)})
    transposed = {name: torch.nn.Parameter(p.detach().T.contiguous().T) for name, p in contiguous.items()}
    for params in (contiguous, transposed):
        groups = [dict(kind="adamw", lr=0.1, params={"table": params["table"]}, weight_decay=0.1)]
        optimizer = MuonAdamW(groups + [dict(kind="muon", lr=0.1, params={"matrix": params["matrix"]})])
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
    for name, p in contiguous.items():
        assert torch.equal(p, transposed[name])


# -----------------------------------------------------------------------------
# Muon


class Reference:
    """Muon for one matrix in float64, directly from the papers: polynomials of the singular values."""

    def __init__(self, weight, coefficients=QUINTIC, safety=1.0, beta2=None, refined=False):
        self.weight, self.coefficients, self.safety = weight.detach().double(), coefficients, safety
        self.beta2, self.momentum_buffer, self.second = beta2, 0.0, 0.0
        self.equilibrate = self.cautious = refined

    def step(self, grad, lr, momentum, weight_decay):
        grad, (rows, cols) = grad.double(), self.weight.shape
        self.momentum_buffer = momentum * self.momentum_buffer + (1 - momentum) * grad
        nesterov = (1 - momentum) * grad + momentum * self.momentum_buffer
        if self.equilibrate:
            lengths = nesterov.norm(dim=1, keepdim=True)
            nesterov = nesterov / lengths * (lengths**2).mean() ** 0.5
        U, S, Vt = torch.linalg.svd(nesterov, full_matrices=False)
        S = S / (S.norm() * self.safety)
        for a, b, c in self.coefficients:
            S = a * S + b * S**3 + c * S**5
        update = U * S @ Vt
        if self.beta2 is not None:  # NorMuon
            norm, mean_square = update.norm(), (update**2).mean(1 if rows >= cols else 0, keepdim=True)
            self.second = self.beta2 * self.second + (1 - self.beta2) * mean_square
            update = update / self.second.sqrt()
            update = update * norm / update.norm()
        decayed = (update * self.weight >= 0) if self.cautious else 1.0
        self.weight = self.weight - lr * weight_decay * decayed * self.weight
        self.weight = self.weight - lr * max(1, rows / cols) ** 0.5 * update


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refined", [False, True])
def test_muon_equals_a_float64_reference(shape, refined):
    params = parameters({"a": SHAPES[shape], "b": SHAPES[shape]})  # matrices of one shape are one stack
    refinements = dict(coefficients=POLAR_EXPRESS, safety=1.02, beta2=0.9, refined=True)
    references = {name: Reference(p, **(refinements if refined else {})) for name, p in params.items()}
    optimizer = MuonAdamW([dict(kind="muon", lr=0.02, params=params, **({} if refined else TEXTBOOK))])
    (group,) = optimizer.param_groups
    for step in range(10):
        set_gradients(params, step)
        group["lr"] = 0.02 * lr_multiplier(step, 10)
        group["momentum"] = 0.85 + 0.01 * step
        group["weight_decay"] = 0.3 * (1 - step / 10)
        optimizer.step()
        for name, reference in references.items():
            reference.step(params[name].grad, group["lr"], group["momentum"], group["weight_decay"])
    for name, reference in references.items():
        torch.testing.assert_close(params[name].double(), reference.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_textbook_muon_equals_torch(shape, dtype):
    params, theirs = parameters({"a": SHAPES[shape]}), parameters({"a": SHAPES[shape]})
    start = params["a"].detach().clone()
    group = dict(kind="muon", lr=0.02, momentum=0.9, weight_decay=0.2, params=params, **TEXTBOOK)
    optimizer = MuonAdamW([group], orthogonalize_dtype=dtype)
    reference = torch.optim.Muon(
        theirs.values(), lr=0.02, momentum=0.9, weight_decay=0.2, adjust_lr_fn="original"
    )  # Newton–Schulz in bf16
    for step in range(20):
        set_gradients(params, step)
        theirs["a"].grad = params["a"].grad.clone()
        for g in optimizer.param_groups + reference.param_groups:
            g["lr"] = 0.02 * lr_multiplier(step, 20)
        optimizer.step()
        reference.step()
    assert relative(params["a"] - start, theirs["a"] - start) < 0.02


def with_spectrum(rows, cols, spectrum, seed=0):
    """Two random matrices with these singular values, all others 0."""
    U = torch.linalg.qr(randn(2, rows, rows, seed=seed).double())[0][..., : len(spectrum)]
    V = torch.linalg.qr(randn(2, cols, cols, seed=seed + 1).double())[0][..., : len(spectrum)]
    return (U * torch.tensor(spectrum) @ V.mT).float()


@pytest.mark.parametrize(
    "rows, cols, rank", [(96, 32, 32), (32, 96, 32), (48, 48, 48), (64, 32, 5), (32, 64, 5), (48, 48, 5)]
)
@pytest.mark.parametrize("method, low, high", [("polar_express", 0.858, 1.142), ("quintic", 0.681, 1.204)])
@pytest.mark.parametrize(
    "dtype, slack", [(torch.float32, 1e-3), (torch.bfloat16, 0.06), (torch.float16, 0.01)]
)
def test_singular_values_are_in_the_published_interval(rows, cols, rank, method, low, high, dtype, slack):
    spectrum = torch.logspace(0, -1.5, rank, dtype=torch.float64).tolist()
    for magnitude in (1e-4, 1.0, 1e4):
        G = magnitude * with_spectrum(rows, cols, spectrum)
        O = orthogonalize(G, dtype, method)  # noqa: E741
        values = torch.linalg.svdvals(O.double())
        assert low - slack < values[:, :rank].min()
        assert values.max() < high + slack  # bf16's rounding errors fill the null space
        if dtype == torch.float32:
            assert rank == min(rows, cols) or values[:, rank:].max() < 1e-2
            # the same singular vectors: Gᵀ·O is symmetric and positive
            product = G.double().mT @ O.double() / magnitude
            assert (product - product.mT).norm() < 1e-3 * product.norm()
            assert torch.linalg.eigvalsh(product + product.mT).min() > -1e-3


def test_small_singular_values_stay_below_the_interval():
    spectrum = torch.logspace(0, -8, 32, dtype=torch.float64).tolist()
    for rows, cols in ((32, 128), (128, 32), (32, 32)):
        G = with_spectrum(rows, cols, spectrum)
        values = torch.linalg.svdvals(orthogonalize(G).double())
        expected = torch.tensor(spectrum, dtype=torch.float64)
        expected = expected / (expected.norm() * 1.02)
        for a, b, c in POLAR_EXPRESS:
            expected = a * expected + b * expected**3 + c * expected**5
        assert torch.isfinite(values).all() and values.max() < 1.143
        expected = expected.sort(descending=True)[0].expand(2, -1)
        torch.testing.assert_close(values, expected, atol=5e-3, rtol=0)


class TF32(TorchDispatchMode):
    """Batched products as on an A100: factors rounded to 10 bits, sums in fp32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            rounded = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in args[-2:]]
            args = (*args[:-2], *rounded)
        return func(*args, **(kwargs or {}))


def test_in_tf32_the_steps_are_applied_to_the_matrix_itself():
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 64, generator=generator))[0] for n in (64, 256))
    G = (U * torch.logspace(0, -4, 64)) @ V.T  # ill-conditioned
    exact = orthogonalize(G[None])

    def error(tf32):
        with TF32():
            return ((orthogonalize(G[None], tf32=tf32) - exact).norm() / exact.norm()).item()

    assert error(tf32=True) < 0.02 and error(tf32=False) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_change_nothing(dtype):
    params = parameters({**SHAPES, "vector": (5,)})
    vector = params.pop("vector")
    group = dict(kind="adamw", lr=0.1, params={"vector": vector})
    optimizer = MuonAdamW([dict(kind="muon", lr=0.1, params=params), group], orthogonalize_dtype=dtype)
    before = {name: p.detach().clone() for name, p in {**params, "vector": vector}.items()}
    for _ in range(3):
        for p in [*params.values(), vector]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert optimizer.skipped == 0 and optimizer.grad_norm == 0
    assert_same_bits(before, {**params, "vector": vector})


def test_a_stack_in_pieces_gives_the_same_weights(monkeypatch):
    whole, pieces = parameters(dict.fromkeys("abcde", (8, 20))), parameters(dict.fromkeys("abcde", (8, 20)))
    for params, numel in ((whole, 10**6), (pieces, 2 * 8 * 20)):  # all five; two, two and one
        monkeypatch.setattr("optim_muon.EAGER_NUMEL", numel)
        optimizer = MuonAdamW([dict(kind="muon", lr=0.02, weight_decay=0.1, params=params)])
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
    for name, p in whole.items():
        torch.testing.assert_close(pieces[name], p, rtol=1e-6, atol=1e-6)


# -----------------------------------------------------------------------------
# Steps with a non-finite loss or gradient


def mixed(compile=False, seed=0, **options):
    """An optimizer for stacks of matrices, a table and a vector."""
    shapes = {"m1": (8, 6), "m2": (8, 6), "m3": (4, 12), "m4": (7, 7), "table": (30, 5), "v": (3,)}
    params = parameters(shapes, seed)
    matrices, rest = ({n: p for n, p in params.items() if (n[0] == "m") == m} for m in (True, False))
    groups = [
        dict(kind="muon", lr=0.05, weight_decay=0.1, params=matrices),
        dict(kind="adamw", lr=0.05, weight_decay=0.1, params=rest),
    ]
    return MuonAdamW(groups, compile=compile, **options), params


def spoil(params, where, value):
    params[where].grad.view(-1)[1] = value


@pytest.mark.parametrize("where", ["m2", "m3", "table", "v", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_step_changes_nothing(where, value):
    (optimizer, params), (clean, clean_params) = mixed(), mixed()
    for step in range(4):
        before = snapshot(optimizer)
        set_gradients(params, 100 + step)
        if where != "loss":
            spoil(params, where, value)
        optimizer.step(torch.tensor(value if where == "loss" else 1.0))  # the first step included
        assert optimizer.skipped == 1
        optimizer.zero_grad(set_to_none=True)
        assert optimizer.first_nonfinite_parameter() == (None if where == "loss" else where)
        assert_same_bits(before, snapshot(optimizer))
        for o, p in ((optimizer, params), (clean, clean_params)):
            set_gradients(p, step)
            o.step(torch.tensor(1.0))
            assert o.skipped == 0
    assert optimizer.state_dict()["state"]["v"]["step"] == 4
    assert_same_bits(snapshot(optimizer), snapshot(clean))


def test_later_steps_do_not_change_an_earlier_flag_or_norm():
    """The caller keeps those of many steps, and reads them at the end of a log interval."""
    optimizer, params = mixed()
    flags, norms, expected = [], [], []
    for step in range(4):
        set_gradients(params, step)
        expected.append(torch.cat([p.grad.flatten() for p in params.values()]).double().norm())
        if step == 2:
            spoil(params, "m1", math.nan)
        optimizer.step()
        flags.append(optimizer.skipped)
        norms.append(optimizer.grad_norm)
    assert torch.stack(flags).tolist() == [0, 0, 1, 0]
    for step in (0, 1, 3):
        assert norms[step].item() == pytest.approx(expected[step].item(), rel=1e-5)
    assert norms[2].isnan()


# -----------------------------------------------------------------------------
# State


def test_state_round_trip_is_bitwise(tmp_path):
    (whole, whole_params), (first, first_params), (second, second_params) = mixed(), mixed(), mixed(seed=50)
    for step in range(10):
        if step == 5:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
            with torch.no_grad():
                for name, p in first_params.items():
                    second_params[name].copy_(p)
        half = (first, first_params) if step < 5 else (second, second_params)
        for optimizer, params in ((whole, whole_params), half):
            set_gradients(params, step)
            optimizer.step()
    assert_same_bits(snapshot(whole), snapshot(second))


def test_state_has_names_and_full_tensors():
    optimizer, params = mixed()
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert list(state) == list(params)
    shapes = {name: {key: tuple(t.shape) for key, t in tensors.items()} for name, tensors in state.items()}
    assert shapes["m1"] == {"momentum_buffer": (8, 6), "second_momentum": (8, 1)}
    assert shapes["m3"] == {"momentum_buffer": (4, 12), "second_momentum": (1, 12)}
    assert shapes["v"] == {"exp_avg": (3,), "exp_avg_sq": (3,), "step": ()}


def test_state_that_does_not_fit_is_named_and_changes_nothing():
    optimizer, params = mixed()
    set_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer)

    def changed(edit):
        state = optimizer.state_dict()["state"]
        state = {name: {key: t + 1 for key, t in tensors.items()} for name, tensors in state.items()}
        edit(state)
        return {"state": state}

    for edit, message in [
        (lambda s: s.pop("m1"), "m1"),
        (lambda s: s.update(other={}), "other"),
        (lambda s: s["table"].pop("exp_avg"), "exp_avg of table"),
        (lambda s: s["v"].update(exp_avg=torch.zeros(4)), "exp_avg of v .*4.*3"),
        (lambda s: s["m4"].update(momentum_buffer=torch.zeros(7, 8)), "momentum_buffer of m4"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(changed(edit))
        assert_same_bits(before, snapshot(optimizer))


def test_hyperparameters_are_not_state():
    """A resumed run can change its learning rates: those of the groups are used."""
    (old, _), (new, _) = mixed(), mixed()
    for group in new.param_groups:
        group["lr"] = group["initial_lr"] = 7.0
    new.load_state_dict(old.state_dict())
    assert [group["lr"] for group in new.param_groups] == [7.0, 7.0]


@pytest.mark.parametrize("numel", [{"muon": 10, "adamw": 7}, {"muon": 10}, {}])
def test_state_bytes_count_one_or_two_fp32_moments(numel):
    assert optimizer_state_bytes(numel) == 4 * numel.get("muon", 0) + 8 * numel.get("adamw", 0)


def test_state_bytes_of_an_optimizer():
    optimizer, params = mixed()
    moments = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    state = optimizer.state_dict()["state"].values()
    sizes = [4 * t.numel() for tensors in state for key, t in tensors.items() if key in moments]
    assert optimizer.state_bytes() == sum(sizes)
    matrices = sum(p.numel() for name, p in params.items() if name[0] == "m")
    others = sum(p.numel() for p in params.values()) - matrices
    assert optimizer.state_bytes() == optimizer_state_bytes({"muon": matrices, "adamw": others})


# -----------------------------------------------------------------------------
# Invalid input


def matrix(*shape):
    return torch.nn.Parameter(torch.zeros(shape or (4, 4)))


@pytest.mark.parametrize(
    "groups, message",
    [
        ([dict(kind="sgd", lr=1.0, params={"a": matrix()})], "'sgd'.*\n.*adamw or muon"),
        ([dict(lr=1.0, params={"a": matrix()})], "None.*\n.*adamw or muon"),
        ([dict(kind="muon", params={"a.b": matrix()})], "a.b has no lr"),
        ([dict(kind="muon", lr=1.0, wd=0.1, params={"a": matrix()})], "option 'wd'.*\n.*weight_decay"),
        ([dict(kind="muon", lr=1.0, params={"bias": matrix(4)})], r"bias \(4,\) .*muon.*\n.*adamw"),
        ([dict(kind="muon", lr=1.0, params={"s": torch.nn.Parameter(torch.ones(()))})], r"s \(\)"),
        ([dict(kind="muon", lr=1.0, params={"conv": matrix(4, 4, 3)})], r"conv \(4, 4, 3\)"),
        ([dict(kind="muon", lr=1.0, params={"embedding.weight": matrix()})], "embedding.weight.*\n.*adamw"),
    ],
)
def test_invalid_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(groups)


def test_a_parameter_in_two_groups():
    shared = matrix()
    for kinds in itertools.product(("adamw", "muon"), repeat=2):
        with pytest.raises(ValueError, match="second is in two groups.*first"):
            names = ("first", "second")
            MuonAdamW([dict(kind=kind, lr=1.0, params={n: shared}) for kind, n in zip(kinds, names)])


def test_two_parameters_of_one_name():
    with pytest.raises(ValueError, match="a is in two groups"):
        MuonAdamW([dict(kind=kind, lr=1.0, params={"a": matrix()}) for kind in ("adamw", "muon")])


def test_a_missing_gradient_is_named_and_changes_nothing():
    optimizer, params = mixed()
    set_gradients(params, 0)
    params["m3"].grad = None
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="m3 has no gradient"):
        optimizer.step()
    assert_same_bits(before, snapshot(optimizer))


def test_empty_groups_are_left_out():
    group = dict(kind="adamw", lr=1.0, params={"a": matrix()})
    optimizer = MuonAdamW([dict(kind="muon", lr=1.0, params={}), group])
    assert [group["kind"] for group in optimizer.param_groups] == ["adamw"]


# -----------------------------------------------------------------------------
# Compiled, and on a GPU


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_compiled_update_is_the_same_and_compiles_once():
    (eager, eager_params), (compiled, compiled_params) = mixed(), mixed(compile=True)
    for step in range(6):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            for optimizer, params in ((eager, eager_params), (compiled, compiled_params)):
                for group in optimizer.param_groups:
                    group["lr"], group["weight_decay"] = 0.05 / (step + 1), 0.1 / (step + 1)
                    if group["kind"] == "muon":
                        group["momentum"] = 0.8 + 0.02 * step
                set_gradients(params, step)
                if step == 3:
                    before = snapshot(optimizer)
                    spoil(params, "m1", math.nan)
                optimizer.step()
                if step == 3:
                    assert_same_bits(before, snapshot(optimizer))
    for name, p in eager_params.items():
        torch.testing.assert_close(p, compiled_params[name], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_equals_cpu_without_synchronization(compile):
    (cpu, cpu_params), (_, source) = mixed(), mixed()
    params = {name: torch.nn.Parameter(p.detach().cuda()) for name, p in source.items()}
    groups = []
    for kind, names in (("muon", ("m1", "m2", "m3", "m4")), ("adamw", ("table", "v"))):
        groups.append(dict(kind=kind, lr=0.05, weight_decay=0.1, params={n: params[n] for n in names}))
    optimizer = MuonAdamW(groups, compile=compile)
    for step in range(6):
        set_gradients(cpu_params, step)
        if step == 3:
            spoil(cpu_params, "m1", math.nan)
        for name, p in params.items():
            p.grad = cpu_params[name].grad.cuda()
        cpu.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step compiles
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.skipped.item() == (step == 3)
    for name, p in cpu_params.items():
        torch.testing.assert_close(params[name].cpu(), p, rtol=1e-3, atol=1e-3)


# -----------------------------------------------------------------------------
# Several processes. Sizes that 2, 3 and 4 ranks cannot share evenly: 3 and 5 matrices, 131 and 3 rows

MATRICES = {f"tall{i}": (12, 8) for i in range(3)} | {"square": (6, 6)}
MATRICES |= {f"wide{i}": (8, 20) for i in range(5)}
TENSORS = {"table": (131, 128), "few_rows": (3, 6000), "vector": (10,), "scalar": (), "small": (7, 4)}
ROWS = 12  # rows of the global batch; each rank takes its slice
WORLDS = (1, 2, 3, 4)


@functools.cache
def regression():
    """{name: (inputs (ROWS, ...), targets (ROWS,))}: a least-squares problem for each parameter."""
    shapes = {**MATRICES, **TENSORS}
    problems = {}
    for i, (name, shape) in enumerate(shapes.items()):
        inputs = randn(ROWS, *shape, seed=9 + i) / math.prod(shape) ** 0.5
        problems[name] = (inputs, randn(ROWS, seed=99 + i))
    return problems


def problem(compile=False, **options):
    params = parameters({**MATRICES, **TENSORS})
    groups = [
        dict(kind="muon", lr=0.02, weight_decay=0.1, params={n: params[n] for n in MATRICES}),
        dict(kind="adamw", lr=0.02, weight_decay=0.1, params={n: params[n] for n in TENSORS}),
    ]
    return MuonAdamW(groups, compile=compile, **options), params


def backward(params, rank, world):
    """Compute gradients of the mean loss over this rank's rows of the global batch -> that loss."""
    total = 0.0
    for name, p in params.items():
        x, y = (t.chunk(world)[rank] for t in regression()[name])
        error = (x * p.detach()).reshape(len(y), -1).sum(1) - y
        p.grad = torch.einsum("r,r...->...", error, x).clone() / len(y)
        total += 0.5 * (error**2).mean()
    return total


def train(optimizer, params, steps, rank, world):
    norms = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(step, 20)
        optimizer.step(backward(params, rank, world))
        assert optimizer.skipped == 0
        norms.append(optimizer.grad_norm.item())
    return norms


def train_in_micro_steps(early, rank, world):
    """
    Ten steps of two backward passes each -> the weights, and the number of reductions that had started before
    the update, and after another backward pass, which belongs to the next step.
    """
    optimizer, params = problem()
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(step, 20)
        for micro_step in (0, 1):
            if early and micro_step == 1:
                optimizer.reduce_early()
            loss = 0.0
            for name, p in params.items():
                x, y = (t.chunk(world)[rank] for t in regression()[name])
                errors = (x * p).reshape(len(y), -1).sum(1) - y
                loss = loss + 0.5 * (errors[micro_step::2] ** 2).sum() / len(y)
            loss.backward()
        started = len(optimizer.reductions)
        optimizer.step(loss)
        optimizer.zero_grad(set_to_none=True)
    weights = values(params)
    sum((p**2).sum() for p in params.values()).backward()
    return weights, started, len(optimizer.reductions)


def order_of_events():
    """-> the events in a backward pass through three layers, and the reductions, in their order."""
    params = {name: torch.nn.Parameter(torch.eye(4)) for name in ("first", "second", "third")}
    optimizer, x, events = MuonAdamW([dict(kind="muon", lr=0.1, params=params)]), torch.ones(4), []
    for name, p in params.items():
        x = p @ x
        x.register_hook(lambda grad, name=name: events.append(f"through {name}"))
    (bucket,) = optimizer.buckets
    reduce, names = bucket.reduce, bucket.names
    bucket.reduce = lambda index: (events.append(f"reduce {names[index]}"), reduce(index))[1]
    optimizer.reduce_early()
    x.sum().backward()
    optimizer.step()
    return events


def values(params):
    return {name: p.detach().clone() for name, p in params.items()}


def one_rank(rank, world, folder):
    """What each process does -> its results, for the tests below."""
    found, optim_muon.EAGER_NUMEL = {}, 200  # small, to get several buckets of one shape
    optimizer, params = problem()
    found["norms"] = train(optimizer, params, range(10), rank, world)
    found["state_10"], found["weights_10"] = copy.deepcopy(optimizer.state_dict()), values(params)
    train(optimizer, params, range(10, 20), rank, world)
    found["weights_20"] = values(params)
    sharded = [t for b in optimizer.buckets if b.sharded for t in b.state.values() if t.ndim]
    found["own_state"] = sum(t.numel() for t in sharded)
    if rank == 0 and world == 2:
        torch.save((found["state_10"], found["weights_10"]), folder / "from_2.pt")

    if world != 3:  # continue from the state that 2 ranks have saved
        state, weights = found["state_10"], found["weights_10"]
        if world != 2:
            state, weights = torch.load(folder / "from_2.pt")
        optimizer, params = problem()
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(weights[name])
        train(optimizer, params, range(10, 20), rank, world)
        found["continued"] = values(params)

    found["early"], found["late"] = (train_in_micro_steps(early, rank, world) for early in (True, False))
    found["events"] = order_of_events()

    optimizer, params = problem()  # only the last rank gets a bad gradient or loss
    found["skips"] = []
    for where in ("table", None, "wide4", "vector", "loss", None):
        loss = backward(params, rank, world)
        if rank == world - 1 and where == "loss":
            loss = loss * math.inf
        elif rank == world - 1 and where:
            params[where].grad.view(-1)[-1] = math.nan
        before = snapshot(optimizer)
        optimizer.step(loss)
        after = snapshot(optimizer)
        untouched = all(torch.equal(before[key], after[key]) for key in before)
        found["skips"].append((optimizer.skipped.item(), untouched))
    found["weights_skipped"], found["state_skipped"] = values(params), optimizer.state_dict()

    optimizer, params = problem(loss_scaling=True)  # only the last rank's gradient is too large for the scale
    found["scaled"] = []
    for too_large in (False, True, False):
        loss = backward(params, rank, world)
        for p in params.values():
            p.grad *= optimizer.loss_scale
        if too_large and rank == world - 1:
            params["wide4"].grad.view(-1)[-1] = math.inf
        optimizer.step(loss)
        numbers = (optimizer.loss_scale, optimizer.skipped, optimizer.scale_skipped)
        found["scaled"].append([number.item() for number in numbers])
    found["weights_scaled"] = values(params)
    return found


def process(rank, world, folder):
    try:
        torch.set_num_threads(1)
        meeting_place = (folder / f"meet_{world}").as_uri()
        dist.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=world)
        torch.save(one_rank(rank, world, folder), folder / f"{world}_{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{world size: [results of each rank]}, from real processes."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo"])  # imported once, not ten times

    def run(world):
        processes = [context.Process(target=process, args=(rank, world, folder)) for rank in range(world)]
        for p in processes:
            p.start()
        deadline = time.monotonic() + 60
        for p in processes:
            p.join(max(0, deadline - time.monotonic()))
            p.kill()
        assert [p.exitcode for p in processes] == [0] * world
        return [torch.load(folder / f"{world}_{rank}.pt") for rank in range(world)]

    return {world: run(world) for world in (2, 1, 3, 4)}  # 2 first: the others load its state


def assert_close(one, other, tolerance=1e-5):
    for name in other:
        error = (one[name] - other[name]).abs() / (1 + other[name].abs())
        assert error.max() < tolerance, name


@pytest.mark.parametrize("world", WORLDS)
def test_many_processes_train_like_one(ranks, world):
    optimizer, params = problem()  # in this process, with no process group
    norms = train(optimizer, params, range(10), 0, 1)
    train(optimizer, params, range(10, 20), 0, 1)
    for rank in ranks[world]:
        assert_same_bits(rank["weights_20"], ranks[world][0]["weights_20"])
        assert_close(rank["weights_20"], values(params))
        assert rank["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_reducing_during_the_last_backward_pass_changes_no_bit(ranks, world):
    all_of_them = len(MATRICES) + len(TENSORS)
    for rank in ranks[world]:
        (weights, started, next_step), (expected, *none_early) = rank["early"], rank["late"]
        assert_same_bits(weights, expected)
        assert_same_bits(weights, ranks[world][0]["early"][0])
        assert_close(weights, ranks[1][0]["weights_10"])
        assert (started, next_step) == (all_of_them if world > 1 else 0, 0) and none_early == [0, 0]


@pytest.mark.parametrize("world", [2, 4])
def test_late_layers_are_reduced_before_early_ones_have_their_gradients(ranks, world):
    steps = [f"{what} {layer}" for layer in ("third", "second", "first") for what in ("through", "reduce")]
    assert all(rank["events"] == steps for rank in ranks[world])


@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_norm_is_that_of_the_global_batch(ranks, world):
    params = parameters({**MATRICES, **TENSORS})
    backward(params, 0, 1)
    expected = torch.cat([p.grad.flatten() for p in params.values()]).double().norm().item()
    assert ranks[world][0]["norms"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_a_bad_gradient_on_one_rank_is_skipped_on_all(ranks, world):
    expected = [(1, True), (0, False), (1, True), (1, True), (1, True), (0, False)]
    optimizer, params = problem()
    for _ in range(2):
        optimizer.step(backward(params, 0, 1))
    for rank in ranks[world]:
        assert rank["skips"] == expected
        assert_same_bits(rank["weights_skipped"], ranks[world][0]["weights_skipped"])
        assert_close(rank["weights_skipped"], values(params))
        assert rank["state_skipped"]["state"]["table"]["step"] == 2


@pytest.mark.parametrize("world", WORLDS)
def test_the_state_dict_is_the_same_for_any_world_size(ranks, world):
    optimizer, params = problem()
    train(optimizer, params, range(10), 0, 1)
    expected = optimizer.state_dict()["state"]
    for rank in ranks[world]:
        state = rank["state_10"]["state"]
        assert state.keys() == expected.keys()
        for name in expected:
            assert_close(state[name], expected[name])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_state_moves_between_world_sizes(ranks, world):
    for rank in ranks[world]:
        assert_close(rank["continued"], ranks[2][0]["weights_20"])
        if world == 2:
            assert_same_bits(rank["continued"], rank["weights_20"])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_rank_keeps_its_share_of_the_state(ranks, world):
    optimizer, _ = problem()
    sharded = {*MATRICES, "table", "few_rows"}
    state = optimizer.state_dict()["state"]
    whole = sum(t.numel() for name in sharded for t in state[name].values() if t.ndim)
    shares = [rank["own_state"] for rank in ranks[world]]
    assert sum(shares) == whole  # no duplicates and no padding
    assert max(shares) < 1.15 * whole / world + 2 * 6000  # even up to one row of few_rows


# -----------------------------------------------------------------------------
# Small parts


def test_rows_get_the_same_length_and_zeros_stay_zeros():
    G = torch.randn(2, 5, 7) * torch.logspace(-12, 3, 5)[:, None]
    G[1, 2] = 0
    found = equilibrate_rows(G)
    lengths = found.norm(dim=2)
    assert torch.equal(found[1, 2], torch.zeros(7)) and torch.isfinite(found).all()
    torch.testing.assert_close(lengths[0], lengths[0].mean().expand(5))
    assert torch.equal(equilibrate_rows(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def test_checksums_depend_on_each_bit_and_its_position():
    for shape in ((12, 8), (7,), (1,)):
        p = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        same = [int(s) for s in checksums(p)]
        assert [int(s) for s in checksums(p.clone())] == same
        changed = p.clone()
        changed.view(torch.int32).view(-1)[-1] ^= 1
        assert [int(s) for s in checksums(changed)] != same
        for dim in range(p.ndim if p.numel() > 1 else 0):  # the same numbers in another order
            assert [int(s) for s in checksums(p.flip(dim))] != same


# -----------------------------------------------------------------------------
# The loss scale, for gradients in fp16


def scaled_step(optimizer, params, step, spoiled=None, loss=1.0):
    """A step with gradients that are multiplied by the loss scale; `spoiled` gets an infinite one."""
    set_gradients(params, step)
    for p in params.values():
        p.grad *= optimizer.scale(torch.ones(()))
    if spoiled:
        spoil(params, spoiled, math.inf)
    optimizer.step(torch.tensor(loss))


def test_a_loss_scale_does_not_change_the_weights_by_one_bit():
    (scaled, params), (plain, plain_params) = mixed(loss_scaling=True), mixed()
    for step in range(6):
        scaled.loss_scale = torch.tensor(2.0 ** (4 * step))
        for o, p in ((scaled, params), (plain, plain_params)):
            scaled_step(o, p, step)
        assert scaled.grad_norm == plain.grad_norm and scaled.skipped == scaled.scale_skipped == 0
    assert_same_bits(snapshot(scaled), snapshot(plain))
    assert "loss_scale" not in plain.state_dict()


@pytest.mark.parametrize("where", ["m2", "table", "v"])
def test_an_overflow_changes_no_weight_and_halves_the_scale(where):
    optimizer, params = mixed(loss_scaling=True)
    scaled_step(optimizer, params, 0)
    before = snapshot(optimizer)
    scaled_step(optimizer, params, 1, spoiled=where)
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.skipped == optimizer.scale_skipped == 1 and optimizer.loss_scale == 2.0**15
    scaled_step(optimizer, params, 2)
    assert optimizer.skipped == optimizer.scale_skipped == 0 and optimizer.loss_scale == 2.0**15


def test_the_scale_is_not_blamed_for_a_bad_loss_nor_at_its_least():
    optimizer, params = mixed(loss_scaling=True)
    for loss in (math.nan, math.inf):
        scaled_step(optimizer, params, 0, spoiled="m1", loss=loss)
        assert optimizer.skipped == 1 and optimizer.scale_skipped == 0 and optimizer.loss_scale == 2.0**16
    for n in range(16):
        scaled_step(optimizer, params, n, spoiled="m1")
        assert optimizer.scale_skipped == 1
    for _ in range(2):
        scaled_step(optimizer, params, 0, spoiled="m1")
        assert optimizer.loss_scale == 1 and optimizer.skipped == 1 and optimizer.scale_skipped == 0
        assert optimizer.first_nonfinite_parameter() == "m1"


def test_the_scale_doubles_after_good_steps_in_a_row(monkeypatch):
    monkeypatch.setattr(optim_muon, "GROWTH_STEPS", 3)
    optimizer, params = mixed(loss_scaling=True)
    scales = []
    for step in range(11):
        scaled_step(optimizer, params, step, spoiled="v" if step == 4 else None)
        scales.append(math.log2(optimizer.loss_scale))
    assert scales == [16, 16, 17, 17, 16, 16, 16, 17, 17, 17, 18]
    optimizer.loss_scale = torch.tensor(2.0**32)
    for step in range(6):
        scaled_step(optimizer, params, step)
    assert optimizer.loss_scale == 2.0**32


def test_a_resume_keeps_the_scale(monkeypatch):
    monkeypatch.setattr(optim_muon, "GROWTH_STEPS", 3)
    optimizer, params = mixed(loss_scaling=True)
    for step in range(5):
        scaled_step(optimizer, params, step, spoiled="v" if step == 0 else None)
    (same, others), (unscaled, _) = mixed(loss_scaling=True), mixed()
    saved = copy.deepcopy(optimizer.state_dict())
    same.load_state_dict(saved)
    unscaled.load_state_dict(saved)  # of another dtype
    for o, p in ((optimizer, params), (same, others)):
        scaled_step(o, p, 5)
        scaled_step(o, p, 6)
        assert math.log2(o.loss_scale) == 17
    fresh, _ = mixed(loss_scaling=True)
    fresh.load_state_dict(unscaled.state_dict())
    assert fresh.loss_scale == 2.0**16 and unscaled.loss_scale is None


def test_the_norm_of_scaled_gradients_does_not_overflow():
    optimizer, params = mixed(loss_scaling=True)
    for p in params.values():
        p.grad = torch.full_like(p, 2.0**16 * 1e15)  # squared 4e39; fp32 ends at 3e38
    optimizer.step(torch.tensor(1.0))
    assert optimizer.skipped == 0
    count = sum(p.numel() for p in params.values())
    assert optimizer.grad_norm.item() == pytest.approx(1e15 * count**0.5)


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_agree_on_the_scale(ranks, world):
    for rank in ranks[world]:
        assert rank["scaled"] == [[2.0**16, 0, 0], [2.0**15, 1, 1], [2.0**15, 0, 0]]
        assert_same_bits(rank["weights_scaled"], ranks[world][0]["weights_scaled"])
        assert_close(rank["weights_scaled"], ranks[1][0]["weights_scaled"])
