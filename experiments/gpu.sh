#!/usr/bin/env bash
# What is left for a CUDA GPU, the paper's budget: bash experiments/gpu.sh FOLDER, of images in
# train/CLASS and test/CLASS. Stopped, it goes on where it was. First comes 28-10, then the depths,
# hours.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1

python train.py --dataset Folder --dataroot "$folder" --depth 28 --width 10 --compile \
    --save logs/gpu/diracnet-28-10 --save_every 3 --resume auto
for models in 'diracnet, 28*' 'plain, 28*' 'resnet, 28*' '*, 100*'; do
    python -m experiments.run depth --budget paper --dataroot "$folder" --only "$models"
done
