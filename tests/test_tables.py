"""The tables of the README and docs: they equal the CSV files; and the answers to the claims."""

import pytest

from experiments import claims, definitions, tables


def results(**series):
    """Returns results of three seeds around the accuracies {x: per cent} of each series."""
    return [
        {'series': name, 'x': x, 'seed': seed, 'ended': 'whole', 'train_loss': 1.0,
         'test_acc_percent': percent + seed - 2, 'parameters': 1000.0}
        for name, points in series.items() for x, percent in points.items() for seed in (1, 2, 3)
    ]


def answer(experiment, results=(), measured=(), source=claims.PAPER):
    claim, = (c for c in claims.CLAIMS if (c.experiment, c.source) == (experiment, source))
    return claim.answer(results, measured)


@pytest.mark.parametrize('page', [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem == 'networks'))
    for page in tables.PAGES])
def test_tables_of_a_page_equal_the_csv_files(page):
    page = page.read_text()
    assert tables.fill(page, tables.ROOT / 'logs') == page


def test_fill_replaces_the_table_between_its_marks(tmp_path):
    # the mean of 70 and 74; the std of two values is their difference over sqrt(2)
    of_seeds = ['2, 1 diverged', '72.00 ± 2.83', '1.375 ± 0.177', '368,730']
    for name, column, cells in (
        ('delta', 'n', ['diracnet']), ('again/width', 'width', ['diracnet', '2']),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'results.csv').write_text(
            'series,x,ended,test_acc_percent,train_loss,parameters\n'
            'diracnet,2,whole,70,1.5,368730\ndiracnet,2,whole,74,1.25,368730\n'
            'diracnet,2,diverged,,,\n')
        page = f'before\n<!-- table: {name} -->\nold\n<!-- end -->\nafter\n'
        filled = tables.fill(page, tmp_path)
        assert filled.startswith(f'before\n<!-- table: {name} -->\n\n| model ')
        assert filled.endswith('<!-- end -->\nafter\n')
        header, _, row = (line.split('|') for line in filled.splitlines()[3:6])
        assert header[2].strip() == column
        assert [cell.strip() for cell in row[1:-1]] == cells + of_seeds
        assert tables.fill(filled, tmp_path) == filled
    for name in ('nothing', 'agian/width'):
        with pytest.raises(ValueError, match=name):
            tables.fill(f'<!-- table: {name} -->\n<!-- end -->', tmp_path)


def test_bench_shows_the_latest_results_against_the_baseline(tmp_path):
    (tmp_path / 'bench.csv').write_text(
        'compared,what,n,images_per_second,ratio,ratio_low,ratio_high,percent_of_product_peak,'
        'target,peak_memory_mb\n'
        'a,older,10,500,1,1,1,,,900\na,gone,10,50,0.1,0.09,0.2,,3,800\n'
        '"depth, a step",DiracNet-28-1,10,1,1,1,1,,,1\n"depth, a step",x,10,1,0.5,0.4,0.6,,,1\n'
        'a,old,40,1000,1,1,1,,,910\na,new,40,2975,2.975,2.5,3.04,52.75,3,820\n'
        'a,newer,40,12345,12.345,12,12.7,,,830\n')
    header, lines = tables.bench(tmp_path)
    assert lines == [
        ['a: new', 'old', '40', '2,975', '2.98 (2.5 to 3.04)', '52.8', '820, 910', '3: not met'],
        ['a: newer', 'old', '40', '12,345', '12.3 (12 to 12.7)', '', '830, 910', ''],
    ]
    assert len(header) == len(lines[0])


def test_accuracy_table_has_empty_cells_when_all_runs_diverged():
    lost = [{**record, 'ended': 'diverged', 'test_acc_percent': ''}
            for record in results(plain={100: 60})]
    (line,) = tables.accuracy_table(lost, [], x='depth')[1]
    assert line == ['plain', '100', f'0, {len(lost)} diverged', '', '', '']


def test_by_depth_leaves_out_diverged_runs(tmp_path):
    (tmp_path / 'depth').mkdir()
    (tmp_path / 'depth' / 'results.csv').write_text(
        'series,x,ended,test_acc_percent\n'
        'plain,100,diverged,\nplain,16,whole,70\nplain,16,whole,74\nresnet,100,whole,80\n')
    assert tables.by_depth(tmp_path) == (
        ['model', '16 layers', '100 layers'],
        [['plain', '72.00 ± 2.83', ''], ['resnet', '', '80.00']])


