"""cli.py: Ctrl-C at any time, missing packages, help."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parent
INTERRUPT = 'import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint("still here")\n'


def run(*arguments, **kwargs):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          timeout=60, **kwargs)
    return done.returncode, done.stdout, done.stderr


COMMANDS = {  # valid arguments
    'train.py': [], 'export.py': ['run', '--to', 'x.pth'], 'predict.py': ['x.png', '--model', 'x'],
    'plot.py': ['run'],
}
SLOW_IMPORTS = ('cv2', 'matplotlib', 'numpy', 'PIL', 'scipy', 'sklearn', 'torch', 'torchvision')


@pytest.mark.parametrize('script', COMMANDS)
def test_command_parses_its_arguments_before_slow_imports(tmp_path, script):
    for name in SLOW_IMPORTS:
        (tmp_path / f'{name}.py').write_text('raise SystemExit(7)\n')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    status, printed, error = run(ROOT / script, '--help', env=environment)
    assert (status, printed.startswith(f'usage: {script}'), error) == (0, True, '')
    status, printed, error = run(ROOT / script, '--unknown', env=environment)
    assert (status, printed, error.count('\n')) == (2, '', 1)
    assert error.startswith(f'{script}: ')
    assert run(ROOT / script, *COMMANDS[script], env=environment) == (7, '', '')


@pytest.mark.parametrize(('arguments', 'problem'), [
    ('train.py --model resnet --growth 12', 'has no --growth'),
    ('train.py --recipe densenet --label_smoothing 1', '--label_smoothing'),
    ('train.py --dataset Digits --image_size 64', '--image_size'),
    ('train.py --normalise [0,0]', '--normalise'),
    ('export.py run --to x.xyz', '--to x.xyz'),
])
def test_command_checks_its_options_before_slow_imports(tmp_path, arguments, problem):
    for name in SLOW_IMPORTS:
        (tmp_path / f'{name}.py').write_text('raise SystemExit(7)\n')
    script, *arguments = arguments.split()
    status, printed, error = run(
        ROOT / script, *arguments, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert (status, printed, error.count('\n')) == (2, '', 1)
    assert problem in error


@pytest.mark.parametrize('script', COMMANDS)
def test_ctrl_c_during_imports_exits_without_output(tmp_path, script):
    """A fake module in place of the slow one sends the signal."""
    imported = 'matplotlib' if script == 'plot.py' else 'torch'
    (tmp_path / f'{imported}.py').write_text(INTERRUPT + 'raise SystemExit(7)\n')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    command = ROOT / script, *COMMANDS[script]
    assert run(*command, env=environment) == (130, '', '')
    ignored = run(*command, env=environment,  # as in the background of a shell script
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert ignored == (7, 'still here\n', '')


def test_ctrl_c_in_exit_on_error_runs_finally_blocks(tmp_path):
    (tmp_path / 'interrupt.py').write_text(INTERRUPT)
    text = '\n'.join([
        'import cli', 'cli.exit_on_ctrl_c()', 'with cli.exit_on_error("x.py"):',
        '    try:', '        import interrupt', '    finally:', '        print("cleaned up")',
    ])
    environment = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{tmp_path}'}
    assert run('-c', text, env=environment) == (130, 'cleaned up\n', '')


HIDDEN = """
import importlib.machinery
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.partition('.')[0] in {names} else found(name, *rest))
"""


@pytest.mark.parametrize(('script', 'missing', 'extra'), [
    ('plot.py', 'matplotlib', 'plot'), ('test.py', 'pytest', 'test'),
])
def test_require_packages_names_the_missing_package_and_its_extra(
    tmp_path, script, missing, extra
):
    (tmp_path / 'sitecustomize.py').write_text(HIDDEN.replace('{names}', repr({missing})))
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    status, printed, error = run(ROOT / script, 'logs', env=environment)
    assert (status, printed, error.count('\n')) == (2, '', 1)
    assert error.startswith(f'{script}: {missing} missing')
    assert f"pip install '.[{extra}]'" in error


@pytest.mark.parametrize('closed', [[1], [2], [1, 2], [0, 1, 2]])
def test_closed_streams_become_the_null_device(tmp_path, closed):
    text = '\n'.join([
        'import cli, sys', 'cli.exit_on_ctrl_c()', f'file = open({str(tmp_path / "file")!r}, "w")',
        'assert file.fileno() > 2', 'cli.say("said")', 'cli.warn("warned")', 'sys.stdout.flush()',
        'sys.stderr.flush()', 'file.write("written")',
    ])
    status, printed, error = run('-c', text, cwd=ROOT,
                                 preexec_fn=lambda: list(map(os.close, closed)))
    assert (tmp_path / 'file').read_text() == 'written'
    assert status == 0
    assert printed == ('' if 1 in closed else 'said\n')
    assert error == ('' if 2 in closed else 'warned\n')


@pytest.mark.slow
def test_train_with_closed_streams(tmp_path):
    command = ['train.py', '--dataset', 'Digits', '--depth', 10, '--epochs', 1, '--save', tmp_path]
    done = run(*command, cwd=ROOT, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert done == (0, '', '')
    assert (tmp_path / 'log.txt').read_text().startswith('json_stats: ')


HOSTILE = '{0}\x1b[2J\r\n{0}\u202e\ud800\xe9\x00'.format('x.py: fine')
@pytest.mark.parametrize(('error', 'line'), [
    (RuntimeError('CUDA error: an illegal access\nCompile with TORCH_USE_CUDA_DSA'),
     'CUDA error: an illegal access'),
    (RuntimeError('Caught DataError in DataLoader worker process 0.\nTraceback\n'
                  'diracnets.image_files.DataError: a.png: corrupt'), 'a.png: corrupt'),
    (RuntimeError(), 'RuntimeError')])
def test_exit_on_error_prints_the_line_with_the_error(capsys, error, line):
    with pytest.raises(SystemExit), cli.exit_on_error('x.py'):
        raise error
    assert capsys.readouterr().err == f'x.py: {line}\n'


ESCAPED = r'x.py: fine\x1b[2J\r\nx.py: fine\u202e\ud800%s\x00'


@pytest.mark.parametrize(('encoding', 'letter'), [('utf-8', '\xe9'), ('ascii', r'\xe9')])
def test_console_lines_are_escaped_when_they_contain_control_characters(
    monkeypatch, capsys, encoding, letter
):
    output = io.TextIOWrapper(io.BytesIO(), encoding, errors='strict')
    monkeypatch.setattr(sys, 'stdout', output)
    parser = cli.ArgumentParser(prog='x.py')

    def fail(error):
        with pytest.raises(SystemExit), cli.exit_on_error('x.py'):
            raise error

    cli.say(HOSTILE, 'second line')
    cli.print_table(['title'], [[HOSTILE]])
    for error in (ValueError(HOSTILE), FileNotFoundError(2, 'no such file', HOSTILE)):
        fail(error)
    with pytest.raises(SystemExit):
        parser.error(HOSTILE)
    output.seek(0)
    escaped = ESCAPED % letter
    said, second, *table = output.read().splitlines()
    assert (said, second, len(table)) == (escaped, 'second line', 3)
    assert escaped in table[2]
    assert capsys.readouterr().err.splitlines() == [
        f'x.py: {escaped}', f'x.py: {escaped}: no such file', f'x.py: {escaped}']


def test_help_of_test_py_shows_pytest_examples():
    status, shown, _ = run(ROOT / 'test.py', '--help')
    assert status == 0
    assert 'python test.py -k fold' in shown


def test_argument_parser_accepts_abbreviations_of_an_option_with_aliases():
    parser = cli.ArgumentParser(prog='x')
    parser.add_argument('--normalise', '--normalize', default='')
    parser.add_argument('--normal_map')
    assert parser.parse_args(['--normali', 'measured']).normalise == 'measured'
    with pytest.raises(SystemExit):
        parser.parse_args(['--norm', 'measured'])
