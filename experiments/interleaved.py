"""Interleaved timing of variants in separate processes: medians, ratios, peak memory."""

import contextlib
import functools
import multiprocessing
import resource
import statistics
from dataclasses import dataclass, field

import torch

from cli import print_table
from experiments.results import append_results, environment
from training.timing import interleave, matmul_gflops, paired_ratio, seconds_per_call

REPETITIONS_PER_PROCESS = 10  # the memory layout of one process shifts its speed by 1 to 2 %


@dataclass
class Variant:
    """One variant of a comparison: `prepare(*arguments)` returns a function that does the work."""

    name: str
    prepare: object
    arguments: tuple
    images: int  # per call of the work
    multiply_adds: float = 0  # per image
    dtype: str = 'float32'
    seconds: list = field(default_factory=list)
    memory: float = 0  # peak resident memory, MB


def serve(pipe, variant):
    """Prepares a variant in this process, then runs its work once per request from the pipe."""
    torch.manual_seed(0)
    work = variant.prepare(*variant.arguments)
    for _ in range(2):  # warm-up
        work()
    pipe.send('ready')
    with contextlib.suppress(EOFError):  # the parent closed the pipe
        while pipe.recv():
            seconds = seconds_per_call(work)
            pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


@contextlib.contextmanager
def worker(variant):
    """Runs a process for a variant; yields its timer once the process is ready.

    The timer runs the work once, updates the peak memory of the variant and returns the seconds.
    It raises RuntimeError if the process has died.
    """
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, variant))
    process.start()
    theirs.close()

    def receive(request=None):
        try:
            if request:
                ours.send(request)
            return ours.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f'{variant.name}: the worker process died with exit code '
                               f'{process.exitcode}') from None

    def timer():
        seconds, memory = receive('work')
        variant.memory = max(variant.memory, memory)
        return seconds

    with ours:
        receive()  # one worker prepares at a time, so that compilation is not timed
        yield timer


def measure(variants, repetitions, title):
    """Times the variants in interleaved repetitions; fills their `seconds` and `memory`."""
    for first in range(0, repetitions, REPETITIONS_PER_PROCESS):
        with contextlib.ExitStack() as workers:
            timers = [workers.enter_context(worker(variant)) for variant in variants]
            count = min(REPETITIONS_PER_PROCESS, repetitions - first)
            for variant, seconds in zip(variants, interleave(timers, count, title)):
                variant.seconds += seconds


# ---------------------------------------------------------------- results


matmul_peak = functools.cache(matmul_gflops)  # measured once per process


def ratio_columns(baseline, variant):
    """Returns the columns of the speedup of a variant over the baseline."""
    names = 'ratio', 'ratio_low', 'ratio_high'
    ratios = paired_ratio(baseline.seconds, variant.seconds)
    return {name: round(ratio, 3) for name, ratio in zip(names, ratios)}


def format_ratio(record):
    return f'{record["ratio"]:.2f} ({record["ratio_low"]:.2f} to {record["ratio_high"]:.2f})'


def compare(title, variants, repetitions, table, target=''):
    """Times the variants, prints the results, appends them to a CSV file and returns them.

    The first variant is the baseline of the ratios; `target` is the wanted ratio of the second.
    """
    peaks = {variant.dtype: matmul_peak(variant.dtype)
             for variant in variants if variant.multiply_adds}
    measure(variants, repetitions, title)
    results = [result_of(title, variant, variants[0], peaks.get(variant.dtype))
               for variant in variants]
    results[1 % len(results)]['target'] = target
    append_results(results, table)
    show(results)
    return results


def result_of(title, variant, baseline, peak):
    """Returns the record of a variant; `peak` is the matmul peak of its dtype in GFLOP/s."""
    rates = [variant.images / seconds for seconds in variant.seconds]
    low, rate, high = statistics.quantiles(rates, n=4)
    gflops = 2e-9 * variant.multiply_adds * rate
    return {
        'compared': title, 'what': variant.name, 'n': len(rates),
        'images_per_second': round(rate, 2), 'first_quartile': round(low, 2),
        'third_quartile': round(high, 2),
        'milliseconds': round(1000 * statistics.median(variant.seconds), 2),
        **ratio_columns(baseline, variant), 'gflop_per_second': round(gflops, 1),
        'percent_of_product_peak': round(100 * gflops / peak, 1) if variant.multiply_adds else '',
        'target': '', 'peak_memory_mb': round(variant.memory), 'dtype': variant.dtype, 'seed': 0,
        **environment(),
    }


def show(results):
    """Prints the results of one comparison as a table."""
    target = results[1 % len(results)]['target']
    print(f'\n{results[0]["compared"]}: {results[0]["n"]} repetitions'
          + (f', target ratio {target}' if target else ''))
    head = ['', 'images/s (quartiles)', 'ms', 'ratio (95 % CI)', 'GFLOP/s', '% of matmul peak',
            'MB']
    print_table(head, [[
        record['what'],
        f'{record["images_per_second"]:,.0f} ({record["first_quartile"]:,.0f} to '
        f'{record["third_quartile"]:,.0f})',
        f'{record["milliseconds"]:,.1f}',
        format_ratio(record),
        str(record['gflop_per_second'] or ''),
        str(record['percent_of_product_peak']),
        f'{record["peak_memory_mb"]:,}',
    ] for record in results])


def latest_comparisons(results):
    """Returns {title: records of the last time it was measured}, the baseline first."""
    latest = {}
    for record in results:
        if float(record['ratio_low']) == float(record['ratio_high']):  # the baseline, to itself
            latest[record['compared']] = []
        latest[record['compared']].append(record)
    return latest


def pairs_with_baseline(results):
    """Yields (baseline, variant) of the last time of each comparison, without those over depth."""
    for title, (baseline, *variants) in latest_comparisons(results).items():
        for variant in variants if not title.startswith('depth') else ():
            yield baseline, variant