def test_devices_compares_common_points(tmp_path):
    (tmp_path / 'depth').mkdir()
    header = 'series,x,ended,test_acc_percent,device\n'
    (tmp_path / 'depth' / 'cpu.csv').write_text(header + ''.join(
        f'{row},CPU\n' for row in ('plain,10,whole,70', 'plain,10,whole,74', 'plain,28,whole,60')))
    (tmp_path / 'depth' / 'results.csv').write_text(
        header + 'plain,28,whole,61,CPU\n' + ''.join(
            f'{row},H100\n' for row in ('plain,10,whole,71', 'plain,10,whole,72',
                                        'plain,10,diverged,', 'resnet,10,whole,80')))
    columns, lines = tables.devices(tmp_path)
    assert lines == [['plain-10-1', '2 and 2', '72.00 ± 2.83', '71.50 ± 0.71', '-0.50']]
    assert len(columns) == len(lines[0])


def test_again_shows_first_runs_and_replication(tmp_path):
    for folder in (tmp_path / 'delta', tmp_path / 'again' / 'delta'):
        folder.mkdir(parents=True)
    header = 'series,x,ended,test_acc_percent,train_seconds\n'
    (tmp_path / 'delta' / 'results.csv').write_text(
        header + 'diracnet,0,whole,70,1\nrepeated,1,whole,60,1\n')
    (tmp_path / 'again' / 'delta' / 'results.csv').write_text(
        header + 'diracnet,0,whole,71,90\ndiracnet,0,whole,73,90\n')
    columns, lines = tables.again(tmp_path)
    assert lines == [
        ['delta', 'diracnet', '0', '1 and 2', '70.00', '72.00 ± 1.41', '+2.00', '3']]
    assert len(columns) == len(lines[0])


def test_hours_shows_estimates_and_measured_hours(tmp_path):
    header = 'series,x,seed,ended,train_seconds,device\n'
    for folder, row in (
        ('large', 'plain,0,1,whole,900,H100'), ('large', 'resnet,2,1,whole,30000,CPU'),
        ('again/large', 'plain,0,1,whole,7200,CPU'), ('again/large', 'plain,0,2,whole,9,H100'),
        ('again/delta', 'diracnet,0,1,whole,360,CPU'),
    ):
        table = tmp_path / folder / 'results.csv'
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text((table.read_text() if table.exists() else header) + row + '\n')
    columns, lines = tables.hours(tmp_path)
    assert {len(line) for line in lines} == {len(columns)}
    by_name = {name: cells for name, *cells in lines}
    # three trainings each of three networks of 28 layers at width 4: 868 million multiply-adds
    assert by_name['large'][0] == '9'
    assert float(by_name['large'][1]) == pytest.approx(
        9 * 3 * 200_000 * 868e6 / definitions.RATES[4] / 3600, rel=0.01)
    assert by_name['large'][2:] == ['2.00 of 1', '0.25 of 1']
    assert by_name['delta'][2:] == ['0.10 of 1', '']
    assert by_name['width'][2:] == ['', '']


def test_gpu_checks_shows_the_last_record(tmp_path):
    (tmp_path / 'gpu').mkdir()
    (tmp_path / 'gpu' / 'checks.csv').write_text(
        'check,what,off,at_most,holds,device\nfolding,RuntimeError: no kernel,,,failed,H100\n'
        'onnx,ONNX,1e-03,0.0001,no,H100\nonnx,ONNX Runtime,1e-03,0.0001,no,H100\n'
        'folding,folded,1e-06,0.0001,yes,H100\nonnx,ONNX,1e-05,0.0001,yes,H100\n'
        'folding,folded,1e-07,0.0001,yes,CPU\n')
    assert tables.gpu_checks(tmp_path) == (
        ['quantity', 'difference', 'tolerance', 'passed'], [
            ['folded', '1e-06', '0.0001', 'yes'], ['ONNX', '1e-05', '0.0001', 'yes']])


