"""The tables of the README and docs: they equal the CSV files, and show their latest results."""

import pytest
from matplotlib.figure import Figure

from experiments import claims, definitions, figures, result_tables, results, tables
from experiments.release import write_log
from records import around, run_records, write_csv, write_speedrun


@pytest.mark.parametrize('page', [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem == 'networks'))
    for page in tables.PAGES])
def test_tables_of_a_page_equal_the_csv_files(page):
    page = page.read_text()
    assert tables.fill(page, tables.ROOT / 'logs') == page


def test_bench_shows_the_latest_results_against_the_baseline(tmp_path):
    (tmp_path / 'bench.csv').write_text(
        'compared,what,n,images_per_second,ratio,ratio_low,ratio_high,percent_of_product_peak,'
        'target,peak_memory_mb\n'
        'a,older,10,500,1,1,1,,,900\na,gone,10,50,0.1,0.09,0.2,,3,800\n'
        '"depth, a step",DiracNet-28-1,10,1,1,1,1,,,1\n"depth, a step",x,10,1,0.5,0.4,0.6,,,1\n'
        'a,old,40,1000,1,1,1,,,910\na,new,40,2975,2.975,2.5,3.04,52.75,3,820\n'
        'a,newer,40,12345,12.345,12,12.7,,,830\na,exact,40,340,0.34,0.34,0.34,,,830\n')
    header, lines = tables.bench(tmp_path)
    assert lines == [
        ['a: new', 'old', '40', '2,975', '2.98 (2.5 to 3.04)', '820, 910', '3: not met'],
        ['a: newer', 'old', '40', '12,345', '12.3 (12 to 12.7)', '830, 910', ''],
        ['a: exact', 'old', '40', '340', '0.34 (0.34 to 0.34)', '830, 910', ''],
    ]
    assert len(header) == len(lines[0])


def test_speedrun_shows_differences_from_airbench_and_scales_compute(tmp_path):
    write_speedrun(tmp_path, [('airbench94_muon', 8, '', 89, 90, 3, 5e12, 'A'),
                              ('airbench94_muon', 8, '', 91, '', '', 5e12, 'A')])
    header, lines = tables.speedrun(tmp_path)
    # the standard error is sqrt(2), with 2 degrees of freedom: 4.303 * 1.414
    assert lines == [
        ['airbench94_muon', '8', '2', '90.00 ± 1.41', '90.00 (1)', '', '5', '3'],
        ['recipe', '8', '2', '89.00 ± 1.41', '89.50 ± 0.71', '-1.00 (-7.08 to +5.08)', '4',
         '5 ± 1'],
        ['recipe', '12', '2', '91.00 ± 0.00', '', '+1.00 (-11.71 to +13.71)', '8', '10 ± 3']]
    assert len(header) == len(lines[0])


def test_speedrun_without_airbench_has_no_differences(tmp_path):
    assert tables.speedrun(tmp_path)[1] == []
    write_speedrun(tmp_path, [('airbench94_muon', 8, '', 89, 90, 3, 5e12, 'A')])
    (tmp_path / 'speedrun' / 'airbench.csv').unlink()
    assert [line[5] for line in tables.speedrun(tmp_path)[1]] == ['', '']


def test_search_shows_differences_of_the_same_seeds(tmp_path):
    write_csv(tmp_path / 'speedrun' / 'search.csv', [
        {'change': change, 'seed': seed, 'multiply_adds': cost, 'train_cpu_seconds': cost + 300,
         'train_acc_percent': 80, 'test_acc_percent': accuracy, 'test_loss': 1 - accuracy / 100}
        for change, cost, accuracies in (
            ('recipe', 200, {1: 80, 2: 82, 3: 90}), ('ReLU', 200, {3: 89, 4: 1}),
            ('EMA', 100, {1: 81, 2: 84}), ('unpaired', 200, {4: 70}))
        for seed, accuracy in accuracies.items()])
    header, lines = tables.search(tmp_path)
    # differences 1 and 2: mean 1.5, 12.706 * 0.7071 / sqrt(2) on each side
    assert lines == [
        ['recipe', '3', '1.00', '1.00', '80.00 ± 0.00', '84.00 ± 5.29', '', ''],
        ['EMA', '2', '0.50', '0.80', '80.00 ± 0.00', '82.50 ± 2.12', '+1.50 (-4.85 to +7.85)',
         '-0.015 (-0.079 to +0.049)']]
    assert tables.search(tmp_path, repeated=False)[1] == [
        ['ReLU', '1', '1.00', '1.00', '80.00', '89.00', '-1.00', '+0.010']]
    assert len(header) == len(lines[0])


