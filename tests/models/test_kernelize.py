"""Conversion of built models to kernel normalization."""
import copy
import runpy
import warnings
from pathlib import Path

import mmseg
import pytest
import torch
from converted import options_for, write_configs
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from program import ROOT
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from toy_cityscapes import generate

import mmseg_kn.baselines  # noqa: F401
from mmseg_kn import KernelNorm2d, KNConv2d, conversion_table, kernelize
from mmseg_kn.models.layers import KernelNormNd

MIM = Path(mmseg.__file__).parent / '.mim/configs'
CAMVID = ROOT / 'configs/deeplabv3'
SIZE = (64, 128)


@pytest.fixture(autouse=True)
def scope():
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def without_files(cfg):
    """Nothing is downloaded."""
    if isinstance(cfg, dict):
        if isinstance(cfg.get('init_cfg'), dict) and cfg['init_cfg']['type'] == 'Pretrained':
            cfg['init_cfg'] = None
        if 'pretrained' in cfg:
            cfg['pretrained'] = None
    for part in cfg.values() if isinstance(cfg, dict) else cfg:
        if isinstance(part, (dict, list)):
            without_files(part)
    return cfg


def model_of(path):
    return without_files(Config.fromfile(path).model)


def batch(n=1, size=SIZE, classes=2):
    samples = []
    for _ in range(n):
        label = torch.randint(0, classes, (1, *size))
        sample = SegDataSample(gt_sem_seg=PixelData(data=label),
                               gt_edge_map=PixelData(data=(label == 1).float()))
        sample.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size))
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in samples],
                data_samples=samples)


def small(depth=18):
    cfg = model_of(CAMVID / 'deeplabv3_r18-d8_1xb2-400_camvid-160x160.py')
    cfg.data_preprocessor.size = SIZE
    return cfg


def randomize(model):
    """Statistics, scales and shifts as after a training."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (_BatchNorm, mmseg_kn.baselines.NoNorm)):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    return model


# What becomes of the layers


def block():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def test_convolution_and_norm_become_one_layer():
    model = randomize(nn.Sequential(
        nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), nn.BatchNorm2d(8)).double())
    model.eval()
    conv, norm = model
    old = conv.weight.detach().clone()
    assert kernelize(model, dropout_p=0.1, eps=1e-3) is model
    new = model[0]
    assert isinstance(new, KNConv2d) and type(model[1]) is nn.Identity and not new.training
    assert new.weight is conv.weight and new.weight.dtype == torch.float64
    for name in ('stride', 'padding', 'dilation', 'groups', 'kernel_size'):
        assert getattr(new, name) == getattr(conv, name)
    assert new.dropout_p == 0.1 and new.eps == 1e-3
    torch.testing.assert_close(new.weight, old * norm.weight.view(-1, 1, 1, 1))
    torch.testing.assert_close(new.bias, norm.bias)
    assert list(model.state_dict()) == ['0.weight', '0.bias']


def test_table():
    model = kernelize(nn.Sequential(*block(), nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4),
                                    nn.Conv2d(4, 2, 1)))
    rows = [line.split() for line in conversion_table(model).splitlines()]
    assert rows[0] == ['layer', 'was', 'became']
    assert rows[1] == ['1', 'BatchNorm2d', 'KNConv2d', '0']
    assert rows[2] == ['4', 'BatchNorm2d', 'KernelNorm2d']
    assert [row[:2] for row in rows[3:]] == [['3', 'ConvTranspose2d'], ['5', 'Conv2d']]
    assert 'no normalization' in ' '.join(rows[4])
    assert isinstance(model[4], KernelNorm2d)
    with pytest.raises(ValueError, match='call mmseg_kn.kernelize'):
        conversion_table(nn.Conv2d(3, 3, 1))


class Crossed(nn.Module):
    """Children do not work in their order; one norm works on what an activation overwrote."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm2, self.norm1, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.conv3, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.relu(self.conv3(x)))


def test_matches_by_what_runs():
    model = kernelize(Crossed())
    assert [row.became for row in model.conversion] == [
        'KNConv2d conv2', 'KNConv2d conv1', 'KernelNorm2d',
        'as it was, no normalization behind it']
    assert type(model.conv3) is nn.Conv2d  # the ReLU in place stands between


