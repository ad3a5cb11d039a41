"""Files that only the pipeline's own loader can read: it is asked, and nothing else refuses them.

Each data set is built, checked by the tool's functions, and loaded as a training loads it.
"""
import random
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.image import io as mmcv_io
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmcv.transforms import LoadAnnotations as MMCVLoadAnnotations
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs, Resize
from PIL import Image

from mmseg_kn.datasets import KNCityscapesDataset
from mmseg_kn.datasets.file_checks import rules_of, scan

LABEL = np.array([[0, 1, 2, 255]] * 6, np.uint8)
COLOURS = np.array([[128, 64, 128], [244, 35, 232], [70, 70, 70]], np.uint8)  # Cityscapes' first


class LoadArray(LoadImageFromFile):
    def transform(self, results):
        results['img'] = np.load(results['img_path'])
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


class LoadColours(LoadAnnotations):
    def _load_seg_map(self, results):
        picture = np.asarray(Image.open(results['seg_map_path']))
        label = np.full(picture.shape[:2], 255, np.uint8)
        for index, colour in enumerate(COLOURS):
            label[(picture == colour).all(2)] = index
        results['gt_seg_map'] = label
        results['seg_fields'].append('gt_seg_map')


class LoadElsewhere(LoadAnnotations):
    """From a file that no suffix of the data set names."""

    def _load_seg_map(self, results):
        results['gt_seg_map'] = np.load(Path(results['seg_map_path']).with_suffix('.npy'))
        results['seg_fields'].append('gt_seg_map')


class ToIndices(BaseTransform):
    """Makes indices of the colours that mmseg's own LoadAnnotations has read as BGR."""

    def transform(self, results):
        picture, label = results['gt_seg_map'], np.full(results['img_shape'], 255, np.uint8)
        for index, colour in enumerate(COLOURS):
            label[(picture == colour[::-1]).all(2)] = index
        results['gt_seg_map'] = label
        return results


class Augment(BaseTransform):
    """One's own augmentation, which loads nothing."""

    def transform(self, results):
        results['img'] = results['img'][::-1].copy()
        results['gt_seg_map'] = results['gt_seg_map'][::-1].copy()
        return results


class Elsewhere(BaseTransform):
    """Names other files than the data set lists."""

    def transform(self, results):
        for key in ('img_path', 'seg_map_path'):
            results[key] = str(Path(results[key]).with_name(f'{key}.png'))
        return results


class Read(BaseTransform):
    """Image and label at once, and at random, in a class of no known base."""

    def transform(self, results):
        results['img'] = np.roll(cv2.imread(results['img_path']), np.random.randint(9), 1)
        results['gt_seg_map'] = LABEL + random.randint(0, 1) * int(torch.rand(1) * 0)
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


def build(folder, image, label=LABEL, pipeline=(), suffix='.png', **kwargs):
    """A data set of one image and label, which are arrays or functions that write to a path."""
    stem = 'train/a/a_0'
    written = []
    for path, content in ((f'leftImg8bit/{stem}_leftImg8bit{suffix}', image),
                          (f'gtFine/{stem}_gtFine_labelTrainIds.png', label)):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif content is not None:
            Image.fromarray(content).save(path)
        written.append(path)
    return KNCityscapesDataset(
        data_root=str(folder), data_prefix=dict(img_path='leftImg8bit/train',
                                                seg_map_path='gtFine/train'),
        img_suffix=f'_leftImg8bit{suffix}', pipeline=[*pipeline, PackSegInputs()], **kwargs)


def image(*channels, value=7):
    return np.full((6, 4, *channels), value, np.uint8)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path, exif=exif)


def unturned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(path, exif=exif)


def radiance(path):
    """A format that OpenCV reads and Pillow does not."""
    assert cv2.imwrite(str(path), np.ones((6, 4, 3), np.float32))


def palette(path):
    picture = Image.fromarray(LABEL)
    picture.putpalette([i for i in range(256) for _ in range(3)])
    picture.save(path)


def array(content):
    def write(path):
        with open(path, 'wb') as file:
            np.save(file, content)
    return write


COLOURED = COLOURS[np.array([[0, 1, 2, 2]] * 6)]
READABLE = {
    '12 bands': dict(image=array(image(12)), suffix='.tif', pipeline=[
        LoadImageFromFile(imdecode_backend='tifffile'), LoadAnnotations()]),
    'npy': dict(image=array(image(5)), suffix='.npy', pipeline=[LoadArray(), LoadAnnotations()]),
    'colours': dict(image=image(3), label=COLOURED, pipeline=[LoadImageFromFile(),
                                                              LoadColours()]),
    'colours after Resize': dict(image=image(3), label=COLOURED, pipeline=[
        LoadImageFromFile(), Resize(scale=(8, 12)), LoadColours()]),
    'colours, made indices later': dict(image=image(3), label=COLOURED, pipeline=[
        LoadImageFromFile(), LoadAnnotations(), ToIndices()]),
    'labels elsewhere': dict(
        image=image(3), label=lambda path: np.save(path.with_suffix('.npy'), LABEL),
        pipeline=[LoadImageFromFile(), LoadElsewhere()]),
    'no known base': dict(image=image(3), pipeline=[Read()]),
    'named elsewhere': dict(
        image=lambda path: path.touch() or cv2.imwrite(str(path.with_name('img_path.png')),
                                                       image(3)),
        label=lambda path: cv2.imwrite(str(path.with_name('seg_map_path.png')), LABEL),
        pipeline=[Elsewhere(), LoadImageFromFile(), LoadAnnotations()]),
    'augmented': dict(image=image(3), pipeline=[LoadImageFromFile(), LoadAnnotations(),
                                                Augment()]),
    'unchanged': dict(image=image(), pipeline=[LoadImageFromFile(color_type='unchanged'),
                                               LoadAnnotations()]),
    'turned': dict(image=turned, suffix='.jpg', pipeline=[LoadImageFromFile(),
                                                          LoadAnnotations()]),
    'not turned': dict(image=unturned, suffix='.jpg', pipeline=[
        LoadImageFromFile(color_type='color_ignore_orientation'), LoadAnnotations()]),
    'Radiance': dict(image=radiance, suffix='.hdr', pipeline=[LoadImageFromFile(),
                                                              LoadAnnotations()]),
    'CMYK': dict(image=lambda path: Image.new('CMYK', (4, 6)).save(path), suffix='.jpg',
                 pipeline=[LoadImageFromFile(), LoadAnnotations()]),
    'palette': dict(image=image(3), label=palette, pipeline=[LoadImageFromFile(),
                                                             LoadAnnotations()]),
    "mmcv's": dict(image=image(3), pipeline=[
        LoadImageFromFile(), MMCVLoadAnnotations(with_bbox=False, with_label=False,
                                                 with_seg=True)]),
}


