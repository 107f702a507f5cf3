"""
MuonAdamW: gradients in, weights out; one optimizer, the same on one process and on many.

Matrices of the blocks learn by Muon (kellerjordan.github.io/posts/muon), everything else by AdamW
(arXiv 1711.05101). With several processes the gradients are averaged in here, each rank updates its share of
the rows or matrices and keeps only their state (ZeRO-2, arXiv 1910.02054), and the weights are gathered.
The schedules are pure functions at the end of the file.
"""

import math

import torch
import torch.distributed as dist

# Polar Express (arXiv 2505.16932), 5 steps, safety 2e-2, cushion 2: the best quintic for each step in turn
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # textbook Muon's Newton–Schulz
ORTHOGONALIZERS = {
    "polar_express": (1.02, POLAR_EXPRESS),
    "quintic": (1.0, QUINTIC),
}  # (safety, coefficients)
SHARD_NUMEL = 2**14  # smaller AdamW tensors are cheaper to update everywhere than to scatter and gather
DEFAULTS = {
    "adamw": {"lr": None, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0},
    "muon": {
        "lr": None,
        "momentum": 0.95,
        "weight_decay": 0.0,
        "beta2": 0.9,  # NorMuon's second moment; None turns it off
        "cautious": True,  # decay only where the update already shrinks the weight
        "orthogonalizer": "polar_express",
    },
}


def orthogonalize(G, dtype=torch.float32, method="polar_express"):
    """
    Push the singular values of each matrix of G (B, rows, cols) towards 1 and keep its singular vectors.
    Five steps X ← aX + (bA + cA²)X with A = XXᵀ, on the smaller Gram side, in `dtype`; result in fp32.
    A zero matrix stays zero.
    """
    safety, coefficients = ORTHOGONALIZERS[method]
    X = G.mT if G.size(-2) > G.size(-1) else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * safety + 1e-7)
    X = X.to(dtype)
    for a, b, c in coefficients:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    X = X.float()
    return X.mT if G.size(-2) > G.size(-1) else X


def normalize_neurons(update, second_momentum, beta2, live):
    """
    NorMuon (arXiv 2510.05491): divide each row (column, if wider than tall) of update (B, rows, cols) by the
    root of its running mean square, then restore the Frobenius norm. Updates second_momentum in place.
    """
    dim = -1 if update.size(-2) >= update.size(-1) else -2
    mean_square = update.square().mean(dim=dim, keepdim=True)
    second_momentum.lerp_(mean_square, live * (1 - beta2))
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True)
    new_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return update * (scale * (norm / new_norm.clamp_min(1e-10)).sqrt())


def muon_update(weight, grad, state, scalars, cautious, method, dtype):
    """One Muon step in place on a stack weight (B, rows, cols); scalars["live"] = 0: nothing changes."""
    live, lr, momentum = scalars["live"], scalars["lr"], scalars["momentum"]
    grad = torch.where(live > 0, grad.float(), 0.0)  # 0 · NaN is NaN, so a bad gradient is replaced
    state["momentum_buffer"].lerp_(grad, live * (1 - momentum))
    update = grad.lerp(state["momentum_buffer"], momentum)  # Nesterov
    update = orthogonalize(update, dtype, method)
    if "second_momentum" in state:
        update = normalize_neurons(update, state["second_momentum"], scalars["beta2"], live)
    decay = scalars["weight_decay"] * weight
    if cautious:
        decay = torch.where(update * weight >= 0, decay, 0.0)
    shape_scale = math.sqrt(max(1, weight.size(-2) / weight.size(-1)))
    weight.sub_(live * lr * (shape_scale * update + decay))


