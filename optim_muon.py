"""
MuonAdamW: gradients in, weights out; one optimizer, the same on one process and on many.

Matrices of the blocks learn by Muon (kellerjordan.github.io/posts/muon), everything else by AdamW
(arXiv 1711.05101). With several processes the gradients are averaged in here, while the backward pass goes
on, each rank updates its share of the rows or matrices and keeps only their state (ZeRO-2, arXiv
1910.02054), and the weights are gathered.
Schedules and rules of thumb are pure functions at the end of the file.
"""

import math
from functools import partial, reduce

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# Polar Express (arXiv 2505.16932), 5 steps, safety 2e-2, cushion 2: the best quintic for each step in turn
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # textbook Muon's Newton–Schulz
# name -> (safety, coefficients)
ORTHOGONALIZERS = {"polar_express": (1.02, POLAR_EXPRESS), "quintic": (1.0, QUINTIC)}
# torch 2.13 has renamed them; a build without torch.distributed has neither
reduce_scatter = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
all_gather = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
SHARD_NUMEL = 2**14  # smaller AdamW tensors are cheaper to update everywhere than to scatter and gather
EAGER_NUMEL = 2**19  # a stack of at most this size stays in a CPU's cache, and its step is 20% faster
DEFAULTS = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0},
    "muon": {
        "momentum": 0.95,
        "weight_decay": 0.0,
        "beta2": 0.9,  # NorMuon's second moment; None turns it off
        "equilibrate": True,  # bring the rows to one length before orthogonalization
        "cautious": True,  # decay only where the update already shrinks the weight
        "orthogonalizer": "polar_express",
    },
}


def orthogonalize(G, dtype=torch.float32, method="polar_express", tf32=False):
    """
    Push the singular values of each matrix of G (B, rows, cols) towards 1 and keep its singular vectors:
    five steps X ← (aI + bA + cA²)X with A = XXᵀ, on the smaller side, in `dtype`. fp32 -> fp32; 0 stays 0.
    tf32: the device rounds the factors of fp32 products to 10 bits.
    """
    safety, coefficients = ORTHOGONALIZERS[method]
    tall = G.size(-2) > G.size(-1)
    norm = torch.linalg.matrix_norm(G, keepdim=True)  # no singular value is larger than the Frobenius norm
    scale = 1 / (norm * safety).clamp_min(1e-7)
    if dtype == torch.float32 and not tf32 and G.size(-2) != G.size(-1):
        # the steps commute: take them on the small A, and apply their product once. Only where products are
        # exact: in TF32 an ill-conditioned matrix comes out wrong by 20% and more, the other way by 0.2%
        A, steps = (G.mT @ G if tall else G @ G.mT) * scale.square(), []
        for a, b, c in coefficients:
            if steps:
                A = steps[-1] @ A @ steps[-1]
            steps.append(torch.baddbmm(A, A, A, beta=b, alpha=c))
            steps[-1].diagonal(dim1=-2, dim2=-1).add_(a)
        P = reduce(torch.bmm, steps) * scale
        return G @ P if tall else P @ G
    X = ((G.mT if tall else G) * scale).to(dtype)
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).float()


def equilibrate_rows(G):
    """Scale each row of G (B, rows, cols) in place to the rows' RMS length (arXiv 2603.28254) -> G."""
    lengths = torch.linalg.vector_norm(G, dim=-1, keepdim=True)
    return G.mul_(lengths.square().mean(dim=-2, keepdim=True).sqrt() / lengths.clamp_min(1e-20))


def normalize_neurons(update, second_momentum, beta2, live):
    """
    NorMuon (arXiv 2510.05491): divide each row (column, if wider than tall) of update (B, rows, cols) by
    the root of its running mean square, then restore the Frobenius norm. Both tensors change in place.
    """
    dim = -1 if update.size(-2) >= update.size(-1) else -2
    mean_square = update.square().mean(dim=dim, keepdim=True)
    second_momentum.lerp_(mean_square, live * (1 - beta2))
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True)
    new_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    update.mul_(scale * (norm / new_norm.clamp_min(1e-10)).sqrt())


