"""
MuonAdamW: one optimizer with param groups of two kinds, on one process or many.

Matrices of the blocks are updated by Muon (kellerjordan.github.io/posts/muon), everything else by AdamW
(arXiv 1711.05101). With several ranks the gradients are averaged in here, during the backward pass; each rank
updates its share of the matrices and rows and keeps only their state (ZeRO-2, arXiv 1910.02054); then the
weights are gathered.
"""

import math
from functools import partial, reduce

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# Polar Express (arXiv 2505.16932): the optimal polynomial a X + b X³ + c X⁵ for each of 5 steps, with safety
# factor 2e-2 and cushion 2
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # Newton–Schulz steps of the original Muon
# name -> (safety: the norm is divided by it, coefficients)
ORTHOGONALIZERS = {"polar_express": (1.02, POLAR_EXPRESS), "quintic": (1.0, QUINTIC)}
# torch 2.13 renamed these functions; a build without torch.distributed has none of them
reduce_scatter = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))
all_gather = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
SHARD_NUMEL = 2**14  # elements; for smaller AdamW tensors updating on all ranks is cheaper than sharding
EAGER_NUMEL = 2**19  # elements; a stack of at most this size stays in a CPU's cache: a 20% faster update
LOSS_SCALES = (1.0, 2.0**16, 2.0**32)  # least, first (torch.amp.GradScaler's) and greatest loss scale
GROWTH_STEPS = 2000  # good steps in a row after which the loss scale is doubled; also GradScaler's
MOMENTS = {"muon": 1, "adamw": 2}  # fp32 numbers that the optimizer keeps per parameter
DEFAULTS = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0},
    "muon": {
        "momentum": 0.95,
        "weight_decay": 0.0,
        "beta2": 0.9,  # of NorMuon's second moment; None turns NorMuon off
        "equilibrate": True,  # scale all rows to the same length before orthogonalization
        "cautious": True,  # apply weight decay only where the update also shrinks the weight
        "orthogonalizer": "polar_express",
    },
}


def orthogonalize(G, dtype=torch.float32, method="polar_express", tf32=False):
    """
    Move the singular values of each matrix in G (B, rows, cols), fp32, close to 1 and keep its singular
    vectors: five steps X ← (aI + bA + cA²)X with A = XXᵀ of the shorter side, computed in `dtype` -> fp32 of
    the same shape. A zero matrix stays zero. tf32: whether the device computes fp32 products in TF32.
    """
    safety, coefficients = ORTHOGONALIZERS[method]
    tall = G.size(-2) > G.size(-1)
    norm = torch.linalg.matrix_norm(G, keepdim=True)  # Frobenius: an upper bound of the singular values
    scale = 1 / (norm * safety).clamp_min(1e-7)
    if dtype == torch.float32 and not tf32 and G.size(-2) != G.size(-1):
        # All steps are polynomials in A and commute: compute their product P on the small A and apply it
        # once. Not in TF32: there the error of an ill-conditioned matrix is 20% and more, instead of 0.2%
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
    """Scale the rows of each matrix in G (B, rows, cols) in place to their RMS length (arXiv 2603.28254)."""
    lengths = torch.linalg.vector_norm(G, dim=-1, keepdim=True)
    return G.mul_(lengths.square().mean(dim=-2, keepdim=True).sqrt() / lengths.clamp_min(1e-20))


def normalize_neurons(update, second_momentum, beta2, enabled):
    """
    NorMuon (arXiv 2510.05491): divide each row (each column, if cols > rows) of update (B, rows, cols) by the
    root of the running mean of its squares, then restore the Frobenius norm. Changes update and
    second_momentum in place.
    """
    dim = -1 if update.size(-2) >= update.size(-1) else -2
    mean_square = update.square().mean(dim=dim, keepdim=True)
    second_momentum.lerp_(mean_square, enabled * (1 - beta2))
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True)
    new_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    update.mul_(scale * (norm / new_norm.clamp_min(1e-10)).sqrt())


