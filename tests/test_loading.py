"""Loading: checkpoints of other training scripts, whose parameters have other keys and names."""

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import diracnets
from diracnet import Network, define_diracnet
from diracnets.checkpoint import common_prefix


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
    model = AveragedModel(Network(define_diracnet(10, 0.25, 'CIFAR10')[0], params))
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
    'a common script': lambda params: {
        'net': prefixed('module.', params), 'acc': 91.2, 'epoch': 180},
    'torchvision references': lambda params: {
        'model': prefixed('', params), 'optimizer': {}, 'lr_scheduler': {}, 'epoch': 9,
        'model_ema': averaged(params), 'args': {'lr': 0.1}},
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