def muon_update(weight, grad, state, group, live, lr, momentum, weight_decay, dtype, tf32=False):
    """
    One Muon step in place on a stack weight (B, rows, cols), fp32; live 0: nothing changes. What moves during
    training is a 0-D tensor and not taken from the group, so that the compiled graph stays valid.
    """
    grad = grad.float()
    grad.view(torch.int32).mul_(live.int())  # a bad gradient times 0, as integers, because 0 · NaN is NaN
    state["momentum_buffer"].lerp_(grad, live * (1 - momentum))
    update = grad.lerp_(state["momentum_buffer"], momentum)  # Nesterov
    if group["equilibrate"]:
        update = equilibrate_rows(update)
    update = orthogonalize(update, dtype, group["orthogonalizer"], tf32)
    if group["beta2"] is not None:
        normalize_neurons(update, state["second_momentum"], group["beta2"], live)
    lr = live * lr
    shrink = -lr * weight_decay
    if group["cautious"]:  # weight first: the product gets its memory layout, not that of a turned update
        shrink = (weight * update).ge_(0).mul_(shrink)
    shape_scale = math.sqrt(max(1, weight.size(-2) / weight.size(-1)))
    weight.mul_(shrink.add_(1)).addcmul_(update, lr, value=-shape_scale)


def adamw_update(weight, grad, state, group, skipped):
    """One AdamW step in place by PyTorch's fused kernel, in fp32 whatever the dtype; skipped 1: none."""
    master = weight.float().contiguous()  # mostly weight itself
    moments = [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]
    (beta1, beta2), rest = group["betas"], {key: group[key] for key in ("lr", "weight_decay", "eps")}
    options = {"fused": True, "amsgrad": False, "maximize": False, "beta1": beta1, "beta2": beta2, **rest}
    # the kernel itself looks at found_inf, on the device
    adamw([master], [grad.float().contiguous()], *moments, found_inf=skipped, **options)
    if master is not weight:
        weight.copy_(master)


def pad(x, rows):
    """x with zeros appended, up to that many rows: collectives want equal parts."""
    missing = rows - x.size(0)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


