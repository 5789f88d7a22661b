"""The functional and the folded DiracNet: parameters, logits, invalid arguments, downloads."""

import copy
import functools
import hashlib
import http.server
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diracnet
from diracnet import DiracNet, define_diracnet, diracnet18, init_params, make_topology
from diracnets.folding import fold
from diracnets.network import Network
from pages import text_of
from reference import slow_w_hat

ROOT = Path(diracnet.__file__).parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(depth, width, dataset, num_classes=None, size=32, steps=3, in_channels=3):
    """Returns (f, params) after a few steps of SGD, with running statistics of real batches."""
    f, params = define_diracnet(depth, width, dataset, num_classes, in_channels=in_channels)
    classes = len(params['fc.bias'])
    optimizer = torch.optim.SGD([p for p in params.values() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = f(torch.randn(16, in_channels, size, size), params, mode=True)
        F.cross_entropy(logits, torch.randint(classes, (16,))).backward()
        optimizer.step()
    return f, {name: tensor.detach() for name, tensor in params.items()}


@pytest.mark.parametrize(('depth', 'width', 'dataset', 'published'), [
    (16, 1, 'CIFAR10', 173_402), (22, 1, 'CIFAR10', 271_066), (28, 1, 'CIFAR10', 368_730),
    (34, 2, 'CIFAR10', 1_854_378), (28, 5, 'CIFAR10', 9_124_250), (28, 10, 'CIFAR10', 36_450_090),
    (28, 1, 'CIFAR100', 374_580), (18, 1, 'ImageNet', 11_523_368), (34, 1, 'ImageNet', 21_638_952),
])
def test_define_diracnet_has_published_parameter_count(depth, width, dataset, published):
    with torch.device('meta'):
        _, params = define_diracnet(depth, width, dataset)
    assert sum(p.numel() for p in params.values() if p.requires_grad) == published


def test_init_params_names_and_distributions():
    _, params = define_diracnet(10, 4, 'CIFAR10', num_classes=7)
    bn = ['weight', 'bias', 'running_mean', 'running_var']
    expected = ['conv', *(f'bn.{leaf}' for leaf in bn)]
    for block in (f'group{g}.block{b}' for g in range(3) for b in range(2)):
        expected += [f'{block}.{leaf}' for leaf in ('conv', 'alpha', 'beta')]
        expected += [f'{block}.bn.{leaf}' for leaf in bn]
    assert list(params) == [*expected, 'fc.weight', 'fc.bias']
    for name, tensor in params.items():
        assert tensor.is_leaf
        assert tensor.requires_grad == ('running' not in name), name
    params = {name: tensor.detach() for name, tensor in params.items()}
    # Kaiming, fan-in: variance 2 / fan-in
    assert params['group2.block1.conv'].var().item() == pytest.approx(2 / (256 * 9), rel=0.02)
    assert params['fc.weight'].var().item() == pytest.approx(2 / 256, rel=0.1)
    gammas = params['group2.block1.bn.weight']
    assert 0 <= gammas.min() < 0.05 < 0.95 < gammas.max() < 1
    for leaf, value in [('alpha', 1), ('beta', 0.1), ('bn.bias', 0), ('bn.running_var', 1)]:
        tensor = params[f'group0.block0.{leaf}']
        assert tensor.tolist() == pytest.approx([value] * 64)
    assert params['fc.bias'].tolist() == [0] * 7


def modular_network():
    """Returns the DiracNet-28-1 for CIFAR-10 that the docs build from DiracConv2d modules."""
    text = text_of('docs/networks.md')
    code = re.search(r'```python\n(from diracconv import DiracConv2d\n.*?)```', text, re.S).group(1)
    names = {}
    exec(code, names)
    return names['network']


def test_function_equals_modules_of_docs():
    f, params = trained(28, 1, 'CIFAR10', steps=1)
    network = modular_network()
    state = {k: v for k, v in network.state_dict().items() if not k.endswith('batches_tracked')}
    # both list the same tensors in the same order, under names of their own
    assert [v.shape for v in state.values()] == [v.shape for v in params.values()]
    state = dict(zip(state, (v.double() for v in params.values())))
    network.double().load_state_dict(state, strict=False)
    params = {name: tensor.double() for name, tensor in params.items()}
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for mode in (True, False):  # training first: it moves the running statistics of both
        network.train(mode)
        torch.testing.assert_close(f(inputs, params, mode), network(inputs), rtol=1e-9, atol=1e-9)
    state = [v for k, v in network.state_dict().items() if not k.endswith('batches_tracked')]
    for ours, theirs in zip(params.values(), state):
        torch.testing.assert_close(ours, theirs)


def test_function_equals_reference_when_dataset_is_imagenet():
    f, params = trained(18, 0.125, 'ImageNet', num_classes=5, size=64, steps=1)
    params = {name: tensor.double() for name, tensor in params.items()}
    inputs = torch.randn(2, 3, 96, 96, dtype=torch.float64)

    def bn(x, name):
        mean, var, gamma, bias = (
            params[f'{name}.{leaf}'].view(-1, 1, 1)
            for leaf in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / (var + 1e-5).sqrt() * gamma + bias

    x = bn(F.conv2d(inputs, params['conv'], stride=2, padding=3), 'bn')
    x = F.max_pool2d(x, 3, 2, 1)
    for g in range(4):
        for b in range(4):
            p = {leaf: params[f'group{g}.block{b}.{leaf}'] for leaf in ('conv', 'alpha', 'beta')}
            w_hat = slow_w_hat(p['conv'], p['alpha'], p['beta'], 1)
            x = bn(F.conv2d(x.clamp(min=0), w_hat, padding=1), f'group{g}.block{b}.bn')
        x = F.max_pool2d(x, 2) if g < 3 else x.clamp(min=0)
    assert x.shape == (2, 64, 3, 3)
    logits = x.mean((2, 3)) @ params['fc.weight'].T + params['fc.bias']
    torch.testing.assert_close(f(inputs, params, False), logits, rtol=1e-9, atol=1e-9)


def test_function_updates_running_statistics_when_mode_is_true():
    f, params = define_diracnet(10, 1, 'CIFAR10')
    inputs = torch.randn(8, 3, 16, 16)
    before = {name: tensor.detach().clone() for name, tensor in params.items()}
    f(inputs, params, mode=False)
    assert all(torch.equal(before[name], params[name]) for name in params)
    f(inputs, params, mode=True)
    changed = {name for name in params if not torch.equal(before[name], params[name])}
    assert changed == {name for name in params if 'running' in name}
    stem = F.conv2d(inputs, params['conv'], padding=1).detach().double()
    expected = 0.1 * stem.mean((0, 2, 3))  # momentum 0.1, from zero
    torch.testing.assert_close(params['bn.running_mean'].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('size', [4, 7, 20, 32, 48])
def test_function_accepts_square_inputs(size):
    f, params = define_diracnet(10, 0.5, 'CIFAR100')
    assert f(torch.randn(2, 3, size, size), params, mode=False).shape == (2, 100)


@pytest.mark.parametrize(('depth', 'dataset', 'size'), [(10, 'CIFAR10', 16), (18, 'ImageNet', 64)])
@pytest.mark.parametrize('channels', [1, 4])
def test_models_accept_other_numbers_of_channels(depth, dataset, size, channels):
    """Zero filters and images in additional channels do not change the logits."""
    f, params = trained(depth, 0.25, dataset, 5, size, in_channels=channels)
    g, rgb = define_diracnet(depth, 0.25, dataset, 5)
    assert params['conv'].shape[1] == channels
    assert params['conv'].numel() * 3 == rgb['conv'].numel() * channels
    rgb, stem = {**params, 'conv': torch.zeros_like(rgb['conv'])}, torch.zeros_like(params['conv'])
    both = min(channels, 3)
    rgb['conv'][:, :both] = stem[:, :both] = params['conv'][:, :both]
    images = torch.randn(2, 4, size, size)
    expected = g(images[:, :3], rgb, False)
    params['conv'] = stem
    inputs = images[:, :channels]
    torch.testing.assert_close(f(inputs, params, False), expected)
    network = Network(f, params).eval()
    torch.testing.assert_close(network(inputs), expected)
    folded = fold(network)
    assert type(folded) is DiracNet
    torch.testing.assert_close(folded(inputs), expected, rtol=1e-4, atol=1e-5)
    net = DiracNet(depth, 0.25, dataset, 5, channels).eval()
    net.load_state_dict(fold_by_hand(params))
    torch.testing.assert_close(net(inputs), expected, rtol=1e-4, atol=1e-5)
    for names in (params, folded.state_dict()):
        expected = make_topology(depth, 0.25, dataset, 5, channels)
        assert diracnet.Topology.from_params(names) == expected


def test_make_topology_rounds_channels_down():
    assert make_topology(16, 0.3, 'CIFAR10').channels == (4, 9, 19)
    assert make_topology(18, 0.75, 'ImageNet').channels == (48, 96, 192, 384)


def test_make_topology_accepts_numpy_integers():
    topology = make_topology(np.int64(16), 1, 'CIFAR10', np.int32(5))
    assert topology == make_topology(16, 1, 'CIFAR10', 5)
    assert len(init_params(topology)['fc.bias']) == 5


@pytest.mark.parametrize(('arguments', 'message'), [
    ((17, 1, 'CIFAR10'), 'depth 17: .* 6n [+] 4; the nearest are 16 and 22'),
    ((4, 1, 'CIFAR10'), 'the nearest are 10 and 16'),
    ((-8, 1, 'CIFAR10'), 'the nearest are 10 and 16'),
    ((20, 1, 'ImageNet'), 'depth 20: .* 18 or 34'),
    ((16, 0.06, 'CIFAR10'), 'width 0.06: expected at least 0.0625'),
    ((18, 0, 'ImageNet'), 'width 0: expected at least 0.015625'),
    ((16, float('nan'), 'CIFAR10'), 'width nan'),
    ((16, 1, 'MNIST'), "unknown dataset 'MNIST': expected one of CIFAR10, CIFAR100, ImageNet"),
    ((16, 1, 'CIFAR10', 0), 'num_classes 0: expected at least 1'),
    ((16.0, 1, 'CIFAR10'), 'depth 16.0: expected an integer'),
    ((18.0, 1, 'ImageNet'), 'depth 18.0: expected an integer'),
    (('16', 1, 'CIFAR10'), "depth '16': expected an integer"),
    ((16, '1', 'CIFAR10'), "width '1': expected at least 0.0625"),
    ((16, 1, 'CIFAR10', 10.0), 'num_classes 10.0: expected an integer'),
    ((16, 1, 'CIFAR10', 5, 3.0), 'in_channels 3.0: expected an integer'),
    ((16, 1, 'CIFAR10', 5, 0), 'in_channels 0: expected at least 1'),
])
def test_define_diracnet_raises_when_argument_is_invalid(arguments, message):
    with pytest.raises(ValueError, match=message):
        define_diracnet(*arguments)


def test_network_equals_function():
    f, params = define_diracnet(10, 1, 'CIFAR10')
    network = Network(f, params)
    assert sorted(network.state_dict()) == sorted(params)
    trainable = [tensor for tensor in params.values() if tensor.requires_grad]
    assert [p.data_ptr() for p in network.parameters()] == [p.data_ptr() for p in trainable]
    inputs = torch.randn(4, 3, 32, 32)
    assert torch.equal(network.eval()(inputs), f(inputs, params, False))
    assert torch.equal(network.train()(inputs), f(inputs, params, True))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other.eval()(inputs), network.eval()(inputs))


def test_network_compiles_to_one_graph():
    network = Network(*define_diracnet(10, 1, 'CIFAR10')).eval()
    inputs = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(inputs), network(inputs))


# ---------------------------------------------------------------- the folded network


def fold_by_hand(params):
    """Folds batch norm and W_hat in float64: returns the state dict of a DiracNet."""
    params = {name: tensor.double() for name, tensor in params.items()}
    state = {'fc.weight': params['fc.weight'], 'fc.bias': params['fc.bias']}
    for name in [name for name in params if name.endswith('conv')]:
        prefix = name[: -len('conv')]
        gamma, bias, mean, var = (
            params[f'{prefix}bn.{leaf}']
            for leaf in ('weight', 'bias', 'running_mean', 'running_var')
        )
        a = gamma / (var + 1e-5).sqrt()
        w_hat = params[name]
        if prefix:
            w_hat = slow_w_hat(w_hat, params[f'{prefix}alpha'], params[f'{prefix}beta'], 1)
        state[f'features.{name}.weight'] = a.view(-1, 1, 1, 1) * w_hat
        state[f'features.{name}.bias'] = bias - mean * a
    return state


@pytest.mark.parametrize(('depth', 'width', 'dataset', 'size'), [
    (16, 1, 'CIFAR10', 32), (28, 2, 'CIFAR100', 32), (18, 0.25, 'ImageNet', 96),
])
def test_diracnet_equals_function_when_folded(depth, width, dataset, size):
    f, params = trained(depth, width, dataset, size=size)
    net = DiracNet(depth, width, dataset).eval()
    net.load_state_dict(fold_by_hand(params))
    inputs = torch.randn(8, 3, size, size)
    with torch.no_grad():
        expected = f(inputs, params, False)
        assert (net(inputs) - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3  # the logits differ enough for the comparison to be meaningful


def test_diracnet_is_a_chain_of_relu_and_convolutions():
    printed = str(DiracNet(18))
    layers = re.findall(r'(Conv2d\(\d+, \d+|ReLU|MaxPool2d|AdaptiveAvgPool2d|Linear)', printed)
    expected = ['Conv2d(3, 64', 'MaxPool2d']
    cin = 64
    for cout in (64, 128, 256, 512):
        if cout > 64:
            expected.append('MaxPool2d')
        for _ in range(4):
            expected += ['ReLU', f'Conv2d({cin}, {cout}']
            cin = cout
    assert layers == [*expected, 'ReLU', 'AdaptiveAvgPool2d', 'Linear']
    keys = set(DiracNet(18).state_dict())
    assert {'features.conv.weight', 'features.group3.block3.conv.bias', 'fc.bias'} <= keys
    assert len(keys) == 2 * (1 + 16 + 1)


def renamed_by_its_hash(file):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return file.rename(file.with_name(f'diracnet18v2folded-{digest}.pth'))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Serves a folded checkpoint, with its hash in its name, on localhost; empties the cache."""
    (tmp_path / 'www').mkdir()
    file = tmp_path / 'www' / 'folded.pth'
    torch.save(DiracNet(18).state_dict(), file)
    file = renamed_by_its_hash(file)
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / 'www')
    )
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(
        diracnet.MODEL_URLS, 18, f'http://127.0.0.1:{server.server_port}/{file.name}'
    )
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '*')
    yield file, tmp_path / 'hub' / 'checkpoints' / file.name
    server.shutdown()
    server.server_close()


def test_diracnet18_downloads_weights_once(published):
    served, cached = published
    state = torch.load(served)
    net = diracnet18(pretrained=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert cached.exists()
    served.unlink()
    diracnet18(pretrained=True)  # from the cache


@pytest.mark.parametrize('defect', ['missing', 'altered', 'damaged cache'])
def test_diracnet18_raises_when_weights_cannot_be_loaded(published, defect):
    served, cached = published
    if defect == 'missing':
        served.unlink()
    elif defect == 'altered':
        served.write_bytes(served.read_bytes()[:-1] + b'!')
    else:
        cached.parent.mkdir(parents=True)
        cached.write_bytes(b'half a file')
    with pytest.raises(RuntimeError, match='download it to') as error:
        diracnet18(pretrained=True)
    assert diracnet.MODEL_URLS[18] in str(error.value)
    assert str(cached) in str(error.value)


@pytest.mark.parametrize('defect', ['bit', 'nan', 'other network'])
def test_diracnet18_checks_hash_when_weights_are_cached(published, defect):
    """Users may put files into the cache by hand. torch.load reads all of these."""
    served, cached = published
    diracnet18(pretrained=True)
    state = torch.load(cached)
    if defect == 'bit':
        state['fc.bias'].view(torch.int32)[0] ^= 1
    if defect == 'nan':
        state['fc.bias'][0] = torch.nan
    if defect == 'other network':
        state = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(state, cached)
    with pytest.raises(RuntimeError, match='download it to') as error:
        diracnet18(pretrained=True)
    expected = re.search(r'-(\w{8})\.pth', cached.name)[1]
    assert re.search(rf'its SHA-256 begins with \w{{8}}, expected {expected};', str(error.value))
    assert str(error.value).endswith(str(cached))


@pytest.mark.parametrize(('change', 'message'), [
    (lambda state: {**state, 'fc.bias': torch.full((1000,), torch.inf)}, 'fc.bias contains NaN'),
    (lambda state: {**state, 'fc.bias': torch.zeros(10)}, r'fc.bias is \(10,\), expected'),
    (lambda state: [1, 2], 'AttributeError'),
])
def test_diracnet18_raises_when_contents_are_invalid(published, monkeypatch, change, message):
    served, cached = published
    cached.parent.mkdir(parents=True)
    file = cached.parent / 'new'
    torch.save(change(torch.load(served)), file)
    file = renamed_by_its_hash(file)
    monkeypatch.setitem(diracnet.MODEL_URLS, 18, f'http://127.0.0.1:1/{file.name}')
    with pytest.raises(RuntimeError, match=message) as error:
        diracnet18(pretrained=True)
    assert '\n' not in str(error.value)
    assert str(error.value).endswith(f'download it to {file}')


@pytest.mark.parametrize(('arguments', 'new', 'outputs'), [
    ({'num_classes': 5}, ['fc.bias', 'fc.weight'], 5),
    ({'num_classes': 0}, [], 512),
    ({'in_channels': 1}, ['features.conv.bias', 'features.conv.weight'], 1000),
    ({'num_classes': 1000, 'in_channels': 3}, [], 1000),
])
def test_hub_diracnet18_has_a_new_head_or_stem_when_sizes_differ(
    monkeypatch, recwarn, arguments, new, outputs
):
    published = DiracNet(18).state_dict()
    monkeypatch.setattr(diracnet, 'load_published', lambda url, get_params: get_params(published))
    model = torch.hub.load(str(ROOT), 'diracnet18', source='local', pretrained=True, **arguments)
    state = model.state_dict()
    assert sorted(name for name, tensor in state.items()
                  if not torch.equal(tensor, published[name])) == new
    assert published.keys() - state.keys() == (
        {'fc.weight', 'fc.bias'} if arguments.get('num_classes') == 0 else set())
    inputs = torch.randn(2, arguments.get('in_channels', 3), 64, 64)
    assert model(inputs).shape == (2, outputs)
    if outputs == 512:
        assert torch.equal(model(inputs), model.features(inputs).mean(dim=(2, 3)))
    warnings = [str(w.message) for w in recwarn if 'randomly' in str(w.message)]
    assert len(warnings) == ('in_channels' in arguments and arguments['in_channels'] != 3)
    assert diracnet.diracnet34(num_classes=7, in_channels=2).fc.out_features == 7


@pytest.mark.parametrize('num_classes', [-1, 2.5])
def test_diracnet18_raises_when_num_classes_is_invalid(num_classes):
    with pytest.raises(ValueError, match=f'num_classes {num_classes}: expected'):
        diracnet18(num_classes=num_classes)
