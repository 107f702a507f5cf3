#!/bin/bash
# A run on several nodes of a SLURM cluster, which goes on after preemption or the limit of time:
#
#     sbatch runs/slurm.sh NAME --depth 20        from this folder, which all nodes see
#
# Five minutes before the limit, and when it is preempted, each rank gets SIGTERM: the run saves and ends, and
# the job puts itself into the queue again. What failed for another reason is not tried again.

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
mkdir -p "out/$name" # with --resume an empty folder is a run that has not begun

srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=gpu --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:29500" --shutdown-timeout=240 \
    train.py --run-name "$name" --resume "${@:2}"
status=$?

if [ $status != 0 ] && tail -n 1 "out/$name/log.jsonl" | grep -q '"event": "interrupted"'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
