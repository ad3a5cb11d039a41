"""The data sets within wrappers, as objects and as configs."""
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.runner.runner import _SlicedDataset

from mmseg_kn.datasets.walk import innermost, walk


def plain():
    return BaseDataset(lazy_init=True, serialize_data=False)


def test_built():
    one, two = plain(), plain()
    twice = RepeatDataset(one, times=2, lazy_init=True)
    both = ConcatDataset([one, two], lazy_init=True)
    part = torch.utils.data.Subset(both, [0])
    assert list(walk(twice)) == [twice, one]
    assert list(walk(part)) == [part, both, one, two]
    assert innermost(part) == [one, two] and innermost(one) == [one]


def test_the_slice_of_num_batch_per_epoch_is_passed_over():
    one = plain()
    twice = RepeatDataset(one, times=2, lazy_init=True)
    assert list(walk(_SlicedDataset(twice, 3))) == [twice, one]
    assert innermost(_SlicedDataset(one, 3)) == [one]


def test_configs():
    cfg = ConfigDict(type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[
        dict(type='A'), dict(type='RepeatDataset', dataset=dict(type='B'))]))
    assert [part.type for part in walk(cfg)] == [
        'MultiImageMixDataset', 'ConcatDataset', 'A', 'RepeatDataset', 'B']
    for part in innermost(cfg):
        part.data_root = 'there'
    assert cfg.dataset.datasets[0].data_root == 'there'
    assert cfg.dataset.datasets[1].dataset.data_root == 'there'
    built = plain()
    assert list(walk(dict(type='RepeatDataset', dataset=built)))[1:] == [built]