def adamw_update(weight, grad, state, scalars):
    """One AdamW step in place, in fp32 whatever the weight's dtype; `scalars["live"]` 0: nothing changes."""
    live, lr = scalars["live"], scalars["lr"]
    grad = torch.where(live > 0, grad.float(), 0.0)
    exp_avg, exp_avg_sq, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    step.add_(live)
    exp_avg.lerp_(grad, live * (1 - scalars["beta1"]))
    exp_avg_sq.lerp_(grad.square(), live * (1 - scalars["beta2"]))
    # 1 - beta^step through expm1: exact in fp32 also when beta is close to 1
    correction1 = -torch.expm1(step.clamp_min(1) * scalars["log_beta1"])
    correction2 = -torch.expm1(step.clamp_min(1) * scalars["log_beta2"])
    update = exp_avg / ((exp_avg_sq / correction2).sqrt_().add_(scalars["eps"])).mul_(correction1)
    new_weight = weight.float()
    new_weight = new_weight * (1 - live * lr * scalars["weight_decay"]) - update * (live * lr)
    weight.copy_(new_weight)


class Bucket:
    """
    What is reduced, updated and gathered as one: a stack of equal matrices (muon) or one tensor (adamw).
    Its first dimension is cut into one chunk per rank (the last ones padded with zeros) if it is `sharded`.
    """

    def __init__(self, group, names, params, rank, world_size):
        self.group, self.names, self.params = group, names, params
        self.stacked = group["kind"] == "muon"
        self.length = len(params) if self.stacked else params[0].size(0)
        self.sharded = world_size > 1 and (self.stacked or params[0].numel() >= SHARD_NUMEL)
        self.parts = world_size if self.sharded else 1
        self.chunk = -(-self.length // self.parts)
        self.own = slice(rank * self.chunk, (rank + 1) * self.chunk) if self.sharded else slice(None)

    def whole(self, tensors):
        """One tensor per parameter -> one (parts · chunk, …) tensor."""
        x = torch.stack(tensors) if self.stacked else tensors[0]
        padding = self.parts * self.chunk - self.length
        return torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) if padding else x

    def separate(self, whole):
        """The inverse of `whole`."""
        return list(whole[: self.length].unbind()) if self.stacked else [whole[: self.length]]

    def gather(self, part):
        """Start to gather each rank's (chunk, …) part -> (the whole, a handle to wait for or None)."""
        if not self.sharded:
            return part, None
        whole = part.new_empty(self.parts * self.chunk, *part.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, part.contiguous(), async_op=True)