class Levels(nn.Module):
    """Heads over two levels: shared convolutions, norms of their own; and the other way round."""

    def __init__(self, forked=False):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 4, 1), nn.ModuleList(
            nn.BatchNorm2d(4) for _ in range(2))
        self.convs, self.norm = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2)), \
            nn.BatchNorm2d(4)
        self.forked = forked

    def forward(self, x):
        if self.forked:
            x = self.conv(x)
            return self.norms[0](x) + self.norms[1](x) + self.norm(self.convs[0](x))
        return [self.norm(conv(norm(self.conv(x)))) for conv, norm in
                zip(self.convs, self.norms, strict=True)]


def test_shared_layers():
    model = kernelize(Levels())
    assert isinstance(model.conv, KNConv2d) and all(isinstance(c, KNConv2d) for c in model.convs)
    assert model.conversion[2].became == 'KNConv2d convs.0, KNConv2d convs.1'
    model = Levels()
    nn.init.ones_(model.norms[0].bias)
    with pytest.warns(UserWarning, match='conv is shared by normalizations of different scale'):
        kernelize(model)
    model = kernelize(Levels(forked=True))  # an output of which two norms make different things
    assert type(model.conv) is nn.Conv2d and isinstance(model.norms[1], KernelNorm2d)


def test_other_convolutions_stay():
    for conv in (nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'),
                 nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
                 nn.ConvTranspose2d(3, 4, 2)):
        model = kernelize(nn.Sequential(conv, nn.BatchNorm2d(4)))
        assert model[0] is conv and isinstance(model[1], KernelNorm2d)


def test_vectors_and_sequences():
    model = kernelize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), example=torch.zeros(2, 5))
    assert isinstance(model[1], KernelNormNd)
    y = model.eval()(torch.randn(3, 5))
    torch.testing.assert_close(y.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    model = kernelize(nn.Sequential(nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6)),
                      example=torch.zeros(2, 5, 7)).eval()
    y = model(torch.randn(3, 5, 7))
    assert y.shape == (3, 6, 7)
    torch.testing.assert_close(y.mean(1), torch.zeros(3, 7), atol=1e-5, rtol=0)


def test_other_norms_on_request():
    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Flatten(2),
                             nn.Linear(16, 6), nn.LayerNorm(6)).eval()
    example = torch.zeros(1, 3, 4, 4)
    model = kernelize(net(), example=example)
    assert isinstance(model[1], nn.GroupNorm) and not isinstance(model[0], KNConv2d)
    plain = net()
    model = kernelize(copy.deepcopy(plain), norms=('GN', 'LN'), example=example, dropout_p=0)
    assert isinstance(model[0], KNConv2d) and isinstance(model[4], KernelNormNd)
    x = torch.randn(1, 8, 6)
    torch.testing.assert_close(model[4](x), plain[4](x))  # LayerNorm's definition
    with pytest.raises(ValueError, match='norms must be a tuple of'):
        kernelize(net(), norms='BN')
    with pytest.raises(ValueError, match='must normalize one dimension'):
        kernelize(nn.Sequential(nn.LayerNorm((3, 224, 224))), norms=['LN'])