def muon_update(weight, grad, state, group, enabled, lr, momentum, weight_decay, dtype, tf32=False):
    """
    One Muon step in place on a stack of matrices, weight (B, rows, cols), fp32. If enabled is 0, nothing
    changes. Numbers that change during training (enabled, lr, momentum, weight_decay) are 0-D tensors: as
    plain numbers each new value would recompile the function.
    """
    grad = grad.float()
    grad.view(torch.int32).mul_(enabled.int())  # as integers, because 0 · NaN is NaN
    state["momentum_buffer"].lerp_(grad, enabled * (1 - momentum))
    update = grad.lerp_(state["momentum_buffer"], momentum)  # Nesterov
    if group["equilibrate"]:
        update = equilibrate_rows(update)
    update = orthogonalize(update, dtype, group["orthogonalizer"], tf32)
    if group["beta2"] is not None:
        normalize_neurons(update, state["second_momentum"], group["beta2"], enabled)
    lr = enabled * lr
    shrink = -lr * weight_decay
    if group["cautious"]:  # weight first: the product gets its memory layout; update may be transposed
        shrink = (weight * update).ge_(0).mul_(shrink)
    shape_scale = math.sqrt(max(1, weight.size(-2) / weight.size(-1)))
    weight.mul_(shrink.add_(1)).addcmul_(update, lr, value=-shape_scale)


def adamw_update(weight, grad, state, group, skipped):
    """One AdamW step in place, in fp32, by PyTorch's fused kernel. If skipped is 1, nothing changes."""
    master = weight.float().contiguous()  # for fp32 weights usually weight itself, no copy
    moments = [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]
    (beta1, beta2), rest = group["betas"], {key: group[key] for key in ("lr", "weight_decay", "eps")}
    options = {"fused": True, "amsgrad": False, "maximize": False, "beta1": beta1, "beta2": beta2, **rest}
    # the kernel reads found_inf on the device: no synchronization
    adamw([master], [grad.float().contiguous()], *moments, found_inf=skipped, **options)
    if master is not weight:
        weight.copy_(master)


def pad(x, rows):
    """x with rows of zeros appended, up to `rows` rows: collectives need parts of equal size."""
    missing = rows - x.size(0)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


