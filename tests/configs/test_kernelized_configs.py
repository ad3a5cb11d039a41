"""Configs over mmseg's own: each is that network, kernel-normalized throughout."""
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from program import ROOT
from settings import flat
from steps import check_steps
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_kn import KNConv2d
from mmseg_kn.engine.partial_norm_hook import norm_faults

CONFIGS = sorted((ROOT / 'configs/kernelized').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_is_mmsegs_config_with_another_normalization(path):
    cfg = Config.fromfile(path)
    assert cfg.custom_imports == dict(imports=['mmseg_kn'], allow_failed_imports=False)
    assert dict(type='PartialNormHook') in cfg.custom_hooks
    assert dict(type='ChannelsLastHook', device='cuda') in cfg.custom_hooks
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1)
    assert cfg.data_preprocessor == cfg.model.model.data_preprocessor
    theirs, = (Path(mmseg.__file__).parent / '.mim/configs').glob(
        f"*/{path.stem.replace('-kn_', '_')}.py")
    theirs, mine = Config.fromfile(theirs), flat(dict(cfg.model.model))
    model = flat(dict(theirs.model))
    differ = {key for key in mine.keys() | model.keys() if mine.get(key) != model.get(key)}
    assert all(key == 'pretrained' or key.startswith(('data_preprocessor.mean',
                                                      'data_preprocessor.std')) for key in differ)
    for key in ('train_dataloader', 'val_dataloader', 'param_scheduler', 'train_cfg'):
        assert cfg[key] == theirs[key]

    size = (64, 128)
    cfg.model.model.data_preprocessor.size = size
    cfg.model.model.pretrained = cfg.model.model.backbone.init_cfg = None
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
        model.init_weights()
    layers = list(model.modules())
    assert any(isinstance(layer, KNConv2d) for layer in layers)
    assert not any(isinstance(layer, _BatchNorm) for layer in layers) and not norm_faults(model)
    check_steps(model, 1, size, 'backbone', stride=None)
