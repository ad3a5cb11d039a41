"""The paper's Table 3: the authors' fully convolutional networks and their schedule."""
import re
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from mmseg_script import run
from program import ROOT
from settings import flat
from steps import check_steps
from torch import nn

from mmseg_kn import KNConv2d, KNResNet

FOLDER = ROOT / 'configs/fcn'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*-d32_*.py'))
SIZE = (64, 96)


def load(name):
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return cfg


def test_every_network_has_its_twins():
    assert {re.fullmatch(r'fcn_(.*)-d32_4xb3-484e_cityscapes-512x1024', name)[1]
            for name in CONFIGS} == {network for depth in (18, 34, 50) for network in (
                f'knr{depth}', f'r{depth}', f'r{depth}-gn', f'r{depth}-ln')}


@pytest.mark.parametrize('name', CONFIGS)
def test_the_network_is_the_authors(name):
    cfg = load(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        features = model.extract_feat(torch.zeros(1, 3, 64, 96))
    depth = int(re.search(r'r(\d+)', name)[1])
    kernel_norm = 'knr' in name
    assert cfg.model.backbone.depth == depth and not cfg.model.backbone.zero_init_residual
    channels = {18: 724, 34: 512, 50: 2048} if kernel_norm else {18: 512, 34: 512, 50: 2048}
    assert [tuple(y.shape) for y in features] == [(1, channels[depth], 2, 3)]
    assert cfg.model.auxiliary_head is None and not model.with_auxiliary_head
    head = model.decode_head
    assert head.dropout.p == 0.1
    logits, conv = (m for m in head.modules() if isinstance(m, nn.Conv2d))
    assert logits is head.conv_seg
    assert (logits.kernel_size, logits.out_channels) == ((1, 1), 19) and logits.bias is not None
    assert (conv.kernel_size, conv.padding, conv.out_channels) == ((3, 3), (1, 1), 512)
    assert type(conv) is (KNConv2d if kernel_norm else nn.Conv2d)
    assert kernel_norm == (conv.bias is not None) == isinstance(model.backbone, KNResNet)
    norms = [m for m in model.modules() if isinstance(m, (nn.SyncBatchNorm, nn.GroupNorm))]
    if kernel_norm:
        assert not norms and conv.activation == 'relu'
    else:
        groups = {'-gn': 32, '-ln': 1}.get(re.search(r'r\d+(-[gl]n)?-d32', name)[1])
        assert all(getattr(norm, 'num_groups', None) == groups for norm in norms)
        assert len(norms) > depth and norms[-1].num_features == 512 if not groups else (
            norms[-1].num_channels == 512)
        # torchvision's stem, and stride in the 3x3 convolution.
        assert model.backbone.conv1.kernel_size == (7, 7)
    assert type(head.dropout) is nn.Dropout  # of elements, not of channels
    assert cfg.custom_imports == dict(
        imports=['mmseg_kn.baselines'], allow_failed_imports=False)


@pytest.mark.parametrize('name', CONFIGS)
def test_schedule_and_data(name):
    cfg = load(name)
    assert cfg.optim_wrapper == dict(type='OptimWrapper', optimizer=dict(
        type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005))
    # 484 epochs of 2,975 images, where a last batch of fewer than 12 is left out.
    assert cfg.train_dataloader.batch_size * 4 == 12
    assert cfg.train_cfg.max_iters == 484 * (2975 // 12) == cfg.param_scheduler[0].end
    assert (cfg.param_scheduler[0].power, cfg.param_scheduler[0].eta_min) == (0.9, 0)
    for interval in (cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.interval):
        assert cfg.train_cfg.max_iters % interval == 0
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert [step.type for step in pipeline] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip',
        'PackSegInputs']
    assert (pipeline[2].ratio_range, pipeline[2].scale) == ((0.5, 2.0), (2048, 1024))
    assert pipeline[3] == dict(type='RandomCrop', crop_size=(512, 1024))
    assert (cfg.data_preprocessor.std == [255] * 3) == ('knr' in name)


@pytest.mark.parametrize('name', CONFIGS)
def test_steps(name):
    cfg = load(name)
    cfg.model.data_preprocessor.size = SIZE
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    # As the authors start it.
    std = (2 / 19) ** 0.5
    assert model.decode_head.conv_seg.weight.std().item() == pytest.approx(std, rel=0.05)
    stem = 'backbone.stem' if 'knr' in name else 'backbone.conv1'
    check_steps(model, cfg.train_dataloader.batch_size, SIZE, stem, stride=32)


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'knr' not in name])
def test_twins_differ_in_the_normalization_alone(name):
    mine, theirs = (flat(dict(load(n))) for n in (
        name, re.sub(r'_r(\d+)(-[gl]n)?-', r'_knr\1-', name)))
    differ = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    norm = re.compile(r'(model\.)?(backbone\.|(norm|conv|act)_cfg|data_preprocessor\.(mean|std)|'
                      r'decode_head\.(in_channels$|(norm|conv|act)_cfg))')
    assert differ and not [key for key in differ if not norm.match(key)]


def test_other_schedules_and_what_training_needs_are_flags_of_the_tool(monkeypatch):
    """The flags that the README gives, read by mmseg's own train.py."""
    text = ' '.join((FOLDER / 'README.md').read_text().split('Table 3\n')[1].split())
    schedule, safe = (found.split() for found in re.findall(r'`(--cfg-options [^`]*)`', text)[:2])
    name = 'fcn_knr18-d32_4xb3-484e_cityscapes-512x1024'
    runner = mock.Mock()
    monkeypatch.setattr(Runner, 'from_cfg', runner)
    monkeypatch.setattr('sys.argv', ['train.py', str(FOLDER / f'{name}.py'), *schedule, *safe[1:]])
    run('train.py')
    (cfg, ), _ = runner.call_args
    before, after = flat(dict(load(name))), flat(dict(cfg))
    changed = {key: after[key] for key in after if after[key] != before.get(key)}
    assert changed == {
        'train_dataloader.batch_size': 2, 'train_cfg.max_iters': 80000,
        'param_scheduler.0.end': 80000, 'train_cfg.val_interval': 8000,
        'default_hooks.checkpoint.interval': 8000, 'optim_wrapper.clip_grad.max_norm': 1,
        'model.backbone.zero_init_residual': True, 'work_dir': f'./work_dirs/{name}',
        'launcher': 'none'}
