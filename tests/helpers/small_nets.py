"""Segmentors of a few small layers, of any channels, with each kind of head that mmseg has."""
import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModule, revert_sync_batchnorm
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from torch import nn

try:
    from mmcv.ops import point_sample
except ImportError:  # the fork without compiled ops, where mmseg has no point head
    point_sample = None

KN = dict(conv_cfg=dict(type='KNConv', activation='relu'), norm_cfg=None, act_cfg=None)


@MODELS.register_module(force=True)
class FourMaps(BaseModule):
    """Maps of 8 channels at strides 2, 4, 8 and 16."""

    def __init__(self, in_channels=3, init_cfg=None):
        super().__init__(init_cfg)
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, stride, 1) for c, stride in (
            (in_channels, 2), (8, 2), (8, 2), (8, 2)))

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x).relu()
            maps.append(x)
        return maps


def _head(kind, classes, **settings):
    head = dict(type=kind, num_classes=classes, channels=8, in_channels=8, norm_cfg=None,
                dropout_ratio=0, align_corners=False)
    if classes == 2:
        head.update(out_channels=1, threshold=0.4, loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=True))
    return dict(head, **settings)


def segmentor(kind, channels=3, classes=3):
    """The config of a segmentor; of two classes it has one output and a threshold.

    Args:
        kind: 'fcn', 'psp', 'fpn' with a neck, 'cascade' of two heads, 'point', or 'kernelized',
            whose head has SyncBN.
    """
    if kind == 'point' and point_sample is None:
        pytest.skip('point heads need mmcv.ops here')
    if kind == 'kernelized':
        model = segmentor('fcn', channels, classes)
        model['decode_head'].update(conv_cfg=None, norm_cfg=dict(type='SyncBN'),
                                    act_cfg=dict(type='ReLU'))
        return dict(type='KernelNormalized', model=model)
    pyramid = dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3], feature_strides=[2, 4, 8, 16])
    several = dict(type='CascadeEncoderDecoder', num_stages=2)
    first = _head('FCNHead', classes, num_convs=1, concat_input=False, **KN)
    model = {
        'fcn': lambda: dict(decode_head=first),
        'psp': lambda: dict(decode_head=_head('PSPHead', classes, pool_scales=(1, 2))),
        'fpn': lambda: dict(decode_head=_head('FPNHead', classes, **pyramid)),
        'cascade': lambda: dict(several, decode_head=[
            first, _head('OCRHead', classes, ocr_channels=8)]),
        # a point head is of several outputs: it asks how far apart the largest two are
        'point': lambda: dict(several, decode_head=[
            _head('FPNHead', 3, **pyramid),
            _head('PointHead', 3, in_channels=[8], in_index=[0], num_fcs=1)]),
    }[kind]()
    if kind in ('fpn', 'point'):
        model['neck'] = dict(type='FPN', in_channels=[8] * 4, out_channels=8, num_outs=4)
    return dict(dict(
        type='EncoderDecoder', backbone=dict(type='FourMaps', in_channels=channels),
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[0.], std=[255.],
                               bgr_to_rgb=channels == 3,
                               size=(32, 64), seg_pad_val=255),
        train_cfg=dict(num_points=32, oversample_ratio=3, importance_sample_ratio=.75),
        test_cfg=dict(mode='whole', subdivision_steps=1, subdivision_num_points=32,
                      scale_factor=2)), **model)


@TRANSFORMS.register_module(force=True)
class LoadNumpy(BaseTransform):

    def transform(self, results):
        image = np.load(results['img_path'])
        return dict(results, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])


# The loader of each number of channels, and the suffix of its files.
LOADERS = {1: (dict(type='LoadImageFromFile', color_type='grayscale'), '.png'),
           3: (dict(type='LoadImageFromFile'), '.png'),
           4: (dict(type='LoadImageFromFile', color_type='unchanged'), '.png'),
           12: (dict(type='LoadNumpy'), '.npy')}
SIZE = (32, 64)


def write_images(folder, channels, number=2):
    """Images of 32 x 64 and their labels: class 0 on the left, 1 on the right, void below.

    Each image is of 4 x 8 squares.
    """
    random = np.random.default_rng(channels)
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        path = str(folder / 'images' / f'{i}{LOADERS[channels][1]}')
        if channels == 12:
            squares = random.normal(4000, 900, (4, 8, 12)).astype(np.float32)
            np.save(path, squares.repeat(8, 0).repeat(8, 1))
        else:
            squares = random.integers(256, size=(4, 8, channels), dtype=np.uint8)
            assert cv2.imwrite(path, squares.repeat(8, 0).repeat(8, 1))
        label = np.zeros(SIZE, np.uint8)
        label[:, 32:], label[24:] = 1, 255
        assert cv2.imwrite(str(folder / 'labels' / f'{i}.png'), label)


@torch.no_grad()
def balance(net, data):
    """Lets each class win somewhere: logits are 0 on the average of the images."""
    heads = net.decode_head if isinstance(net.decode_head, nn.ModuleList) else [net.decode_head]
    last = [getattr(head, 'fc_seg', None) or head.conv_seg for head in heads]
    handles = [layer.register_forward_hook(
        lambda layer, args, y: y - y.flatten(2).mean((0, 2)).view(1, -1, *[1] * (y.ndim - 2)))
        for layer in last]
    means = {}
    handles += [layer.register_forward_pre_hook(lambda layer, args: means.update({
        layer: layer.forward(*args).flatten(2).mean((0, 2))})) for layer in last]
    net.encode_decode(net.data_preprocessor(data)['inputs'], [dict(img_shape=SIZE)])
    for handle in handles:
        handle.remove()
    for layer in last:
        layer.bias -= means[layer]


def write_config(folder, kind, channels=3, classes=3, labels=True, model=None):
    """A config over the images in ``folder``, and a checkpoint of random weights beside it.

    Returns:
        The paths of both.
    """
    loader, suffix = LOADERS[channels]
    names = ('ground', 'thing', 'sky')[:classes]
    pipeline = [loader, *[dict(type='LoadAnnotations')] * labels, dict(type='PackSegInputs')]
    dataset = dict(
        type='BaseSegDataset', data_root=str(folder), img_suffix=suffix, seg_map_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='labels'), pipeline=pipeline,
        metainfo=dict(classes=names, palette=[[250, 0, 0], [0, 250, 0], [0, 0, 250]][:classes]))
    loader = dict(batch_size=1, num_workers=0, dataset=dataset,
                  sampler=dict(type='DefaultSampler', shuffle=False))
    cfg = Config(dict(
        default_scope='mmseg', model=model or segmentor(kind, channels, classes),
        train_dataloader=loader, test_dataloader=loader,
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        crop_size=SIZE))
    path = folder / f'{kind}_{channels}_{classes}_{labels}.py'
    cfg.dump(path)
    torch.manual_seed(0)
    net = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv1d)):
            nn.init.normal_(layer.weight, std=0.5)
    balance(net, pseudo_collate(list(DATASETS.build(dataset))))
    # as converters write it, without the classes
    torch.save(dict(state_dict=net.state_dict(), meta={}), path.with_suffix('.pth'))
    return path, path.with_suffix('.pth')
