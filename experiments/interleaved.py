"""Interleaved timing of variants in separate processes: medians, ratios, peak memory."""

import contextlib
import functools
import multiprocessing
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cli import print_table
from experiments.results import append_results, column, environment
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
    memory: float = 0  # peak, MB: resident memory, or allocated memory of the GPU

    @property
    def rates(self):
        """The images per second of each repetition."""
        return [self.images / seconds for seconds in self.seconds]

    @property
    def flops_per_second(self):
        """Two operations per multiply-add, at the median rate."""
        return 2 * self.multiply_adds * statistics.median(self.rates)


def peak_resident_memory():
    """Returns the peak resident memory of this process in MB.

    `ru_maxrss` would include that of the parent process, before this one was executed.
    """
    kib = re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]
    return int(kib) * 1024 / 1e6  # in MB


def serve(pipe, variant):
    """Prepares a variant in this process, then runs its work once per request from the pipe."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the parent closed the pipe; Ctrl-C
        torch.manual_seed(0)
        work = variant.prepare(*variant.arguments)
        for _ in range(2):  # warm-up
            work()
        pipe.send('ready')
        while pipe.recv():
            pipe.send((seconds_per_call(work), peak_resident_memory()))


@contextlib.contextmanager
def worker(variant):
    """Runs a process for a variant; yields its timer once the process is ready.

    The timer runs the work once, updates the peak memory of the variant and returns the seconds.
    It raises RuntimeError if the process has died.
    """
    context = multiprocessing.get_context('spawn')
    parent_end, child_end = context.Pipe()
    process = context.Process(target=serve, args=(child_end, variant))
    process.start()
    child_end.close()

    def receive(request=None):
        try:
            if request:
                parent_end.send(request)
            return parent_end.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f'{variant.name}: the worker process died with exit code '
                               f'{process.exitcode}') from None

    def timer():
        seconds, memory = receive('work')
        variant.memory = max(variant.memory, memory)
        return seconds

    with parent_end:
        receive()  # one worker prepares at a time, so that compilation is not timed
        yield timer


def time_in_processes(variants, repetitions, title):
    """Times the variants in interleaved repetitions; fills their `seconds` and `memory`."""
    for first in range(0, repetitions, REPETITIONS_PER_PROCESS):
        with contextlib.ExitStack() as workers:
            timers = [workers.enter_context(worker(variant)) for variant in variants]
            count = min(REPETITIONS_PER_PROCESS, repetitions - first)
            for variant, seconds in zip(variants, interleave(timers, count, title)):
                variant.seconds += seconds


# ---------------------------------------------------------------- results


matmul_peak = functools.cache(matmul_gflops)  # measured once per process


RATIO = '{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})'  # format of a record's speedup


def timing_columns(title, variant, baseline):
    """Returns the columns of all timings: rate, time, speedup over the baseline, peak memory."""
    names = 'ratio', 'ratio_low', 'ratio_high'
    ratios = paired_ratio(baseline.seconds, variant.seconds)
    return {
        'compared': title, 'what': variant.name, 'n': len(variant.seconds),
        'images_per_second': round(statistics.median(variant.rates), 2),
        'milliseconds': round(1000 * statistics.median(variant.seconds), 3),
        **{name: round(ratio, 3) for name, ratio in zip(names, ratios)},
        'peak_memory_mb': round(variant.memory),
    }


def print_records(records, target, columns):
    """Prints the records of a comparison; `columns` are further ones, as {header: format}."""
    print(f'\n{records[0]["compared"]}: {records[0]["n"]} repetitions'
          + (f'; target: {target}' if target else ''))
    columns = {'': '{what}', 'images/s': '{images_per_second:,.0f}', 'ms': '{milliseconds:,.2f}',
               'ratio (95 % CI)': RATIO, **columns, 'MB': '{peak_memory_mb:,}'}
    print_table([*columns], [[cell.format(**record) for cell in columns.values()]
                             for record in records])


def compare(title, variants, repetitions, table, target=''):
    """Times the variants, prints the results, appends them to a CSV file and returns them.

    The first variant is the baseline of the ratios; `target` is the wanted ratio of the second.
    """
    peaks = {variant.dtype: matmul_peak(variant.dtype)
             for variant in variants if variant.multiply_adds}
    time_in_processes(variants, repetitions, title)
    records = [variant_record(title, variant, variants[0], peaks.get(variant.dtype))
               for variant in variants]
    records[1 % len(records)]['target'] = target
    append_results(records, table)
    print_records(records, target, {
        'quartiles': '{first_quartile:,.0f} to {third_quartile:,.0f}',
        'GFLOP/s': '{gflop_per_second}', '% of matmul peak': '{percent_of_product_peak}'})
    return records


def variant_record(title, variant, baseline, peak):
    """Returns the record of a variant; `peak` is the matmul peak of its dtype in GFLOP/s."""
    low, _, high = statistics.quantiles(variant.rates, n=4)
    gflops = variant.flops_per_second / 1e9
    return {
        **timing_columns(title, variant, baseline),
        'first_quartile': round(low, 2), 'third_quartile': round(high, 2),
        'gflop_per_second': round(gflops, 1),
        'percent_of_product_peak': round(100 * gflops / peak, 1) if variant.multiply_adds else '',
        'target': '', 'dtype': variant.dtype, 'seed': 0, **environment(),
    }


def latest_comparisons(results):
    """Returns {title: records of the last time it was measured}, the baseline first."""
    latest, previous = {}, None
    for record in results:  # those of a comparison stand together
        records = latest.setdefault(record['compared'], [])
        if record['compared'] != previous or record['what'] in column(records, 'what'):
            records.clear()  # measured again
        records.append(record)
        previous = record['compared']
    return latest


def pairs_with_baseline(results):
    """Yields (baseline, variant) of the last time of each comparison, without those over depth."""
    for title, (baseline, *variants) in latest_comparisons(results).items():
        for variant in variants if not title.startswith('depth') else ():
            yield baseline, variant
