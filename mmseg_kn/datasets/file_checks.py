"""What is wrong with an image file or its label file, by its header or by all of it."""
import io
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from mmengine import fileio

from .headers import Header, UnknownFormat, decode, image_fault, label_fault, read_header
from .label_values import Classes, value_fault
from .pipeline_loaders import Loaders, label_index, load, loaders_of


class Rules(NamedTuple):
    """What a dataset asks of its files: ``classes`` is None where it names none."""
    loaders: Loaders
    classes: Classes | None


class Record(NamedTuple):
    """One image and its label, read: the image's size, pixels of each label value, faults."""
    size: tuple | None
    pixels: np.ndarray | None
    faults: list


def rules_of(dataset, heads: Sequence[tuple[int, int]] = ()) -> Rules:
    """The :class:`Rules` of a dataset of mmseg.

    Args:
        dataset: One that reads files, of mmseg's kind.
        heads: (num_classes, ignore_index) of each head that is trained with it. By default one
            head with the dataset's classes and mmseg's 255; mmseg never reads a dataset's
            ``ignore_index``.
    """
    loaders = loaders_of(dataset.pipeline)
    names = dataset.metainfo.get('classes')
    if names is None:
        return Rules(loaders, None)
    # Labels that one's own loader has read are as training sees them.
    index = label_index(loaders.label, dataset) if loaders.label else np.arange(256)
    own = not getattr(dataset, 'METAINFO', {}).get('classes')
    return Rules(loaders, Classes(names, index, list(heads) or [(len(names), 255)], own))


def summary(faults: list[str]) -> str:
    """The message of some of the files that were looked at, of which it names one."""
    files = 'a bad file' if len(faults) == 1 else f'{len(faults)} bad files'
    return (f'{files} among those looked at (tools/misc/check_dataset.py looks at all), e.g. '
            f'{min(faults)}')


def faults_of(sample: dict, rules: Rules) -> list[str]:
    """The faults of local files that their headers tell, or the pipeline's own loaders."""
    return _read(sample, rules, lambda path, loader: open(path, 'rb'), lambda file: None).faults


def scan(sample: dict, rules: Rules) -> Record:
    """Reads and decodes an image and its label through mmengine's file backends.

    Args:
        sample: As the dataset's ``get_data_info`` gives it.
        rules: Of the dataset.
    """
    return _read(sample, rules, _fetch, decode)


def label_pixels(sample: dict, rules: Rules) -> np.ndarray | None:
    """How many pixels of a label have each value, (256,); None where the pipeline reads none."""
    path, loader = sample.get('seg_map_path'), rules.loaders.label
    try:
        # As mmseg does, which takes 16 bits, too, and 3-d arrays of one channel.
        label = load(sample, rules.loaders).label if not loader else \
            decode(_fetch(path, loader)).squeeze().astype(np.uint8)
    except (OSError, ValueError, TypeError):  # which training will meet, if it comes to that
        return None
    return None if label is None or label.ndim != 2 else _count(label)[0]


def _fetch(path: str, loader) -> BinaryIO:
    return io.BytesIO(fileio.get(path, backend_args=loader.backend_args))


def _read(sample: dict, rules: Rules, fetch: Callable, pixels_of: Callable) -> Record:
    """The record of a sample, of as much of it as ``pixels_of`` an opened file tells."""
    loaders, faults, size, label = rules.loaders, [], None, None

    def check(path: str, loader, fault_of: Callable) -> tuple:
        """The size of a file, and what is in it unless something is wrong."""
        header = None
        try:
            with fetch(path, loader) as file:
                header = read_header(file, getattr(loader, 'color_type', '') in
                                     ('color', 'grayscale'))
                if fault := fault_of(header):
                    faults.append(f'{path}: {fault}')
                    return header.size, None
                return header.size, pixels_of(file)
        except OSError as error:
            faults.append(f'{path} cannot be read ({error.strerror or error}); restore it, or '
                          "check the dataset's suffixes and folders")
        except UnknownFormat as error:
            own = load(sample, loaders._replace(others=[loader]))
            if own.fault:
                faults.append(f'{path} {error}')
            return own.size, own.label
        except ValueError as error:
            faults.append(f'{path} {error}')
        return header and header.size, None

    if loaders.image and 'img_path' in sample:
        colour = loaders.image.color_type.startswith('color')
        size, _ = check(sample['img_path'], loaders.image,
                        lambda header: image_fault(header) if colour else None)
    path = sample.get('seg_map_path')
    if loaders.label and path:
        _, label = check(path, loaders.label, lambda header: label_fault(header, size))
    if loaders.others and not faults:
        own = load(sample, loaders)
        size = size or own.size
        label = own.label if label is None else label
        if own.fault:
            faults.append(own.fault)
        elif own.size and own.label_size and not loaders.label:
            shown = Header(own.label_size, 8, own.label.shape[2] if own.label.ndim > 2 else 1,
                           False)
            if fault := label_fault(shown, own.size):
                faults.append(f'{path or sample.get("img_path")}: {fault}')
                label = None
    if label is None:
        return Record(size, None, faults)
    pixels, outside = _count(label)
    fault = value_fault(pixels, rules.classes)
    if rules.classes and (strange := outside - {ignore for _, ignore in rules.classes.heads}):
        fault = (f'labels must be one of {len(rules.classes.names)} classes, got '
                 f'{", ".join(map(str, sorted(strange)[:8]))}; mend the transform that loads them')
    if fault:
        faults.append(f'{path or sample.get("img_path")}: {fault}')
    return Record(size, pixels, faults)


def _count(label: np.ndarray) -> tuple[np.ndarray, set]:
    """Pixels of each of 256 values, and the values that are none of these."""
    label = label.astype(np.int64).ravel()
    inside = (label >= 0) & (label < 256)
    return np.bincount(label[inside], minlength=256), set(np.unique(label[~inside]).tolist())
