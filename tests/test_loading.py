"""Loading: checkpoints of other training scripts, whose parameters have other keys and names."""

import argparse
import pickle
import sys
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import diracnets
from diracnet import define_diracnet, is_folded
from diracnets.checkpoint import common_prefix
from diracnets.network import Network
from pages import blocks

ARGS = argparse.Namespace(lr=0.1, opt=['sgd'])


@pytest.fixture
def params():
    torch.manual_seed(0)
    f, params = define_diracnet(10, 0.25, 'CIFAR10')
    params['bn.running_mean'] += 0.25
    return {name: tensor.detach() for name, tensor in params.items()}


def prefixed(prefix, params):
    return OrderedDict((prefix + name, tensor) for name, tensor in params.items())


def averaged(params):
    """The state dict of an AveragedModel of three updates, with its int64 counter."""
    model = AveragedModel(diracnets.DiracNet(10, 0.25, 'CIFAR10') if is_folded(params)
                          else Network.from_params(params))
    model.n_averaged += 3
    return model.state_dict()


FOREIGN = {  # the contents of a file, from flat parameters
    'lightning': lambda params: {
        'epoch': 3, 'global_step': 40, 'pytorch-lightning_version': '2.4.0',
        'state_dict': prefixed('net.', params), 'loops': {'fit_loop': {'state_dict': {}}},
        'callbacks': {'ModelCheckpoint': {'best_model_path': 'a.ckpt'}},
        'optimizer_states': [{'state': {}, 'param_groups': []}], 'lr_schedulers': [],
        'hparams_name': 'kwargs', 'hyper_parameters': {'lr': 0.1, 'name': 'mine'},
    },
    'lightning of a compiled model': lambda params: {
        'epoch': 3, 'state_dict': prefixed('model.net._orig_mod.', params)},
    "PyTorch's tutorial": lambda params: {
        'epoch': 3, 'model_state_dict': params, 'optimizer_state_dict': {}, 'loss': 0.4},
    'hyperparameters called params': lambda params: {
        'params': {'lr': 0.1}, 'model': {'state_dict': params}},
    'a common script': lambda params: {
        'net': prefixed('module.', params), 'acc': 91.2, 'epoch': 180},
    'torchvision references': lambda params: {
        'model': prefixed('', params), 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 9,
        'model_ema': averaged(params), 'args': ARGS},
    'a dict in a dict': lambda params: {'model': {'state_dict': params}, 'epoch': 'last'},
    'params with a prefix': lambda params: {'params': prefixed('module.model.', params)},
    'averaged': averaged,
    'averaged in params': lambda params: {'params': averaged(params)},
    'bare with a prefix': lambda params: prefixed('backbone.', params),
    'compiled groups': lambda params: OrderedDict(
        (name.replace('group1.', 'group1._orig_mod.'), t) for name, t in params.items()),
}


@pytest.mark.parametrize('layout', FOREIGN)
@pytest.mark.parametrize('folded', [False, True])
def test_load_finds_the_parameters_of_other_scripts(params, tmp_path, layout, folded):
    model = diracnets.fold(params)
    if folded and not layout.startswith('averaged'):
        params = dict(model.state_dict())
    torch.save(FOREIGN[layout](params), tmp_path / 'last.ckpt')
    loaded = diracnets.load(tmp_path / 'last.ckpt')
    state = loaded.model.state_dict()
    assert state.keys() == params.keys()
    assert all(torch.equal(tensor, params[name]) for name, tensor in state.items())
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (loaded.model(inputs) - model(inputs)).abs().max() < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_load_gives_the_dtype_and_layout_of_preprocessed_images(params, tmp_path, dtype):
    model = Network.from_params(params).to(dtype, memory_format=torch.channels_last)
    torch.save(model.state_dict(), tmp_path / 'half.pth')
    loaded = diracnets.load(tmp_path / 'half.pth')
    assert loaded.model(loaded.preprocess(torch.zeros(3, 32, 32))[None]).dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in loaded.model.parameters())


@pytest.mark.parametrize('kind', [tuple, list])
def test_load_compares_overrides_with_the_normalization_of_the_file(params, tmp_path, kind):
    normalization = {'mean': [0.5, 0.25, 0.5], 'std': [0.25, 0.5, 0.5]}
    args = {'depth': 10, 'width': 0.25, 'dataset': 'Folder', 'image_size': 32, **normalization}
    torch.save({'params': params, 'args': args}, tmp_path / 'a.pth')
    overrides = {name: kind(values) for name, values in normalization.items()}
    assert diracnets.load(tmp_path / 'a.pth', overrides).preprocess.mean == (0.5, 0.25, 0.5)
    with pytest.raises(ValueError, match='mean is .*, not'):
        diracnets.load(tmp_path / 'a.pth', {'mean': kind([0.5, 0.5, 0.5])})