RATES = """\
compared,what,n,images_per_second,ratio,ratio_low,ratio_high,ratio_to,\
percent_of_product,peak_memory_mb,device
"training 99-1, batch 8",train.py,20,7,1,1,1,train.py,1,7,old
"inference 99, batch 1","DiracNet-99, deploy()",5,70,1,1,1,first,1,7,old
"training 10-1, batch 8",train.py,20,7,1,1,1,train.py,1,7,GPU
"training 10-1, batch 8",train.py,20,1000,1,1,1,train.py,1,7,GPU
"training 10-1, batch 8",train.py --compile,20,4000,4,3.2,5,train.py,9.6,10,GPU
"training 10-1, batch 8","float32, NCHW, eager",20,500,0.5,0.4,0.6,train.py,1,7,GPU
"training 10-1, batch 8","ordinary convolutions, train.py",20,2000,2,1.5,3,train.py,1,7,GPU
"training 10-1, batch 8","ordinary convolutions, train.py --compile",9,4,4.16,4,4.8,train.py,9,7,GPU
"training 10-1, batch 8","resnet, train.py",20,1600,1.6,1,2,train.py,1,7,GPU
"training 10-1, batch 8","resnet, train.py --compile",20,3200,3.2,3,4,train.py,9,7,GPU
"training 28-1, batch 8",train.py,20,1000,1,1,1,train.py,1,7,GPU
"inference 18, batch 1","DiracNet-18, deploy()",5,70,1,1,1,first,1,7,GPU
"inference 18, batch 1","DiracNet-18, deploy()",16,1430,1,1,1,first,1.2,7,GPU
"training 10-1, batch 8",train.py,20,7,1,1,1,train.py,1,7,CPU
"""


def test_gpu_tables_show_the_latest_gpu(tmp_path):
    (tmp_path / 'gpu').mkdir()
    (tmp_path / 'gpu' / 'rates.csv').write_text(RATES)
    columns, lines = tables.gpu_training(tmp_path)
    assert len(columns) == len(lines[0])
    assert lines == [['10-1, batch 8', '20', '500', '1,000', '4,000', '3,200', '10', '10',
                      '+100 (+50 to +200)', '+4 (-20 to +50)']]  # 28-1 is incomplete
    assert tables.gpu_inference(tmp_path)[1] == [
        ['18, batch 1', 'DiracNet-18, deploy()', '16', '1,430', '1.00 (1.00 to 1.00)', '1']]


def test_claim_on_the_cost_of_w_hat_on_a_gpu(tmp_path):
    (tmp_path / 'gpu').mkdir()
    (tmp_path / 'gpu' / 'rates.csv').write_text(RATES)
    _, measured = tables.read_experiment('gpu', tmp_path)
    assert tables.missing_results('gpu', [], measured) == ''
    assert answer('gpu', measured=measured) == (
        'time of a step +100.0 to +100.0 %, with --compile +4.0 to +4.0 % (bfloat16, 1 '
        'comparisons, GPU)', 'partly')
    ordinary = [row for row in measured if row['what'].startswith('ordinary')]
    for eager, compiled, expected in ((1.04, 4.16, 'yes'), (1.06, 4.4, 'no')):
        for row, ratio in zip(ordinary, (eager, compiled), strict=True):
            row['ratio'] = ratio
        assert answer('gpu', measured=measured)[1] == expected
    ordinary[1] |= {'ratio': 1.04, 'ratio_to': 'train.py --compile'}  # as in newer results
    assert 'with --compile +4.0 to +4.0 %' in answer('gpu', measured=measured)[0]
    assert tables.missing_results('gpu', [], [row for row in measured if row not in ordinary]) == (
        'not run yet')
    assert tables.missing_results('gpu', [], []) == 'not run yet'


def test_accuracy_table_sorts_points_by_number():
    many = results(**{'1000 layers': {1000: 50}, '100 layers': {100: 60}})
    assert [line[0] for line in tables.accuracy_table(many, [])[1]] == ['100 layers', '1000 layers']
    two = results(b={1: 50}, a={1: 60, 0.5: 70})
    assert [line[:2] for line in tables.accuracy_table(two, [], x='width')[1]] == [
        ['a', '0.5'], ['a', '1'], ['b', '1']]


@pytest.mark.parametrize(('plain', 'diracnet', 'expected'), [
    ({10: 80, 100: 60}, {10: 80, 100: 82}, 'yes'),
    ({10: 80, 100: 60}, {10: 80, 100: 70}, 'partly'),
    ({10: 80, 100: 81}, {10: 80, 100: 70}, 'no'),
])
def test_claim_on_depth(plain, diracnet, expected):
    finding, verdict = answer('depth', results(plain=plain, diracnet=diracnet))
    assert verdict == expected
    assert f'plain loses {max(plain.values()) - plain[100]:.1f} pp' in finding


def test_mean_accuracies_count_diverged_runs_as_chance():
    trained = results(plain={1: 70}, diracnet={1: 70, 0.1: 70})
    trained[-1] |= {'ended': 'diverged', 'test_acc_percent': ''}
    # two of three at 69 and 70 per cent, and one at 10
    assert claims.mean_accuracies(trained)['diracnet'][0.1] == pytest.approx((69 + 70 + 10) / 3)
    assert answer('init', trained)[1] == 'no'


