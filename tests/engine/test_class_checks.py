"""What ClassCheckHook and check_dataset.py say of heads, losses and ignored values, and remedies.

The data are water and the rest of the image, labelled 1 and 0 unless a test says otherwise.
"""
import contextlib
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset, MultiImageMixDataset
from mmseg.evaluation import IoUMetric
from mmseg.models.losses import CrossEntropyLoss, DiceLoss, FocalLoss, LovaszLoss
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from program import ROOT
from small_training import config, tool

from mmseg_kn.engine import ClassCheckHook
from mmseg_kn.engine.class_checks import heads_of, limits_of, output_fault, setting_faults

CLASSES = ('background', 'water')
SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture
def water(tmp_path):
    """Five images; the fifth is for validation."""
    label = np.zeros((32, 32), np.uint8)
    label[:, 16:] = 1
    for i in range(5):
        split = 'val' if i == 4 else 'train'
        for folder, pixels in (('img', np.full((32, 32, 3), 99, np.uint8)), ('ann', label)):
            path = tmp_path / 'water' / folder / split / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), pixels)
    return tmp_path / 'water'


def labels(root, change):
    for path in root.glob('ann/*/*.png'):
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert cv2.imwrite(str(path), change(label))


def settings(root, classes=CLASSES, number=2, **options):
    """The config of a training with these classes, as mmseg's BaseSegDataset reads them."""
    cfg = config(root)
    cfg.model.data_preprocessor.size = (32, 32)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.num_classes = number
    for split in ('train', 'val', 'test'):
        folder = 'train' if split == 'train' else 'val'
        cfg[f'{split}_dataloader'].dataset = dict(
            type='BaseSegDataset', data_root=str(root), img_suffix='.png',
            metainfo=dict(classes=classes),
            data_prefix=dict(img_path=f'img/{folder}', seg_map_path=f'ann/{folder}'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
                      dict(type='PackSegInputs')])
    cfg.merge_from_dict(options)
    return cfg


def train(root, **options):
    runner = Runner.from_cfg(settings(root, **options))
    runner.train()
    return runner


def told(root, capsys, tmp_path, match, **options):
    """The fault, which the tool and the start of a training must name."""
    cfg = settings(root, **options)
    cfg.dump(tmp_path / 'told.py')
    code, printed = tool(root, capsys, config=tmp_path / 'told.py')
    assert code == 1 and re.search(match, printed), printed
    with pytest.raises(ValueError, match=match) as e:
        Runner.from_cfg(cfg).train()
    assert not list(root.glob('work/*.pth'))
    return str(e.value)


def of_heads(**head):
    """Options that set the same in both heads."""
    return {f'model.{name}.{key}': value for key, value in head.items()
            for name in ('decode_head', 'auxiliary_head')}


# One output channel


def test_one_output_channel_with_softmax(water, capsys, tmp_path):
    message = told(water, capsys, tmp_path, r'CrossEntropyLoss in model\.decode_head, which is '
                   'not', **of_heads(out_channels=1))
    assert "set model.decode_head.loss_decode=dict(type='CrossEntropyLoss', use_si" in message
    train(water, **of_heads(out_channels=1, threshold=0.5, loss_decode=SIGMOID))
    train(water)  # without out_channels


@pytest.mark.parametrize('loss, good', [
    (CrossEntropyLoss(), False), (CrossEntropyLoss(use_sigmoid=True), True),
    (DiceLoss(), False), (FocalLoss(), False), (LovaszLoss(loss_type='binary', reduction='none',
                                                           per_image=False), True),
    (torch.nn.ModuleList([CrossEntropyLoss(use_sigmoid=True), CrossEntropyLoss()]), False)])
def test_losses_of_one_output_channel(loss, good):
    """mmseg's loss is asked. What it says of two pixels of a class and two of none is the truth:
    DiceLoss takes class 0 for the only one, softmax has no second.
    """
    head = MODELS.build(dict(type='FCNHead', in_channels=4, channels=4, num_classes=2, num_convs=0,
                             concat_input=False, out_channels=1))
    head.loss_decode = loss
    assert (output_fault('decode_head', head) is None) == good


# One class, and strings


def test_one_class(water, capsys, tmp_path):
    for number in (1, 2):  # whichever the heads have
        message = told(water, capsys, tmp_path, "must be two or more.*got 'water' alone",
                       classes=('water', ), number=number)
    assert "classes=['background', 'water'], labelled 0 and 1, and set num_classes=2" in message
    train(water, classes=['background', 'water'])


def test_one_class_of_a_head_alone(water, capsys, tmp_path):
    """Where the data set names no classes, too."""
    model = build(dict(number=1))
    for names in (dict(), dict(classes=CLASSES)):
        faults = setting_faults(model, BaseSegDataset(lazy_init=True, metainfo=names), 'train',
                                'config.py')
        assert any('num_classes of a head must be 2 or more, got 1 in model.decode_head' in fault
                   and 'set model.decode_head.num_classes=2' in fault for fault in faults)


