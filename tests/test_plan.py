"""plan.py: schedules, rules, and progress by steps and by the clock."""

import math
import random

import pytest

from plan import (
    Interval,
    PlanError,
    ProgressByClock,
    ProgressBySteps,
    best_batch_size,
    best_dropout,
    best_weight_decay,
    compile_mode,
    deepest,
    expected_mfu,
    interval_steps,
    largest_divisor,
    largest_vocab,
    lr_multiplier,
    lr_scales,
    micro_batch_sizes,
    muon_momentum,
    needed_tokens,
    num_evaluations,
    share_batch,
    weight_decay_multiplier,
    whole_rows,
)

# -----------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    "step, progress, warmup, warmdown, final, expected",
    [
        (0, 0.0, 40, 0.5, 0.1, 1 / 40),  # the first update is not 0
        (38, 0.038, 40, 0.5, 0.1, 39 / 40),
        (39, 0.039, 40, 0.5, 0.1, 1.0),  # the warmup is over
        (500, 0.5, 40, 0.5, 0.1, 1.0),  # the last stable update
        (750, 0.75, 40, 0.5, 0.1, 0.1 + 0.9 * 0.5),
        (999, 0.999, 40, 0.5, 0.1, 0.1 + 0.9 / 500),  # the last update of 1,000
        (1000, 1.0, 40, 0.5, 0.1, 0.1),
        (999, 0.999, 40, 0.5, 0.0, 1 / 500),  # never 0 while there is an update
        (0, 0.0, 0.1, 0.65, 0.05, 1.0),  # N = 1: a tenth of it
        (0, 0.0, 2, 0.5, 0.1, 0.5),  # N = 20
        (1, 0.05, 2, 0.5, 0.1, 1.0),
        (0, 0.0, 0, 0.5, 0.1, 1.0),  # no warmup
        (99, 0.99, 10, 0.0, 0.1, 1.0),  # no warmdown
        (100, 1.0, 10, 0.0, 0.1, 1.0),
        (0, 0.0, 0, 1.0, 0.0, 1.0),  # warmdown from the start
        (25, 0.25, 0, 1.0, 0.0, 0.75),
        (4, 0.04, 10, 1.0, 0.0, 0.5 * 0.96),  # warmup and warmdown multiply where they overlap
        (50, 0.5, 0, 1.0, 1.0, 1.0),  # final 1: constant
        (7, 0.75, 0, 0.5, 0.1, 0.55),  # progress by the clock need not be step / N
    ],
)
def test_lr_multiplier(step, progress, warmup, warmdown, final, expected):
    assert lr_multiplier(step, progress, warmup, warmdown, final) == pytest.approx(expected, rel=1e-12)


def test_muon_momentum():
    assert muon_momentum(0, 0.0, 0.5) == pytest.approx(0.85)
    assert muon_momentum(200, 0.02, 0.5) == pytest.approx(0.91)
    assert [muon_momentum(s, s / 10_000, 0.5) for s in (400, 3000, 5000)] == pytest.approx([0.97] * 3)
    assert muon_momentum(7500, 0.75, 0.5) == pytest.approx(0.935)
    assert muon_momentum(10_000, 1.0, 0.5) == pytest.approx(0.90)
    assert muon_momentum(9999, 0.9999, 0.0) == pytest.approx(0.97)
    assert all(0.85 <= muon_momentum(s, s / 300, 1.0) <= 0.97 for s in range(300))


def test_weight_decay_multiplier():
    assert [weight_decay_multiplier(p, 0.5) for p in (0.0, 0.499, 0.5)] == [1.0, 1.0, 1.0]
    assert weight_decay_multiplier(0.75, 0.5) == pytest.approx(0.5)
    assert 0 < weight_decay_multiplier(0.999, 0.5) < 1e-4
    assert weight_decay_multiplier(1.0, 0.5) == pytest.approx(0)
    assert weight_decay_multiplier(0.999, 0.0) == 1.0


# -----------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(
    "minutes, vocab", [(0.05, 512), (1, 2048), (3, 4096), (5, 4096), (10, 4096), (20, 8192), (1e6, 2**15)]
)
def test_largest_vocab(minutes, vocab):
    assert largest_vocab(minutes) == vocab


@pytest.mark.parametrize(
    "params, tokens", [(124e6, 1.488e9), (1e9, 12e9), (124e6 / 2**5, 12 * 124e6 / 2**7.9)]
)
def test_needed_tokens(params, tokens):
    assert needed_tokens(params, math.inf) == pytest.approx(tokens)
    assert needed_tokens(params, tokens / 3.9) == pytest.approx(tokens)
    assert needed_tokens(params, tokens / 4.1) == math.inf  # more than four epochs


