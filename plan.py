"""
The plan of a run: from its horizon to vocabulary, depth, batch, learning rates, weight decay and compilation;
the schedules; progress by steps and by the clock.

Pure functions and plain classes, without torch. Each rule names its source and gives an example. "Matrix and
head parameters" are those that scaling laws count: embeddings are left out (nanochat).
"""

import math
from typing import NamedTuple


class PlanError(Exception):
    """A plan that cannot work. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


# -----------------------------------------------------------------------------
# Schedules: pure functions of progress in [0, 1], and of the step where something warms up


def warmdown(progress, warmdown_ratio):
    """0 before the learning rate starts to decay, then linearly to 1 at the end of the run."""
    return 1 - min(1.0, (1 - progress) / warmdown_ratio) if warmdown_ratio > 0 else 0.0


def lr_multiplier(step, progress, warmup, warmdown_ratio, final_lr_frac):
    """
    Warmup, stable, decay (arXiv 2405.18392) for the update after `step` updates: linearly up over `warmup`
    steps, then 1, then linearly down to final_lr_frac over the last warmdown_ratio of the run.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    return rise * (1 - (1 - final_lr_frac) * warmdown(progress, warmdown_ratio))


def muon_momentum(step, progress, warmdown_ratio):
    """0.85 → 0.97 over the first 400 steps, then to 0.90 while the learning rate decays (nanochat)."""
    momentum = 0.85 + (0.97 - 0.85) * min(1.0, step / 400)
    return momentum + (0.90 - momentum) * warmdown(progress, warmdown_ratio)


def weight_decay_multiplier(progress, warmdown_ratio):
    """1, then half a cosine down to 0 while the learning rate decays."""
    return 0.5 * (1 + math.cos(math.pi * warmdown(progress, warmdown_ratio)))


# -----------------------------------------------------------------------------
# Progress. Both classes have the same methods, so that the loop does not ask which one it has


class Interval(NamedTuple):
    """The steps until the next report, planned by rank 0."""

    progress: list  # before the first step, then after each step: one value more than there are steps
    suspended: float = 0.0  # seconds by which the deadline was extended, because the process was suspended

    @property
    def steps(self):
        return len(self.progress) - 1


def interval_steps(step, warm_from, dt, log_every, periods):
    """
    The most steps until the next report: log_every, or one until step warm_from and then half a second of
    steps, ten at most. Always 10 s at most, because signals and saves wait for it, and never past warm_from
    or a multiple of a period (-1: none). dt: seconds per step.
    """
    steps = log_every or (1 if step < warm_from else min(10, max(1, int(0.5 / dt))))
    steps = min(steps, max(1, int(10 / dt)))
    ends = [step - step % period + period for period in periods if period > 0]
    ends += [warm_from] if step < warm_from else []
    return min(steps, *(end - step for end in ends)) if ends else steps


class ProgressBySteps:
    """
    Progress = tokens trained / tokens planned. That is step / num_iterations while the batch is constant; a
    resumed run may have trained its first `step` steps, and `tokens` tokens, with another batch.
    """

    def __init__(self, num_iterations, tokens_per_step, step=0, tokens=0):
        self.first_step, self.tokens, self.tokens_per_step = step, tokens, tokens_per_step
        self.last_step = max(step, num_iterations)
        self.planned_tokens = tokens + (self.last_step - step) * tokens_per_step

    def at(self, step, now=None):
        """Progress after `step` steps."""
        if step == self.last_step:
            return 1.0
        return (self.tokens + (step - self.first_step) * self.tokens_per_step) / self.planned_tokens

    def seconds_left(self, step, dt, now):
        """Seconds of training left, at `dt` seconds per step."""
        return dt * (self.last_step - step)

    def next_interval(self, step, dt, max_steps, now, closing_seconds):
        """The next steps, at most max_steps -> Interval; without steps if the run is over."""
        steps = max(0, min(max_steps, self.last_step - step))
        return Interval([self.at(step + i) for i in range(steps + 1)])

    def state_dict(self, now):
        """What a checkpoint saves of it: nothing, the step is enough."""
        return {"span": None, "span_used": None}


