"""Imports follow the layers of CONTRIBUTING.md, and `import diracnets` needs torch alone."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob('*.py'), *(
    path for package in ('diracnets', 'training', 'experiments')
    for path in (ROOT / package).rglob('*.py')
)]
LIBRARY = {'diracconv', 'diracnet', 'diracnets'}
MAY_IMPORT = {  # module or package: the modules and packages of this project that it may import
    'diracconv': set(),
    'diracnet': {'diracconv'},
    'diracnets.fused_weights': {'diracconv'},
    'diracnets.network': {'diracconv', 'diracnet', 'diracnets.fused_weights'},
    'diracnets.architectures': {'diracnets.preprocessing'},
    'diracnets.models': {'diracconv', 'diracnet', 'diracnets.architectures', 'diracnets.models',
                         'diracnets.network'},
    'diracnets.folding': {'diracconv', 'diracnet', 'diracnets.network'},
    'diracnets.deployment': set(),
    'diracnets.metadata': {'diracnet'},
    'diracnets.checkpoint': {'diracnet', 'diracnets.metadata', 'diracnets.network'},
    'diracnets.image_files': set(),
    'diracnets.preprocessing': {'diracnet', 'diracnets.image_files'},
    'diracnets.onnx': {'diracnets.metadata'},
    'diracnets.quantization': {'diracnets.folding', 'diracnets.onnx', 'diracnets.preprocessing'},
    'diracnets.formats': {'diracnets.checkpoint', 'diracnets.metadata', 'diracnets.onnx'},
    'diracnets.loading': {
        'diracnet', 'diracnets.architectures', 'diracnets.checkpoint', 'diracnets.folding',
        'diracnets.metadata', 'diracnets.models', 'diracnets.onnx', 'diracnets.preprocessing',
    },
    'diracnets.timm': {'diracconv', 'diracnet', 'diracnets.checkpoint', 'diracnets.models.plain',
                       'diracnets.network'},
    'diracnets': LIBRARY,
    'cli': set(),
    'training.choices': set(),
    'training.options': {'diracnets.architectures', 'diracnets.preprocessing', 'training.choices',
                         'cli'},
    'training.files': set(),
    'training.log': {'training.files'},
    'training': {*LIBRARY, 'training', 'cli'},
    'train': {*LIBRARY, 'training', 'cli'},
    'export': {*LIBRARY, 'training', 'cli'},
    'predict': {*LIBRARY, 'cli', 'training.files'},
    'plot': {'training.log', 'cli'},
    'test': {'cli'},
    'hubconf': {'diracnet', 'diracnets.network'},
    'experiments': {*LIBRARY, 'experiments', 'training', 'cli', 'train', 'hubconf',
                    'plot'},
}
OPTIONAL = {  # third-party packages that the library imports inside functions
    'PIL', 'cv2', 'google', 'numpy', 'onnx', 'onnxruntime', 'onnxscript', 'safetensors', 'timm',
    'torchvision', 'tqdm',
}
AT_MODULE_LEVEL = {'diracnets.timm': {'timm'}}  # modules that nothing else imports


def module_name(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(path): ast.parse(path.read_text()) for path in FILES}


def walk_module_level(tree):
    """Yields the nodes that run on import: no function bodies and no `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
        functions = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda
        if not type_checking and not isinstance(node, functions):
            yield node
            yield from walk_module_level(node)


def imported_names(nodes):
    """Returns the names of the modules in import statements; of this project also submodules."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{node.module}.{alias.name}' for alias in node.names} & MODULES.keys() or {
                node.module}
    return names


def project_imports():
    """Returns {module: modules of this project that it imports, inside functions too}."""
    return {
        name: imported_names(ast.walk(tree)) & MODULES.keys() for name, tree in MODULES.items()
    }


def packages(names):
    return {name.partition('.')[0] for name in names}


def layer_of(module):
    """Returns the most specific entry of MAY_IMPORT that contains a module."""
    parts = module.split('.')
    prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in MAY_IMPORT)


def test_imports_follow_the_layers():
    violations = {
        (module, other) for module, others in project_imports().items() for other in others
        if not any(other == allowed or other.startswith(f'{allowed}.')
                   for allowed in MAY_IMPORT[layer_of(module)])
    }
    assert not violations
    assert {layer_of(module) for module in MODULES} == MAY_IMPORT.keys()


def test_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter(project_imports()).static_order())
    assert order.index('diracconv') < order.index('train')


@pytest.mark.parametrize('script', sorted(
    {module_name(path) for path in ROOT.glob('*.py')} - LIBRARY - {'cli'}))
def test_scripts_are_imported_only_by_experiments(script):
    importers = {name for name, imported in project_imports().items() if script in imported}
    assert packages(importers) <= {'experiments'}


@pytest.mark.parametrize('module', sorted(
    name for name in MODULES if packages([name]) <= LIBRARY))
def test_library_imports_only_torch_at_module_level(module):
    tree = MODULES[module]
    # triton is a dependency of torch for CUDA, and fused_weights runs without it
    required = {*sys.stdlib_module_names, 'torch', 'triton', *LIBRARY,
                *AT_MODULE_LEVEL.get(module, ())}
    assert packages(imported_names(walk_module_level(tree))) <= required
    assert packages(imported_names(ast.walk(tree))) <= required | OPTIONAL


@pytest.mark.parametrize('module', [
    'cli', 'diracnets', 'diracnets.architectures', 'diracnets.image_files',
    'diracnets.preprocessing', 'training.choices', 'training.files', 'training.log',
    'training.options',
])
def test_options_and_log_import_only_the_standard_library(module):
    imported = packages(imported_names(walk_module_level(MODULES[module])))
    assert imported <= {*sys.stdlib_module_names, 'cli', 'diracnets', 'training'}


@pytest.mark.parametrize('module', AT_MODULE_LEVEL)
def test_modules_of_optional_packages_are_imported_by_no_other(module):
    assert not any(module in imported for imported in project_imports().values())


def test_import_diracnets_loads_no_other_package_than_torch():
    script = ('import sys, torch; before = set(sys.modules); from diracnets import *; '
              'print(*{name.partition(".")[0] for name in set(sys.modules) - before})')
    printed = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    names = {name for name in printed.split() if not name.startswith('_sysconfigdata_')}
    assert names - sys.stdlib_module_names - {'triton'} == LIBRARY


def test_public_names_of_diracnets_are_not_hidden_by_modules():
    script = '\n'.join([
        'from diracnets.loading import load', 'import diracnets.deployment', 'import types',
        'assert "create_model" in dir(diracnets)', 'assert not hasattr(diracnets, "create")',
        'assert diracnets.load is load',
        'for name in diracnets.__all__:',
        '    assert not isinstance(getattr(diracnets, name), types.ModuleType), name',
    ])
    subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True)


def test_modules_that_diracnets_imports_are_attributes_at_the_first_access():
    script = 'import diracnets; print(diracnets.quantization.__name__)'
    printed = subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout
    assert printed == 'diracnets.quantization\n'
