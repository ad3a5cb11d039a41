"""ImageNet at 32 x 32 pixels, from the pickles in which it is published.

Source: P. Chrabaszcz, I. Loshchilov, F. Hutter, "A Downsampled Variant of ImageNet as an
Alternative to the CIFAR datasets", 2017, https://arxiv.org/abs/1707.08819; files from
https://image-net.org/download-images (downsampled, 32 x 32). The authors of kernel normalization
train privately on it.
"""
import bisect
import itertools
import os
from collections.abc import Sequence

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from ..checkpoints.safe_pickle import load_pickle

SIZE = 32
NUM_CLASSES = 1000
FILES = {'train': tuple(f'train_data_batch_{i}' for i in range(1, 11)), 'val': ('val_data', )}


class _Items(Sequence):
    """Items of several arrays of images, made when they are asked for."""

    def __init__(self, images: list[np.ndarray], labels: list[np.ndarray]) -> None:
        self.images, self.labels = images, labels
        self.ends = list(itertools.accumulate(map(len, images)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # from the end, and IndexError
        part = bisect.bisect_right(self.ends, index)
        at = index - self.ends[part]
        image = self.images[part][at].reshape(3, SIZE, SIZE).transpose(1, 2, 0)
        return dict(img=np.ascontiguousarray(image), gt_label=int(self.labels[part][at]))


# In mmengine's root registry, from where mmpretrain finds it.
@DATASETS.register_module()
class ImageNet32(BaseDataset):
    """ImageNet32x32 for mmpretrain's ``ImageClassifier``: items as those of its ``CIFAR100``.

    Images are (32, 32, 3), uint8, in the order RGB; labels 0 to 999, which is the publisher's
    numbering less one. The files are read without running code that they may carry. They stay in
    memory, 3.9 GB for the training set; worker processes share it.

    Args:
        data_root: Folder with ``train_data_batch_1`` to ``train_data_batch_10``, or ``val_data``.
        split: ``'train'``, 1,281,167 images, or ``'val'``, 50,000.
        files: Names of the files to read, in place of all of the split.
        kwargs: ``pipeline`` and others of mmengine's ``BaseDataset``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There is no such split, or a file does not hold such images and labels.
    """

    def __init__(self, data_root: str, split: str = 'train',
                 files: Sequence[str] | None = None, **kwargs) -> None:
        if split not in FILES:
            raise ValueError(f'split must be one of {tuple(FILES)}, got {split!r}')
        self.split = split
        self.files = tuple(files or FILES[split])
        kwargs.setdefault('test_mode', split != 'train')
        # Lists of dicts are serialized to save memory; arrays need not be.
        super().__init__(data_root=data_root, serialize_data=False, **kwargs)

    def load_data_list(self) -> _Items:
        paths = [os.path.join(self.data_root, name) for name in self.files]
        if missing := [path for path in paths if not os.path.isfile(path)]:
            raise FileNotFoundError(
                f'{missing[0]} is missing; unpack the pickles of ImageNet32x32 '
                '(https://image-net.org/download-images) there, or set data_root')
        return _Items(*zip(*map(_read, paths), strict=True))


def _read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3072) and labels (N,) of a file."""
    content = load_pickle(path)
    content = content if isinstance(content, dict) else {}
    images, labels = content.get('data'), np.asarray(content.get('labels', ()))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or (
            images.ndim != 2 or images.shape[1] != 3 * SIZE**2):
        found = f'{images.dtype} {images.shape}' if isinstance(images, np.ndarray) else (
            type(images).__name__)
        raise ValueError(f"{path} must hold under 'data' an array of uint8 (N, {3 * SIZE**2}), "
                         f'got {found}; get the 32 x 32 pixels variant of ImageNet')
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or (
            len(labels) and not 1 <= labels.min() <= labels.max() <= NUM_CLASSES):
        raise ValueError(f"{path} must hold under 'labels' {len(images)} integers from 1 to "
                         f'{NUM_CLASSES}, got {labels.dtype} {labels.shape}; get the file again')
    return images, labels.astype(np.int64) - 1