def test_gpu_tables_show_the_last_run_and_the_kernels_of_a_step(tmp_path):
    run = {'model': '28-1', 'command': 'python train.py', 'images_per_second': 30000.4,
           'seconds_per_epoch': 1.7, 'compile_seconds': 30.2, 'minutes': 6.2,
           'peak_memory_mb': 1234, 'device': 'H100'}
    write_csv(tmp_path / 'gpu' / 'runs.csv', [{**run, 'minutes': 9}, run, {**run, 'device': 'A'}])
    _, lines = tables.gpu_runs(tmp_path)
    assert lines == [['28-1', 'python train.py', device, '30,000', '1.70', '30', '6.2', '1,234']
                     for device in ('H100', 'A')]
    kernel = {'device': 'H100', 'step': 'train.py', 'milliseconds': 1.5, 'launches': 30.0}
    write_csv(tmp_path / 'gpu' / 'profile.csv', [
        {**kernel, 'kernels': 'W_hat', 'launches': 9.0}, {**kernel, 'kernels': 'W_hat'},
        {**kernel, 'kernels': 'pooling', 'step': 'compiled'}])
    assert tables.gpu_profile(tmp_path) == (
        ['device', 'step', 'W_hat, ms (launches)', 'pooling, ms (launches)'],
        [['H100', 'train.py', '1.50 (30)', ''], ['H100', 'compiled', '', '1.50 (30)']])


def test_gpu_checks_shows_differences_and_tolerances(tmp_path):
    write_csv(tmp_path / 'gpu' / 'checks.csv', [
        {'check': 'onnx', 'what': what, 'off': '1e-05', 'at_most': '0.0001', 'holds': 'yes'}
        for what in ('ONNX', 'pp between devices')])
    assert tables.gpu_checks(tmp_path) == (
        ['quantity', 'difference', 'tolerance', 'passed'],
        [[what, '1e-05', '0.0001', 'yes'] for what in ('ONNX', 'pp between devices')])


def test_tables_show_runs_that_diverged_in_their_first_epoch(tmp_path):
    for name, points in (('depth', {('plain', 10): [None], ('plain', 16): [None, 60.]}),
                         ('width', {('depth 28', 1): [None]}),
                         ('delta', {('diracnet', 28): [None]})):
        records = [{**record, 'parameters': 2_500_000 if record['train_loss'] else ''}
                   for record in run_records(points)]
        write_csv(tmp_path / name / 'results.csv', records)
    _, lines = tables.TABLES['depth'](tmp_path)
    assert lines == [['plain', '1 diverged', '60.00 (1, 1 diverged)', '-25.0'],
                     ['parameters, millions', '', '2.5', '']]
    assert tables.TABLES['width'](tmp_path)[1] == [['diracnet-28', '1 diverged', '']]
    assert tables.TABLES['ablations'](tmp_path)[1] == [['diracnet', '1 diverged', '', '', '']]
    assert claims.claims(tmp_path)[1]


def test_ablations_count_runs_of_equal_accuracy(tmp_path):
    first, = run_records({('diracnet', 28): [70.]})
    first['parameters'] = 368_730
    write_csv(tmp_path / 'delta' / 'results.csv', [first])
    write_csv(tmp_path / 'versions' / 'results.csv', [first])
    write_csv(tmp_path / 'again' / 'delta' / 'results.csv', [{**first, 'train_loss': 1.1}])
    assert tables.TABLES['ablations'](tmp_path)[1][0][:3] == [
        'diracnet', '70.00 ± 0.00 (2)', '1.050 ± 0.071']


