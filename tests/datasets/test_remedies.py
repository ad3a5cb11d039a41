"""The remedies in messages about files and classes, followed to the letter: each one works."""
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmseg.registry import DATASETS
from small_training import files, rewrite, tool, train
from toy_cityscapes import generate

from mmseg_kn.datasets import KNCityscapesDataset


@pytest.fixture
def scenes(tmp_path):
    generate(tmp_path / 'scenes', train=2, val=1, size=(64, 128))
    return tmp_path / 'scenes'


def change_all(root, change, label=False):
    for path in root.rglob('*_labelTrainIds.png' if label else '*_leftImg8bit.png'):
        assert cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def refused(root, match, **options):
    with pytest.raises(ValueError, match=match) as e:
        train(root, **options)
    return str(e.value)


@pytest.mark.parametrize('channels, change', [
    (1, lambda image: image[..., 0]),
    (4, lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2BGRA))])
def test_images_of_other_channels(channels, change, scenes):
    change_all(scenes, change)
    message = refused(scenes, 'images of 3 channels are needed')
    told = re.search(
        r"train on (\d): color_type='unchanged' in each LoadImageFromFile, no "
        r'PhotoMetricDistortion, in_channels=(\d) of the backbone, and in data_preprocessor mean '
        r'and std of (\d) values? and bgr_to_rgb=False', message)
    assert told.groups() == (str(channels), ) * 3
    load = dict(type='LoadImageFromFile', color_type='unchanged')
    tested = [load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    options = {f'{split}_dataloader.dataset.pipeline': tested for split in ('val', 'test')}
    runner = train(scenes, **options, **{
        'train_dataloader.dataset.pipeline': [*tested[:2], dict(type='RandomFlip', prob=0.5),
                                              tested[2]],
        'model.backbone.in_channels': channels,
        'model.data_preprocessor.mean': [0.] * channels,
        'model.data_preprocessor.std': [255.] * channels,
        'model.data_preprocessor.bgr_to_rgb': False})
    assert runner.model.backbone.stem.weight.shape[1] == channels
    # The other remedies: to convert, and to take them as they are.
    options = {f'{split}_dataloader.dataset.check_files': False for split in ('train', 'val')}
    train(scenes, **options)
    change_all(scenes, lambda image: cv2.cvtColor(
        image, cv2.COLOR_GRAY2BGR if channels == 1 else cv2.COLOR_BGRA2BGR))
    train(scenes)


# Fault of one file, its message, and what makes it right.
CONVERSIONS = {
    '16-bit image': (rewrite(lambda image: image.astype(np.uint16) * 257),
                     'convert it', lambda image: (image // 257).astype(np.uint8), False),
    'grey and alpha': (rewrite(lambda image: image[..., 0]), 'convert it to RGB',
                       lambda image: cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), False),
    '16-bit label': (rewrite(lambda label: label.astype(np.uint16), True),
                     'convert it, with indices from 0 to 254 and 255',
                     lambda label: label.astype(np.uint8), True),
    'colours': (rewrite(lambda label: cv2.merge([label] * 3), True),
                'convert colours to indices', lambda label: label[..., 0], True),
    'size': (rewrite(lambda label: label[::2, ::2], True), 'resize it with nearest neighbours',
             lambda label: cv2.resize(label, (128, 64), interpolation=cv2.INTER_NEAREST), True),
    'value': (rewrite(lambda label: np.where(label == 0, 200, label), True), 'renumber them',
              lambda label: np.where(label == 200, 0, label), True),
}


@pytest.mark.parametrize('case', CONVERSIONS)
def test_conversions(case, scenes, capsys):
    fault, remedy, mend, of_label = CONVERSIONS[case]
    fault(scenes)
    code, printed = tool(scenes, capsys)
    assert code == 1 and remedy in printed
    path = files(scenes)[of_label]
    assert cv2.imwrite(str(path), mend(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    code, printed = tool(scenes, capsys)
    assert code == 0 and 'problems: 0' in printed


def test_every_class_named(scenes):
    change_all(scenes, lambda label: np.where(label == 0, 19, label), label=True)
    message = refused(scenes, 'labels must be one of 19 classes, .* got 19 in')
    assert 'name every class in METAINFO of a dataset class of your own (docs/getting' in message

    @DATASETS.register_module(force=True)
    class Twenty(KNCityscapesDataset):
        METAINFO = dict(classes=(*KNCityscapesDataset.METAINFO['classes'], 'twentieth'),
                        palette=[*KNCityscapesDataset.METAINFO['palette'], [1, 2, 3]])

    options = {f'{split}_dataloader.dataset.type': 'Twenty' for split in ('train', 'val', 'test')}
    message = refused(scenes, r'set model\.decode_head\.num_classes=20', **options)
    options.update({f'model.{head}.num_classes': 20 for head in ('decode_head',
                                                                 'auxiliary_head')})
    train(scenes, **options)
    # Where the data set's class names none, metainfo does.
    base = {'type': 'BaseSegDataset', 'img_suffix': '_leftImg8bit.png',
            'seg_map_suffix': '_gtFine_labelTrainIds.png'}
    options.update({f'{split}_dataloader.dataset.{key}': value for key, value in base.items()
                    for split in ('train', 'val', 'test')})
    names = [f'class {i}' for i in range(19)]
    options['train_dataloader.dataset.metainfo'] = dict(classes=names)
    options['val_dataloader.dataset.metainfo'] = dict(classes=names)
    nineteen = dict(options, **{f'model.{head}.num_classes': 19 for head in (
        'decode_head', 'auxiliary_head')})
    message = refused(scenes, 'name every class in metainfo=dict', **nineteen)
    for split in ('train', 'val'):
        options[f'{split}_dataloader.dataset.metainfo'] = dict(classes=[*names, 'class 19'])
    train(scenes, **options)


def test_the_train_ids_that_the_message_names(scenes):
    for path in scenes.rglob('*_labelTrainIds.png'):
        path.rename(str(path).replace('labelTrainIds', 'mine'))
    suffix = '{}_dataloader.dataset.seg_map_suffix'
    refused(scenes, 'seg_map_suffix must name those', **{
        suffix.format(split): '_gtFine_labelIds.png' for split in ('train', 'val')})
    train(scenes, **{suffix.format(split): '_gtFine_mine.png' for split in ('train', 'val')})


def test_a_file_copied_again(scenes):
    image, label = files(scenes)
    for path, message in ((image, 'copy or convert it again'), (label, 'is missing|are missing')):
        whole = path.read_bytes()
        path.write_bytes(whole[:-20]) if path == image else path.unlink()
        refused(scenes, message)
        path.write_bytes(whole)
    train(scenes)
    assert Path(image).is_file()
