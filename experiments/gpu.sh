#!/usr/bin/env bash
# All that waits for a CUDA GPU: bash experiments/gpu.sh FOLDER, of images in train/CLASS and
# test/CLASS. Stopped, it goes on where it was. First comes what holds and how fast it is, then the
# paper's budget: 28-10, and the depths, hours.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1

python -m experiments.gpu --minutes 8 || echo 'not all holds: see logs/gpu/checks.csv'
python train.py --dataset Folder --dataroot "$folder" --depth 28 --width 10 --compile \
    --save logs/gpu/diracnet-28-10 --save_every 3 --resume auto
for models in 'diracnet, 28*' 'plain, 28*' 'resnet, 28*' '*, 100*'; do
    python -m experiments.run depth --budget paper --dataroot "$folder" --only "$models"
done
