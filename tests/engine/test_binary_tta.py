"""Test-time augmentation of one output: the mean of probabilities, above the threshold."""
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.models import SegTTAModel
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from program import ROOT
from small_nets import segmentor

from mmseg_kn.engine import binary_tta


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


def test_a_tested_data_set_has_the_same_miou(tmp_path):
    """Foreground is what is bright; by mmseg's own merging all is, and mIoU is 25."""
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    image = np.full((64, 96, 3), 40, np.uint8)
    image[:, 48:] = 210
    cv2.imwrite(str(tmp_path / 'images/a.png'), image)
    cv2.imwrite(str(tmp_path / 'labels/a.png'), (image[..., 0] > 127).astype(np.uint8))

    net = segmentor('fcn', classes=2)
    net['backbone'] = dict(type='FourMaps', in_channels=3)
    net['decode_head'].update(in_index=0, threshold=0.3, num_convs=0)
    model = MODELS.build(Config(dict(type='SegTTAModel', module=net))._cfg_dict).eval()
    stem, last = model.module.backbone.convs[0], model.module.decode_head.conv_seg
    for layer, weight, bias in ((stem, 1 / 27, 0.), (last, 10 / 8, -5.)):
        torch.nn.init.constant_(layer.weight, weight)
        torch.nn.init.constant_(layer.bias, bias)

    pipeline = Config.fromfile(ROOT / 'configs/_base_/datasets/cityscapes.py').tta_pipeline
    dataset = DATASETS.build(dict(
        type='BaseSegDataset', data_root=str(tmp_path), img_suffix='.png', pipeline=pipeline,
        data_prefix=dict(img_path='images', seg_map_path='labels'), seg_map_suffix='.png',
        metainfo=dict(classes=('ground', 'thing'))))
    with torch.no_grad():
        result, = model.test_step(pseudo_collate([dataset[0]]))
    areas = IoUMetric.intersect_and_union(result.pred_sem_seg.data[0], result.gt_sem_seg.data[0],
                                          2, 255)
    assert (areas[0] / areas[1]).mean() > 0.95
    assert result.img_path.endswith('a.png')


@pytest.mark.parametrize('kind', ['fcn', 'cascade'])
def test_probabilities_are_averaged(kind):
    model = SegTTAModel(segmentor(kind, classes=2))  # with a threshold of 0.4
    found = []
    for values in ([0.1, 0.45, 0.9], [0.5, 0.3, 0.1]):
        data = torch.tensor([[values]])
        sample = SegDataSample(metainfo=dict(img_path=f'{len(found)}.png'))
        sample.set_data(dict(seg_logits=PixelData(data=data),
                             pred_sem_seg=PixelData(data=torch.zeros_like(data))))
        found.append(sample)
    merged, = model.merge_preds([found])
    # the means are 0.3, 0.375 and 0.5
    assert merged.pred_sem_seg.data.tolist() == [[[0, 0, 1]]]
    assert merged.img_path == '0.png' and 'gt_sem_seg' not in merged


def test_several_outputs_are_merged_by_mmseg(monkeypatch):
    model = SegTTAModel(segmentor('fcn', classes=3))
    monkeypatch.setattr(binary_tta, '_merge_preds', lambda self, samples: ['mmseg', samples])
    assert model.merge_preds([]) == ['mmseg', []]
