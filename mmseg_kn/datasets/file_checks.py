"""What is wrong with an image file or its label file, by its header or by all of it."""
import io
import os
import struct
import tempfile
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from mmcv.transforms import LoadAnnotations as MMCVLoadAnnotations
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

_PNG = b'\x89PNG\r\n\x1a\n'
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type; 3 has a palette
_ENDS = {_PNG: b'\0\0\0\0IEND\xaeB`\x82', b'\xff\xd8\xff': b'\xff\xd9'}  # PNG, JPEG
_MODES = {'1': (1, 1), 'L': (8, 1), 'P': (8, 1), 'LA': (8, 2), 'PA': (8, 2), 'RGB': (8, 3),
          'YCbCr': (8, 3), 'RGBA': (8, 4), 'CMYK': (8, 4)}
_AGAIN = 'copy or convert it again'
_ACCEPT = 'check_files=False in the dataset takes it as it is'


class Header(NamedTuple):
    """Of an image file: ``size`` is (H, W), ``bits`` of one channel."""
    size: tuple
    bits: int
    channels: int
    palette: bool


class Rules(NamedTuple):
    """What a dataset asks of its files.

    ``color_type`` is that of its ``LoadImageFromFile``, None where no image is loaded that way;
    ``labels`` says whether its pipeline loads labels; ``index`` is what becomes of the 256
    values of a label file, None where there are no classes.
    """
    color_type: str | None
    labels: bool
    index: np.ndarray | None
    classes: Sequence[str]
    ignore_index: int

    def allowed(self) -> np.ndarray:
        """Which of the 256 values are a class or ignored."""
        return (self.index < len(self.classes)) | (self.index == self.ignore_index)


class Record(NamedTuple):
    """One image and its label, read: the image's size, pixels of each label value, faults."""
    size: tuple | None
    pixels: np.ndarray | None
    faults: list


def transforms_of(transforms):
    """Yields the transforms of a pipeline, those of test-time augmentation's branches too."""
    for transform in transforms:
        yield transform
        yield from transforms_of(getattr(transform, 'transforms', ()))
        for branch in getattr(transform, 'subroutines', ()):
            yield from transforms_of([branch])


def rules_of(dataset) -> Rules:
    """The :class:`Rules` of a dataset of mmseg."""
    parts = list(transforms_of(dataset.pipeline.transforms))
    loaders = [t.color_type for t in parts if isinstance(t, LoadImageFromFile)]
    classes = dataset.metainfo.get('classes')
    return Rules(loaders[0] if loaders else None,
                 any(isinstance(t, MMCVLoadAnnotations) for t in parts),
                 None if classes is None else _index_of(dataset), classes or (),
                 getattr(dataset, 'ignore_index', 255))


