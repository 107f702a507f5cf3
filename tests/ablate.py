"""
Ablations: compare variants of the settings at equal training time. Run by hand; no other file uses it.

    python tests/ablate.py                                # list the sets
    python tests/ablate.py minute-1                       # run what is missing, then print the table
    python tests/ablate.py minute-1 --seeds 5 --first 11  # five new seeds

Speed and quality are measured separately, by running train.py. Speed: two threads; the shapes take turns, and
the median of several rounds counts. Learning rates do not change it. Quality: each run trains for the steps
that its variant's measured speed allows in the set's seconds. Two runs share the machine, one thread each:
its load does not change their results. Each result is saved as a line of ablations.tsv. If a call is
interrupted, the next one continues where it stopped.
"""

import argparse
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import report  # noqa: E402

TABLE = Path(__file__).with_suffix("").with_name("ablations.tsv")
COLUMNS = ("set", "kind", "flags", "number", "batch", "steps", "tok_per_sec", "val_bpb", "commit")
ROUNDS = 2  # of the speed measurement
UNTIMED = "lr|weight-decay|warmup-steps|warmdown-ratio|final-lr-frac"  # flags that do not change the speed

MINUTE, FIVE = "--depth 1 --vocab-size 2048", "--depth 2 --vocab-size 4096"
# name: (seconds of training, {variant: flags}). All variants are compared with the first one. Each sets its
# batch size, so that it does not depend on train.py's rule
SETS = {
    "minute-1": (
        45,
        {
            "depth 1, vocabulary 2,048": f"{MINUTE} --total-batch-size 2048",
            "depth 2": "--depth 2 --vocab-size 2048 --total-batch-size 2048",
            "width 192": f"{MINUTE} --aspect-ratio 192 --total-batch-size 2048",
            "vocabulary 1,024": "--depth 1 --vocab-size 1024 --total-batch-size 2048",
            "vocabulary 4,096": "--depth 1 --vocab-size 4096 --total-batch-size 2048",
            "batch 4,096": f"{MINUTE} --total-batch-size 4096",
            "matrix_lr × 1.5": f"{MINUTE} --total-batch-size 2048 --matrix-lr 0.03",
            "matrix_lr / 1.5": f"{MINUTE} --total-batch-size 2048 --matrix-lr 0.013",
            "embedding_lr × 2": f"{MINUTE} --total-batch-size 2048 --embedding-lr 0.6",
            "embedding_lr / 2": f"{MINUTE} --total-batch-size 2048 --embedding-lr 0.15",
        },
    ),
    "minute-5": (
        270,
        {
            "depth 2, vocabulary 4,096": f"{FIVE} --total-batch-size 4096",
            "depth 1": "--depth 1 --vocab-size 4096 --total-batch-size 8192",
            "depth 3": "--depth 3 --vocab-size 4096 --total-batch-size 4096",
            "vocabulary 2,048": "--depth 2 --vocab-size 2048 --total-batch-size 4096",
            "vocabulary 8,192": "--depth 2 --vocab-size 8192 --total-batch-size 4096",
            "batch 8,192": f"{FIVE} --total-batch-size 8192",
        },
    ),
}


class Results:
    """The lines of ablations.tsv: {(set, kind, flags, round or seed): line}."""

    def __init__(self, name):
        self.name, self.lines = name, {}
        if TABLE.exists():
            with TABLE.open(newline="") as file:
                self.lines = {self.key(line): line for line in csv.DictReader(file, delimiter="\t")}

    def key(self, line):
        return line["set"], line["kind"], line["flags"], int(line["number"])

    def get(self, kind, flags, number):
        """The line with this key in this set, or None."""
        return self.lines.get((self.name, kind, flags, number))

    def add(self, **line):
        """Add a line and save the file."""
        line = {"set": self.name, **line}
        self.lines[self.key(line)] = line
        with TABLE.with_suffix(".tmp").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
            table.writeheader()
            table.writerows(self.lines[key] for key in sorted(self.lines))
        os.replace(TABLE.with_suffix(".tmp"), TABLE)


def train(flags, threads):
    """Run train.py. Returns (summary, config). RuntimeError with the output if it fails."""
    folder = tempfile.mkdtemp(prefix="ablate-")
    command = [sys.executable, str(REPO / "train.py"), *flags.split(), "--out-dir", folder, "--run-name", "a"]
    try:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        read = (Path(folder, "a", name).read_text() for name in ("summary.json", "config.json"))
        return tuple(map(json.loads, read))
    finally:
        shutil.rmtree(folder)


