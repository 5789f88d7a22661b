#!/usr/bin/env bash
# Trains on one process and on two with the same whole batch, and draws both logs:
# bash experiments/ranks.sh. They differ in rounding and in the batch norm's statistics, which are
# those of each process' own images.
set -euo pipefail
cd "$(dirname "$0")/.."
flags="--dataset Digits --depth 10 --batch_size 64 --epochs 12 --epoch_step [8,11] --dtype float"
torchrun --nproc_per_node=1 train.py $flags --save logs/ranks-1
torchrun --nproc_per_node=2 train.py $flags --save logs/ranks-2
python plot.py logs/ranks-1 logs/ranks-2 --save logs/ranks.png
