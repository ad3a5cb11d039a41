"""Which transforms of a pipeline load images and labels, and what they make of a sample."""
import contextlib
import copy
import os
import random
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations as MMCVLoadAnnotations
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations, loading
from PIL import Image

_KNOWN = ('mmcv', 'mmseg', 'mmengine', 'mmseg_kn')  # whose transforms either load or do not


class Loaders(NamedTuple):
    """The loaders of a pipeline.

    ``image`` and ``label`` are mmcv's LoadImageFromFile and mmseg's LoadAnnotations where they
    are exactly these and read with decoders whose result the header of a file tells, else None.
    ``others`` are all transforms that load, or may do so, in their order: empty where ``image``
    and ``label`` say everything. ``whole`` is the pipeline.
    """
    image: LoadImageFromFile | None
    label: LoadAnnotations | None
    others: list
    whole: object

    def need_label_files(self) -> bool:
        """Whether mmseg's LoadAnnotations reads the files that a dataset lists."""
        if self.label:
            return True
        first = next((t for t in self.others if _foreign(t) or isinstance(
            t, MMCVLoadAnnotations)), None)
        return type(first) is LoadAnnotations


class Loaded(NamedTuple):
    """A sample: (H, W) of its image and of its label as loaded, the label, what went wrong."""
    size: tuple | None = None
    label_size: tuple | None = None
    label: np.ndarray | None = None
    fault: str | None = None


def transforms_of(transforms) -> Iterator:
    """Yields the transforms of a pipeline, those of test-time augmentation's branches too."""
    for transform in transforms:
        yield transform
        yield from transforms_of(getattr(transform, 'transforms', ()))
        for branch in getattr(transform, 'subroutines', ()):
            yield from transforms_of([branch])


def loaders_of(pipeline) -> Loaders:
    """The :class:`Loaders` of a dataset's pipeline."""
    parts = list(transforms_of(pipeline.transforms))
    others = [t for t in parts if _foreign(t) or isinstance(t, (
        LoadImageFromFile, MMCVLoadAnnotations)) or type(t).__module__ == loading.__name__]
    images = [t for t in others if not isinstance(t, MMCVLoadAnnotations) and not _foreign(t)]
    labels = [t for t in others if isinstance(t, MMCVLoadAnnotations) or _foreign(t)]
    # One's own transform may name another image before it is loaded, and make indices of what
    # LoadAnnotations has read.
    image = images[0] if images and all(map(_plain_image, images)) and \
        not _foreign(others[0]) else None
    label = labels[0] if labels and all(map(_plain_label, labels)) else None
    done = (image or not images) and (label or not labels)
    return Loaders(image, label, [] if done else others, pipeline)


def _foreign(transform) -> bool:
    return type(transform).__module__.split('.')[0] not in _KNOWN


def _plain_image(transform) -> bool:
    return type(transform) is LoadImageFromFile and not transform.ignore_empty and \
        transform.imdecode_backend in ('cv2', 'pillow') and \
        getattr(transform, 'file_client_args', None) is None


def _plain_label(transform) -> bool:
    return type(transform) is LoadAnnotations and transform.imdecode_backend == 'pillow'


def label_index(loader: LoadAnnotations, dataset) -> np.ndarray:
    """What a loader makes of the 256 values: it loads a file that holds each of them once."""
    loader = copy.copy(loader)
    loader.backend_args = None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'label.png')
        Image.fromarray(np.arange(256, dtype=np.uint8)[None]).save(path)
        return loader(dict(
            seg_map_path=path, seg_fields=[], label_map=getattr(dataset, 'label_map', None),
            reduce_zero_label=getattr(dataset, 'reduce_zero_label', False)))['gt_seg_map']


def load(sample: dict, loaders: Loaders) -> Loaded:
    """Runs the transforms that load; if one fails, the whole pipeline, which has the last word.

    The transforms between, which resize and crop, are left out, and the program's random numbers
    stay as they are.

    Args:
        sample: As the dataset's ``get_data_info`` gives it.
        loaders: Of its pipeline.
    """
    results, sizes, transform = copy.deepcopy(sample), {}, None
    with _own_randomness():
        try:
            for transform in loaders.others:
                results = transform(results)
                if results is None:  # left out, as with ignore_empty=True
                    return Loaded()
                for key in ('img', 'gt_seg_map'):
                    if key not in sizes and isinstance(results.get(key), np.ndarray):
                        sizes[key] = results[key].shape[:2]
        except Exception as error:  # one's own loader raises what it likes
            try:
                loaders.whole(copy.deepcopy(sample))
            except Exception:
                return Loaded(fault=_told(sample, 'img' in sizes, transform, error))
            return Loaded()
    return Loaded(sizes.get('img'), sizes.get('gt_seg_map'), results.get('gt_seg_map'))


def _told(sample, has_image, transform, error) -> str:
    path = has_image and sample.get('seg_map_path') or sample.get('img_path')
    kind = 'label' if has_image else 'image'
    return (f'{path}: the pipeline must load this {kind}, got from {type(transform).__name__} '
            f'{type(error).__name__}: {error}; restore the file, or mend that transform')


@contextlib.contextmanager
def _own_randomness():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