class ProgressByClock:
    """
    Progress = share of the time used. The time begins with the first step of this process and ends early
    enough for the closing work; a run that has a limit in steps, too, takes the larger of the two shares.

    end: when the process should exit, on the clock of `now` (seconds, time.monotonic); span: seconds from
    first step to closing work, None: from `end`, in the first interval; used: seconds of the span used before
    this process; progress: at its start; by_steps: a ProgressBySteps, or None without a limit in steps.
    """

    def __init__(self, end, span=None, used=0.0, progress=0.0, by_steps=None):
        self.end, self.span, self.used, self.progress, self.by_steps = end, span, used, progress, by_steps
        self.start = None  # when the span began, or would have if all of it were in this process
        self.last_call, self.expected, self.last_dt = None, 0.0, math.inf

    def time_left(self, now):
        """Seconds until the deadline."""
        return self.start + self.span - now

    def at(self, step, now):
        """Progress at a time; it never falls."""
        return min(1.0, max(self.progress, 1 - self.time_left(now) / self.span))

    def share_of_steps(self, step):
        return self.by_steps.at(step) if self.by_steps else 0.0

    def seconds_left(self, step, dt, now):
        """Seconds of training left: until the deadline, or until the limit in steps."""
        left = self.time_left(now)
        return min(left, self.by_steps.seconds_left(step, dt, now)) if self.by_steps else left

    def next_interval(self, step, dt, max_steps, now, closing_seconds):
        """
        The next steps, at most max_steps, at `dt` seconds each -> Interval; without steps if the run is over.

        Where progress is ahead of the clock it waits for it. An interval takes at most a sixth of the time
        left and a twentieth of the span, so that no change of speed leads past the deadline. A step begins
        only if at least half of it fits. If more than twice the planned time has passed since the last call,
        the excess moves progress by at most 0.2; the rest (a closed laptop) extends the deadline.
        """
        if self.start is None:
            time_left = max(self.end - now - closing_seconds, dt)  # for at least one step
            self.span = self.span or self.used + time_left
            self.start, self.last_call = now - self.used, now
        suspended = max(0.0, now - self.last_call - 2 * self.expected - 0.2 * self.span)
        self.start, self.last_call = self.start + suspended, now
        dt, self.last_dt = min(dt, self.last_dt), dt  # the faster of two: a short interruption is no speed
        left = self.time_left(now)
        steps = min(max_steps, max(1, int(min(left / 6, self.span / 20) / dt))) if left >= dt / 2 else 0
        if self.by_steps:
            steps = max(0, min(steps, self.by_steps.last_step - step))
        self.expected = steps * dt
        if steps == 0:
            return Interval([1.0], suspended)
        begin = min(1.0, max(self.at(step, now), self.share_of_steps(step)))
        end = min(1.0, max(1 - (left - steps * dt) / self.span, self.share_of_steps(step + steps)))
        increment = max(0.0, end - begin) / steps
        interval = Interval([begin + i * increment for i in range(steps + 1)], suspended)
        self.progress = interval.progress[-1]
        return interval

    def state_dict(self, now):
        """What a checkpoint saves of it: the time used is not the progress where steps are ahead of it."""
        return {"span": self.span, "span_used": now - self.start}


# -----------------------------------------------------------------------------
# Vocabulary and depth


def largest_vocab(minutes):
    """
    The largest vocabulary that a CPU has time to learn, a power of two: 1 minute -> 2,048, 3 -> 4,096,
    20 -> 8,192. Fitted on two cores: after 45 s, vocabularies of 1,024, 2,048 and 4,096 reached 1.260, 1.251
    and 1.281 bits per byte; after 160 s 1.088, 1.077 and 1.061. After 575 s at depth 3, 4,096 and 8,192
    reached 0.922 and 0.917, but with 8,192 the rule for depth would choose depth 2, which reached 0.934.
    """
    return 2 ** min(15, max(9, 11 + round(0.36 * math.log2(minutes))))