def test_a_string_for_classes(water, capsys, tmp_path):
    message = told(water, capsys, tmp_path, "must be a list of names, got the string 'water'",
                   classes='water')
    assert "such as ['background', 'water']" in message
    assert 'num_classes=5' not in message


# Ignored values


def test_padding_that_no_head_ignores(water, capsys, tmp_path):
    labels(water, lambda label: np.where(np.eye(32) > 0, 2, label).astype(np.uint8))
    options = dict(of_heads(ignore_index=2), **{'val_evaluator.ignore_index': 2})
    message = told(water, capsys, tmp_path, 'must have the ignore_index of the heads, got seg_pad_'
                   r'val=255 of model\.data_preprocessor and ignore_index=2 of model\.decode_head',
                   **options)
    remedy, value = re.search(r'set (\S+)=(\d+)$', message).groups()
    options.update({remedy: int(value), 'model.data_preprocessor.size': (40, 40)})
    train(water, **options)


@pytest.mark.parametrize('transform, name, remedy', [
    (dict(type='RandomRotate', prob=1., degree=30), 'seg_pad_val', dict(seg_pad_val=2)),
    (dict(type='Pad', size=(40, 40)), 'pad_val.seg', dict(pad_val=dict(img=0, seg=2))),
    (dict(type='RandomCutOut', prob=1., n_holes=1, cutout_shape=(4, 4), seg_fill_in=255),
     'seg_fill_in', dict(seg_fill_in=2))])
def test_a_transform_that_fills_labels(transform, name, remedy, water):
    def faults(transform):
        cfg = settings(water, **of_heads(ignore_index=2),
                       **{'model.data_preprocessor.seg_pad_val': 2})
        cfg.train_dataloader.dataset.pipeline.insert(2, transform)
        dataset = BaseSegDataset(**{key: value for key, value in cfg.train_dataloader.dataset.
                                    items() if key != 'type'})
        values = set(np.unique(dataset[0]['data_samples'].gt_sem_seg.data))
        return values, setting_faults(MODELS.build(cfg.model), dataset, 'train', 'config.py')

    values, (fault, other) = faults(transform)  # of each head
    assert 255 in values and 'model.auxiliary_head' in other
    assert f"got {transform['type']}'s {name}=255 in train_dataloader" in fault
    assert fault.endswith(f"set {name}=2 in {transform['type']}")
    values, found = faults(dict(transform, **remedy))
    assert 255 not in values and not found


def test_a_transform_of_several_images(water):
    cfg = settings(water, **of_heads(ignore_index=2), **{'model.data_preprocessor.seg_pad_val': 2})
    dataset = MultiImageMixDataset(cfg.train_dataloader.dataset, [dict(
        type='RandomMosaic', prob=1., img_scale=(32, 32))], lazy_init=True)
    fault = setting_faults(MODELS.build(cfg.model), dataset, 'train', 'config.py')[0]
    assert "got RandomMosaic's seg_pad_val=255 in train_dataloader" in fault


def test_255_of_mmseg_itself(water):
    """mmseg gives 255 to the zero label and to classes left out."""
    cfg = settings(water, **of_heads(ignore_index=2), **{'model.data_preprocessor.seg_pad_val': 2})
    cfg.train_dataloader.dataset.update(reduce_zero_label=True)
    cfg.train_dataloader.dataset.pop('type')
    dataset = BaseSegDataset(**cfg.train_dataloader.dataset)
    fault = setting_faults(MODELS.build(cfg.model), dataset, 'train', 'config.py')[0]
    assert 'labels in which mmseg sets 255 (reduce_zero_label' in fault
    assert fault.endswith('set model.decode_head.ignore_index=255')
    cfg.model.decode_head.ignore_index = cfg.model.auxiliary_head.ignore_index = 255
    cfg.model.data_preprocessor.seg_pad_val = 255
    assert not setting_faults(MODELS.build(cfg.model), dataset, 'train', 'config.py')


def test_a_metric_that_counts_what_the_heads_ignore(water, capsys, tmp_path):
    options = dict(of_heads(ignore_index=2), **{'model.data_preprocessor.seg_pad_val': 2})
    model = MODELS.build(settings(water, **options).model)
    dataset = BaseSegDataset(lazy_init=True, metainfo=dict(classes=CLASSES))
    fault = setting_faults(model, dataset, 'val', 'config.py', [IoUMetric()])[0]
    assert 'got IoUMetric(ignore_index=255) in val_evaluator and ignore_index=2 of' in fault
    assert fault.endswith('set ignore_index=2 in val_evaluator')
    assert not setting_faults(model, dataset, 'val', 'config.py', [IoUMetric(ignore_index=2)])
    # To leave a class out of the metric alone is a choice.
    assert not setting_faults(model, dataset, 'val', 'config.py', [IoUMetric(ignore_index=0)])


