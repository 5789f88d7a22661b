"""What the README and docs/ say can be run, and is where they say."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import export
import plot
import predict
from experiments import bench, deploy, sizes
from experiments.bench import BENCHES
from pages import PAGES, ROOT, blocks, commands, text_of
from training import options


def test_every_command_is_one_of_ours():
    found = commands()
    assert len(found) >= 40
    for words in found:
        line = shlex.join(words)
        if 'train.py' in words:
            if '--help' not in words:
                options.parse_options(words[words.index('train.py') + 1 :])
        elif words[:2] == ['python', '-m']:
            assert (ROOT / (words[2].replace('.', '/') + '.py')).exists(), line
            if words[2] == 'experiments.bench':
                assert words[3] in {*BENCHES, '$what'}, line
        elif words[0] in ('python', 'bash'):
            assert (ROOT / words[1]).exists(), line
        elif words[0] == 'make':
            assert re.search(rf'^{words[1]}:', (ROOT / 'Makefile').read_text(), re.M), line
        else:
            assert words[:2] == ['pip', 'install'], line


def test_options_of_the_other_commands(capsys):
    parsers = {'export.py': export.parse_options, 'predict.py': predict.parse_options}
    lines = [words for words in commands() if words[0] == 'python' and words[1] in parsers]
    assert len(lines) >= 6
    for words in lines:
        assert parsers[words[1]](words[2:])
    for module in (export, plot, predict):
        with pytest.raises(SystemExit) as exit:
            module.main(['--help'])
        assert exit.value.code == 0


@pytest.mark.parametrize('module', [bench, deploy, sizes],
                         ids=lambda module: module.__name__)
def test_help_of_the_experiments(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x', '--help'])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    shown = ''.join(capsys.readouterr().out.split())  # lines may end at a hyphen
    assert ''.join(module.__doc__.splitlines()[0].split()) in shown


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_files(page):
    text = text_of(page)
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        assert link.startswith('https://') or (page.parent / link).exists(), link


def test_files_of_the_readme_are_all_there_are():
    table = text_of('README.md').split('## Files')[1].split('## Citing')[0]
    cells = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
    named = {name.rstrip('/') for cell in cells for name in re.findall(r'`([^`]+)`', cell)}
    if not shutil.which('git') or not (ROOT / '.git').exists():
        pytest.skip('no repository: nothing tells our files from others')
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    paths = [Path(line) for line in listed.stdout.splitlines()]
    ours = {path.parts[0] for path in paths if len(path.parts) > 1 or path.suffix == '.py'}
    ours = {name for name in ours if not name.startswith('.')}
    assert named == ours | {'diracnet-export.ipynb'}


def test_readme_is_short_and_its_first_block_is_w_hat():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150
    assert blocks('README.md')[0][1].startswith('scale = ')