# A timed run ends after this many epochs: more would memorize the text, even with more dropout. Depth 2 on
# 1 MB of verse: 1.319 bits per byte after 5 epochs, 1.281 after 10, 1.306 after 20 with dropout 0.3
MAX_EPOCHS = 10


def best_dropout(epochs):
    """
    Dropout for a text that is read `epochs` times: 0.02 for each, none for a single one. 10 epochs of 1 MB of
    verse, depth 2: 1.423 bits per byte without, 1.320 with 0.1, 1.281 with 0.2.
    """
    return round(0.02 * min(epochs, MAX_EPOCHS), 2) if epochs > 1 else 0.0


def needed_tokens(params, unique_tokens):
    """
    Training tokens for which a model of `params` matrix and head parameters is the best choice: 12 per
    parameter (nanochat) from depth 12 on, fewer for smaller models, ∝ params^1.58. Compare it with three
    quarters of what the time allows. Fitted to runs of 45 to 575 s on two cores: in 270 s depth 3 reached
    1.062 bits per byte and depth 2 1.046; in 575 s 0.922 and 0.937.
    124e6 -> 1.5e9; 2.1e6 (depth 3, vocabulary 4,096) -> 2.4e6; 0.9e6 (depth 2) -> 0.6e6.

    A model that needs more than four epochs of a text of `unique_tokens` is too large for it: up to four,
    a text read again is almost as good as new text (arXiv 2305.16264). 1 MB of verse, 10 epochs with dropout
    0.2: depth 2, which needs one epoch, reached 1.281, and depth 3, which needs 4.4, reached 1.317.
    """
    needed = 12 * params * min(1.0, (params / 124e6) ** 0.58)
    return needed if needed <= 4 * unique_tokens else math.inf


def expected_mfu(width):
    """Share of its peak FLOP/s that a GPU reaches, approximately: on an H100, width 256: 0.29, 768: 0.47."""
    return 0.62 * width / (width + 270)


def deepest(depths, is_affordable):
    """The last of `depths`, in ascending order, before the first that is_affordable(depth) rejects."""
    best = depths[0]  # without asking: it is the smallest choice
    for depth in depths[1:]:
        if not is_affordable(depth):
            break
        best = depth
    return best


# -----------------------------------------------------------------------------
# Compilation


def compile_mode(device_type, minutes=None, flops=None):
    """
    What torch.compile should compile in a run of so many minutes or training FLOPs: "nothing", "parts" or
    "graph", the whole forward pass.

    On two cores, depth 3, the parts take 45 s and make a step 1.2 times as fast; the graph takes 70 s and
    gains another 3%. 8e13 and 4e14 FLOPs are 6 and 30 minutes there. On an H100 the graph of depth 12 takes a
    minute, 20 s more than its parts, and gains 1.5%; 5e17 FLOPs are 20 minutes there. On MPS nothing is
    compiled.
    """
    on_gpu = device_type == "cuda"
    if minutes:
        parts_pay, graph_pays = minutes >= (2 if on_gpu else 6), minutes >= (20 if on_gpu else 30)
    else:
        parts_pay, graph_pays = flops >= (2e16 if on_gpu else 8e13), flops >= (5e17 if on_gpu else 4e14)
    if device_type == "mps" or not parts_pay:
        return "nothing"
    return "graph" if graph_pays else "parts"


# -----------------------------------------------------------------------------
# Batch