def test_all_runs_counts_diverged_runs_on_other_machines(tmp_path):
    record, = run_records({('plain', 10): [None]})
    write_csv(tmp_path / 'depth' / 'results.csv', [record])
    write_csv(tmp_path / 'again' / 'depth' / 'results.csv', [{**record, 'threads': 2}, record])
    assert [run['threads'] for run in results.all_runs(tmp_path)] == [1, 2]


def test_width_has_the_large_width_of_the_budget(tmp_path):
    points = run_records({('diracnet', 28): [95.]}, 200)
    write_csv(tmp_path / 'paper' / 'large' / 'results.csv', [
        {**record, 'parameters': 36_500_000} for record in points])
    assert tables.TABLES['width'](tmp_path / 'paper') == (
        ['model', 'width 10', 'parameters, millions'], [['diracnet-28', '95.00 (1)', '36.50']])


RATES = """\
compared,what,n,images_per_second,ratio,ratio_low,ratio_high,ratio_to,\
percent_of_product,peak_memory_mb,device
"training 99-1, batch 8",train.py,20,7,1,1,1,train.py,1,7,old
"inference 99, batch 1","DiracNet-99, deploy()",5,70,1,1,1,first,1,7,old
"training 10-1, batch 8",train.py,20,7,1,1,1,train.py,1,7,GPU
"training 10-1, batch 8",train.py,20,1000,1,1,1,train.py,1,7,GPU
"training 10-1, batch 8",train.py --compile,20,4000,4,3.2,5,train.py,9.6,10,GPU
"training 10-1, batch 8","float32, NCHW, eager",20,500,0.5,0.4,0.6,train.py,1,7,GPU
"training 10-1, batch 8","standard convolutions, train.py",20,2000,2,1.5,3,train.py,1,7,GPU
"training 10-1, batch 8","standard convolutions, train.py --compile",9,4,4.16,4,4.8,train.py,9,7,GPU
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
    newer = '"training 10-1, batch 8",train.py,20,9,1,1,1,train.py,1,7,newer\n'
    (tmp_path / 'gpu' / 'rates.csv').write_text(RATES + newer)  # with --no-compile
    assert tables.gpu_training(tmp_path)[1] == lines


def test_claims_on_the_cost_of_w_hat_on_a_gpu(tmp_path):
    (tmp_path / 'gpu').mkdir()

    def answers(rates):
        (tmp_path / 'gpu' / 'rates.csv').write_text(rates)
        return {claim.text.split(': ')[1]: answer for claim in claims.CLAIMS
                if 'GPU' in claim.text for answer in claim.answers(tmp_path)}

    found = answers(RATES)
    assert found.keys() == {'GPU, CIFAR networks, --no-compile', 'GPU, CIFAR networks, compiled'}
    default, compiled = found.values()
    assert default.quantity == 'extra time of a step, GPU, %'
    assert [(e.value, e.low, e.high) for e in default.estimates] == [(100, 50, 200)]
    assert (default.n, default.verdict) == ('1', 'no')
    # 4.16 / 4, with the outer bounds 4 / 5 and 4.8 / 3.2
    estimate, = compiled.estimates
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((4, -20, 50))
    assert compiled.verdict == 'inconclusive'
    for ratios, verdict in (('1.08,1.06,1.09', 'no'), ('1.08,1.04,1.09', 'inconclusive'),
                            ('1.02,1.01,1.04', 'yes')):
        paired = RATES.replace('4.16,4,4.8,train.py', f'{ratios},train.py --compile')
        assert answers(paired)['GPU, CIFAR networks, compiled'].verdict == verdict
    imagenet = answers(RATES.replace('10-1, batch 8', '18-1, batch 256'))
    assert imagenet.keys() == {'GPU, 224 pixels, compiled or not'}
    assert answers(RATES.splitlines()[0]) == {}


# ---------------------------------------------------------------- docs/results.md


def test_fill_replaces_the_table_between_its_marks(tmp_path):
    # the mean of 70 and 74; the std of two values is their difference over sqrt(2)
    records = [{**record, 'parameters': 368730}
               for record in run_records({('diracnet', 28): (70, 74)})]
    for folder in (tmp_path, tmp_path / 'medium'):
        write_csv(folder / 'depth' / 'results.csv', records)
    for name in ('depth', 'medium/depth'):
        page = f'before\n<!-- table: {name} -->\nold\n<!-- end -->\nafter\n'
        filled = tables.fill(page, tmp_path)
        assert filled.startswith(f'before\n<!-- table: {name} -->\n| model ')
        assert filled.endswith('<!-- end -->\nafter\n')
        rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in filled.splitlines()]
        assert rows[2] == ['model', '28 layers']
        assert rows[4:6] == [['diracnet', '72.00 ± 2.83 (2)'], ['parameters, millions', '0.37']]
        assert tables.fill(filled, tmp_path) == filled
    for name in ('nothing', 'agian/width'):
        with pytest.raises(ValueError, match=name):
            tables.fill(f'<!-- table: {name} -->\n<!-- end -->', tmp_path)


def with_parameters(records):
    return [{'parameters': 1e4 * record['x'], 'train_seconds': 3600, 'threads': 1,
             'dtype': 'float', **record} for record in records]


def test_depth_table_shows_losses_and_differences(tmp_path):
    write_csv(tmp_path / 'depth' / 'results.csv', with_parameters(run_records({
        ('plain', 16): around(70), ('plain', 100): (None, None), ('diracnet', 16): around(68),
        ('diracnet', 100): (66, 66, None), ('diracnet', 202): (40,)})))
    header, lines = result_tables.depth(tmp_path)
    assert header[-2:] == ['202 layers', 'accuracy loss, pp (95 % CI)']
    # diverged runs are left out of the mean, and have 10 % in the loss
    assert lines[0][:4] == ['plain', '70.00 ± 0.10 (3)', '2 diverged', '']
    assert lines[0][4] == '+60.0 (+59.8 to +60.2)'
    assert lines[1][2:4] == ['66.00 ± 0.00 (2, 1 diverged)', '40.00 (1)']
    assert lines[2] == ['parameters, millions', '0.16', '1', '2', '']
    # two groups of variance 0.01 and n = 3: half a width of 0.23
    assert lines[3][:2] == ['diracnet - plain, pp (95 % CI)', '-2.0 (-2.2 to -1.8)']
    assert {len(line) for line in lines} == {len(header)}
    assert len(lines) == 4  # neither ResNets nor dirac-init


def test_width_table_adds_other_models_of_several_widths(tmp_path):
    for name, points in (
        ('width', {('depth 10', 1): (60,), ('depth 28', 1): (72, 74), ('depth 28', 2): (78,)}),
        ('large', {('diracnet', 1): (81,), ('resnet', 2): (79,)}),
        ('depth', {('resnet', 28): (76,), ('resnet', 52): (75,), ('diracnet', 28): (7,)}),
    ):
        write_csv(tmp_path / name / 'results.csv',
                  with_parameters(run_records(points, epochs=name)))
    header, lines = result_tables.width(tmp_path)
    assert header == ['model', 'width 1', 'width 2', 'width 4', 'parameters, millions']
    assert [line[:4] for line in lines] == [
        ['diracnet-10', '60.00 (1)', '', ''],
        ['diracnet-28', '73.00 ± 1.41 (2)', '78.00 (1)', '81.00 (1)'],
        ['resnet-28', '76.00 (1)', '', '79.00 (1)']]


def test_init_and_ablations_show_differences_from_the_baseline(tmp_path):
    write_csv(tmp_path / 'init' / 'results.csv', run_records({
        ('plain', 1): around(60), ('plain', 0.1): around(50), ('plain', 0.01): (40,),
        ('plain, delta-orthogonal', 1): around(61)}))
    header, lines = result_tables.init(tmp_path)
    assert lines == [
        ['plain', '60.00 ± 0.10 (3)', '', '50.00 ± 0.10 (3)', '-10.0 (-10.2 to -9.8)',
         '40.00 (1)', '-20.0'],
        ['plain, delta-orthogonal', '61.00 ± 0.10 (3)', '+1.0 (+0.8 to +1.2)', *[''] * 4]]
    assert {len(line) for line in lines} == {len(header)}
    same = run_records({('diracnet', 0): around(70)})
    for name, other in (('versions', ('diracnet-v1', 0)), ('delta', ('diracnet-repeated', 1))):
        write_csv(tmp_path / name / 'results.csv',
                  with_parameters(run_records({other: around(68)}) + same))
    header, lines = result_tables.ablations(tmp_path)
    assert [[line[i] for i in (0, 1, 3)] for line in lines] == [
        ['diracnet-v1', '68.00 ± 0.10 (3)', '-2.0 (-2.2 to -1.8)'],
        ['diracnet', '70.00 ± 0.10 (3)', ''],
        ['diracnet-repeated', '68.00 ± 0.10 (3)', '-2.0 (-2.2 to -1.8)']]


def test_alpha_beta_table_shows_thirds_of_the_layers(tmp_path):
    def measured(seed, alpha):
        return [{'series': 'width 1', 'seed': seed, 'epoch': epoch, 'layer': layer,
                 'alpha_mean': alpha + layer, 'beta_mean': 0.5, 'dirac_norm': 4 * layer,
                 'free_norm': 2} for epoch in (0, 4) for layer in range(1, 7)]

    write_csv(tmp_path / 'alpha-beta' / 'measured.csv', measured(1, 0))
    write_csv(tmp_path / 'again' / 'alpha-beta' / 'measured.csv', measured(1, 1))
    assert result_tables.alpha_beta(tmp_path)[1] == [
        ['diracnet-28, width 1', '4', '2', '2.00, 4.00, 6.00', '0.50, 0.50, 0.50',
         '3.00, 7.00, 11.00']]


def test_int8_and_cost_show_first_runs_and_replication(tmp_path):
    def measured(seed, int8):
        return {'series': 'plain', 'seed': seed, 'float32_test_acc_percent': 70,
                'int8_test_acc_percent': int8, 'equalised_int8_test_acc_percent': 70}

    write_csv(tmp_path / 'int8' / 'measured.csv', [measured(1, 69), measured(2, 68)])
    write_csv(tmp_path / 'again' / 'int8' / 'measured.csv', [measured(1, 68), measured(2, 67)])
    header, (line,) = result_tables.int8(tmp_path)
    # losses of the seeds: 1.5 and 2.5, whose interval is 2 ± 12.706 / 2
    assert line == ['plain', '70.00 ± 0.00', '70.00 ± 0.00', '1.50 ± 0.71', '2.50 ± 0.71',
                    '+2.00 (-4.35 to +8.35)', '0.00 ± 0.00', '0.00 ± 0.00', '+0.00']
    assert len(line) == len(header)

    def timed(what, rate, ratio, dtype):
        return {'compared': 'inference, 28-1', 'what': what, 'images_per_second': rate,
                'ratio': ratio, 'ratio_low': ratio, 'ratio_high': 2 * ratio, 'dtype': dtype}

    write_csv(tmp_path / 'cost' / 'measured.csv', [
        timed('plain, folded', 1000, 1, 'float32'), timed('other', 2000, 2, 'float32')])
    write_csv(tmp_path / 'again' / 'cost' / 'measured.csv', [timed('other', 4000, 0.5, 'bfloat16')])
    assert result_tables.cost(tmp_path) == (
        ['128 images', 'float32, ms', 'time / baseline (95 % CI)', 'bfloat16, ms',
         'time / baseline (95 % CI)'],
        [['inference, 28-1: plain, folded', '128.0', '', '', ''],
         ['inference, 28-1: other', '64.0', '0.500 (0.250 to 0.500)', '32.0',
          '2.000 (1.000 to 2.000)']])


def test_thousand_shows_first_runs_and_replication(tmp_path):
    first = with_parameters(run_records(
        {('a', 400): (8,), ('b', 100): (98,), ('c', 1000): (None,)}))
    write_csv(tmp_path / 'thousand' / 'results.csv', first)
    write_csv(tmp_path / 'again' / 'thousand' / 'results.csv',
              [{**record, 'dtype': 'bfloat16'} for record in first[1:2]])
    assert result_tables.thousand(tmp_path) == (
        ['runs', '100 layers, %', '400 layers, %', '1000 layers, %'],
        [['first, float32', '98.00', '8.00', '1 diverged'],
         ['replication, bfloat16', '98.00', '', '']])


def test_devices_compares_configurations_with_several_seeds_on_both(tmp_path):
    on_cpu = run_records({('plain', 10): around(70), ('resnet', 10): (70,)})
    on_gpu = [{**record, 'device': 'H100', 'test_acc_percent': record['test_acc_percent'] + 1}
              for record in on_cpu + run_records({('plain', 28): around(60)})]
    write_csv(tmp_path / 'depth' / 'cpu.csv', on_cpu)
    write_csv(tmp_path / 'depth' / 'results.csv', on_gpu)
    assert result_tables.devices(tmp_path) == (['%', 'plain-10-1'], [
        ['CPU', '70.00 ± 0.10 (3)'], ['GPU', '71.00 ± 0.10 (3)'],
        ['GPU - CPU, pp (95 % CI)', '+1.0 (+0.8 to +1.2)']])


def test_hours_separates_core_hours_from_hours_of_a_gpu(tmp_path):
    large = run_records({('plain', 0): (70, 71), ('resnet', 2): (72,)})
    changes = ({'device': 'H100', 'train_seconds': 900}, {'device': 'H100', 'train_seconds': 900},
               {'train_seconds': 1800, 'threads': 2})
    first = with_parameters([{**record, **change} for record, change in zip(large, changes)])
    write_csv(tmp_path / 'large' / 'results.csv', first)
    write_csv(tmp_path / 'int8' / 'results.csv', first[2:])  # a shared run
    depth = {**first[0], 'run': 'plain-10-1-s1'}
    write_csv(tmp_path / 'depth' / 'results.csv', [depth])
    write_csv(tmp_path / 'depth' / 'cpu.csv', [{**depth, 'device': 'CPU', 'train_loss': 2.}])
    write_csv(tmp_path / 'again' / 'large' / 'results.csv', with_parameters(
        run_records({('plain', 0): (75,)})))
    write_csv(tmp_path / 'medium' / 'depth' / 'results.csv', with_parameters(
        run_records({('plain', 28): (80,)}, epochs=30)))
    header, lines = result_tables.hours(tmp_path)
    assert header[1:] == ['depth', 'large', 'int8', 'depth, medium', 'all, once']
    estimates, *measured = [line[1:] for line in lines]
    # three runs of each of three networks of 28 layers at width 4: 868 million multiply-adds
    hours, count = estimates[1].split()
    assert float(hours) == pytest.approx(
        9 * 3 * 200_000 * 868e6 / definitions.RATES[4] / 3600, abs=0.06)
    assert count == '(9)'
    assert measured == [['0.25 (1)', '1.00 (1)', '1.00 (1)', '1.00 (1)', '2.25 (3)'],
                        ['', '1.00 (1)', '', '', '1.00 (1)'],
                        ['0.25 (1)', '0.50 (2)', '', '', '0.75 (3)']]


# ---------------------------------------------------------------- figures


def test_replication_figure_compares_the_runs_of_each_seed(tmp_path):
    shallow = {('diracnet-10', 1): (60, 61, 62), ('diracnet-16', 1): (70, 71)}
    deep = {('diracnet-28', 1): (70, 71, 75)}
    write_csv(tmp_path / 'width' / 'results.csv', run_records({**shallow, **deep}))
    write_csv(tmp_path / 'again' / 'width' / 'results.csv', run_records({
        ('diracnet-10', 1): (61, 62, 63), ('diracnet-16', 1): (70,), ('diracnet-28', 1): (
            75, 71, 70)}))
    pairs = figures.replication_pairs(tmp_path)
    assert [[*pair] for pair in pairs.values()] == [  # not of 16 layers: a seed is missing
        [{1: 60, 2: 61, 3: 62}, {1: 61, 2: 62, 3: 63}],
        [{1: 70, 2: 71, 3: 75}, {1: 75, 2: 71, 3: 70}]]
    figure = Figure()
    figures.replication(figure, tmp_path)
    means, deviations = figure.axes
    labels = [text.get_text() for text in deviations.get_legend().get_texts()]
    # deviations -2, -1, 3 and 3, -1, -2: the sum of products -11 over the sum of squares 14
    assert labels == ['10 layers: r = 1.00', f'28 layers: r = {-11 / 14:.2f}']
    assert [*means.lines[0].get_xdata()] == [61]
    assert [*means.lines[0].get_ydata()] == [62]
    assert figure.get_suptitle().endswith('(n = 3 seeds each)')


def test_replication_figure_needs_a_configuration_with_a_depth(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / 'again'):
        write_csv(folder / 'speedrun' / 'results.csv', [
            {**record, 'run': f'diracnet-fast-8ep-s{record["seed"]}'}
            for record in run_records({('full recipe', 8): (88, 89)})])
    with pytest.raises(SystemExit):
        figures.main(['replication', '--logs', str(tmp_path)])
    assert 'again: no configuration' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        figures.main(['typo'])
    assert 'typo: no figure; use one of depth' in capsys.readouterr().err


def test_results_page_states_the_correlations_of_the_replication_figure():
    figure = Figure()
    figures.replication(figure, tables.ROOT / 'logs')
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert [label.partition(':')[0] for label in labels] == ['10 and 16 layers', '28 layers']
    page = (tables.ROOT / 'docs' / 'results.md').read_text()
    assert all(f'({label.partition(": ")[2]})' in page for label in labels)


def test_figure_of_one_depth_draws_the_epochs(tmp_path):
    write_csv(tmp_path / 'depth' / 'results.csv', [
        {**record, 'log': f'{record["seed"]}.txt'} for record in run_records({
            ('plain', 28): (60, 62)})])
    for seed, accuracies in ((1, (40, 60)), (2, (42, 62))):
        write_log([{'epoch': i, 'test_acc': accuracy, 'train_loss': 1 / i}
                   for i, accuracy in enumerate(accuracies, 1)], tmp_path / f'{seed}.txt')
    accuracy, loss = figures.draw('depth', tmp_path).axes
    assert [*accuracy.lines[0].get_xdata()] == [1, 2]
    assert [*accuracy.lines[0].get_ydata()] == [41, 61]
    assert [*loss.lines[0].get_ydata()] == [1, 0.5]


def test_depth_table_and_figure_show_all_budgets(tmp_path):
    short = run_records({('resnet', x): (accuracy,) for x, accuracy in (
        (10, 71), (28, 75), (52, 74))} | {('plain', 28): (63, None)})
    short[-1]['epochs'] = 1  # diverged
    write_csv(tmp_path / 'depth' / 'results.csv', short)
    write_csv(tmp_path / 'medium' / 'depth' / 'results.csv', run_records(
        {('plain', 28): (83, 85), ('plain', 100): (80,)}, epochs=30))
    assert result_tables.by_depth(tmp_path) == (
        ['model', 'epochs', '10 layers', '28 layers', '52 layers', '100 layers'],
        [['plain', '30', '', '84.00 ± 1.41 (2)', '', '80.00 (1)'],
         ['plain', '4', '', '63.00 (1, 1 diverged)', '', ''],
         ['resnet', '4', '71.00 (1)', '75.00 (1)', '74.00 (1)', '']])
    figure = figures.draw('depth', tmp_path)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ['plain, 30 epochs', 'plain, 4 epochs', 'resnet, 4 epochs']
    lines = {container.get_label(): container.lines[0] for container in figure.axes[0].containers}
    assert [[*line.get_ydata()] for line in lines.values()] == [[84, 80], [63], [71, 75, 74]]
    long, short, other = lines.values()
    assert long.get_color() == short.get_color() != other.get_color()
    assert long.get_linewidth() > short.get_linewidth()


def test_figures_pool_the_runs_of_the_replication(tmp_path):
    write_csv(tmp_path / 'delta' / 'results.csv', run_records({('diracnet', 0): (70, 72)}))
    write_csv(tmp_path / 'again' / 'delta' / 'results.csv', run_records({('diracnet', 0): (80,)}))
    circles = figures.draw('delta', tmp_path).axes[0].lines[0]
    assert sorted(circles.get_xdata()) == [70, 72, 80]
