"""Classifies images with a trained model: prints the top five classes of each image.

    python predict.py cat.jpg dog.jpg --model logs/diracnet-28-2
    python predict.py cat.jpg --model diracnet-int8.onnx    # a file of export.py
    python predict.py cat.jpg --model diracnet18            # the authors' ImageNet model
    python predict.py photos --model diracnet18 --json photos.json  # a folder and its subfolders

Unreadable images are reported on stderr and skipped; the exit status is then 2.
"""

import csv
import io
import json
import os
import sys

from cli import ArgumentParser, exit_on_ctrl_c, exit_on_error, exit_on_signals, say, warn

BATCH = 32  # images
TOP = 5  # classes


def parse_options(argv=None):
    parser = ArgumentParser.of_script('predict.py', __doc__)
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='image file, or folder with images')
    add('--model', required=True,
        help='folder of a run, checkpoint, .onnx, .safetensors or .pth file of export.py, or '
             'diracnet18 or diracnet34')
    add('--json', metavar='FILE', help='write paths, classes and probabilities to this JSON file')
    add('--csv', metavar='FILE', help='write paths, classes and probabilities to this CSV file')
    opt = parser.parse_args(argv)
    others = [*opt.images, opt.model]
    for name in ('json', 'csv'):
        path = getattr(opt, name)
        if path:
            if problem := _output_problem(path, others):
                parser.error(f'--{name} {path}: {problem}; use another path')
            others.append(path)
    return opt


def _output_problem(path, others):
    """Returns why a file cannot be written there, or ''; others: paths that it must not replace."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        return 'its folder does not exist'
    if not os.access(folder, os.W_OK):
        return 'its folder is not writable'
    if os.path.exists(target) and not os.path.isfile(target):
        return 'not a regular file'
    if os.path.exists(target) and not target.endswith(('.json', '.csv', '.txt')):
        return 'exists, and is not a .json, .csv or .txt file'
    return 'an input, or another output' if target in map(os.path.realpath, others) else ''


if __name__ == '__main__':  # --help and errors come before the imports that take seconds
    exit_on_ctrl_c()
    parse_options()

import torch
from tqdm import tqdm

from diracnets.class_names import imagenet_classes
from diracnets.folding import fold
from diracnets.image_files import DataError
from diracnets.loading import load
from diracnets.preprocessing import find_images
from training.files import atomic_write


def load_classifier(name):
    """Returns (folded model, Preprocessing, class names or None) of a file or published model."""
    loaded = load(name)
    classes = loaded.classes
    if classes is None and (loaded.preprocess.kind, loaded.num_classes) == ('ImageNet', 1000):
        classes = imagenet_classes()
    return fold(loaded.model), loaded.preprocess, classes


def read_input(preprocess, path):
    """Returns the input for an image file, or the DataError of an unreadable one."""
    try:
        return preprocess(path)
    except DataError as error:
        return error


@torch.inference_mode()
def predict(paths, name):
    """Yields (path, [(class, probability), ...] or DataError) of each image file, in order.

    name: name of the model. The list contains the TOP classes, the most probable first.
    """
    model, preprocess, classes = load_classifier(name)
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        inputs = [read_input(preprocess, path) for path in batch]
        readable = [x for x in inputs if isinstance(x, torch.Tensor)]
        outputs = iter(model(torch.stack(readable)).softmax(dim=1) if readable else ())
        for path, x in zip(batch, inputs):
            if isinstance(x, DataError):
                yield path, x
                continue
            probabilities = next(outputs)  # (num_classes,)
            if not probabilities.isfinite().all():
                raise RuntimeError(f'{name}: its outputs are non-finite (NaN or Inf)')
            top = probabilities.topk(min(TOP, len(probabilities)))
            yield path, [(classes[i] if classes else f'class {i}', p)
                         for p, i in zip(top.values.tolist(), top.indices.tolist())]


def to_json(predictions):
    """Returns the JSON text of [(path, [(class, probability), ...]), ...]."""
    return json.dumps([
        {'path': path, 'predictions': [{'class': name, 'probability': p} for name, p in top]}
        for path, top in predictions
    ], indent=1)


def to_csv(predictions):
    """Returns the CSV text of [(path, [(class, probability), ...]), ...], one row per image."""
    file = io.StringIO()
    count = max((len(top) for _, top in predictions), default=TOP)
    columns = [f'{field}_{i}' for i in range(1, count + 1) for field in ('class', 'probability')]
    writer = csv.writer(file)
    writer.writerow(['path', *columns])
    for path, top in predictions:
        writer.writerow([path, *(value for pair in top for value in pair)])
    return file.getvalue()


def predict_all(opt):
    """Prints and writes the predictions for all readable images.

    Returns the number of unreadable ones.
    """
    paths = [path for name in opt.images
             for path in (find_images(name) if os.path.isdir(name) else [name])]
    predictions, unreadable = [], 0
    results = tqdm(predict(paths, opt.model), total=len(paths), unit='img', disable=None,
                   leave=False)
    try:
        for path, top in results:
            if isinstance(top, DataError):
                with tqdm.external_write_mode(sys.stderr):
                    warn(f'predict.py: {top}')
                unreadable += 1
                continue
            predictions.append((path, top))
            with tqdm.external_write_mode():
                say(path, *(f'  {100 * p:6.2f} %  {name}' for name, p in top))
    finally:  # a signal or an error loses no predictions
        for path, write in ((opt.json, to_json), (opt.csv, to_csv)):
            if path and (predictions or unreadable):
                # surrogates stand for bytes of file names that are not UTF-8
                content = write(predictions).encode('utf-8', 'backslashreplace')
                atomic_write(os.path.realpath(path), content)
    return unreadable


def main(argv=None):
    opt = parse_options(argv)
    with exit_on_error('predict.py'), exit_on_signals():
        unreadable = predict_all(opt)
    if unreadable:
        sys.exit(2)


if __name__ == '__main__':
    main()
