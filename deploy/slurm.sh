#!/usr/bin/env bash
# A study under SLURM, from a clone on a disk that all nodes have: docs/cluster.md says how it is used.
#
#   make plan PRESET=imagenet SOURCE=/data/imagenet    # installs .venv, on a node with access to the network
#   sbatch deploy/slurm.sh                             # all that params.yaml asks for
#   sbatch deploy/slurm.sh repro --runs e-vit-h
#
# Before the time is over, and when it is preempted, the job checkpoints, and goes into the queue again.
#SBATCH --job-name=flopeq
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it by sbatch}"
source .venv/bin/activate
[ $# -gt 0 ] || set -- repro

# Only who knows the token is let into this Ray: other users share these nodes' network.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{ print $1 }')
port=$((20000 + SLURM_JOB_ID % 10000))      # two jobs may share a node's network
export RAY_ADDRESS=$address:$port

# Keeps Ray alive as long as this script lives; no more than the job's share of the node goes to it.
ray_on() { # <srun's choice of nodes> <ray start's arguments>
  local nodes=$1; shift
  # shellcheck disable=SC2086  # several words
  srun --overlap $nodes ray start "$@" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
    ${SLURM_GPUS_ON_NODE:+--num-gpus="$SLURM_GPUS_ON_NODE"} --block >>"ray-$SLURM_JOB_ID.log" 2>&1 &
  rays+=($!)
}
rays=() stage=
trap '[ -z "$stage" ] || kill -TERM "$stage"; stopped=yes' TERM
trap 'kill "${rays[@]}" 2>/dev/null || true; wait' EXIT
stopped=

ray_on "--nodes=1 --ntasks=1 --nodelist=$head" --head --node-ip-address="$address" --port="$port" \
  --include-dashboard=false
nodes=${SLURM_JOB_NUM_NODES:?}
if [ "$nodes" -gt 1 ]; then
  sleep 10
  ray_on "--nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude=$head" --address="$RAY_ADDRESS"
fi
python - "$nodes" <<'PYTHON'
import sys, time
import ray

for _ in range(60):
    try:
        ray.init(logging_level="ERROR")
        break
    except ConnectionError:
        time.sleep(2)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(2)
PYTHON

python -m "stages.$1" "${@:2}" &
stage=$!
status=0
wait "$stage" || status=$?
if [ -n "$stopped" ]; then                  # the first wait ended with the signal, not with the stage
  status=0
  wait "$stage" || status=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
