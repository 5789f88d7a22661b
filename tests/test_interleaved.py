"""What the benchmarks make of the seconds that they measured."""

import csv
import fcntl
import multiprocessing
import os
import re
import subprocess
import threading

import matplotlib.image
import pytest
import torch

from experiments import interleaved


def test_interval_of_the_median():
    # of ten values the second and the ninth: 1 - 2 (1 + 10) / 2**10 = 97.9 %
    assert interleaved.median_interval([7, 1, 2, 3, 4, 5, 6, 8, 9, 10]) == (5.5, 2, 9)
    # of forty the fourteenth and the twenty-seventh: 96.2 %
    assert interleaved.median_interval(list(range(1, 41))) == (20.5, 14, 27)
    assert interleaved.median_interval([3.0] * 12) == (3, 3, 3)


@pytest.mark.slow
def test_sides_work_in_turns_each_in_a_process_of_its_own(tmp_path):
    path = tmp_path / 'calls.txt'
    sides = [interleaved.Variant(name, writing, (str(path), name), 1) for name in 'ab']
    interleaved.measure(sides, 13, 'letters')
    calls = [line.split() for line in path.read_text().splitlines()]
    # twice each to warm up, and again after ten turns, in other processes
    assert ''.join(name for name, _ in calls) == 'aabb' + 10 * 'ab' + 'aabb' + 3 * 'ab'
    assert len({process for _, process in calls}) == 4
    assert [len(side.seconds) for side in sides] == [13, 13]
    assert all(side.memory > 10 for side in sides)


def writing(path, name):
    import os

    def work():
        with open(path, 'a') as file:
            file.write(f'{name} {os.getpid()}\n')

    return work


@pytest.mark.slow
def test_a_process_that_ends_is_one_line_and_the_others_end_too():
    sides = [interleaved.Variant('lasting', lasting, (), 1), interleaved.Variant('dying', dying, (3,), 1)]
    with pytest.raises(RuntimeError, match='^dying: its process ended with 9: expected'):
        interleaved.measure(sides, 5, 'deaths')
    assert [len(side.seconds) for side in sides] == [2, 1]
    for child in multiprocessing.active_children():
        child.join(60)
    assert not multiprocessing.active_children()


def lasting():
    return lambda: None


def dying(calls):
    import os

    left = [None] * calls  # two of them to warm up

    def work():
        if not left:
            os._exit(9)
        left.pop()

    return work


def test_rows_of_other_columns_are_not_mixed(tmp_path):
    table = tmp_path / 'table.csv'
    interleaved.append([{'who': 'first', 'n': 1}], table)
    interleaved.append([{'n': 2, 'who': 'second'}], table)  # in the order of the file
    with pytest.raises(ValueError, match='columns who, n: expected who, m'):
        interleaved.append([{'who': 'third', 'm': 3}], table)
    assert table.read_text().split() == ['who,n', 'first,1', 'second,2']


def test_rows_wait_for_another_that_appends(tmp_path):
    """Of two that find no table, the second has to see the head that the first one writes."""
    table = tmp_path / 'table.csv'
    with open(table, 'a') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        late = threading.Thread(target=interleaved.append, args=([{'who': 'late'}], table))
        late.start()
        late.join(0.3)
        assert table.read_text() == ''
        other.write('who\nfirst\n')
    late.join()
    assert table.read_text().split() == ['who', 'first', 'late']


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Of a copy that lies in a repository of something else there is none, nor without git."""
    for name in [name for name in os.environ if name.startswith('GIT_')]:  # as hooks of git have
        monkeypatch.delenv(name)
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=b', '-c', 'commit.gpgsign=false', '-C',
           str(tmp_path)]
    for words in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'c']):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(interleaved, 'ROOT', tmp_path)
    assert re.fullmatch('[0-9a-f]{7,}', interleaved.commit())
    (tmp_path / 'copy').mkdir()
    monkeypatch.setattr(interleaved, 'ROOT', tmp_path / 'copy')
    assert interleaved.commit() == ''
    monkeypatch.setattr(interleaved, 'ROOT', tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert interleaved.commit() == ''


def test_rows_table_and_figure(tmp_path, capsys, monkeypatch):
    def measured(sides, pairs, title):
        for side, seconds in zip(sides, ([2.0, 4.0, 4.0, 8.0] * 3, [1.0, 1.0, 2.0, 2.0] * 3)):
            side.seconds, side.memory = seconds, 512.4

    monkeypatch.setattr(interleaved, 'measure', measured)
    monkeypatch.setattr(interleaved, 'product_peak', lambda dtype: 100.0)
    table = tmp_path / 'bench.csv'
    sides = [interleaved.Variant('slow', None, (), 100, 1e9), interleaved.Variant('fast', None, (), 100, 1e9)]
    interleaved.compare('two', sides, 12, table, target=3)
    for side in sides:
        side.multiply_adds = 0
    interleaved.compare('two', sides, 12, table)
    with open(table, newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['what'] for row in rows] == ['slow', 'fast'] * 2
    slow, fast, *_ = rows
    assert float(slow['images_per_second']) == 25  # 100 in 4 seconds, at the median
    assert float(slow['gflop_per_second']) == 50  # 25 times a billion multiply-adds
    assert float(slow['percent_of_product_peak']) == 50
    assert float(fast['ratio']) == 3  # of 2, 4, 2 and 4: by turns, not of the medians
    assert (float(fast['ratio_low']), float(fast['ratio_high'])) == (2, 4)
    assert (fast['target'], slow['target'], rows[3]['target']) == ('3', '', '')
    assert (fast['torch'], fast['n'], fast['peak_memory_mb']) == (torch.__version__, '12', '512')
    printed = capsys.readouterr().out
    assert 'two: 12 turns, target 3 times' in printed
    assert '3.00 (2.00 to 4.00)' in printed

    interleaved.compare('depth, a step', [interleaved.Variant('DiracNet-28-1', None, (), 1)], 12, table)
    interleaved.draw(table).savefig(tmp_path / 'bench.png')
    assert matplotlib.image.imread(tmp_path / 'bench.png').std() > 0.05


def test_unknown_benchmark_is_one_line(capsys):
    from experiments import bench

    for argv in (['speed'], ['train', '--pairs', '2']):
        with pytest.raises(SystemExit) as exit:
            bench.main(argv)
        assert exit.value.code == 2
        assert capsys.readouterr().err.count('\n') == 1
