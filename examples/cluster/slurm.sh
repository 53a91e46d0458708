#!/bin/bash
# Train on several nodes under Slurm: sbatch examples/cluster/slurm.sh run.yaml
#
# run.yaml says everything about the run, the engine too (accelerate_config: zero2). It, the models and the data have to lie
# where every node sees them under the same paths, and so does output_dir: a job that was stopped and is started again goes
# on from its last checkpoint. Five minutes before the time is up each process gets SIGTERM and saves one.
#
# Run in our tests with two nodes that are one machine, on the CPU; not on a cluster.
#SBATCH --job-name=amid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail

config=${1:?which run.yaml?}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

given=(--config "$config" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)))
given+=(--main_process_ip "$first" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) --resume_from_checkpoint auto)

# One launcher on each node, which starts a process for each of its GPUs.
srun --kill-on-bad-exit=1 bash -c 'exec amid-trl train "$@" --machine_rank "$SLURM_NODEID"' launcher "${given[@]}"