@pytest.mark.parametrize("width, measured", [(256, 0.285), (768, 0.474)])  # on an H100, README
def test_expected_mfu_is_close_to_what_was_measured(width, measured):
    assert expected_mfu(width) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("tokens, batch", [(1.5e9, 2**19), (3e9, 2**19.383), (8e6, 1e4), (45, 2**11)])
def test_best_batch_size(tokens, batch):
    assert best_batch_size(tokens) == pytest.approx(batch)


@pytest.mark.parametrize(
    "batch, T, rows",
    [(2**19, 2048, 256), (2**19, 1000, 512), (2**12, 512, 8), (4000, 384, 8), (1, 512, 1), (700, 512, 1)],
)
def test_whole_rows(batch, T, rows):
    assert whole_rows(batch, T) == rows * T
    assert whole_rows(batch, T, num_rows=7) == min(rows, 4) * T  # no row twice in a batch


def test_learning_rates_and_weight_decay_for_a_batch():
    assert lr_scales(2**19) == (1.0, 1.0)
    assert lr_scales(2**21) == (2.0, 2.0)
    assert lr_scales(2**11) == pytest.approx((0.5, 2**1.6))
    assert best_weight_decay(2**19, 1.5e9) == pytest.approx(0.28)
    assert best_weight_decay(2**19, 6e9) == pytest.approx(0.07)
    assert best_weight_decay(2**21, 6e9) == pytest.approx(0.14)
    assert best_weight_decay(2**12, 2e6) == 0.28


def test_best_dropout_only_for_a_text_read_several_times():
    assert [best_dropout(epochs) for epochs in (0, 0.5, 1)] == [0, 0, 0]
    assert 0 < best_dropout(2) < best_dropout(5) < best_dropout(10) == best_dropout(1000) <= 0.3


@pytest.mark.parametrize(
    "largest_that_is_affordable, depth, asked",
    [(0, 1, [2]), (1, 1, [2]), (3, 3, [2, 3, 5]), (9, 5, [2, 3, 5])],
)
def test_the_deepest_affordable_depth(largest_that_is_affordable, depth, asked):
    calls = []
    found = deepest((1, 2, 3, 5), lambda d: calls.append(d) or d <= largest_that_is_affordable)
    assert (found, calls) == (depth, asked)  # the smallest one is taken without asking


@pytest.mark.parametrize(
    "device_type, minutes, flops, mode",
    [
        ("cpu", 5.9, None, "nothing"),
        ("cpu", 6, None, "parts"),
        ("cpu", 30, None, "graph"),
        ("cpu", None, 7e13, "nothing"),
        ("cpu", None, 9e13, "parts"),
        ("cpu", None, 5e14, "graph"),
        ("cuda", 2, None, "parts"),
        ("cuda", None, 1e16, "nothing"),
        ("cuda", None, 5e17, "graph"),
        ("mps", 100, None, "nothing"),
    ],
)
def test_compile_mode(device_type, minutes, flops, mode):
    assert compile_mode(device_type, minutes, flops) == mode


def test_micro_batch_sizes_are_divisors_in_descending_order():
    assert micro_batch_sizes(12) == [12, 6, 3, 1]
    assert micro_batch_sizes(64) == [64, 32, 16, 8, 4, 2, 1]
    assert micro_batch_sizes(1) == [1]
    assert largest_divisor(8, 3) == 2 and largest_divisor(7, 6) == 1


def test_a_batch_is_shared_or_the_nearest_sizes_are_named():
    assert share_batch(2048, 64, 4, was_given=True) == 8
    assert share_batch(500, 64, 4, was_given=True) == 2  # rounded to whole rows, never to suit a machine
    assert share_batch(10, 64, 1, was_given=True) == 1
    with pytest.raises(PlanError, match=r"2048: 3 processes cannot share 32 rows.\n.* 1920 and 2112\."):
        share_batch(2048, 64, 3, was_given=True)
    assert share_batch(2048, 64, 3, was_given=False) == 11  # an automatic one moves to 33 rows
    assert share_batch(64, 64, 3, was_given=False) == 1


def test_ten_evaluations_or_five_percent_of_the_time():
    assert num_evaluations(1.0) == 10
    assert num_evaluations(1.0, 1000.0) == 10
    assert num_evaluations(1.0, 100.0) == pytest.approx(5)
    assert num_evaluations(10.0, 100.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "step, dt, log_every, periods, steps",
    [
        (5, 0.01, None, (), 1),  # each of the first 10
        (10, 0.01, None, (), 10),
        (10, 0.1, None, (), 5),  # half a second
        (10, 3.0, None, (), 1),
        (10, 0.1, 50, (), 50),
        (10, 1.0, 50, (), 10),  # ten seconds
        (5, 0.1, 50, (), 5),  # up to step 10
        (12, 0.01, None, (20, -1, 7), 2),  # up to step 14
        (14, 0.01, None, (20, -1, 7), 6),
    ],
)
def test_steps_until_the_next_report(step, dt, log_every, periods, steps):
    assert interval_steps(step, 10, dt, log_every, periods) == steps


