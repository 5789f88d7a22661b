"""Commands, code blocks, links and file tables of the README, docs/ and the model cards."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
import plot
import predict
from experiments import bench, tables
from experiments.bench import BENCHES
from pages import PAGES, ROOT, blocks, commands, text_of
from training import options

README_SECTIONS = [
    'Highlights', 'Installation', 'Quick start', 'Pretrained models', 'Results', 'How it works',
    'Use in your own network', 'Training', 'Export', 'Documentation',
    'Limitations and differences from the original', 'Citation and license',
]


@pytest.mark.slow
def test_every_command_of_the_pages_is_accepted():
    shown = commands()
    assert len(shown) >= 40
    for words in shown:
        line = shlex.join(words)
        if 'train.py' in words:
            if '--help' not in words:
                options.parse_options(words[words.index('train.py') + 1 :])
        elif words[:2] == ['python', '-m']:
            assert (ROOT / (words[2].replace('.', '/') + '.py')).exists(), line
            if words[2] == 'experiments.bench':
                assert words[3] in {*BENCHES, '$name'}, line
        elif words[0] in ('python', 'bash'):
            assert (ROOT / words[1]).exists(), line
        elif words[0] == 'make':
            assert re.search(rf'^{words[1]}:', (ROOT / 'Makefile').read_text(), re.M), line
        else:
            assert words[:2] == ['pip', 'install'], line


def test_export_and_predict_accept_the_options_of_the_pages(capsys):
    parsers = {'export.py': export.parse_options, 'predict.py': predict.parse_options}
    lines = [words for words in commands() if words[0] == 'python' and words[1] in parsers]
    assert len(lines) >= 6
    for words in lines:
        assert parsers[words[1]](words[2:])
    for module in (export, plot, predict):
        with pytest.raises(SystemExit) as exit:
            module.main(['--help'])
        assert exit.value.code == 0


@pytest.mark.parametrize('module', [bench, tables],
                         ids=lambda module: module.__name__)
def test_experiment_help_starts_with_the_docstring(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x', '--help'])
    with pytest.raises(SystemExit) as exit:
        module.main()
    assert exit.value.code == 0
    printed = ''.join(capsys.readouterr().out.split())  # argparse may break lines at a hyphen
    assert ''.join(module.__doc__.splitlines()[0].split()) in printed


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_of_a_page_exist(page):
    text = text_of(page)
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        assert link.startswith('https://') or (page.parent / link).exists(), link


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_anchors_of_links_are_headings(page):
    for link in re.findall(r'\]\((?!https:)([^)]*#[^)]+)\)', text_of(page)):
        path, _, anchor = link.partition('#')
        headings = re.findall(r'^#+ (.*)$', text_of(page.parent / path if path else page), re.M)
        assert anchor in {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
                          for heading in headings}, link


def test_layout_table_lists_all_tracked_files():
    table = text_of('CONTRIBUTING.md').split('## Layout')[1].split('##')[0]
    cells = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
    listed = {name.rstrip('/') for cell in cells for name in re.findall(r'`([^`]+)`', cell)}
    if not shutil.which('git') or not (ROOT / '.git').exists():
        pytest.skip('the list of tracked files needs a git repository')
    output = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    paths = [Path(line) for line in output.splitlines()]
    tracked = {path.parts[0] for path in paths if len(path.parts) > 1 or path.suffix == '.py'}
    tracked = {name for name in tracked if not name.startswith('.')}
    assert listed == tracked | {'diracnet-export.ipynb'}


def test_readme_has_its_sections_in_order_within_150_lines():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 150
    assert re.findall(r'^## (.*)$', text, re.M) == README_SECTIONS


def test_python_blocks_of_the_readme_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shape = (8, 8, 3, 3)
    names = {'weight': torch.randn(shape), 'alpha': torch.ones(8), 'beta': torch.ones(8)}
    for language, text in blocks('README.md'):
        assert language == 'python'
        exec(text, names)
    assert float(capsys.readouterr().out) < 3e-5  # "about 1e-05": 7e-6 to 1.7e-5, by CPU and images
    assert names['logits'].shape == (16, 10)
    convolutions = [m for m in names['deployed'].modules() if isinstance(m, torch.nn.Conv2d)]
    assert {type(m) for m in convolutions} == {torch.nn.Conv2d}