@pytest.fixture(autouse=True)
def decoder(monkeypatch):
    """mmcv's decoder 'tifffile' is an optional package: a stand-in reads arrays."""
    monkeypatch.setattr(mmcv_io, 'tifffile', types.SimpleNamespace(imread=np.load))


@pytest.mark.parametrize('case', READABLE)
def test_what_the_pipeline_reads_is_never_refused(case, tmp_path):
    dataset = build(tmp_path, **READABLE[case])
    assert dataset[0]['data_samples'].gt_sem_seg.shape == (6, 4)
    record = scan(dataset.get_data_info(0), rules_of(dataset))
    assert record.faults == [] and record.size == (6, 4)
    label = dataset[0]['data_samples'].gt_sem_seg.data.ravel()
    assert record.pixels.tolist() == torch.bincount(label, minlength=256).tolist()


def test_an_image_that_may_be_left_out(tmp_path):
    dataset = build(tmp_path, lambda path: path.touch(), pipeline=[
        LoadImageFromFile(ignore_empty=True), LoadAnnotations()])
    assert scan(dataset.get_data_info(0), rules_of(dataset)).faults == []


def test_the_random_numbers_of_the_program_stay(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    build(tmp_path, image(3), pipeline=[Read()])
    assert draw() == expected


UNREADABLE = {
    'npy': (dict(image=lambda path: path.write_bytes(b'none'), suffix='.npy',
                 pipeline=[LoadArray(), LoadAnnotations()]),
            r'a_0_leftImg8bit.npy: the pipeline must load this image, got from LoadArray .*; '
            'restore the file, or mend that transform'),
    'elsewhere': (dict(image=image(3), pipeline=[LoadImageFromFile(), LoadElsewhere()]),
                  r'labelTrainIds.png: the pipeline must load this label, got from LoadElsewhere '
                  'FileNotFoundError'),
    'colours': (dict(image=image(3), label=COLOURED, pipeline=[
        LoadImageFromFile(), LoadAnnotations(imdecode_backend='cv2')]),
        'labels of one channel are needed.*got 3 channels'),
    'size': (dict(image=array(image(3)[:4]), suffix='.npy', pipeline=[
        LoadArray(), LoadAnnotations()]), 'got 6 x 4 and 4 x 4'),
    '12 bands': (dict(image=array(image(12)), suffix='.tif', pipeline=[
        LoadImageFromFile(), LoadAnnotations()]), 'cannot be read as an image'),
    'augmented': (dict(image=image(3)[:4], pipeline=[LoadImageFromFile(), LoadAnnotations(),
                                                     Augment()]), 'got 6 x 4 and 4 x 4'),
}


@pytest.mark.parametrize('case', UNREADABLE)
def test_what_the_pipeline_cannot_read_is_named(case, tmp_path):
    settings, message = UNREADABLE[case]
    with pytest.raises(ValueError, match=f'a bad file.*{message}'):
        build(tmp_path, **settings)
    dataset = build(tmp_path, **settings, check_files=False)
    fault, = scan(dataset.get_data_info(0), rules_of(dataset)).faults
    assert str(tmp_path) in fault


def test_missing_labels_before_ones_own_augmentation(tmp_path):
    with pytest.raises(ValueError, match='1 of 1 label files are missing'):
        build(tmp_path, image(3), None, [LoadImageFromFile(), LoadAnnotations(), Augment()])


@pytest.mark.parametrize('heads, wrong', [
    ([(19, 255)], [30]), ([(19, 30)], [255]), ([(19, 255), (19, 30)], [30, 255]),
    ([(2, 255)], [2, 30])])
def test_ignored_is_what_all_heads_ignore(heads, wrong, tmp_path):
    """Not the data set's ignore_index, which mmseg never reads."""
    label = np.array([[0, 1, 2, 255], [30, 30, 30, 30]] * 3, np.uint8)
    dataset = build(tmp_path, image(3), label, [LoadImageFromFile(), LoadAnnotations()],
                    ignore_index=2)
    faults = scan(dataset.get_data_info(0), rules_of(dataset, heads)).faults
    assert f', got {", ".join(map(str, wrong))} in ' in faults[0]


def test_values_of_an_own_loader_that_are_no_class(tmp_path):
    class Negative(LoadAnnotations):
        def _load_seg_map(self, results):
            results['gt_seg_map'] = np.full((6, 4), -1)

    dataset = build(tmp_path, image(3), pipeline=[LoadImageFromFile(), Negative()])
    sample = dataset.get_data_info(0)
    assert scan(sample, rules_of(dataset, [(19, -1)])).faults == []
    fault, = scan(sample, rules_of(dataset)).faults
    assert 'got -1; mend the transform that loads them' in fault
