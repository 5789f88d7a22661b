#!/usr/bin/env bash
# Trains DiracNet-16-1 in float32 and in bfloat16, three seeds each, and prints their accuracies:
# bash experiments/dtype.sh FOLDER, of images in train/CLASS and test/CLASS.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    for dtype in float bfloat16; do
        python train.py --dataset Folder --dataroot "$1" --depth 16 --epochs 10 \
            --lr_schedule cosine --dtype $dtype --seed $seed --resume auto \
            --save "logs/dtype/$dtype-$seed" > /dev/null
        echo "$dtype, seed $seed: $(grep -o '"test_acc": [0-9.]*' \
            "logs/dtype/$dtype-$seed/log.txt" | tail -1)"
    done
done