class NormAct(nn.BatchNorm2d):
    """As timm has it: the activation is inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


def test_an_activation_inside_the_norm_stays():
    model = kernelize(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)))
    assert (model(torch.randn(2, 3, 5, 5)) >= 0).all() and isinstance(model[0], KNConv2d)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.lonely = block(), nn.BatchNorm2d(4)
        self.spare = block()

    def forward(self, x):
        return self.used(x)


def test_what_no_example_runs():
    with pytest.raises(ValueError, match=r'got none that runs lonely \(BatchNorm2d\); give '
                       r'kernelize\(model, example=...\) an input'):
        kernelize(Unused())
    model = Unused()
    del model.lonely
    assert isinstance(kernelize(model).spare[0], KNConv2d)  # by the order of children
    model = kernelize(Unused(), example=lambda model: (
        model(torch.zeros(1, 3, 4, 4)), model.lonely(torch.zeros(1, 4, 4, 4))))
    assert isinstance(model.lonely, KernelNorm2d)
    with pytest.raises(ValueError, match='running the model failed: RuntimeError'):
        kernelize(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))


def test_order_in_a_conv_module_that_is_not_run():
    model = nn.Module()
    model.head = ConvModule(3, 3, 1, norm_cfg=dict(type='BN'), order=('norm', 'act', 'conv'))
    model.tail = ConvModule(3, 4, 1, norm_cfg=dict(type='BN'))
    kernelize(model)
    assert isinstance(model.head.bn, KernelNorm2d) and isinstance(model.tail.conv, KNConv2d)


def test_state_and_random_numbers_stay():
    model = nn.Sequential(*block(), nn.Dropout(), nn.Flatten(1), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 224, 224))
    model[0].eval()
    model.register_buffer('count', torch.zeros(1))
    model.register_forward_hook(lambda module, *args: module.count.add_(1) and None)
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    kernelize(model)
    assert torch.equal(before, torch.get_rng_state())
    assert model.count == 0 and modes == [m.training for m in model.modules()]


def test_in_place_activations_stay_in_place():
    x = torch.randn(2, 3, 8, 8)
    grads = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8),
                              nn.ReLU(inplace), nn.BatchNorm2d(8), nn.ReLU(inplace),
                              nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(inplace))
        kernelize(model)(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# mmseg's models


def build(cfg, **kwargs):
    return MODELS.build(dict(type='KernelNormalized', model=cfg, **kwargs))


def test_equals_the_twin_that_is_built_by_hand():
    cfg = model_of(CAMVID / 'deeplabv3_r18-kn-d8_1xb2-400_camvid-160x160.py')
    cfg.data_preprocessor = small().data_preprocessor
    twin, mine = randomize(MODELS.build(cfg)), build(small())
    weights = {name.replace('nonorm', 'bn'): v for name, v in twin.state_dict().items()}
    # Its scales and shifts look like a BatchNorm's, and are folded as those.
    for name, module in twin.named_modules():
        if isinstance(module, mmseg_kn.baselines.NoNorm):
            name = name.replace('nonorm', 'bn')
            weights[f'{name}.running_var'] = torch.ones(module.num_features)
    with pytest.warns(UserWarning, match='the checkpoint is that of a BatchNorm network'):
        found = mine.load_state_dict(weights, strict=False)
    assert not found.missing_keys and len(found.unexpected_keys) == 3 * 22
    data = batch(2, classes=11)
    losses = []
    for model in (twin, mine):
        torch.manual_seed(0)
        model.train()
        losses.append(model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss'))
        model.eval()
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        a, b = (model.encode_decode(images, [dict(img_shape=SIZE)] * 2) for model in (twin, mine))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


def test_initial_weights():
    model = build(small())
    weight = model.backbone.layer2[1].conv1.weight.detach().clone()
    model.init_weights()
    stage = model.backbone.layer2
    for blocks in (model.backbone.layer1, stage):
        for part in blocks:  # zero_init_residual
            assert not part.conv2.weight.any() and part.conv1.weight.any()
    assert not torch.equal(weight, stage[1].conv1.weight)
    assert stage[1].conv1.weight.std().item() == pytest.approx((2 / (128 * 9))**0.5, rel=0.05)
    cfg = small()
    cfg.backbone.zero_init_residual = False
    model = build(cfg)
    model.init_weights()
    assert model.backbone.layer1[0].conv2.weight.any()


def test_pretrained_batchnorm_weights(tmp_path):
    backbone = randomize(MODELS.build(small())).backbone
    torch.save(backbone.state_dict(), tmp_path / 'r18.pth')
    cfg = small()
    cfg.pretrained = str(tmp_path / 'r18.pth')
    model = build(cfg)
    with pytest.warns(UserWarning, match='the checkpoint is that of a BatchNorm network'):
        model.init_weights()
    block, old = model.backbone.layer1[0], backbone.layer1[0]
    torch.testing.assert_close(block.conv2.bias, old.bn2.bias)
    torch.testing.assert_close(block.conv2.weight,
                               old.conv2.weight * old.bn2.weight.view(-1, 1, 1, 1))
    with pytest.raises(RuntimeError, match='Unexpected key'):
        model.backbone.load_state_dict(backbone.state_dict())


def test_state_dict_comes_back():
    model, other = build(small()), build(small())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        other.load_state_dict(copy.deepcopy(model).state_dict())
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(model.eval().extract_feat(x)[-1], other.eval().extract_feat(x)[-1])


def test_samples_do_not_meet():
    """By the probe of private training, in training mode, and without opacus's BatchNorm check."""
    pytest.importorskip('opacus')
    from private import wrapper_for

    from mmseg_kn.privacy.probe import check_batch
    model = build(small())
    check_batch(model, wrapper_for(model, batch_size=2), batch(2, classes=11))