def test_missing_results_until_all_runs_are_done():
    runs = tables.EXPERIMENTS['delta'](tables.BUDGETS['small'])
    done = [{'series': run.series, 'x': run.x, 'seed': run.seed, 'ended': 'whole',
             'run': run.run_name} for run in runs]
    assert tables.missing_results('delta', [], []) == 'not run yet'
    assert tables.missing_results('delta', done[:2], []) == '2 of 6 runs done'
    assert tables.missing_results('delta', done, []) == ''
    assert tables.missing_results('int8', done, []) == '0 of 9 runs done'
    assert tables.missing_results('cost', [], [{'compared': 'inference'}]) == (
        'one of two comparisons done')


def test_claim_on_width():
    rising = {'depth 10': {0.5: 60, 1: 70}, 'depth 16': {0.5: 65, 1: 75}}
    assert answer('width', results(**rising))[1] == 'yes'
    assert answer('width', results(**{**rising, 'depth 16': {0.5: 65, 1: 64}}))[1] == 'no'
    assert answer('width', results(**{**rising, 'depth 16': {0.5: 55, 1: 75}}))[1] == 'partly'


def test_claim_on_init():
    assert answer('init', results(plain={1: 70, 0.1: 60}, diracnet={1: 70, 0.1: 70.5}))[1] == 'yes'
    assert answer('init', results(plain={1: 70, 0.1: 70}, diracnet={1: 70, 0.1: 60}))[1] == 'no'
    finding, verdict = answer('init', results(plain={1: 70, 0.1: 64}, diracnet={1: 70, 0.1: 75}))
    assert verdict == 'yes'  # a gain is no drop
    assert 'diracnet loses 0.0 pp' in finding
    assert 'plain loses 6.0 pp' in finding


def test_claims_on_alpha_and_beta():
    def measured(ratios, alpha, deviation=0.0):
        return [{'epoch': epoch, 'layer': layer, 'dirac_norm': 2 * ratio if epoch else 20.0,
                 'free_norm': 2.0, 'alpha_mean': alpha if epoch else 1,
                 'alpha_deviation': deviation}
                for epoch in (0, 4) for layer, ratio in enumerate(ratios, 1)]

    finding, verdict = answer('alpha-beta', (), measured((0.5, 1, 3), 1.02))
    assert verdict == 'yes'
    assert 'from 10.0 to 0.5 in the first third of the layers, from 10.0 to 3.0 in' in finding
    assert answer('alpha-beta', (), measured((0.9, 1, 0.5), 1.02))[1] == 'no'
    assert answer('alpha-beta', (), measured((3, 1, 2), 1.02))[1] == 'partly'
    for alpha, deviation, expected in ((1.02, 0.05, 'no'), (0.7, 0.0, 'yes'), (1.0, 0.2, 'yes')):
        same = measured((1, 1, 1), alpha, deviation)
        assert answer('alpha-beta', (), same, 'Oyedotun et al.')[1] == expected


def test_claims_on_large_and_versions():
    behind = results(plain={0: 70}, diracnet={1: 80}, resnet={2: 82})
    assert answer('large', behind, source='Oyedotun et al.') == (
        'DiracNet minus ResNet: -2.0 pp', 'yes')
    ahead = results(plain={0: 70}, diracnet={1: 81.5}, resnet={2: 79})
    assert answer('large', ahead, source='Oyedotun et al.') == (
        'DiracNet minus ResNet: +2.5 pp', 'no')
    assert answer('versions', results(**{'diracnet-v1': {0: 80}, 'diracnet': {1: 80.5}})) == (
        'v1 minus v2: -0.5 pp', 'yes')


def test_claims_on_cost():
    def measured(what, ratio, low, high):
        return [{'compared': what, 'what': name, 'dtype': 'float32', 'n': 20.0, 'ratio': ratio,
                 'ratio_low': low, 'ratio_high': high} for name in ('diracnet', 'diracnet, folded')]

    training, inference = (c for c in claims.CLAIMS if c.experiment == 'cost')
    step = measured('a training step, 28-1', 0.8, 0.5, 1.25)
    assert training.answer((), step) == (
        'time of a step +25.0 % (95 % CI -20.0 to +100.0; float32, n = 20)', 'no')
    same = measured('inference, 28-1', 0.98, 0.95, 1.01)
    assert inference.answer((), same)[1] == 'yes'
    slower = measured('inference, 28-1', 0.9, 0.89, 0.91)
    assert inference.answer((), slower)[1] == 'no'
