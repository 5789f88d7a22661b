#!/usr/bin/env bash
# All that waits for a CUDA GPU, the most wanted first: bash experiments/gpu.sh FOLDER, of images in
# train/CLASS and test/CLASS. Stopped, it goes on where it was. First come trainings, twelve at once
# as each alone leaves most of a GPU idle, then rates, and then the paper's budget, hours.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
mkdir -p runs

for seed in 1 2 3; do  # the network that is kept, trained for longer, with squares cut out
    OMP_NUM_THREADS=1 python train.py --dataset Folder --dataroot "$folder" --depth 28 --width 2 \
        --optimizer muon --lr 0.1 --adam_lr 0.02 --lr_schedule linear --batch_size 500 \
        --label_smoothing 0.1 --flip alternating --cutout 12 --epochs 120 --seed "$seed" \
        --save "runs/diracnet-28-2-s$seed" --resume auto > "runs/diracnet-28-2-s$seed.txt" &
done
for model in plain diracnet resnet; do
    for seed in 1 2 3; do
        OMP_NUM_THREADS=1 python -m experiments.run large --dataroot "$folder" \
            --only "$model*seed $seed" > "runs/large-$model-s$seed.txt" &
    done
done
for process in $(jobs -p); do
    wait "$process"
done

python -m experiments.gpu --minutes 8 || echo 'not all holds: see logs/gpu/checks.csv'
python train.py --dataset Folder --dataroot "$folder" --depth 28 --width 10 --compile \
    --save logs/gpu/diracnet-28-10 --save_every 3 --resume auto
for models in 'diracnet, 28*' 'plain, 28*' 'resnet, 28*' '*, 100*'; do
    python -m experiments.run depth --budget paper --dataroot "$folder" --only "$models"
done