class MuonAdamW(torch.optim.Optimizer):
    """
    groups: dicts with "kind" ("adamw" or "muon"), "params" ({name: parameter}), "lr" and what DEFAULTS has.
    orthogonalize_dtype: bf16 where its products are fast, else fp32. compile: fuse each update with Inductor.
    Under an initialized process group, `step` averages the gradients over ranks and shards its state.

    After `step(loss)`: `grad_norm`, the norm of the averaged gradient, and `skipped`, 1.0 if the loss or a
    gradient was not finite on any rank (then nothing has changed anywhere): 0-D tensors, not synchronized.
    A gradient whose squared norm overflows fp32 counts as not finite.
    """

    def __init__(self, groups, orthogonalize_dtype=torch.float32, compile=False):
        seen = {}
        for group in groups:
            if group["kind"] not in DEFAULTS:
                raise ValueError(f"unknown kind {group['kind']!r} of a param group: choose adamw or muon")
            if group.get("lr") is None:
                raise ValueError(f"the {group['kind']} group of {', '.join(group['params'])} has no lr")
            for name, p in group["params"].items():
                if id(p) in seen:
                    raise ValueError(f"parameter {name} is in two groups (the other time as {seen[id(p)]})")
                seen[id(p)] = name
                if group["kind"] == "muon" and (p.ndim != 2 or "embedding" in name):
                    raise ValueError(
                        f"parameter {name} {tuple(p.shape)} cannot be in a muon group: Muon is for the "
                        "matrices of hidden layers; embeddings, vectors and scalars belong in an adamw group"
                    )
        groups = [
            {**DEFAULTS[g["kind"]], **g, "initial_lr": g["lr"], "params": list(g["params"].items())}
            for g in groups
            if g["params"]
        ]
        super().__init__(groups, defaults={})
        self.orthogonalize_dtype = orthogonalize_dtype
        self.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        self.muon_update = torch.compile(muon_update, dynamic=False) if compile else muon_update
        self.adamw_update = torch.compile(adamw_update, dynamic=False) if compile else adamw_update
        self.device = self.param_groups[0]["params"][0].device
        self.grad_norm = self.skipped = torch.zeros((), device=self.device)
        self.scalars = [
            {} for _ in self.param_groups
        ]  # 0-D tensors, so that a moving schedule recompiles nothing
        self.buckets = []
        for index, group in enumerate(self.param_groups):
            by_shape = {}
            for name, p in zip(group["param_names"], group["params"]):
                by_shape.setdefault(tuple(p.shape) if group["kind"] == "muon" else name, []).append((name, p))
            for pairs in by_shape.values():
                bucket = Bucket(group, *map(list, zip(*pairs)), self.rank, self.world_size)
                bucket.scalars = self.scalars[index]
                bucket.state = self._new_state(bucket)
                self.buckets.append(bucket)

    def _new_state(self, bucket):
        shape = (bucket.chunk, *bucket.params[0].shape[0 if bucket.stacked else 1 :])
        zeros = lambda *size: torch.zeros(size, dtype=torch.float32, device=self.device)  # noqa: E731
        if bucket.group["kind"] == "adamw":
            return {"exp_avg": zeros(*shape), "exp_avg_sq": zeros(*shape), "step": zeros()}
        state = {"momentum_buffer": zeros(*shape)}
        if bucket.group["beta2"] is not None:
            count, rows, cols = shape
            state["second_momentum"] = zeros(count, rows, 1) if rows >= cols else zeros(count, 1, cols)
        return state

    def _refresh_scalars(self):
        """Copy what the groups say into 0-D device tensors; a fill is asynchronous, and only on a change."""
        for group, scalars in zip(self.param_groups, self.scalars):
            values = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if group["kind"] == "adamw":
                beta1, beta2 = group["betas"]
                values |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
                values |= {"log_beta1": math.log(beta1), "log_beta2": math.log(beta2)}
            else:
                values |= {"momentum": group["momentum"], "beta2": group["beta2"] or 0.0}
            for name, value in values.items():
                if name not in scalars:
                    scalars[name] = torch.full((), value, dtype=torch.float32, device=self.device)
                    scalars[name].host_value = value
                elif scalars[name].host_value != value:
                    scalars[name].fill_(value)
                    scalars[name].host_value = value

    @torch.no_grad()
    def step(self, loss=None):
        """
        One update from the parameters' .grad; `loss`: this rank's loss, a tensor, checked to be finite too.
        Raises ValueError for a parameter without gradient.
        """
        for bucket in self.buckets:
            for name, p in zip(bucket.names, bucket.params):
                if p.grad is None:
                    raise ValueError(f"parameter {name} has no gradient: it took no part in the loss")
        self._refresh_scalars()
        grads = [p.grad for bucket in self.buckets for p in bucket.params]
        self.grad_norm = torch.nn.utils.get_total_norm(grads).float()
        local = self.grad_norm if loss is None else self.grad_norm + loss.detach().float()
        self.skipped = (~torch.isfinite(local)).float()
        waits = []
        if self.distributed:
            verdict = dist.all_reduce(self.skipped, dist.ReduceOp.MAX, async_op=True)
            waits = [self._reduce(bucket) for bucket in self.buckets]
            verdict.wait()
        live = 1 - self.skipped
        squares, gathers = [], []
        for index, bucket in enumerate(self.buckets):
            if self.distributed:
                grad, handle = waits[index]
                handle.wait()
                if bucket.sharded or self.rank == 0:  # what every rank holds is counted once
                    squares.append(grad.float().square().sum())
            else:
                grad = bucket.whole([p.grad for p in bucket.params])
            whole = bucket.whole([p.data for p in bucket.params])
            weight = whole[bucket.own]
            scalars = {**bucket.scalars, "live": live}
            if bucket.group["kind"] == "muon":
                options = bucket.group["cautious"], bucket.group["orthogonalizer"], self.orthogonalize_dtype
                self.muon_update(weight, grad, bucket.state, scalars, *options)
            else:
                self.adamw_update(weight, grad, bucket.state, scalars)
            if bucket.stacked or bucket.sharded:  # elsewhere the update went into the parameter itself
                gathers.append((bucket, *bucket.gather(weight)))  # overlaps the next bucket's update
        for bucket, whole, handle in gathers:
            if handle is not None:
                handle.wait()
            torch._foreach_copy_(bucket.params, bucket.separate(whole))
        if self.distributed:
            total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.device)
            dist.all_reduce(total)
            self.grad_norm = total.sqrt()

    def _reduce(self, bucket):
        """Start to average a bucket's gradient over ranks -> (this rank's part, a handle to wait for)."""
        whole = bucket.whole([p.grad for p in bucket.params])
        if not bucket.sharded:
            return whole, dist.all_reduce(whole, dist.ReduceOp.AVG, async_op=True)
        part = whole.new_empty(bucket.chunk, *whole.shape[1:])
        return part, dist.reduce_scatter_tensor(part, whole.contiguous(), dist.ReduceOp.AVG, async_op=True)

    def state_dict(self):
        """
        {"state": {parameter name: {state name: full tensor}}, "param_groups": [...]}, the same for any world
        size. Where nothing had to be gathered the tensors are the optimizer's own memory. A collective call.
        """
        state = {}
        for bucket in self.buckets:
            for name in bucket.names:
                state[name] = {}
            for key, part in bucket.state.items():
                if part.ndim == 0:
                    wholes = [part] * len(bucket.names)
                else:
                    whole, handle = bucket.gather(part)
                    if handle is not None:
                        handle.wait()
                    wholes = bucket.separate(whole)
                for name, tensor in zip(bucket.names, wholes):
                    state[name][key] = tensor
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Take over a state_dict() of any world size; ValueError names what does not fit."""
        saved = state_dict["state"]
        names = [name for bucket in self.buckets for name in bucket.names]
        if set(names) != set(saved):
            raise ValueError(f"optimizer state does not fit: {', '.join(sorted(set(names) ^ set(saved)))}")
        for bucket in self.buckets:
            for key, part in bucket.state.items():
                tensors = [saved[name].get(key) for name in bucket.names]
                shape = part.shape[1:] if bucket.stacked else (bucket.length, *part.shape[1:])[: part.ndim]
                for name, tensor in zip(bucket.names, tensors):
                    if tensor is None or tensor.shape != shape:
                        raise ValueError(
                            f"optimizer state {key} of {name} does not fit: expected {tuple(shape)}"
                        )
                if part.ndim == 0:
                    part.copy_(tensors[0])
                else:
                    part.copy_(bucket.whole([t.to(self.device) for t in tensors])[bucket.own])
        by_names = {tuple(group["param_names"]): group for group in state_dict["param_groups"]}
        for group in self.param_groups:
            group.update({k: v for k, v in by_names[tuple(group["param_names"])].items() if k in group})


def warmdown_progress(step, num_iterations, warmdown_ratio):
    """0 before the learning rate starts to decay, then linearly to 1 at step = num_iterations."""
    warmdown = warmdown_ratio * num_iterations
    return 0.0 if warmdown == 0 else max(0.0, 1 - (num_iterations - step) / warmdown)


def lr_multiplier(step, num_iterations, warmup_steps, warmdown_ratio, final_lr_frac):
    """
    Warmup, stable, decay (arXiv 2405.18392) for the update after `step` updates, N = num_iterations: linearly
    up over min(warmup_steps, N / 10) steps, 1, then linearly down to final_lr_frac over warmdown_ratio · N.
    """
    warmup = min(warmup_steps, num_iterations / 10)
    rise = 1.0 if warmup == 0 else min(1.0, (step + 1) / warmup)
    return rise * (1 - (1 - final_lr_frac) * warmdown_progress(step, num_iterations, warmdown_ratio))


def muon_momentum(step, num_iterations, warmdown_ratio):
    """0.85 → 0.97 over the first 400 steps, and on to 0.90 as the learning rate decays (nanochat)."""
    momentum = 0.85 + (0.97 - 0.85) * min(1.0, step / 400)
    return momentum + (0.90 - momentum) * warmdown_progress(step, num_iterations, warmdown_ratio)


def weight_decay_multiplier(step, num_iterations, warmdown_ratio):
    """1, then a half cosine to 0 as the learning rate decays: before that nothing depends on the horizon."""
    return 0.5 * (1 + math.cos(math.pi * warmdown_progress(step, num_iterations, warmdown_ratio)))
