"""Configs of other networks for CamVid, as compare_norms.py takes them."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from program import ROOT, load_tool
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_kn import KNConv2d
from mmseg_kn.engine.partial_norm_hook import norm_faults

# isort: split
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from steps import check_steps

STRIDES = {'deeplabv3plus_r18-d8': 8, 'fast-scnn': 8, 'fcn_hr18s': 32, 'fcn_unet-s5-d16': 1,
           'stdc1': 8}  # of the last feature map
small_networks = load_tool(ROOT / 'tools/benchmarks/small_networks.py')


@pytest.mark.parametrize('name', small_networks.NETWORKS)
def test_trains_with_two_images_and_kernelized_with_one(name, tmp_path):
    tool = load_tool(ROOT / 'tools/benchmarks/compare_norms.py')
    path = tmp_path / f'{name}.py'
    small_networks.config_of(name).dump(path)
    cfg = tool.load(str(path), SimpleNamespace(data_root=None, cfg_options={
        'model.data_preprocessor.size': (64, 96)}))
    twin = tool.kernelized(cfg)
    init_default_scope('mmseg')
    for part, batch in ((cfg, 2), (twin, 1)):
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(part.model))
        model.init_weights()
        kinds = [KNConv2d, _BatchNorm] if part is twin else [_BatchNorm, KNConv2d]
        assert any(isinstance(layer, kinds[0]) for layer in model.modules())
        assert not any(isinstance(layer, kinds[1]) for layer in model.modules())
        assert not norm_faults(model)
        check_steps(model, batch, (64, 96), '', STRIDES[name])
        # CamVid at 160 x 120 has sides that not all downsamplings divide.
        image = torch.zeros(3, 60, 80, dtype=torch.uint8)
        sample = SegDataSample(metainfo=dict(
            img_shape=(60, 80), ori_shape=(60, 80), pad_shape=(60, 80), flip=False))
        with torch.no_grad():
            result, = model.test_step(dict(inputs=[image], data_samples=[sample]))
        assert result.pred_sem_seg.data.shape == (1, 60, 80)
