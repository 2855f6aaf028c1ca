#!/bin/bash
# Train on SLURM nodes, one torchrun agent per node. From the checkout's root, on a file system that the nodes share:
#   sbatch --nodes=2 docs/launch/slurm.sh --recipe lead-14b
# Arguments go to lead_fast.train. Environment: RUN (the run directory, with the same path on all nodes), VENV (the
# environment that `make install` made), NPROC_PER_NODE. A requeued job keeps its number and therefore resumes its run.
#SBATCH --job-name=lead-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@900
set -euo pipefail
run=${RUN:-runs/slurm-$SLURM_JOB_ID}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
# 900 s before the job's time ends the ranks get SIGTERM: they finish the step and save. torchrun waits that long for them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-840}
srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${VENV:-.venv}/bin/torchrun" \
  --nnodes="$SLURM_NNODES" --nproc_per_node="${NPROC_PER_NODE:-8}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:$((10000 + SLURM_JOB_ID % 50000))" \
  -m lead_fast.train --output="$run" --resume --parallel.replicate="$SLURM_NNODES" "$@"
