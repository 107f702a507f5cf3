#!/bin/bash
# A run on several nodes of a SLURM cluster. It continues after preemption and after the time limit:
#
#     sbatch runs/slurm.sh NAME --depth 20        # in this repository, on a file system that all nodes share
# The run is in out/NAME: the flags after NAME cannot include --out-dir.
#
# Each rank gets SIGTERM five minutes before the time limit, and when the job is preempted. Then the run saves
# and exits, and the job requeues itself. A run that fails for another reason is not requeued.

#SBATCH --job-name=onedial
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

name=$1
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
mkdir -p "out/$name" # --resume starts a new run if the folder is empty
touch "out/$name/.started"

srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=gpu --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:29500" --shutdown-timeout=240 \
    train.py --run-name "$name" --resume "${@:2}"
status=$?

# only if this start has got as far as training: a start that fails earlier would be requeued for ever
log="out/$name/log.jsonl"
if [ $status != 0 ] && [ ! "$log" -ot "out/$name/.started" ] && tail -n 1 "$log" | grep -q '"event": "interrupted"'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