def best_batch_size(tokens):
    """
    Tokens per step for a run over `tokens` tokens: ∝ tokens^0.383 (arXiv 2505.13738), but at most 1/800 of
    them and at least 2^11. Depth 2 on 237 kB: 1.48 bits per byte in 240 steps of 2^11 tokens, 1.58 in 120 of
    2^12. In 270 s depth 3 reached 1.10 in 1,266 steps of 2^11 and 1.06 in 686 of 2^12; depth 2 1.07 in 1,523
    of 2^12 and 1.10 in 381 of 2^14. Below 2^11 the updates would take most of the time.
    1.5e9 tokens -> 2^19; 20e9 -> 2^20.4; 4e6 -> 2^12.
    """
    return max(2**11, min(2**19 * (tokens / 1.5e9) ** 0.383, tokens / 800))


def whole_rows(batch_size, T, num_rows=math.inf):
    """
    Round a batch, in tokens, to a power of two of rows of T tokens, at most the num_rows of the corpus ->
    tokens. Most numbers of ranks can share it, and it splits into micro-steps. 2^19, T = 2,048 -> 256 rows.
    """
    rows = 2 ** round(math.log2(max(1, batch_size / T)))
    return T * (rows if rows <= num_rows else 2 ** int(math.log2(num_rows)))


def largest_divisor(number, limit):
    """The largest divisor of `number` that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def micro_batch_sizes(largest):
    """Micro-batch sizes to try, in rows, each the largest divisor of the one before: 12 -> 12, 6, 3, 1."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(largest_divisor(sizes[-1], sizes[-1] - 1))
    return sizes


def share_batch(total_batch_size, T, world_size, was_given):
    """
    Share a batch of total_batch_size tokens among ranks -> rows of T tokens per rank. A batch that the user
    has given and the ranks cannot share is a PlanError; an automatic one moves to the nearest that they can.
    """
    rows = max(1, round(total_batch_size / T))
    if rows % world_size == 0:
        return rows // world_size
    if was_given:
        below, above = (max(1, rows // world_size + n) * world_size * T for n in (0, 1))
        what = f"--total-batch-size {total_batch_size}: {world_size} processes cannot share {rows} rows"
        raise PlanError(f"{what}.\nThe nearest sizes that they can share are {below} and {above}.")
    return max(1, round(rows / world_size))


# -----------------------------------------------------------------------------
# Learning rates, weight decay, evaluations, saves. The reference is nanochat's depth 12: 2^19 tokens a step,
# 1.5e9 tokens in all


def lr_scales(batch_size):
    """
    Factors for AdamW's and Muon's learning rates with batch_size tokens per step, relative to 2^19. Above it
    both grow with √batch (nanochat): 2^20 -> 1.41, 1.41. Below it √batch is far too small: with 2,048 tokens
    and 549 steps, AdamW was best at half of its rates and Muon at three times its rate: 2^11 -> 0.5, 3.03.
    """
    ratio = batch_size / 2**19
    return (ratio**0.5, ratio**0.5) if ratio > 1 else (ratio**0.125, ratio**-0.2)


def best_weight_decay(batch_size, tokens):
    """
    Muon's weight decay ∝ √batch / tokens, so that its sum over a run stays the same (arXiv 2405.13698); at
    most 0.28. Batches of 2^19 over 1.5e9 tokens -> 0.28, over 6e9 -> 0.07.
    """
    return 0.28 * min(1.0, (batch_size / 2**19) ** 0.5 * 1.5e9 / tokens)


def num_evaluations(eval_seconds, training_seconds=math.inf):
    """Number of evaluations after step 0: ten, or those that fit 5% of training_seconds; may be below 1."""
    return min(10.0, 0.05 * training_seconds / eval_seconds)


def num_saves(num_iterations, dt, save_every, save_minutes):
    """Number of checkpoints of a run of steps that take dt seconds, the last one included."""
    by_steps = num_iterations // save_every if save_every > 0 else 0
    by_time = int(num_iterations * dt / (60 * save_minutes)) if save_minutes > 0 else 0
    return 1 + by_steps + by_time
