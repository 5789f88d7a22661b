"""The stored outputs of the notebook equal those of a fresh kernel."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def texts(notebook):
    """Returns the text outputs of each code cell, without rounding errors (machine-dependent)."""
    outputs = [
        ''.join(output.get('text', output.get('data', {}).get('text/plain', ''))
                for output in cell.outputs if output.get('name') != 'stderr')
        for cell in notebook.cells if cell.cell_type == 'code'
    ]
    return [re.sub(r'\d+e-\d+|0e\+00', '(rounding)', text) for text in outputs]


@pytest.fixture(scope='module')
def stored():
    return nbformat.read(ROOT / 'diracnet-export.ipynb', as_version=4)


@pytest.mark.slow
def test_notebook_outputs_equal_those_of_a_fresh_kernel(stored, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))  # no published weights, as in the stored run
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # no network access
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    fresh = copy.deepcopy(stored)
    NotebookClient(fresh, timeout=300, resources={'metadata': {'path': str(ROOT)}}).execute()
    assert texts(fresh) == texts(stored)


def test_notebook_stores_complete_and_accurate_outputs(stored):
    text = '\n'.join(texts(stored))
    assert 'DiracNet-18: 11,523,368 parameters' in text
    assert 'DiracNet-34, randomly initialized: 21,638,952 parameters' in text
    assert 'DiracNet-28-2 of this repository' in text
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
