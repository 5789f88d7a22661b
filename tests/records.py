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


def write_speedrun(folder, airbench):
    """Writes runs of the speed-run: eight epochs on the CPU A, twelve on another one."""
    results = [{**record, 'multiply_adds': multiply_adds, 'cpu': cpu} for record, multiply_adds, cpu
               in zip(run_records({('recipe', 8): [89], ('recipe', 12): [91]}), (4e12, 8e12), 'AB')]
    short, long = (record['run'] for record in results)
    columns = ('series', 'x', 'run', 'test_acc_percent', 'tta_test_acc_percent',
               'matmul_equivalent_tflop', 'multiply_adds', 'cpu')
    measured = [('recipe', 8, short, 88, 89, 4), ('recipe', 8, short, 90, 90, 6),
                ('recipe', 12, long, 91, '', 1000), ('recipe', 12, long, 91, '', 1000)]
    for name, runs in (('airbench', airbench), ('measured', measured)):
        write_csv(folder / 'speedrun' / f'{name}.csv', [dict(zip(columns, run)) for run in runs])
    write_csv(folder / 'speedrun' / 'results.csv', results)
