"""The notebook gives in a fresh kernel what is stored in it."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def texts(notebook):
    """Returns the text outputs of each cell; rounding errors differ between machines."""
    outputs = [
        ''.join(output.get('text', output.get('data', {}).get('text/plain', ''))
                for output in cell.outputs if output.get('name') != 'stderr')
        for cell in notebook.cells if cell.cell_type == 'code'
    ]
    return [re.sub(r'\d+e-\d+', '(rounding)', text) for text in outputs]


@pytest.fixture(scope='module')
def stored():
    return nbformat.read(ROOT / 'diracnet-export.ipynb', as_version=4)


@pytest.mark.slow
def test_a_fresh_kernel_gives_the_stored_outputs(stored, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))  # no published weights, as when it was stored
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # and no network
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    fresh = copy.deepcopy(stored)
    NotebookClient(fresh, timeout=300, resources={'metadata': {'path': str(ROOT)}}).execute()
    assert texts(fresh) == texts(stored)


def test_stored_outputs(stored):
    text = '\n'.join(texts(stored))
    assert 'DiracNet-18: 11,523,368 parameters' in text
    assert 'DiracNet-34, newly drawn: 21,638,952 parameters' in text
    assert "this project's DiracNet-28-2" in text
    differences = re.findall(r'max difference[^\n]*: (\d+e-\d+)', '\n'.join(
        output.get('text', '') for cell in stored.cells for output in cell.get('outputs', [])
    ))
    assert len(differences) == 4
    assert all(float(difference) < 1e-5 for difference in differences)
    assert sum('image/png' in output.get('data', {})
               for cell in stored.cells for output in cell.get('outputs', [])) == 2
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == 'code']
    assert counts == list(range(1, len(counts) + 1))
    assert not any('/tmp' in cell.source or '/home' in cell.source for cell in stored.cells)
