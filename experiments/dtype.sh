#!/usr/bin/env bash
# Trains DiracNet-16-1 in float32, in bfloat16, and in float32 with one thread, which adds in another
# order; three seeds each; prints their accuracies.
# bash experiments/dtype.sh FOLDER, of images in train/CLASS and test/CLASS.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1

train() {  # NAME DTYPE SEED
    python train.py --dataset Folder --dataroot "$folder" --depth 16 --epochs 10 \
        --lr_schedule cosine --dtype "$2" --seed "$3" --resume auto \
        --save "logs/dtype/$1-$3" > /dev/null
    echo "$1, seed $3: $(grep -o '"test_acc": [0-9.]*' "logs/dtype/$1-$3/log.txt" | tail -1)"
}

for seed in 1 2 3; do
    train float float $seed
    train bfloat16 bfloat16 $seed
    OMP_NUM_THREADS=1 train float-1thread float $seed
done
