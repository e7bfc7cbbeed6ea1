#!/usr/bin/env bash
# One job on SLURM with a Ray cluster of its own. From the top folder, on storage that all nodes share, after `make setup` there:
#   sbatch deploy/slurm.sh train-policy run.name=mine run.dir=/shared/runs run.cache=/shared/cache
# `ray symmetric-run` starts a head on the first node and workers on the others, waits for all of them, runs the job on the head,
# and stops Ray everywhere when it ends; the exit status is the job's. It ends with `ray stop`: hence whole nodes.
#SBATCH --job-name=causalrm-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --output=causalrm-ray-%j.log
set -euo pipefail
: "${1:?which job? sbatch deploy/slurm.sh <job> [key=value ...]}"
cd "${SLURM_SUBMIT_DIR:?run it with sbatch}"
export PATH=$PWD/.venv/bin:$PATH

# A token for this cluster alone, which every node reads; only its owner can.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token.$SLURM_JOB_ID
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
mkdir -p "$HOME/.ray"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
    ray symmetric-run --address "${nodes[0]}:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --dashboard-host=127.0.0.1 --disable-usage-stats \
    -- python -m jobs "$@" cluster.address=auto