# -----------------------------------------------------------------------------
# Progress by steps


def test_progress_by_steps_is_exactly_step_over_num_iterations():
    """For any batch: a run by steps has the same learning rates bit for bit as one that divides steps."""
    rng = random.Random(0)
    for _ in range(2000):
        n, batch = rng.randrange(1, 10**5), rng.randrange(1, 10**7)
        step = rng.randrange(n + 1)
        assert ProgressBySteps(n, batch).at(step) == step / n
        resumed_at = rng.randrange(step + 1)
        assert ProgressBySteps(n, batch, resumed_at, resumed_at * batch).at(step) == step / n


def test_progress_by_steps_counts_tokens_where_the_batch_has_changed():
    timeline = ProgressBySteps(20, tokens_per_step=1024, step=10, tokens=5120)
    assert timeline.planned_tokens == 5120 + 10 * 1024
    assert timeline.at(10) == pytest.approx(1 / 3) and timeline.at(20) == 1.0
    again = ProgressBySteps(20, tokens_per_step=1024, step=15, tokens=5120 + 5 * 1024)
    assert [again.at(s) for s in range(15, 21)] == [timeline.at(s) for s in range(15, 21)]


def test_intervals_of_progress_by_steps_end_at_the_last_step():
    timeline = ProgressBySteps(12, 512)
    interval = timeline.next_interval(step=5, dt=0.1, max_steps=10, now=0.0, closing_seconds=1.0)
    assert interval == Interval([step / 12 for step in range(5, 13)]) and interval.steps == 7
    assert timeline.next_interval(12, 0.1, 10, 0.0, 1.0) == Interval([1.0])
    assert timeline.seconds_left(5, 0.5, now=0.0) == 3.5
    complete = ProgressBySteps(12, 512, step=15, tokens=15 * 512)  # resumed with fewer steps than it has done
    assert complete.next_interval(15, 0.1, 10, 0.0, 1.0) == Interval([1.0])


# -----------------------------------------------------------------------------
# Progress by the clock


NEVER = math.inf


def timed_run(
    span,
    step_time,
    rng,
    log_every=None,
    eval_every=0,
    eval_time=0,
    resume_at=NEVER,
    stop_at=NEVER,
    stop=0,
    last_step=NEVER,
):
    """
    A run like train.py's loop, on a simulated clock. step_time: seconds since the start -> seconds of a step.
    -> (seconds beyond the deadline, [(progress, seconds) of each step], seconds the deadline was extended).
    """
    now = begin = 1e6 * rng.random()
    by_steps = ProgressBySteps(last_step, 512) if last_step < NEVER else None
    timeline = ProgressByClock(now + span + 7, by_steps=by_steps)  # 7 s of closing work
    last_progress = 0.0
    dt = step_time(0.0) * rng.choice([0.5, 1, 2])  # the benchmark's figure is coarse
    steps, extended, set_up = [], 0.0, 0.0
    while True:
        max_steps = log_every or (1 if len(steps) < 10 else min(10, max(1, int(0.5 / dt))))
        max_steps = min(max_steps, max(1, int(10 / dt)))
        if eval_every:
            max_steps = min(max_steps, eval_every - len(steps) % eval_every)
        interval = timeline.next_interval(len(steps), dt, max_steps, now, closing_seconds=7)
        extended += interval.suspended
        if interval.steps == 0:
            return now - begin - span - set_up, steps, extended
        assert interval.progress[0] >= last_progress  # it never falls
        start, last_progress = now, interval.progress[-1]
        for progress in interval.progress[:-1]:
            steps.append((progress, step_time(now - begin)))
            now += steps[-1][1]
            if now - begin > stop_at:
                now, stop_at = now + stop, NEVER
        dt = (now - start) / interval.steps
        if eval_every and len(steps) % eval_every == 0 and timeline.time_left(now) > 3 * eval_time:
            now += eval_time * rng.uniform(0.7, 1.5)
        if now - begin > resume_at:  # killed just after a save, and started again
            saved, progress, resume_at = timeline.state_dict(now), timeline.at(len(steps), now), NEVER
            assert progress >= last_progress
            now, set_up = now + 30.0, 30.0
            if by_steps:
                by_steps = ProgressBySteps(last_step, 512, len(steps), 512 * len(steps))
            timeline = ProgressByClock(NEVER, saved["span"], saved["span_used"], progress, by_steps)


def assert_in_time(late, steps, span):
    """Late by 1%, 4 s or one step at most, early by 3% or 8 s; the last step's progress close to 1."""
    slowest = max(seconds for _, seconds in steps[-10:])
    assert -max(0.03 * span, 8) <= late <= max(0.01 * span, 4, slowest)
    assert (1 - steps[-1][0]) * span <= 1.5 * slowest
    assert all(0 <= a <= b <= 1 for (a, _), (b, _) in zip(steps, steps[1:]))


