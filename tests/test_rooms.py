"""Imports go one way: each room knows those below it alone, and there is no circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [
    path for path in (*ROOT.glob('*.py'), *(
        file for room in ('baselines', 'training', 'experiments') for file in
        (ROOT / room).glob('*.py')))
    if path.name not in ('__init__.py', 'test.py')
]
PACKAGE = {
    'diracconv', 'diracnet', 'diracfold', 'diracmodules', 'dirachead', 'diracimage', 'diracschema',
    'diracequal', 'diracfile', 'diraconnx', 'diracdeploy', 'diracpublished',
}
MAY_IMPORT = {  # room: what of the project it may know
    'diracconv': set(),
    'diracpublished': set(),
    'diracnet': {'diracconv', 'diracpublished'},
    'diracfold': {'diracconv', 'diracnet'},
    'diracmodules': {'diracconv', 'diracnet', 'diracfold'},
    'diracequal': {'diracfold'},
    'dirachead': set(),
    'diracimage': {'dirachead'},
    'diracschema': set(),
    'diracfile': {'diracnet', 'diracpublished', 'diracschema'},
    'diraconnx': set(),
    'diracdeploy': set(),
    'command': set(),
    'baselines': {'baselines', *PACKAGE},
    'networks': {'baselines', *PACKAGE},
    'training': {'training', 'networks', 'baselines', 'command', *PACKAGE},
    'train': {'training', 'networks', 'command', *PACKAGE},
    'export': {'training', 'networks', 'command', *PACKAGE},
    'predict': {'networks', 'command', *PACKAGE},
    'plot': {'training', 'command'},
    'hubconf': {'diracnet', 'diracpublished'},
    'experiments': {'experiments', 'train', 'export', 'hubconf', 'plot', 'training', 'networks',
                    'baselines', 'command', *PACKAGE},
}


def module_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def imports():
    """Returns {module: the modules of the project that it imports, anywhere in its text}."""
    modules = {module_of(path) for path in FILES}
    rooms = {module.partition('.')[0] for module in modules}
    found = {}
    for path in FILES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = {f'{node.module}.{alias.name}' for alias in node.names}
                names |= (whole & modules) or {node.module}
        found[module_of(path)] = {n for n in names if n in modules or n in rooms}
    return found


def test_each_room_knows_only_what_is_below_it():
    wrong = {
        (module, other) for module, others in imports().items() for other in others
        if other.partition('.')[0] not in MAY_IMPORT[module.partition('.')[0]]
    }
    assert not wrong
    assert {module.partition('.')[0] for module in imports()} == MAY_IMPORT.keys()


def test_no_circle():
    order = list(graphlib.TopologicalSorter(imports()).static_order())
    assert order.index('diracconv') < order.index('train')