@pytest.mark.parametrize('in_file', [True, False])
def test_load_refuses_a_normalization_for_other_channels(tmp_path, in_file):
    given = {'mean': [0.5] * 3, 'std': [0.5] * 3}
    contents = {'params': define_diracnet(10, 0.5, 'CIFAR10', in_channels=1)[1]}
    if in_file:
        contents['args'] = {'dataset': 'Folder', 'image_size': 32, **given}
    torch.save(contents, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='mean has 3 values: expected 1, one for each input'):
        diracnets.load(tmp_path / 'a.pth', {} if in_file else given)


def test_load_finds_parameters_with_a_prefix_in_safetensors(params, tmp_path):
    save_file(prefixed('module.', params), tmp_path / 'a.safetensors')
    assert diracnets.load_params(tmp_path / 'a.safetensors').keys() == params.keys()


@pytest.mark.parametrize('name', diracnets.list_models())
def test_names_of_no_architecture_have_a_common_prefix(name):
    with torch.device('meta'):
        model = diracnets.create_model(name)
        assert common_prefix(model.state_dict()) == ''
        assert common_prefix(diracnets.fold(model).state_dict()) == ''


@pytest.mark.parametrize(('contents', 'names'), [
    ({'epoch': 3, 'weights': {'conv': torch.ones(2)}, 'loss': torch.ones(())},
     ['epoch', 'weights', 'loss']),
    ({'state_dict': {'extra': 1, 'a' * 9000: 2}}, ['extra', 'aaaa']),
    ({f'key{i}': i for i in range(50)}, ['key0', 'key11', '38 more']),
    ({'model': {'net.conv': torch.ones(2, 2, 3, 3), 'loss.weight': torch.ones(10)}},
     ['net.conv', 'loss.weight']),
])
def test_load_error_lists_the_keys_when_there_are_no_parameters(tmp_path, contents, names):
    torch.save(contents, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='expected') as caught:
        diracnets.load(tmp_path / 'a.pt')
    assert str(caught.value).startswith(f'{tmp_path}/a.pt: ')
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert all(name in str(caught.value) for name in names)


def test_load_refuses_values_inside_a_namespace_that_are_nested_too_deep(params, tmp_path):
    value = []
    for _ in range(40):
        value = [value, value]
    torch.save({'params': params, 'args': argparse.Namespace(value=value)}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='values'):
        diracnets.load(tmp_path / 'a.pt')


def test_load_keeps_the_types_that_torch_load_allows(params, tmp_path):
    torch.save({'state_dict': params, 'args': argparse.Namespace(lr=0.1)}, tmp_path / 'a.pt')
    with torch.serialization.safe_globals([argparse.Namespace]):
        diracnets.load(tmp_path / 'a.pt')
        assert torch.load(tmp_path / 'a.pt', weights_only=True)['args'].lr == 0.1
    diracnets.load(tmp_path / 'a.pt')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pt', weights_only=True)


def test_hub_mixin_of_the_docs_stores_sizes_and_parameters(tmp_path, monkeypatch):
    pytest.importorskip('huggingface_hub')
    monkeypatch.chdir(tmp_path)
    (code,) = (code for _, code in blocks('docs/networks.md') if 'PyTorchModelHubMixin' in code)
    *definitions, folded, unfolded = code.strip().splitlines()
    names = {'__name__': 'page'}
    monkeypatch.setitem(sys.modules, 'page', types.ModuleType('page'))
    torch.manual_seed(0)
    exec('\n'.join(definitions), names)
    torch.manual_seed(1)
    exec(f'{folded}\n{unfolded}', names)
    inputs = torch.randn(2, 3, 32, 32)
    for name, size in (('folded', 32), ('unfolded', 16)):
        model, loaded = names[name].eval(), diracnets.load(tmp_path / name / 'model.safetensors')
        assert loaded.title == 'DiracNet-10-0.5'
        assert loaded.num_classes == 7
        torch.testing.assert_close(loaded.model(inputs), model(inputs))
        assert model(inputs[..., :size, :size]).shape == (2, 7)
    torch.manual_seed(0)
    expected = names['HubDiracNet'](10, 0.5, 'CIFAR10', num_classes=7).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in names['folded'].state_dict().items())