@pytest.mark.parametrize("seed", range(200))
def test_a_timed_run_ends_on_time_with_its_decay_complete(seed):
    rng = random.Random(seed)
    span = rng.choice([10, 40, 250, 900])
    base = span * 10 ** rng.uniform(-4, -1.7)  # with longer steps the end may be missed by half a step
    cut, change, noise = rng.uniform(0, span), rng.choice([0.5, 1, 2]), rng.choice([0, 0.1, 0.3])

    def step_time(seconds):
        return base * (change if seconds > cut else 1) * (1 + noise * rng.uniform(-1, 1))

    eval_every = rng.choice([0, 7, 50])
    eval_time = min(base * rng.choice([0.3, 3, 10]), 0.1 * base * eval_every)
    resume_at = rng.choice([NEVER, 0.4 * span])
    log_every = rng.choice([None, 10**6])  # intervals of half a second, or of ten
    late, steps, extended = timed_run(span, step_time, rng, log_every, eval_every, eval_time, resume_at)
    assert extended == 0
    assert_in_time(late, steps, span)


@pytest.mark.parametrize("stop", [5.0, 15.0, 60.0, 3600.0])
def test_a_suspended_process_moves_progress_by_a_fifth_and_extends_the_deadline(stop):
    rng = random.Random(0)
    late, steps, extended = timed_run(100, lambda seconds: 0.2, rng, stop_at=50.0, stop=stop)
    assert late == pytest.approx(max(0.0, stop - 20), abs=2) and extended == pytest.approx(late, abs=2)
    assert max(b - a for (a, _), (b, _) in zip(steps, steps[1:])) <= 0.21
    assert_in_time(late - extended, steps, 100)


def test_waiting_for_data_is_time_and_no_suspension():
    timeline = ProgressByClock(end=100.0)
    timeline.next_interval(0, 0.01, 10, 0.0, 0.0)
    waits = [timeline.next_interval(10, 0.01, 10, now / 10, 0.0) for now in range(1, 900)]  # it asks on
    assert all(wait.suspended == 0 and wait.steps for wait in waits)
    assert waits[-1].progress[0] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("resume_at", [NEVER, 20.0])
def test_a_run_limited_by_its_text_progresses_by_steps(resume_at):
    late, steps, _ = timed_run(100, lambda s: 0.1, random.Random(0), resume_at=resume_at, last_step=400)
    assert len(steps) == 400 and late < -25
    assert [p for p, _ in steps] == pytest.approx([step / 400 for step in range(400)], abs=0.01)


def test_the_clock_ends_a_run_limited_by_its_text_if_the_machine_becomes_slow():
    slow = lambda seconds: 0.1 if seconds < 30 else 2.0  # noqa: E731
    late, steps, _ = timed_run(100, slow, random.Random(0), last_step=400)
    assert 300 < len(steps) < 400
    assert_in_time(late, steps, 100)


def test_one_step_always_runs_and_a_finished_run_stays_finished():
    timeline = ProgressByClock(end=52.0)
    first = timeline.next_interval(0, dt=3.0, max_steps=10, now=50.0, closing_seconds=1.0)
    assert first.progress == [0.0, pytest.approx(1.0)] and first.suspended == 0
    assert timeline.next_interval(1, 4.0, 10, 54.0, 1.0).steps == 0 and timeline.at(1, 54.0) == 1.0
    complete = ProgressByClock(end=99.0, span=100.0, used=100.0, progress=1.0)
    assert complete.next_interval(5, 0.01, 10, 50.0, 1.0) == Interval([1.0])


def test_a_resumed_run_limited_by_its_text_has_the_time_that_it_had_not_used():
    """Steps are far ahead of the clock; a slow machine after the resume gets the time that is really left."""
    by_steps = ProgressBySteps(400, 512)
    timeline = ProgressByClock(end=100.0, by_steps=by_steps)
    step, now = 0, 0.0
    while step < 300:
        interval = timeline.next_interval(step, 0.05, 10, now, 0.0)
        step, now = step + interval.steps, now + 0.05 * interval.steps
    saved, progress = timeline.state_dict(now), timeline.at(step, now)
    assert progress == pytest.approx(0.75, abs=0.03) and saved["span_used"] == pytest.approx(now) == 15
    by_steps = ProgressBySteps(400, 512, step, 512 * step)
    again = ProgressByClock(math.inf, saved["span"], saved["span_used"], progress, by_steps)
    assert again.next_interval(step, 2.0, 1, 1000.0, 0.0).progress[0] == pytest.approx(0.75, abs=0.01)
    assert again.time_left(1000.0) == pytest.approx(85)  # and not 25: a share of steps is not time