class Bucket:
    """
    What is updated and gathered as one: matrices of one shape (muon) or one tensor (adamw).
    If `sharded`, each rank owns a chunk of the matrices or of the tensor's rows and keeps only their state.
    """

    def __init__(self, group, names, params, rank, world_size):
        self.group, self.names, self.params = group, names, params
        self.stacked, self.distributed = group["kind"] == "muon", world_size > 1
        self.sharded = self.distributed and (self.stacked or params[0].numel() >= SHARD_NUMEL)
        self.length = len(params) if self.stacked else params[0].shape[:1].numel()  # 1 of a 0-D tensor
        self.parts = world_size if self.sharded else 1
        self.chunk = -(-self.length // self.parts)
        start = min(rank * self.chunk, self.length)  # the last ranks may own less, or nothing
        self.own = slice(start, min(start + self.chunk, self.length))
        share = self.mine(params)
        zeros = partial(share.new_zeros, dtype=torch.float32)
        if self.stacked:
            count, rows, cols = share.shape
            self.state = {"momentum_buffer": zeros(share.shape)}
            if group["beta2"] is not None:
                self.state["second_momentum"] = zeros((count, rows, 1) if rows >= cols else (count, 1, cols))
        else:
            self.state = {"exp_avg": zeros(share.shape), "exp_avg_sq": zeros(share.shape), "step": zeros(())}

    def mine(self, tensors):
        """This rank's share of one tensor per parameter: a stack of some matrices, or a view of some rows."""
        if self.stacked:
            matrices = tensors[self.own]
            return torch.stack(matrices) if matrices else tensors[0].new_empty(0, *tensors[0].shape)
        return tensors[0][self.own] if self.sharded and tensors[0].ndim else tensors[0]  # 0-D: a step count

    def separate(self, whole):
        """One tensor for the bucket -> one per parameter."""
        return list(whole.unbind()) if self.stacked else [whole]

    def reduce(self, index):
        """
        Start to average the gradient of a parameter over ranks -> (this rank's part of it, a handle or None).
        A matrix goes to its owner; what the others have of it then means nothing.
        """
        grad = self.params[index].grad.contiguous()
        if not self.distributed:
            return grad, None
        if not self.sharded:
            return grad, dist.all_reduce(grad, dist.ReduceOp.AVG, async_op=True)
        if self.stacked:
            handle = dist.reduce(grad, index // self.chunk, dist.ReduceOp.AVG, async_op=True)
            return grad if self.own.start <= index < self.own.stop else grad[:0], handle
        part = grad.new_empty(self.chunk, *grad.shape[1:])
        whole = pad(grad, self.parts * self.chunk)
        handle = reduce_scatter(part, whole, dist.ReduceOp.AVG, async_op=True)
        return part[: self.own.stop - self.own.start], handle

    def gather(self, share):
        """Start to gather the ranks' shares -> (the whole, a handle or None)."""
        if not self.sharded or not share.ndim:
            return share, None
        whole = share.new_empty(self.parts * self.chunk, *share.shape[1:])
        handle = all_gather(whole, pad(share, self.chunk), async_op=True)
        return whole[: self.length], handle


class MuonAdamW(torch.optim.Optimizer):
    """
    groups: dicts with "kind" ("adamw" or "muon"), "params" ({name: parameter}), "lr" and what DEFAULTS has.
    orthogonalize_dtype: bf16 where its products are fast, else fp32. compile: Muon's update, with Inductor.
    Under an initialized process group, `step` averages the gradients over ranks and shards its state.
    ValueError for groups that make no sense.

    After `step(loss)`: `grad_norm`, the norm of the averaged gradient, and `skipped`, 1.0 if the loss or a
    gradient was not finite on any rank (then nothing has changed anywhere): 0-D tensors, not synchronized.
    A gradient whose squared norm overflows fp32 counts as not finite.
    """

    def __init__(self, groups, orthogonalize_dtype=torch.float32, compile=False):
        check_groups(groups)
        groups = [{**DEFAULTS[g["kind"]], **g, "initial_lr": g["lr"]} for g in groups if g["params"]]
        names = [{"params": list(g["params"].values()), "param_names": list(g["params"])} for g in groups]
        super().__init__([{**g, **lists} for g, lists in zip(groups, names)], defaults={})
        self.orthogonalize_dtype = orthogonalize_dtype
        grouped = dist.is_available() and dist.is_initialized()
        rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self.distributed = self.world_size > 1
        self.muon_update = torch.compile(muon_update, dynamic=False) if compile else muon_update
        self.device = self.param_groups[0]["params"][0].device
        has_tf32 = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.tf32 = has_tf32 and torch.backends.cuda.matmul.allow_tf32
        self.grad_norm = self.skipped = torch.zeros((), device=self.device)
        self.buckets = []
        for group in self.param_groups:
            by_shape = {}
            for name, p in zip(group["param_names"], group["params"]):
                by_shape.setdefault(p.shape if group["kind"] == "muon" else name, []).append((name, p))
            for pairs in by_shape.values():
                count = len(pairs)
                if self.device.type == "cpu" and not compile:
                    count = self.world_size * max(1, EAGER_NUMEL // pairs[0][1].numel())
                for start in range(0, len(pairs), count):
                    names, params = map(list, zip(*pairs[start : start + count]))
                    self.buckets.append(Bucket(group, names, params, rank, self.world_size))
        self.parameters = {name: p for b in self.buckets for name, p in zip(b.names, b.params)}
        self.places = {p: (b, index) for b in self.buckets for index, p in enumerate(b.params)}
        owners = [1 if b.sharded else self.world_size for b, _ in self.places.values()]
        self.owners = torch.tensor(owners, device=self.device)  # how many ranks have each averaged gradient
        self.reductions, self.hooks = {}, []
        self.bad_norms = torch.zeros(len(self.parameters), device=self.device)  # of the last bad step

    def add_param_group(self, group):
        """Take over a checked group. (torch's own method would import the compiler, which takes a second.)"""
        self.param_groups.append(group)

    def reduce_early(self):
        """To be called before the last backward pass of a step, which then averages what it completes."""
        if self.distributed:
            self.hooks = [p.register_post_accumulate_grad_hook(self._reduce) for p in self.places]

    def _reduce(self, p):
        bucket, index = self.places[p]
        self.reductions[p] = bucket.reduce(index)

    @torch.no_grad()
    def step(self, loss=None):
        """
        One update from the parameters' .grad, which several ranks overwrite; `loss`: this rank's loss, a
        tensor, checked to be finite too. ValueError for a parameter without gradient.
        """
        for name, p in self.parameters.items():
            if p.grad is None:
                raise ValueError(f"parameter {name} has no gradient.\nIt took no part in the loss.")
        for hook in self.hooks:
            hook.remove()
        for p in self.places:
            if p not in self.reductions:
                self._reduce(p)
        for _, handle in self.reductions.values():
            if handle is not None:
                handle.wait()
        grads = {p: self.reductions[p][0] for p in self.places}
        self.reductions, self.hooks = {}, []
        norms = torch.stack(torch._foreach_norm(list(grads.values()), dtype=torch.float32))
        square = (norms.square() / self.owners).sum()  # each gradient counts once
        verdict = square if loss is None else square + loss.detach().float()
        if self.distributed:
            sums = torch.stack([square, verdict])
            dist.all_reduce(sums)
            square, verdict = sums
        self.grad_norm, self.skipped = square.sqrt(), (~torch.isfinite(verdict)).float()
        self.bad_norms = torch.where(self.skipped > 0, norms, self.bad_norms)
        if self.device.type == "mps" and self.skipped:  # Metal's fused AdamW knows no flag: look here
            return
        gathers = []
        for bucket in self.buckets:
            parts = [grads[p] for p in bucket.params]
            share = self._update(bucket, bucket.mine(parts) if bucket.stacked else parts[0])
            if bucket.sharded:
                gathers.append((bucket, *bucket.gather(share)))  # overlaps the next bucket's update
            elif bucket.stacked:
                torch._foreach_copy_(bucket.params, bucket.separate(share))
        for bucket, whole, handle in gathers:
            handle.wait()
            torch._foreach_copy_(bucket.params, bucket.separate(whole))

    def _update(self, bucket, grad):
        """Update this rank's share of a bucket by its share of the gradient -> the new weights."""
        group, share = bucket.group, bucket.mine(bucket.params)
        if not bucket.stacked:  # then the share is the parameter's own memory
            adamw_update(share, grad, bucket.state, group, self.skipped)
            return share
        share = share.float()
        if len(share):  # there may be more ranks than matrices
            scalar = partial(torch.full, (), dtype=torch.float32, device=self.device)  # asynchronous
            moving = {key: scalar(group[key]) for key in ("lr", "momentum", "weight_decay")}
            moving["live"] = 1 - self.skipped
            precision = {"dtype": self.orthogonalize_dtype, "tf32": self.tf32}
            self.muon_update(share, grad, bucket.state, group, **precision, **moving)
        return share

    def not_finite(self):
        """
        The first parameter whose gradient was not finite on some rank in the last step that was skipped: its
        name, or None if that was for the loss alone. A collective call.
        """
        bad = (~self.bad_norms.isfinite()).int()
        if self.distributed:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        return next((name for name, flag in zip(self.parameters, bad.tolist()) if flag), None)

    def different_rank(self):
        """The first rank whose weights have other checksums than rank 0's, or None. A collective call."""
        if not self.distributed:
            return None
        sums = torch.stack([number for p in self.parameters.values() for number in checksums(p.detach())])
        everyones = [torch.zeros_like(sums) for _ in range(self.world_size)]
        dist.all_gather(everyones, sums)
        return next((r for r, theirs in enumerate(everyones) if not torch.equal(theirs, everyones[0])), None)

    def state_bytes(self):
        """Bytes of the whole state in a checkpoint: moments in fp32, one for Muon and two for AdamW."""
        moments = {"muon": 1, "adamw": 2}
        return sum(4 * moments[g["kind"]] * p.numel() for g in self.param_groups for p in g["params"])

    def state_dict(self):
        """
        {"state": {parameter name: {state name: full fp32 tensor}}}, the same for any world size. What did
        not have to be gathered is the optimizer's own memory. A collective call.
        """
        state = {name: {} for name in self.parameters}
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                whole, handle = bucket.gather(part)
                if handle is not None:
                    handle.wait()
                for name, tensor in zip(bucket.names, bucket.separate(whole)):
                    state[name][key] = tensor
        return {"state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """
        Take over a state_dict() of any world size; learning rates and the like stay those of the groups.
        ValueError names what does not fit, before anything has changed. A collective call.
        """
        saved = state_dict["state"]
        if strange := saved.keys() ^ self.parameters.keys():
            raise ValueError(f"optimizer state does not fit: {', '.join(sorted(strange))}")
        for name, tensors in self.state_dict()["state"].items():
            for key, whole in tensors.items():
                found = saved[name][key].shape if key in saved[name] else None
                if found != whole.shape:
                    raise ValueError(f"optimizer state {key} of {name} has shape {found}, not {whole.shape}")
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                part.copy_(bucket.mine([saved[name][key] for name in bucket.names]))


def checksums(p):
    """Two int64 sums over the bits of p, of rows and of columns, each weighted by its place."""
    bits = p.float().view(torch.int32).reshape(p.shape[:1].numel(), -1)
    sums = (bits.sum(dim, dtype=torch.int64) for dim in (1, 0))
    return [(s * torch.arange(1, len(s) + 1, device=s.device)).sum() for s in sums]


def check_groups(groups):
    """ValueError for what cannot be meant: an unknown kind or option, no lr, a parameter in two groups."""
    seen = {}
    for group in groups:
        kind = group.get("kind")
        if kind not in DEFAULTS:
            raise ValueError(f"a param group is of the unknown kind {kind!r}.\nChoose adamw or muon.")
        unknown = group.keys() - DEFAULTS[kind].keys() - {"kind", "params", "lr"}
        if unknown or "lr" not in group:
            fault = f"the unknown option {min(unknown)!r}" if unknown else "no lr"
            members, known = ", ".join(group["params"])[:100], ", ".join(DEFAULTS[kind])
            raise ValueError(f"the {kind} group of {members} has {fault}.\nIt takes lr, {known}.")
        for name, p in group["params"].items():
            if id(p) in seen or name in seen.values():  # state is kept by name
                raise ValueError(f"{name} is in two groups, once as {seen.get(id(p), name)}.\nKeep one.")
            seen[id(p)] = name
            if kind == "muon" and (p.ndim != 2 or "embedding" in name):
                raise ValueError(
                    f"parameter {name} {tuple(p.shape)} cannot be in a muon group.\nMuon is for matrices "
                    "of hidden layers; embeddings, vectors and scalars belong in an adamw group."
                )


# -----------------------------------------------------------------------------
# Schedules: pure functions of the progress of a run, in [0, 1], and of the step where something warms up


def warmdown(progress, warmdown_ratio):
    """0 before the learning rate starts to decay, then linearly to 1 at the end."""
    return 1 - min(1.0, (1 - progress) / warmdown_ratio) if warmdown_ratio > 0 else 0.0


def lr_multiplier(step, progress, warmup, warmdown_ratio, final_lr_frac):
    """
    Warmup, stable, decay (arXiv 2405.18392) for the update after `step` updates: linearly up over `warmup`
    steps, 1, linearly down to final_lr_frac over the last warmdown_ratio of the run.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    return rise * (1 - (1 - final_lr_frac) * warmdown(progress, warmdown_ratio))


def muon_momentum(step, progress, warmdown_ratio):
    """0.85 → 0.97 over the first 400 steps, and on to 0.90 as the learning rate decays (nanochat)."""
    momentum = 0.85 + (0.97 - 0.85) * min(1.0, step / 400)
    return momentum + (0.90 - momentum) * warmdown(progress, warmdown_ratio)


def weight_decay_multiplier(progress, warmdown_ratio):
    """1, then a half cosine to 0 as the learning rate decays."""
    return 0.5 * (1 + math.cos(math.pi * warmdown(progress, warmdown_ratio)))


class Timetable:
    """
    Progress by the clock, for a run that may take `span` seconds from its first step to its last: the share
    of them that has passed, or of the run's `last_step`, whichever is larger. All times are seconds on one
    clock that never goes back.
    """

    def __init__(self, now, span, progress=0.0, last_step=math.inf):
        self.span, self.progress, self.last_step = span, progress, last_step
        self.start, self.last, self.expected, self.last_dt = now - progress * span, now, 0.0, math.inf

    def left(self, now):
        """Seconds until the deadline."""
        return self.start + self.span - now

    def at(self, now):
        """Progress at a time."""
        return min(1.0, max(self.progress, 1 - self.left(now) / self.span))

    def window(self, now, dt, most, step=0):
        """
        Plan a window of at most `most` steps that take `dt` each, after `step` steps -> (progress of its
        first step, increment per step, number of steps; 0: the run is over, seconds by which the deadline had
        to be put off).

        Progress never falls: where it is ahead of the clock it waits for it. A window is planned for at most
        a sixth of the time left and a twentieth of all, so that no change of speed leads beyond the
        deadline, and a step begins only if at least half of it fits. What the time since the last call has
        over twice the planned one moves progress by at most 0.2: a longer stall is added to the deadline.
        """
        stall = max(0.0, now - self.last - 2 * self.expected - 0.2 * self.span)
        self.start, self.last = self.start + stall, now
        dt, self.last_dt = min(dt, self.last_dt), dt  # the better of two windows: a short stall is no speed
        left = self.left(now)
        steps = min(most, max(1, int(min(left / 6, self.span / 20) / dt))) if left >= dt / 2 else 0
        steps = max(0, min(steps, self.last_step - step))
        self.expected = steps * dt
        if steps == 0:
            return 1.0, 0.0, 0, stall
        first = self.progress = min(1.0, max(self.at(now), step / self.last_step))
        end = min(1.0, max(1 - (left - steps * dt) / self.span, (step + steps) / self.last_step))
        increment = max(0.0, end - first) / steps
        self.progress += (steps - 1) * increment  # that of the window's last step
        return first, increment, steps, stall


# -----------------------------------------------------------------------------
# Rules: from the length of a run to its batch, learning rates and weight decay. Their reference is nanochat's
# depth 12: batches of 2^19 tokens, 1.5e9 tokens in all


def largest_vocab(minutes):
    """
    The largest vocabulary that a CPU's run of so many minutes has time to learn, a power of two: 1 -> 2,048,
    3 -> 4,096, 20 -> 8,192. Fitted on two cores: after 45 s 1,024, 2,048 and 4,096 came to 1.260, 1.251 and
    1.281 bits per byte, after 160 s to 1.088, 1.077 and 1.061; after 575 s of depth 3 4,096 and 8,192
    came to 0.922 and 0.917, but with 8,192 the rule below would take depth 2 then, which came to 0.934.
    """
    return 2 ** min(15, max(9, 11 + round(0.36 * math.log2(minutes))))


# So often a timed run reads a text, and then ends: it would be learnt by heart. Depth 2 on 237 kB came to
# 1.58 bits per byte in 3 epochs, to 1.48 in 5, to 1.59 in 8
MOST_EPOCHS = 5


def needed_tokens(params, unique):
    """
    The tokens that make a model of so many matrix and head parameters the best choice: 12 each (nanochat)
    from depth 12 on, fewer in smaller models, ∝ params^1.58. To be held against three quarters of what the
    time would allow. Fitted to runs of 45 to 575 s on two cores: in 270 s depth 3 came to 1.062 bits per byte
    and depth 2 to 1.046, in 575 s to 0.922 and 0.937.
    124e6 -> 1.5e9; 2.1e6 (depth 3, vocabulary 4,096) -> 2.4e6; 0.9e6 (depth 2) -> 0.6e6.

    A text of `unique` tokens can be too small for that. Then time is not what is short, and MOST_EPOCHS will
    do, but only for a model that needs at most twice as much: on 1 MB depth 3 came to 1.43 bits per byte;
    depth 4, which needs three times as much, to 1.43 in four epochs and then rose to 1.50.
    """
    needed, most = 12 * params * min(1.0, (params / 124e6) ** 0.58), MOST_EPOCHS * unique
    return min(needed, most) if needed <= 2 * most else math.inf


def expected_mfu(width):
    """The share of its peak that a GPU reaches, about: measured on an H100 width 256 -> 0.29, 768 -> 0.47."""
    return 0.62 * width / (width + 270)


def best_batch_size(tokens):
    """
    Tokens per step for a run over so many tokens: ∝ tokens^0.383 (arXiv 2505.13738), but some 800 steps at
    least. Depth 2, 237 kB: 1.48 bits per byte in 240 steps of 2^11 tokens, 1.58 in 120 of 2^12; but depth 3,
    270 s: 1.10 in 1,266 of 2^11, 1.06 in 686 of 2^12; depth 2: 1.07 in 1,523 of 2^12, 1.10 in 381 of 2^14.
    1.5e9 tokens -> 2^19; 20e9 -> 2^20.4; 4e6 -> 2^12; below 2^11 updates would take most of the time.
    """
    return max(2**11, min(2**19 * (tokens / 1.5e9) ** 0.383, tokens / 800))


def whole_rows(batch_size, T):
    """
    The power of two of rows of T tokens that is closest to a batch of so many tokens, in tokens: it can be
    shared by most numbers of ranks and split into micro-steps. 2^19 and T = 2,048 -> 256 rows.
    """
    return T * 2 ** round(math.log2(max(1, batch_size / T)))


def lr_scales(batch_size):
    """
    Factors of AdamW's and of Muon's learning rates for this many tokens per step, against 2^19. Above it both
    go with √batch (nanochat): 2^20 -> 1.41, 1.41. Below, that is far too timid: at 2,048 tokens and 549 steps
    AdamW did best with half of its rates and Muon with three times its rate: 2^11 -> 0.5, 3.03.
    """
    ratio = batch_size / 2**19
    return (ratio**0.5, ratio**0.5) if ratio > 1 else (ratio**0.125, ratio**-0.2)


def best_weight_decay(batch_size, tokens):
    """
    Muon's weight decay ∝ √batch / tokens, so that it adds up to the same over a run (arXiv 2405.13698); 0.28
    at most. Batches of 2^19 over 1.5e9 tokens -> 0.28, over 6e9 -> 0.07.
    """
    return 0.28 * min(1.0, (batch_size / 2**19) ** 0.5 * 1.5e9 / tokens)