class Bucket:
    """
    Parameters that are updated and gathered together: matrices of one shape (muon) or one tensor (adamw).
    If `sharded`, each rank owns a chunk of the matrices or of the tensor's rows, and keeps only its state.
    """

    def __init__(self, group, names, params, rank, world_size):
        self.group, self.names, self.params = group, names, params
        self.stacked, self.distributed = group["kind"] == "muon", world_size > 1
        self.sharded = self.distributed and (self.stacked or params[0].numel() >= SHARD_NUMEL)
        self.length = len(params) if self.stacked else params[0].shape[:1].numel()  # 1 for a 0-D tensor
        self.parts = world_size if self.sharded else 1
        self.chunk = -(-self.length // self.parts)  # rounded up
        start = min(rank * self.chunk, self.length)  # the last ranks may own fewer, or none
        self.own = slice(start, min(start + self.chunk, self.length))
        share = self.own_share(params)
        zeros = partial(share.new_zeros, dtype=torch.float32)
        if self.stacked:
            count, rows, cols = share.shape
            self.state = {"momentum_buffer": zeros(share.shape)}
            if group["beta2"] is not None:
                self.state["second_momentum"] = zeros((count, rows, 1) if rows >= cols else (count, 1, cols))
        else:
            self.state = {"exp_avg": zeros(share.shape), "exp_avg_sq": zeros(share.shape), "step": zeros(())}

    def own_share(self, tensors):
        """One tensor per parameter -> this rank's share: a stack of its matrices, or a view of its rows."""
        if self.stacked:
            matrices = tensors[self.own]
            return torch.stack(matrices) if matrices else tensors[0].new_empty(0, *tensors[0].shape)
        return tensors[0][self.own] if self.sharded and tensors[0].ndim else tensors[0]  # 0-D: the step count

    def unstack(self, full):
        """One tensor for the bucket -> a list of one tensor per parameter."""
        return list(full.unbind()) if self.stacked else [full]

    def reduce(self, index):
        """
        Start to average the gradient of parameter `index` over the ranks -> (this rank's part of it, a handle
        or None). A matrix is reduced to its owner; the other ranks get an empty part.
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
        padded = pad(grad, self.parts * self.chunk)
        handle = reduce_scatter(part, padded, dist.ReduceOp.AVG, async_op=True)
        return part[: self.own.stop - self.own.start], handle

    def gather(self, share):
        """Start to gather the shares of all ranks -> (the full tensor, a handle or None)."""
        if not self.sharded or not share.ndim:
            return share, None
        full = share.new_empty(self.parts * self.chunk, *share.shape[1:])
        handle = all_gather(full, pad(share, self.chunk), async_op=True)
        return full[: self.length], handle


class MuonAdamW(torch.optim.Optimizer):
    """
    groups: dicts with "kind" ("adamw" or "muon"), "params" ({name: parameter}), "lr", and options as in
    DEFAULTS. orthogonalize_dtype: bf16 if the device multiplies it fast, else fp32. compile: compile Muon's
    update. Inside a process group `step` averages gradients over the ranks and shards the state.
    loss_scaling: whether the loss is scaled, for gradients in fp16. Raises ValueError for invalid groups.

    `step(loss)` sets two 0-D tensors on the device: `grad_norm`, the norm of the averaged gradient, and
    `skipped`, 1.0 if the loss or a gradient was not finite on any rank; then no weight and no state has
    changed on any rank. A gradient whose squared norm overflows fp32 counts as not finite.

    With loss_scaling call scale(loss).backward(). `step` then divides the gradients by the loss scale, halves
    the scale if a gradient is not finite although the loss is, and sets `scale_skipped` to 1.0 if a smaller
    scale may help: such a step is no fault of the training. All of this happens on the device.
    """

    def __init__(self, groups, orthogonalize_dtype=torch.float32, compile=False, loss_scaling=False):
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
        # an old AMD GPU may pass for one with TF32: then the slower of two exact ways is taken
        has_tf32 = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.tf32 = has_tf32 and torch.backends.cuda.matmul.allow_tf32
        self.grad_norm = self.skipped = self.scale_skipped = torch.zeros((), device=self.device)
        self.loss_scale = torch.tensor(LOSS_SCALES[1], device=self.device) if loss_scaling else None
        self.good_steps = torch.zeros((), device=self.device)  # in a row, since the loss scale has changed
        self.buckets = []
        for group in self.param_groups:
            by_shape = {}
            for name, p in zip(group["param_names"], group["params"]):
                by_shape.setdefault(p.shape if group["kind"] == "muon" else name, []).append((name, p))
            for pairs in by_shape.values():
                count = len(pairs)
                if self.device.type == "cpu" and not compile:  # several smaller stacks
                    count = self.world_size * max(1, EAGER_NUMEL // pairs[0][1].numel())
                for start in range(0, len(pairs), count):
                    names, params = map(list, zip(*pairs[start : start + count]))
                    self.buckets.append(Bucket(group, names, params, rank, self.world_size))
        self.parameters = {name: p for b in self.buckets for name, p in zip(b.names, b.params)}
        self.locations = {p: (b, index) for b in self.buckets for index, p in enumerate(b.params)}
        copies = [1 if b.sharded else self.world_size for b, _ in self.locations.values()]
        self.copies = torch.tensor(copies, device=self.device)  # how many ranks have each averaged gradient
        self.reductions, self.hooks = {}, []  # reductions: {parameter: (part, handle)} of this step
        # norm of each parameter's gradient, on this rank, in the last step that was skipped
        self.skipped_norms = torch.zeros(len(self.parameters), device=self.device)

    def add_param_group(self, group):
        """Add a checked group. (torch's own method imports the compiler, which takes a second.)"""
        self.param_groups.append(group)

    def scale(self, loss):
        """The loss times the loss scale, if there is one."""
        return loss if self.loss_scale is None else loss * self.loss_scale

    def reduce_early(self):
        """Call before the last backward pass of a step, to average each gradient while that pass goes on."""
        if self.distributed:
            self.hooks = [p.register_post_accumulate_grad_hook(self._reduce) for p in self.locations]

    def _reduce(self, p):
        bucket, index = self.locations[p]
        self.reductions[p] = bucket.reduce(index)

    @torch.no_grad()
    def step(self, loss=None):
        """
        One update from the parameters' .grad (with several ranks or a loss scale their content is
        overwritten). `loss`: this rank's loss, a tensor and not scaled, which must be finite too. Raises
        ValueError for a parameter without a gradient.
        """
        for name, p in self.parameters.items():
            if p.grad is None:
                raise ValueError(f"parameter {name} has no gradient.\nMake the loss depend on it.")
        for hook in self.hooks:
            hook.remove()
        for p in self.locations:
            if p not in self.reductions:
                self._reduce(p)
        for _, handle in self.reductions.values():
            if handle is not None:
                handle.wait()
        grads = {p: self.reductions[p][0] for p in self.locations}
        self.reductions, self.hooks = {}, []
        if self.loss_scale is not None:
            torch._foreach_mul_(list(grads.values()), 1 / self.loss_scale)  # exact: a power of two
        norms = torch.stack(torch._foreach_norm(list(grads.values()), dtype=torch.float32))
        squared_norm = (norms.square() / self.copies).sum()  # over all ranks each gradient counts once
        loss = torch.zeros_like(squared_norm) if loss is None else loss.detach().float()
        if self.distributed:
            sums = torch.stack([squared_norm, loss])
            dist.all_reduce(sums)
            squared_norm, loss = sums
        # not finite if the loss or any gradient is not finite
        self.grad_norm, self.skipped = squared_norm.sqrt(), (~torch.isfinite(squared_norm + loss)).float()
        if self.loss_scale is not None:
            self._adjust_loss_scale(self.skipped * torch.isfinite(loss))
        self.skipped_norms = torch.where(self.skipped > 0, norms, self.skipped_norms)
        if self.device.type == "mps" and self.skipped:  # Metal's fused AdamW ignores found_inf: synchronize
            return
        gathers = []
        for bucket in self.buckets:
            parts = [grads[p] for p in bucket.params]
            share = self._update(bucket, bucket.own_share(parts) if bucket.stacked else parts[0])
            if bucket.sharded:
                gathers.append((bucket, *bucket.gather(share)))  # while the next bucket is updated
            elif bucket.stacked:
                torch._foreach_copy_(bucket.params, bucket.unstack(share))
        for bucket, full, handle in gathers:
            handle.wait()
            torch._foreach_copy_(bucket.params, bucket.unstack(full))

    def _adjust_loss_scale(self, overflowed):
        """Halve the loss scale if `overflowed` is 1.0; double it after GROWTH_STEPS good steps in a row."""
        least, _, greatest = LOSS_SCALES
        self.scale_skipped = overflowed * (self.loss_scale > least)
        good_steps = (self.good_steps + 1) * (1 - self.skipped)
        grown = (good_steps >= GROWTH_STEPS).float()
        self.good_steps = good_steps * (1 - grown)
        self.loss_scale = (self.loss_scale * (1 + grown - 0.5 * overflowed)).clamp(least, greatest)

    def _update(self, bucket, grad):
        """Update this rank's share of a bucket by its share of the gradient -> the share's new weights."""
        group, share = bucket.group, bucket.own_share(bucket.params)
        if not bucket.stacked:  # the share is a view of the parameter
            adamw_update(share, grad, bucket.state, group, self.skipped)
            return share
        share = share.float()
        if len(share):  # with more ranks than matrices some ranks own none
            scalar = partial(torch.full, (), dtype=torch.float32, device=self.device)  # no synchronization
            numbers = {key: scalar(group[key]) for key in ("lr", "momentum", "weight_decay")}
            numbers["enabled"] = 1 - self.skipped
            precision = {"dtype": self.orthogonalize_dtype, "tf32": self.tf32}
            self.muon_update(share, grad, bucket.state, group, **precision, **numbers)
        return share

    def first_nonfinite_parameter(self):
        """
        -> the name of the first parameter whose gradient was not finite on any rank in the last skipped
        step, or None if only the loss was not finite. A collective call.
        """
        bad = (~self.skipped_norms.isfinite()).int()
        if self.distributed:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        return next((name for name, flag in zip(self.parameters, bad.tolist()) if flag), None)

    def first_different_rank(self):
        """-> the first rank whose weights differ from rank 0's, by checksums, or None. A collective call."""
        if not self.distributed:
            return None
        sums = torch.stack([number for p in self.parameters.values() for number in checksums(p.detach())])
        by_rank = [torch.zeros_like(sums) for _ in range(self.world_size)]
        dist.all_gather(by_rank, sums)
        return next((r for r, other in enumerate(by_rank) if not torch.equal(other, by_rank[0])), None)

    def state_bytes(self):
        """-> bytes of the full state in a checkpoint."""
        numel = dict.fromkeys(MOMENTS, 0)
        for group in self.param_groups:
            numel[group["kind"]] += sum(p.numel() for p in group["params"])
        return optimizer_state_bytes(numel)

    def state_dict(self):
        """
        -> {"state": {parameter name: {state name: full fp32 tensor}}}, the same for any world size, and with
        loss scaling "loss_scale": a tensor of the scale and the number of good steps since it has changed.
        Tensors that did not have to be gathered are not copies. A collective call.
        """
        state = {name: {} for name in self.parameters}
        for bucket in self.buckets:
            for key, share in bucket.state.items():
                full, handle = bucket.gather(share)
                if handle is not None:
                    handle.wait()
                for name, tensor in zip(bucket.names, bucket.unstack(full)):
                    state[name][key] = tensor
        if self.loss_scale is None:
            return {"state": state}
        return {"state": state, "loss_scale": torch.stack([self.loss_scale, self.good_steps])}

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """
        Load a state_dict() that was saved with any world size. Learning rates and other options stay as the
        groups have them. Raises ValueError, before anything changes, if names or shapes differ. Collective.
        A loss scale is loaded if it was saved and this optimizer scales the loss.
        """
        saved = state_dict["state"]
        if different := saved.keys() ^ self.parameters.keys():
            raise ValueError(f"optimizer state does not fit: {', '.join(sorted(different))}")
        for name, tensors in self.state_dict()["state"].items():
            for key, full in tensors.items():
                found = saved[name][key].shape if key in saved[name] else None
                if found != full.shape:
                    raise ValueError(f"optimizer state {key} of {name} has shape {found}, not {full.shape}")
        for bucket in self.buckets:
            for key, share in bucket.state.items():
                share.copy_(bucket.own_share([saved[name][key] for name in bucket.names]))
        if self.loss_scale is not None and "loss_scale" in state_dict:
            self.loss_scale, self.good_steps = state_dict["loss_scale"].to(self.device).unbind()


def optimizer_state_bytes(numel_by_kind):
    """{"muon": number of parameters, "adamw": …} -> bytes of the moments on all ranks together, in fp32."""
    return sum(4 * MOMENTS[kind] * numel for kind, numel in numel_by_kind.items())


def checksums(p):
    """-> two int64 0-D tensors: sums over the bits of p, weighted by row number and by column number."""
    bits = p.float().view(torch.int32).reshape(p.shape[:1].numel(), -1)
    sums = (bits.sum(dim, dtype=torch.int64) for dim in (1, 0))
    return [(s * torch.arange(1, len(s) + 1, device=s.device)).sum() for s in sums]


def check_groups(groups):
    """ValueError for an unknown kind or option, no lr, a parameter in two groups or unsuitable for Muon."""
    seen = {}
    for group in groups:
        kind = group.get("kind")
        if kind not in DEFAULTS:
            raise ValueError(f"a param group has the unknown kind {kind!r}.\nChoose adamw or muon.")
        unknown = group.keys() - DEFAULTS[kind].keys() - {"kind", "params", "lr"}
        if unknown or "lr" not in group:
            fault = f"the unknown option {min(unknown)!r}" if unknown else "no lr"
            members, known = ", ".join(group["params"])[:100], ", ".join(DEFAULTS[kind])
            raise ValueError(f"the {kind} group of {members} has {fault}.\nIts options: lr, {known}.")
        for name, p in group["params"].items():
            if id(p) in seen or name in seen.values():  # state is kept by name
                raise ValueError(f"{name} is in two groups, once as {seen.get(id(p), name)}.\nRemove one.")
            seen[id(p)] = name
            if kind == "muon" and (p.ndim != 2 or "embedding" in name):
                raise ValueError(
                    f"parameter {name} {tuple(p.shape)} cannot be in a muon group.\nMuon is for matrices "
                    "of hidden layers; embeddings, vectors and scalars belong in an adamw group."
                )
