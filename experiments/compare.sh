#!/usr/bin/env bash
# Trains a DiracNet and the networks it is compared with on the same images with the same budget,
# and draws their logs: bash experiments/compare.sh FOLDER, of images in train/CLASS and test/CLASS.
# The DenseNet is small (19.9 million multiply-adds to their 54.7), as dense layers take longer.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # name, flags of the model
    python train.py --dataset Folder --dataroot "$images" --dtype bfloat16 --epochs 8 \
        --lr_schedule cosine --save "logs/compare-$1" --resume auto "${@:2}"
}
images=$1
run diracnet --model diracnet --depth 28
run plain --model plain --depth 28
run resnet --model resnet --depth 28
run densenet --model densenet --layers 16 --growth 12
python plot.py logs/compare-{diracnet,plain,resnet,densenet} --save logs/compare.png
