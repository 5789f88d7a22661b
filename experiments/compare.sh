#!/usr/bin/env bash
# Trains a DiracNet and the networks it is compared with on the same images with the same budget,
# and draws their logs: bash experiments/compare.sh FOLDER, of images in train/CLASS and test/CLASS.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # name, flags of the model
    python train.py --dataset Folder --dataroot "$images" --dtype bfloat16 --epochs 8 \
        --lr_schedule cosine --depth 28 --save "logs/compare-$1" --resume auto "${@:2}"
}
images=$1
run diracnet --model diracnet
run plain --model plain
run resnet --model resnet
run plain-dbb --model plain --block dbb
python plot.py logs/compare-{diracnet,plain,resnet,plain-dbb} --save logs/compare.png