# Masks of 0 and 255


def test_masks_of_0_and_255(water, capsys, tmp_path):
    labels(water, lambda label: label * 255)
    message = told(water, capsys, tmp_path, r'must hold two classes or more, got only background '
                   r'\(0\) and ignored pixels \(255\)')
    assert 'as in masks of 0 and 255, renumber them with its index' in message
    # Beside images that hold the other class, such labels are those of images without it.
    cfg, both = settings(water), settings(water)
    part = cfg.train_dataloader.dataset
    shutil.copytree(water / 'ann', water / 'right')
    for path in water.glob('right/*/*.png'):
        assert cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED) // 255)
    other = dict(part, data_prefix=dict(img_path='img/train', seg_map_path='right/train'))
    both.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[other, part])
    both.dump(tmp_path / 'both.py')
    assert tool(water, capsys, config=tmp_path / 'both.py')[0] == 0
    labels(water, lambda label: label // 255)  # as the message says
    train(water)


def test_rare_objects_are_only_warned_of(water, caplog, monkeypatch):
    """Where time allows to look at some of the labels, the others may hold a second class."""
    labels(water, lambda label: label * 255)
    monkeypatch.setattr('mmseg_kn.datasets.first_look.time.monotonic',
                        iter(range(0, 10000, 2)).__next__)
    runner = Runner.from_cfg(settings(water))
    with monkeypatch.context() as patch:
        warned = []
        patch.setattr(runner.logger, 'warning', warned.append)
        runner.train()
    assert any('1 of 4 labels: labels must hold two classes or more' in str(w) for w in warned)


# All heads


def build(*heads, auxiliary=(), **model):
    def head(number, **kwargs):
        return dict(dict(type='FCNHead', in_channels=64, channels=64, num_classes=number,
                         num_convs=0, concat_input=False, in_index=3), **kwargs)

    made = [head(**h) for h in heads]
    cascade = dict(type='CascadeEncoderDecoder', num_stages=len(made)) if len(made) > 1 else dict(
        type='EncoderDecoder')
    return MODELS.build(dict(
        cascade, backbone=dict(type='KNResNet', depth=18), test_cfg=dict(mode='whole'),
        decode_head=made if len(made) > 1 else made[0],
        auxiliary_head=[head(**h) for h in auxiliary], **model))


def test_every_head_is_compared():
    dataset = BaseSegDataset(lazy_init=True, metainfo=dict(classes=CLASSES))
    model = build(dict(number=2), dict(number=3), auxiliary=[dict(number=2), dict(number=4), dict(
        number=2, ignore_index=7), dict(number=2, out_channels=1)],
        data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32)))
    assert list(heads_of(model)) == ['decode_head[0]', 'decode_head[1]', *(
        f'auxiliary_head[{i}]' for i in range(4))]
    assert limits_of(heads_of(model)) == [(2, 255), (3, 255), (4, 255), (2, 7)]
    faults = '\n'.join(setting_faults(model, dataset, 'train', 'config.py'))
    for text in ('got 3 in model.decode_head[1]', 'got 4 in model.auxiliary_head[1]',
                 'ignore_index=7 of model.auxiliary_head[2]',
                 'CrossEntropyLoss in model.auxiliary_head[3]'):
        assert text in faults
    assert faults.count('\n') == 3 and 'decode_head[0]' not in faults


@pytest.mark.parametrize('value, right', [(0, True), (2, False), (7, False), (255, False)])
def test_each_batch_is_checked_for_every_head(value, right):
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 2, 2), value)),
                           metainfo=dict(seg_map_path='label.png'))
    hook = ClassCheckHook()
    hook.limits = [(2, 255), (3, 7)]
    with contextlib.nullcontext() if right else pytest.raises(ValueError, match='label.png'):
        hook.before_train_iter(None, 0, dict(data_samples=[sample]))


def test_heads_that_make_their_own_targets():
    """STDC's third auxiliary head finds edges: two classes, whatever the data set's."""
    cfg = Config.fromfile(ROOT / 'configs/kernelized/stdc1-kn_4xb12-80k_cityscapes-512x1024.py')
    model = MODELS.build(cfg.model)
    heads = heads_of(model)
    assert list(heads) == ['decode_head', 'auxiliary_head[0]', 'auxiliary_head[1]']
    dataset = BaseSegDataset(lazy_init=True, metainfo=dict(classes=[str(i) for i in range(19)]))
    assert not setting_faults(model, dataset, 'train', 'config.py')