def shape_of(flags):
    """The flags without those that do not change the speed."""
    return re.sub(rf" *--\S*({UNTIMED}) \S+", "", flags).strip()


def measure_speed(results, variants):
    """Tokens per second of each shape, in rounds. Round 0 is short: it finds the steps for 5 seconds."""
    for number in range(ROUNDS + 1):
        for flags in dict.fromkeys(map(shape_of, variants.values())):
            if results.get("speed", flags, number):
                continue
            first = results.get("speed", flags, 0)
            seconds_per_step = int(first["batch"]) / float(first["tok_per_sec"]) if first else 1.0
            steps = 10 + max(20, round(5 / seconds_per_step))  # the first 10 steps are not timed
            call = f"{flags} --num-iterations {steps} --eval-every -1 --eval-bytes 8192"
            summary, config = train(call, threads=2)
            results.add(
                **{"kind": "speed", "flags": flags, "number": number, "steps": steps},
                batch=config["settings"]["total_batch_size"],
                tok_per_sec=round(summary["tok_per_sec"]),
                commit=config["versions"]["git_commit"],
            )
            print(f"speed    {flags}: {report.short(summary['tok_per_sec'])} tokens/s", flush=True)


def speed_of(results, flags):
    """(batch size, median tokens per second at that batch size)"""
    lines = [results.get("speed", shape_of(flags), number) for number in range(1, ROUNDS + 1)]
    return int(lines[0]["batch"]), statistics.median(float(line["tok_per_sec"]) for line in lines)


def measure_quality(results, seconds, variants, seeds):
    """val_bpb of each variant and seed after the steps that its speed allows in `seconds`."""

    def measure(flags, seed):
        batch, tok_per_sec = speed_of(results, flags)
        steps = max(1, round(seconds * tok_per_sec / batch))
        call = f"{flags} --num-iterations {steps} --seed {seed} --no-compile --eval-every -1"
        summary, config = train(call, threads=1)
        return {
            **{"kind": "quality", "flags": flags, "number": seed, "batch": batch, "steps": steps},
            **{"tok_per_sec": round(tok_per_sec), "val_bpb": round(summary["val_bpb"], 5)},
            "commit": config["versions"]["git_commit"],
        }

    jobs = [(flags, seed) for seed in seeds for flags in variants.values()]
    jobs = [(flags, seed) for flags, seed in jobs if not results.get("quality", flags, seed)]
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(lambda job: measure(*job), jobs):
            results.add(**line)
            print(f"quality  {line['flags']}, seed {line['number']}: {line['val_bpb']:.4f}", flush=True)


def table(results, variants, seeds):
    """Markdown table: each variant's mean val_bpb and its difference from the first variant."""
    rows, base = [], None
    for variant, flags in variants.items():
        lines = list(filter(None, (results.get("quality", flags, seed) for seed in seeds)))
        values = [float(line["val_bpb"]) for line in lines]
        if not values:
            continue
        spread = f" ± {statistics.stdev(values):.4f}, n = {len(values)}" if len(values) > 1 else ""
        change = report.difference(base, values) if base else ""
        speed, mean = report.short(float(lines[0]["tok_per_sec"])), f"{statistics.mean(values):.4f}{spread}"
        rows.append([variant, speed, lines[0]["batch"], lines[0]["steps"], mean, change])
        base = base or values
    return report.table(["variant", "tokens/s", "batch", "steps", "val_bpb", "difference"], rows)


def main():
    parser = argparse.ArgumentParser(usage="python tests/ablate.py SET [--seeds N] [--first SEED]")
    parser.add_argument("set", nargs="?")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds [3]")
    parser.add_argument("--first", type=int, default=1, help="first seed [1]")
    options = parser.parse_args()
    if options.set not in SETS:
        for name, (seconds, variants) in SETS.items():
            print(f"{name:<12}{seconds} s  {', '.join(variants)}")
        return
    seconds, variants = SETS[options.set]
    seeds, results = range(options.first, options.first + options.seeds), Results(options.set)
    measure_speed(results, variants)
    measure_quality(results, seconds, variants, seeds)
    print(table(results, variants, seeds))


if __name__ == "__main__":
    main()
