"""Imports go one way: each room knows those below it alone, and there is no circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [
    path for path in (*ROOT.glob('*.py'), *(
        file for folder in ('diracnets', 'training', 'experiments') for file in
        (ROOT / folder).rglob('*.py')))
    if path.name != 'test.py'
]
LIBRARY = {'diracconv', 'diracnet', 'diracnets'}
MAY_IMPORT = {  # by module, or by its package: the modules and packages that it may import
    'diracconv': set(),
    'diracnet': {'diracconv'},
    'diracnets.models': {'diracconv', 'diracnet', 'diracnets.models'},
    'diracnets.metadata': {'diracnet'},
    'diracnets.image_headers': set(),
    'diracnets.onnx': set(),
    'diracnets.deploy': set(),
    'diracnets.preprocessing': {'diracnets.image_headers'},
    'diracnets.checkpoint': {'diracnet', 'diracnets.metadata'},
    'diracnets.fold': {'diracconv', 'diracnet'},
    'diracnets.modular': {'diracconv', 'diracnet', 'diracnets.fold'},
    'diracnets.quantization': {'diracnets.fold', 'diracnets.onnx', 'diracnets.preprocessing'},
    'diracnets.loading': LIBRARY,
    'diracnets': LIBRARY,
    'cli': set(),
    'training': {*LIBRARY, 'training', 'cli'},
    'train': {*LIBRARY, 'training', 'cli'},
    'export': {*LIBRARY, 'training', 'cli'},
    'predict': {*LIBRARY, 'cli'},
    'plot': {'training', 'cli'},
    'hubconf': {'diracnet'},
    'experiments': {*LIBRARY, 'experiments', 'training', 'cli', 'train', 'export', 'hubconf',
                    'plot'},
}


def module_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports():
    """Returns {module: the project's modules that it imports, anywhere in its text}."""
    modules = {module_of(path) for path in FILES}
    found = {}
    for path in FILES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                submodules = {f'{node.module}.{alias.name}' for alias in node.names} & modules
                names |= submodules or {node.module}
        found[module_of(path)] = names & modules
    return found


def layer_of(module):
    """The most specific entry of MAY_IMPORT that contains a module."""
    parts = module.split('.')
    prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in MAY_IMPORT)


def test_imports_follow_the_layering():
    wrong = {
        (module, other) for module, others in imports().items() for other in others
        if not any(other == allowed or other.startswith(f'{allowed}.')
                   for allowed in MAY_IMPORT[layer_of(module)])
    }
    assert not wrong
    assert {layer_of(module) for module in imports()} == MAY_IMPORT.keys()


def test_no_import_cycle():
    order = list(graphlib.TopologicalSorter(imports()).static_order())
    assert order.index('diracconv') < order.index('train')