FAMILIES = {
    'bisenetv2': 'bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    'ddrnet': 'ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    'erfnet': 'erfnet_fcn_4xb4-160k_cityscapes-512x1024.py',
    'fastscnn': 'fast_scnn_8xb4-160k_cityscapes-512x1024.py',
    'pidnet': 'pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    'segformer': 'segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    'stdc': 'stdc1_4xb12-80k_cityscapes-512x1024.py',
}


@pytest.mark.parametrize('family', FAMILIES)
def test_families_train_at_batch_1(family):
    model = build(model_of(MIM / family / FAMILIES[family]))
    model.init_weights()
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    model.train()
    data = batch()
    data = dict(inputs=data['inputs'][0][None].float() / 255, data_samples=data['data_samples'])
    losses = model(**data, mode='loss')
    sum(value.sum() for name, value in losses.items() if 'loss' in name).backward()
    for name, parameter in model.named_parameters():
        if 'fusion_kernel' not in name:  # which STDC never trains
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # the same random numbers, another neighbour
    features = []
    images = torch.rand(3, 3, *SIZE)
    for neighbour in (1, 2):
        torch.manual_seed(0)
        with torch.no_grad():
            features.append(model.extract_feat(images[[0, neighbour]]))
    for a, b in zip(*[f if isinstance(f, (tuple, list)) else [f] for f in features], strict=True):
        torch.testing.assert_close(a[0], b[0])


def test_settings_beside_the_model():
    cfg = small()
    options = dict(dropout_p=0.2, pretrained=None, train_cfg=None,
                   data_preprocessor=dict(type='SegDataPreProcessor', mean=[9], std=[9]))
    model = build(cfg, **options)
    assert model.backbone.layer1[0].conv1.dropout_p == 0.2
    assert model.data_preprocessor.mean.tolist() != [9] and model.train_cfg is None
    del cfg['data_preprocessor']
    assert build(cfg, **options).data_preprocessor.mean.tolist() == [[[9.]]]


# A whole training


def test_train_resume_and_test(tmp_path, monkeypatch):
    """By the tools, in this process: what a converted network adds is not how they start."""
    generate(tmp_path / 'scenes', train=2, val=1, size=SIZE)
    write_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.syspath_prepend(ROOT / 'tools')

    def call(tool, *args):
        monkeypatch.setattr('sys.argv', [tool, *args, '--work-dir', tool, *options_for(
            tmp_path / 'scenes', converted=True), f'train_cfg.max_iters={iterations}'])
        runpy.run_path(str(ROOT / f'tools/{tool}.py'), run_name='__main__')
        return max(Path(tool).glob('*/*.log')).read_text()

    iterations = 2
    log = call('train', 'kn.py')
    assert 'Iter(train) [2/2]' in log and 'partly kernel-normalized' not in log
    iterations = 4
    log = call('train', 'kn.py', '--resume')
    assert 'Iter(train) [3/4]' in log and 'Iter(train) [1/4]' not in log and 'mIoU' in log
    log = call('test', 'kn.py', 'train/iter_4.pth', '--tta')
    assert 'mIoU' in log and 'unexpected key' not in log and 'missing key' not in log
    torch.save(MODELS.build(Config.fromfile('bn.py').model).state_dict(), 'bn.pth')
    with pytest.raises(ValueError, match='convert it by tools/model_converters/batchnorm2kernel'):
        call('test', 'kn.py', 'bn.pth')
    from mmseg.apis import MMSegInferencer, inference_model, init_model
    config, checkpoint = str(tmp_path / 'kn.py'), str(tmp_path / 'train/iter_4.pth')
    image = str(next(tmp_path.rglob('*_leftImg8bit.png')))
    model = init_model(config, checkpoint, device='cpu')
    assert any(isinstance(module, KNConv2d) for module in model.modules())
    prediction = inference_model(model, image).pred_sem_seg.data[0]
    found = MMSegInferencer(config, checkpoint, device='cpu')(image)['predictions']
    assert (prediction.numpy() == found).all()
