"""Writes CSV files of experiments for the tests."""

import csv


def write_csv(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def run_records(points, epochs=4):
    """Returns results of {(series, x): accuracies of seeds 1, 2, ...}; None is a diverged run."""
    return [{
        'series': series, 'x': x, 'seed': seed, 'dataset': 'Folder', 'epochs': epochs,
        'run': f'{series}-{x}-{epochs}ep-s{seed}', 'log': 'log.txt', 'device': 'CPU', 'threads': 1,
        'torch': '2.14',
        'ended': 'diverged' if accuracy is None else 'complete',
        'test_acc_percent': '' if accuracy is None else accuracy,
        'train_loss': '' if accuracy is None else 1.0,
    } for (series, x), values in points.items() for seed, accuracy in enumerate(values, 1)]


def around(mean):
    """Returns three accuracies with a mean and a variance of 0.01."""
    return mean - 0.1, mean, mean + 0.1