def _index_of(dataset) -> np.ndarray:
    """What mmseg makes of the 256 values: it loads a label file that holds each of them once."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'label.png')
        Image.fromarray(np.arange(256, dtype=np.uint8)[None]).save(path)
        return LoadAnnotations()(dict(
            seg_map_path=path, seg_fields=[], label_map=getattr(dataset, 'label_map', None),
            reduce_zero_label=getattr(dataset, 'reduce_zero_label', False)))['gt_seg_map']


def read_header(file: BinaryIO) -> Header:
    """Reads the head and the last bytes of an image; decodes it only if it ends unusually.

    Raises:
        ValueError: The file is empty, cut off or not an image; says so without its name.
    """
    head = file.read(32)
    if not head:
        raise ValueError(f'is empty; {_AGAIN}')
    end = next((end for start, end in _ENDS.items() if head.startswith(start)), None)
    if end:
        file.seek(-min(len(end), len(head)), os.SEEK_END)
        if file.read() != end:  # cut off, or something follows the image
            file.seek(0)
            if head.startswith(_PNG) and end not in file.read():
                raise ValueError(f'is cut off: a PNG ends in an IEND chunk; {_AGAIN}')
            decode(file)
    if head.startswith(_PNG):
        # Pillow shows 16-bit colours as 8-bit ones.
        width, height, bits, kind = struct.unpack('>IIBB', head[16:26])
        return Header((height, width), bits, _PNG_CHANNELS.get(kind, 0), kind == 3)
    image = _open(file)
    width, height = image.size
    if image.format == 'JPEG' and image.getexif().get(0x0112, 1) > 4:
        width, height = height, width  # OpenCV turns it as its EXIF entry says
    bits, channels = _MODES.get(image.mode, (16 if '16' in image.mode else 32, 1))
    return Header((height, width), bits, channels, image.mode == 'P')


def _open(file: BinaryIO) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = 'unknown format' if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f'cannot be read as an image ({reason}); {_AGAIN}') from None


def decode(file: BinaryIO) -> np.ndarray:
    """The pixels of an image as mmseg reads a label; ValueError, without its name, if damaged."""
    image = _open(file)
    try:
        image.load()
        return np.asarray(image)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f'is damaged or cut off ({error}); {_AGAIN}') from None


def image_fault(header: Header, rules: Rules) -> str | None:
    """What keeps an image from being the 8-bit colours that it is loaded as, or None."""
    if not (rules.color_type or '').startswith('color'):
        return None
    if header.bits > 8:
        return (f'images of 8 bits a channel are needed, got {header.bits} bits, of which OpenCV '
                f'would drop the lower ones; convert it, or {_ACCEPT}')
    if header.channels != 3 and not header.palette:
        what = 'a grey image' if header.channels == 1 else f'{header.channels} channels'
        return (f'images of 3 channels are needed, got {what}; convert it to RGB, or set '
                "color_type='unchanged' in LoadImageFromFile and in_channels of the backbone, or "
                f'{_ACCEPT}')
    return None


def label_fault(header: Header, size: tuple | None) -> str | None:
    """What keeps a file from holding an index for each pixel of an image of this size."""
    if header.channels != 1:
        return (f'labels of one channel are needed, the index of the class, got '
                f'{header.channels} channels, as pictures in colours have; convert colours to '
                'indices')
    # Pillow stretches grey values of 2 and 4 bits to 0 ... 255.
    if header.bits not in (1, 8) and not header.palette:
        return (f'labels of 8 bits are needed, got {header.bits} bits; convert it, with indices '
                'from 0 to 254 and 255 for ignored pixels')
    if size is not None and header.size != size:
        return ('a label must have the size of its image, got {} x {} and {} x {} (H x W); make '
                'it again from the annotation, or resize it with nearest neighbours'
                .format(*header.size, *size))
    return None


def value_fault(pixels: np.ndarray, rules: Rules) -> str | None:
    """Which label values are no class, given how many pixels have each, (256,); or None."""
    if rules.index is None:
        return None
    wrong = np.flatnonzero((pixels > 0) & ~rules.allowed())
    if not len(wrong):
        return None
    number = len(rules.classes)
    valid = np.flatnonzero(rules.allowed() & (rules.index != rules.ignore_index))
    share = pixels[wrong].sum() / pixels.sum()
    values = ', '.join(map(str, wrong[:8])) + ', ...' * (len(wrong) > 8)
    remedy = ('renumber them, or name every class in metainfo=dict(classes=...) and set '
              'num_classes of the heads to match')
    if number == 19 and wrong.max() < 34:
        remedy = ("these look like Cityscapes' labelIds: mmseg's "
                  'tools/dataset_converters/cityscapes.py makes *_labelTrainIds.png of the '
                  'polygons, and seg_map_suffix must name those')
    return (f'labels must be one of {number} classes, {valid.min()} to {valid.max()}, or ignored, '
            f'got {values} in {share:.1%} of its pixels; {remedy}')


def header_faults(image: str, label: str | None, rules: Rules) -> list[str]:
    """The faults of a local image and its label that their headers tell, with their names."""
    faults, size = [], None
    if rules.color_type is not None:
        with open(image, 'rb') as file:
            size = _tell(faults, image, file, lambda header: image_fault(header, rules))
    if label and rules.labels:
        with open(label, 'rb') as file:
            _tell(faults, label, file, lambda header: label_fault(header, size))
    return faults


def _tell(faults: list, path: str, file: BinaryIO, fault_of) -> tuple | None:
    """Adds the fault of a file's header, with its name; returns its size unless unreadable."""
    try:
        header = read_header(file)
    except ValueError as error:
        faults.append(f'{path} {error}')
        return None
    if fault := fault_of(header):
        faults.append(f'{path}: {fault}')
    return header.size


def scan(sample: dict, rules: Rules, backend_args: dict | None) -> Record:
    """Reads and decodes an image and its label through mmengine's file backends.

    Args:
        sample: ``img_path`` and, if there is a label, ``seg_map_path``, as mmseg's datasets list.
        rules: Of the dataset.
        backend_args: Of the dataset.
    """
    faults, size, pixels = [], None, None

    def check(path, fault_of):
        """The size and, unless something is wrong, the pixels of a file."""
        try:
            file = io.BytesIO(fileio.get(path, backend_args=backend_args))
        except OSError as error:
            faults.append(f'{path} cannot be read ({error.strerror or error}); restore it, or '
                          "check the dataset's suffixes and folders")
            return None, None
        before = len(faults)
        size = _tell(faults, path, file, fault_of)
        if len(faults) > before:
            return size, None
        try:
            return size, decode(file)
        except ValueError as error:
            faults.append(f'{path} {error}')
            return size, None

    if rules.color_type is not None:
        size, _ = check(sample['img_path'], lambda header: image_fault(header, rules))
    label = sample.get('seg_map_path')
    if label and rules.labels:
        _, values = check(label, lambda header: label_fault(header, size))
        if values is not None:
            pixels = np.bincount(values.astype(np.uint8).ravel(), minlength=256)
            if fault := value_fault(pixels, rules):
                faults.append(f'{label}: {fault}')
    return Record(size, pixels, faults)
