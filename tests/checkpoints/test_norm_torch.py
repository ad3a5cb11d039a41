"""Conversion of the authors' checkpoints: all of a file, or a clear error and no file."""
import argparse
import hashlib
import os

import golden
import pytest
import torch
from mmseg.models.backbones import ResNet
from program import ROOT, execute

from mmseg_kn import KNResNet, KNResNetClassifier, __version__
from mmseg_kn.checkpoints.norm_torch import convert_file, convert_norm_torch, norm_torch_depth

TOOL = ROOT / 'tools/model_converters/norm_torch2mmseg.py'


@pytest.fixture(scope='module')
def weights():
    return golden.norm_torch_weights(18, num_classes=10)


def save(path, weights, **more):
    """A checkpoint as the authors' training script writes it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    torch.save(dict(model=weights, optimizer=optimizer.state_dict(),
                    lr_scheduler=scheduler.state_dict(), epoch=99,
                    args=argparse.Namespace(lr=0.1, device='cuda', resume=''), **more), path)
    return path


def refused(path, match, **options):
    """Conversion fails so, and leaves nothing behind."""
    out = path.parent / 'out' / 'converted.pth'
    with pytest.raises(ValueError, match=match):
        convert_file(path, out, **options)
    assert not out.parent.exists()


@pytest.mark.parametrize('depth', golden.NORM_TORCH)
def test_every_depth(depth):
    weights = golden.norm_torch_weights(depth)
    assert norm_torch_depth(weights) == depth
    backbone = convert_norm_torch(weights)
    KNResNet(depth).load_state_dict(backbone)
    whole = convert_norm_torch(weights, classifier=True)
    KNResNetClassifier(depth).load_state_dict(whole)
    # each of their tensors is used, and only once
    assert sorted(v.double().sum().item() for v in whole.values()) == sorted(
        v.double().sum().item() for v in weights.values())
    assert all(torch.equal(value, whole[f'backbone.{key}']) for key, value in backbone.items())


def test_file(tmp_path, weights):
    source = save(tmp_path / 'knresnet18.pth', weights)
    path, depth = convert_file(source, tmp_path / 'new' / 'knresnet18_in1k.pth')
    data = path.read_bytes()
    assert depth == 18
    assert path.name == f'knresnet18_in1k-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['meta'] == dict(
        source_sha256=hashlib.sha256(source.read_bytes()).hexdigest(), depth=18,
        mmseg_kn_version=__version__)
    assert convert_file(source, tmp_path / 'new' / 'knresnet18_in1k.pth')[0] == path

    net = KNResNet(18, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    assert torch.equal(net.stem.weight, weights['block0.0.weight'])
    assert torch.equal(net.layer4[1].conv2.bias, weights['res_block6.conv2.bias'])


def test_file_of_a_classifier(tmp_path, weights):
    path, _ = convert_file(save(tmp_path / 'src.pth', weights), tmp_path / 'dst.pth',
                           classifier=True)
    net = KNResNetClassifier(18, num_classes=10)
    net.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    assert torch.equal(net.head['fc'].weight, weights['fc.weight'])
    assert torch.equal(net.backbone.tail.weight, weights['conv_block_f.conv.weight'])


def test_a_bare_state_dict(tmp_path, weights):
    torch.save(weights, tmp_path / 'src.pth')
    path, depth = convert_file(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert depth == 18 and path.exists()


def test_low_resolution(tmp_path):
    weights = golden.norm_torch_weights(18, num_classes=100, stem_kernel=3)
    net = KNResNetClassifier(18, num_classes=100, low_resolution=True)
    net.load_state_dict(convert_norm_torch(weights, classifier=True))
    refused(save(tmp_path / 'src.pth', weights), '3x3 stem does not fit KNResNet')


def test_what_their_script_for_cifar_saves(tmp_path):
    weights = golden.norm_torch_weights(18, num_classes=100, stem_kernel=3)
    torch.save(dict(model_state_dict=weights, last_epoch=150, optimizer_state_dict={}),
               tmp_path / 'src.pth')
    path, _ = convert_file(tmp_path / 'src.pth', tmp_path / 'dst.pth', classifier=True)
    net = KNResNetClassifier(18, num_classes=100, low_resolution=True)
    net.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    assert torch.equal(net.head['fc'].weight, weights['fc.weight'])


def test_mish(tmp_path, weights):
    """Their private networks differ in the activation alone, which no name of a weight tells."""
    source = save(tmp_path / 'src.pth', weights)
    plain, _ = convert_file(source, tmp_path / 'plain.pth')
    path, _ = convert_file(source, tmp_path / 'dst.pth', activation='Mish')
    assert torch.load(path, weights_only=True)['meta']['activation'] == 'mish'

    def start(activation, path):
        KNResNet(18, activation=activation, init_cfg=dict(
            type='Pretrained', checkpoint=str(path))).init_weights()

    start('mish', path)
    with pytest.raises(ValueError, match="was trained with activation='mish'"):
        start('relu', path)
    with pytest.raises(ValueError, match='convert it with --activation mish if'):
        start('mish', plain)
    refused(source, 'activation must name one of torch.nn', activation='swish')
    weights = {name: torch.zeros(1).expand(shape)
               for name, shape in golden.convnext_shapes().items()}
    torch.save(weights, source)
    refused(source, "of a ConvNeXt, whose activations are fixed, got activation='mish'",
            activation='mish')


def changed(weights, **changes):
    weights = dict(weights)
    for key, value in changes.items():
        key = key.replace('__', '.')
        if value is None:
            del weights[key]
        else:
            weights[key] = value
    return weights


def test_the_prefix_of_a_data_parallel_model(weights):
    wrapped = {f'module.{key}': value for key, value in weights.items()}
    assert convert_norm_torch(wrapped).keys() == convert_norm_torch(weights).keys()


@pytest.mark.parametrize('changes, message', [
    (dict(res_block3__conv2__bias=None), 'knresnet18, but have missing keys: '
     'res_block3.conv2.bias$'),
    (dict(res_block7__conv1__bias=torch.zeros(3)), 'but have unknown keys: '
     'res_block7.conv1.bias$'),
    (dict(fc__weight=None, head__weight=torch.zeros(1)), 'missing keys: fc.weight; '
     'unknown keys: head.weight$'),
    (dict(trans_block1__conv__weight=torch.zeros(256, 64, 3, 3)), 'trans_block1.conv.weight of '
     r'knresnet18 must have the shape \(256, 64, 2, 2\), got \(256, 64, 3, 3\)'),
    (dict(fc__bias=torch.zeros(11)), r'fc.bias of knresnet18 must have the shape \(10,\), got'),
    (dict(fc__weight=torch.tensor(1.)), 'fc.weight of knresnet18 must have the shape'),
    (dict(block0__0__weight=torch.zeros(64)), 'block0.0.weight of knresnet18 must have the shape'),
    (dict(fc__bias=3), 'fc.bias must be a dense tensor of finite floating-point numbers'),
    (dict(fc__bias=torch.zeros(10).to_sparse()), 'fc.bias must be a dense tensor'),
    (dict(fc__bias=torch.zeros(10, dtype=torch.int32)), 'fc.bias must be a dense tensor'),
    (dict(fc__bias=torch.zeros(10, device='meta')), 'fc.bias must be a dense tensor'),
    (dict(fc__bias=torch.full((10,), torch.nan)), 'fc.bias must be a dense tensor'),
])
def test_other_keys_and_shapes(tmp_path, weights, changes, message):
    refused(save(tmp_path / 'src.pth', changed(weights, **changes)), message)


def test_other_networks(tmp_path, weights):
    source = tmp_path / 'src.pth'
    refused(save(source, ResNet(18).state_dict()), 'running statistics.* BatchNorm network')
    refused(save(source, KNResNet(18).state_dict()), 'KNResNet of mmseg_kn already')
    refused(save(source, dict(weight=torch.zeros(1))), 'no key block0.0.weight among 1: weight;')
    refused(save(source, {}), 'no key block0.0.weight among 0')
    refused(save(source, [1]), "state dict under 'model', got list")
    torch.save([1], source)
    refused(source, "state dict under 'model', got list")
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in KNResNet(18).state_dict().items()}),
               source)
    refused(source, 'KNResNet of mmseg_kn already')


def test_damaged_and_dangerous_files(tmp_path, weights):
    source = save(tmp_path / 'src.pth', weights)
    data = source.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 100):
        source.write_bytes(data[:size])
        refused(source, 'is damaged or not a checkpoint')

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    refused(save(source, weights, extra=Runs()), 'was refused: .*mkdir')
    assert not (tmp_path / 'ran').exists()
    # Namespace is allowed here, and here only.
    save(source, weights)
    with pytest.raises(Exception, match='argparse.Namespace'):
        torch.load(source, weights_only=True)


def test_a_view_is_saved_without_the_rest(tmp_path, weights):
    big = torch.zeros(10_000_000)
    path, _ = convert_file(save(tmp_path / 'src.pth', changed(weights, fc__bias=big[:10])),
                           tmp_path / 'dst.pth')
    used = sum(v.numel() * 4 for v in convert_norm_torch(weights).values())
    assert path.stat().st_size < used + 100_000


def test_a_target_without_pth(tmp_path, weights):
    with pytest.raises(ValueError, match='ends in .pth, got'):
        convert_file(save(tmp_path / 'src.pth', weights), tmp_path / 'folder')


def test_a_full_disk_leaves_nothing(tmp_path, weights, monkeypatch):
    source = save(tmp_path / 'src.pth', weights)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='No space left'):
        convert_file(source, tmp_path / 'out' / 'dst.pth')
    assert not list((tmp_path / 'out').iterdir())


def test_an_unconverted_checkpoint_names_the_tool(tmp_path, weights):
    source = tmp_path / 'src.pth'
    net = KNResNet(18, init_cfg=dict(type='Pretrained', checkpoint=str(source)))
    for write in (lambda: save(source, weights), lambda: torch.save(weights, source),
                  lambda: torch.save(dict(model=weights), source)):
        write()
        with pytest.raises(ValueError, match='norm_torch2mmseg.py converts'):
            net.init_weights()


def test_tool(tmp_path, weights):
    source = save(tmp_path / 'src.pth', weights)

    log = execute(TOOL, source, 'dst.pth', '--activation', 'mish', cwd=tmp_path)
    written, = tmp_path.glob('dst-*.pth')
    assert f'KNResNet-18; written to {written.name}' in log
    assert "depth=18, activation='mish', init_cfg=dict(type='Pretrained'" in log
    assert f"type='Pretrained', checkpoint='{written.name}'" in log
    log = execute(TOOL, tmp_path / 'absent.pth', 'dst.pth', cwd=tmp_path, check=False)
    assert 'absent.pth can not be found' in log.splitlines()[-1] and 'Traceback' not in log
