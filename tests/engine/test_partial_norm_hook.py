"""A network that kernel normalization reaches in parts alone says so, and no other does."""
import logging
from pathlib import Path
from types import SimpleNamespace

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from mmseg.registry import MODELS
from program import ROOT
from torch import nn

from mmseg_kn import KNConv2d
from mmseg_kn.engine.partial_norm_hook import PartialNormHook, norm_faults

MIM = Path(mmseg.__file__).parent / '.mim/configs'
KN = dict(conv_cfg=dict(type='KNConv'), norm_cfg=None)


def build(model):
    with torch.device('meta'), DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(model)


CONFIGS = sorted(ROOT.glob('configs/*/*camvid-160x160.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_our_configs_are_normalized_throughout(path):
    cfg = Config.fromfile(path)
    import_modules_from_strings(**cfg.custom_imports)
    assert dict(type='PartialNormHook') in cfg.custom_hooks
    assert not norm_faults(build(cfg.model))


def test_bare_convolutions_of_a_head():
    head = dict(type='DepthwiseSeparableASPPHead', in_channels=8, channels=8, num_classes=3,
                c1_in_channels=4, c1_channels=4, **KN)
    fault, = norm_faults(build(dict(head, conv_cfg=dict(type='KNConv', activation='relu'),
                                    act_cfg=None)))
    assert fault.startswith('convolutions have no normalization: aspp_modules.1.depthwise')
    head['norm_cfg'] = dict(type='BN')
    del head['conv_cfg']
    assert not norm_faults(build(head))  # no kernel normalization at all


def test_a_neck_that_is_to_be_linear():
    neck = dict(type='FPN', in_channels=[4, 8], out_channels=4, num_outs=2)
    assert not norm_faults(build(dict(neck, **KN)))
    fault, = norm_faults(build(dict(
        neck, conv_cfg=dict(type='KNConv', activation='relu'), norm_cfg=None)))
    assert "have activation='relu': " in fault and 'lateral_convs.0.conv' in fault


def test_converted_models_are_left_alone():
    cfg = Config.fromfile(MIM / 'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(type='KernelNormalized', model=cfg.model))
    assert not norm_faults(model)


def test_the_hook_warns_once_and_lists_names(caplog):
    caplog.set_level(logging.WARNING)
    model = nn.Sequential(KNConv2d(3, 4, 1), *(nn.BatchNorm2d(4) for _ in range(10)))
    PartialNormHook().before_train(SimpleNamespace(model=model, logger=logging.getLogger('t')))
    message, = caplog.messages
    assert 'only partly kernel-normalized. BatchNorm is left' in message
    assert '1, 2, 3, 4, 5, 6, 7, 8 and 2 more. A config over' in message
    PartialNormHook().before_train(SimpleNamespace(model=model[1:], logger=None))
