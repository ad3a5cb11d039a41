"""KNConvNeXt under UPerNet: mmseg's recipe of ConvNeXt, without any BatchNorm."""
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from program import ROOT
from steps import check_steps
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_kn import KNConv2d, KNConvNeXt
from mmseg_kn.engine.partial_norm_hook import norm_faults
from mmseg_kn.models.knconvnext import ARCHS, as_arch

ATTO = ((2, 2, 6, 2), (40, 80, 160, 320))  # of ConvNeXt V2's paper, and mmpretrain
FOLDER = ROOT / 'configs/knconvnext'
CONFIGS = sorted(path.stem for path in FOLDER.glob('knconvnext*.py'))


def load(name):
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('name', CONFIGS)
def test_is_kernel_normalized_throughout(name):
    cfg = load(name)
    assert cfg.custom_imports == dict(imports=['mmseg_kn'], allow_failed_imports=False)
    arch = name.split('_')[0].removeprefix('knconvnext-')
    assert as_arch(cfg.model.backbone.arch) == (ATTO if arch == 'atto' else ARCHS[arch])
    assert cfg.data_preprocessor == cfg.model.data_preprocessor
    with torch.device('meta'):  # the large one has 234 million weights
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, KNConvNeXt)
    assert not any(isinstance(m, _BatchNorm) for m in model.modules()) and not norm_faults(model)
    assert model.decode_head.num_classes == (150 if 'ade20k' in name else 19)
    kinds = [type(m) for m in model.decode_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kinds.count(torch.nn.Conv2d) == 1 and kinds.count(KNConv2d) == 12  # the logits
    with torch.device('meta'):
        features = model.extract_feat(torch.zeros(1, 3, 64, 96))
        assert model.decode_head(features).shape == (1, model.decode_head.num_classes, 16, 24)
        model.auxiliary_head(features)


@pytest.mark.parametrize('name', CONFIGS)
def test_steps(name):
    cfg = load(name)
    size = (64, 96)
    cfg.model.data_preprocessor.size = size
    cfg.model.test_cfg.update(crop_size=size, stride=size)
    cfg.model.decode_head.channels = 64
    channels = as_arch(cfg.model.backbone.arch).channels
    cfg.model.backbone.arch = dict(depths=(1, 1, 2, 1), channels=channels)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {id(p): group['lr'] for group in wrapper.param_groups for p in group['params']}
    if cfg.optim_wrapper.paramwise_cfg.decay_rate == 1:
        assert {rates[id(p)] for p in model.parameters()} == {cfg.optim_wrapper.optimizer.lr}
    else:  # by the stage, as mmseg has it for ConvNeXt, whose names of layers it knows
        assert rates[id(model.backbone.downsample_layers[2].weight)] < rates[
            id(model.backbone.stages[0][0].norm.weight)] < rates[
                id(model.backbone.stages[3][0].norm.weight)] < rates[
                    id(model.decode_head.conv_seg.weight)] == 1e-4
    check_steps(model, 2, size, 'backbone.downsample_layers.0.0', stride=32)


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_differs_from_mmsegs_config_in_the_normalization(size):
    mine = load(f'knconvnext-{size}_upernet_8xb2-160k_ade20k-512x512')
    theirs = Config.fromfile(
        Path(mmseg.__file__).parent / '.mim/configs/convnext'
        / f'convnext-{size}_upernet_8xb2-amp-160k_ade20k-512x512.py',
        import_custom_modules=False)  # they are mmpretrain's
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator', 'param_scheduler',
                'train_cfg', 'data_preprocessor'):
        assert mine[key] == theirs[key], key
    # Without half precision, which is a flag, and with clipped gradients.
    theirs.optim_wrapper.update(type='OptimWrapper', clip_grad=dict(max_norm=1))
    del theirs.optim_wrapper['loss_scale']
    assert mine.optim_wrapper == theirs.optim_wrapper
    for part in ('decode_head', 'auxiliary_head'):
        norm = dict(norm_cfg=None, act_cfg=None, conv_cfg=dict(type='KNConv', activation='relu'))
        assert mine.model[part] == dict(theirs.model[part], **norm)
    assert mine.model.test_cfg == theirs.model.test_cfg
    assert mine.model.backbone == dict(
        type='KNConvNeXt', arch=size, drop_path_rate=theirs.model.backbone.drop_path_rate)


CAMVID = 'upernet_1xb2-1600_camvid-160x160'


@pytest.mark.parametrize(('name', 'norm'), [
    ('convnext-atto', torch.nn.SyncBatchNorm), ('convnext-atto-gn', torch.nn.GroupNorm)])
def test_twins_differ_in_the_normalization(name, norm):
    mine, twin = load(f'knconvnext-atto_{CAMVID}'), load(f'{name}_{CAMVID}')
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator', 'param_scheduler',
                'train_cfg', 'data_preprocessor', 'optim_wrapper', 'custom_hooks'):
        assert mine[key] == twin[key], key
    twin.model.data_preprocessor.size = size = (64, 96)
    torch.manual_seed(0)
    model = MODELS.build(twin.model)
    heads = [model.decode_head, model.auxiliary_head]
    norms = [m for head in heads for m in head.modules() if isinstance(m, norm)]
    assert len(norms) == 13 and not any(  # every convolution of the heads but their logits
        isinstance(m, KNConv2d) for m in model.modules())
    stem, *openings = model.backbone.downsample_layers
    shapes = [[tuple(p.shape) for p in opening.parameters()] for opening in openings]
    assert shapes == [[(c, ), (c, ), (2 * c, c, 2, 2), (2 * c, )] for c in (40, 80, 160)]
    x = torch.rand(2, 40, 6, 8)
    expected = torch.nn.functional.layer_norm(
        x.permute(0, 2, 3, 1), (40, ), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(openings[0](x), torch.nn.functional.conv2d(
        expected, openings[0][1].weight, openings[0][1].bias, stride=2))
    check_steps(revert_sync_batchnorm(model), 2, size, 'backbone.downsample_layers.0.0', stride=32)
