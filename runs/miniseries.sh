#!/usr/bin/env bash
# A scaling law on a laptop: five model sizes, each trained on one token per matrix and head parameter. It took
# 18 minutes on two busy cores. FLAGS=… adds flags to each run. At the end, report.py fits the law and prints the
# path of compare.md, which has a table; the plot scaling.png is beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
sizes=("--depth 1" "--depth 2" "--depth 2 --aspect-ratio 96" "--depth 3" "--depth 3 --aspect-ratio 86")
out=out/miniseries
for i in "${!sizes[@]}"; do
    # shellcheck disable=SC2086
    python train.py ${sizes[$i]} --vocab-size 2048 --target-param-data-ratio 1 \
        --out-dir "$out" --run-name "size-$((i + 1))" ${FLAGS:-}
done
python report.py "$out"/size-*
