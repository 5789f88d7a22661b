#!/usr/bin/env bash
# All that waits for a CUDA GPU, the most wanted first: bash experiments/gpu.sh FOLDER, of images in
# train/CLASS and test/CLASS. Stopped, it goes on where it was. The first part, several trainings at
# once, is some ten minutes of an H100; then come rates, alone, and the paper's budget, hours.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1

mkdir -p runs
export OMP_NUM_THREADS=1  # of the CPU, which many processes share
for seed in 1 2 3; do  # the network to keep, longer and with squares cut out
    python train.py --dataset Folder --dataroot "$folder" --depth 28 --width 2 --optimizer muon \
        --lr 0.1 --adam_lr 0.02 --lr_schedule linear --batch_size 500 --label_smoothing 0.1 \
        --flip alternating --cutout 12 --epochs 120 --seed "$seed" \
        --save "runs/diracnet-28-2-s$seed" --resume auto > "runs/diracnet-28-2-s$seed.txt" &
done
for process in {1..9}; do  # each takes what no other trains
    python -m experiments.run large --dataroot "$folder" > "runs/large-$process.txt" &
done
wait
unset OMP_NUM_THREADS

python -m experiments.gpu --no-checks --no-compile --minutes 2
python -m experiments.gpu --minutes 8 || echo 'not all holds: see logs/gpu/checks.csv'
python train.py --dataset Folder --dataroot "$folder" --depth 28 --width 10 --compile \
    --save logs/gpu/diracnet-28-10 --save_every 3 --resume auto
for models in 'diracnet, 28*' 'plain, 28*' 'resnet, 28*' '*, 100*'; do
    python -m experiments.run depth --budget paper --dataroot "$folder" --only "$models"
done
