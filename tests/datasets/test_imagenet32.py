"""ImageNet32x32, read from pickles like the published ones."""
import pickle

import numpy as np
import pytest
from mmengine.registry import DATASETS

from mmseg_kn.datasets import ImageNet32

COUNTS = (3, 2, 4)


def write(root, counts=COUNTS, name='train_data_batch_{}', first=1, **changes):
    """Files of random images; returns all images (N, 3072) and labels from 1."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for i, count in enumerate(counts, first):
        images.append(rng.integers(0, 256, (count, 3072), dtype=np.uint8))
        labels.append(rng.integers(1, 1001, count).tolist())
        content = dict(dict(data=images[-1], labels=labels[-1], mean=np.zeros(3072)), **changes)
        (root / name.format(i)).write_bytes(pickle.dumps(content, 4))
    return np.concatenate(images), np.concatenate(labels)


@pytest.fixture
def files():
    return [f'train_data_batch_{i}' for i in (1, 2, 3)]


def test_items(tmp_path, files):
    images, labels = write(tmp_path)
    data = DATASETS.build(dict(type='ImageNet32', data_root=str(tmp_path), files=files,
                               pipeline=[], max_refetch=0))
    assert isinstance(data, ImageNet32) and len(data) == 9 and not data.test_mode
    for i in (0, 2, 3, 8):
        item = data[i]
        assert item['img'].shape == (32, 32, 3) and item['img'].flags.c_contiguous
        # The file has all of red, then all of green, then all of blue.
        np.testing.assert_array_equal(item['img'][5, 7], images[i].reshape(3, 32, 32)[:, 5, 7])
        assert item['gt_label'] == labels[i] - 1 and item['sample_idx'] == i
    with pytest.raises(IndexError):
        data[9]


def test_parts_of_the_data(tmp_path, files):
    _, labels = write(tmp_path)
    for indices, expected in ((4, labels[:4]), ([8, 0], labels[[8, 0]])):
        data = ImageNet32(str(tmp_path), files=files, indices=indices)
        assert [data[i]['gt_label'] + 1 for i in range(len(data))] == expected.tolist()


def test_validation(tmp_path):
    _, labels = write(tmp_path, (2, ), 'val_data')
    data = ImageNet32(str(tmp_path), split='val')
    assert data.test_mode and [data[i]['gt_label'] + 1 for i in (0, 1)] == labels.tolist()


def test_all_ten_files_are_read(tmp_path):
    write(tmp_path, [1] * 9)
    with pytest.raises(FileNotFoundError, match='train_data_batch_10 is missing; unpack'):
        ImageNet32(str(tmp_path))
    write(tmp_path, [1], first=10)
    assert len(ImageNet32(str(tmp_path))) == 10  # the remedy


@pytest.mark.parametrize('changes, message', [
    (dict(data=np.zeros((3, 12288), np.uint8)), r'uint8 \(N, 3072\), got uint8 \(3, 12288\)'),
    (dict(data=np.zeros((3, 3072))), 'got float64'),
    (dict(data=[1]), 'got list'),
    (dict(labels=[1, 2]), r'3 integers from 1 to 1000, got int64 \(2,\)'),
    (dict(labels=[0, 1, 2]), 'from 1 to 1000'),
    (dict(labels=[1, 2, 1001]), 'from 1 to 1000'),
    (dict(labels=['a', 'b', 'c']), 'from 1 to 1000'),
])
def test_other_contents(tmp_path, changes, message):
    write(tmp_path, (3, ), **changes)
    with pytest.raises(ValueError, match=message):
        ImageNet32(str(tmp_path), files=['train_data_batch_1'])


def test_other_splits_and_files(tmp_path):
    with pytest.raises(ValueError, match="split must be one of .*got 'test'"):
        ImageNet32(str(tmp_path), split='test')
    (tmp_path / 'val_data').write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match='val_data must hold .* got NoneType'):
        ImageNet32(str(tmp_path), split='val')
