"""What the header of an image or label file tells, and what it keeps mmseg from reading."""
import os
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

_PNG = b'\x89PNG\r\n\x1a\n'
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type; 3 has a palette
_ENDS = {_PNG: b'\0\0\0\0IEND\xaeB`\x82', b'\xff\xd8\xff': b'\xff\xd9'}  # PNG, JPEG
# Of CMYK mmcv's decoders make three channels by themselves.
_MODES = {'1': (1, 1), 'L': (8, 1), 'P': (8, 1), 'LA': (8, 2), 'PA': (8, 2), 'RGB': (8, 3),
          'YCbCr': (8, 3), 'RGBA': (8, 4), 'CMYK': (8, 3)}
_AGAIN = 'copy or convert it again'
_ACCEPT = 'check_files=False in the dataset takes it as it is'


class Header(NamedTuple):
    """Of an image file: ``size`` is (H, W), ``bits`` of one channel."""
    size: tuple
    bits: int
    channels: int
    palette: bool


class UnknownFormat(ValueError):
    """Pillow cannot read a file, which another decoder may."""


def read_header(file: BinaryIO, turn: bool = True) -> Header:
    """Reads the head and the last bytes of an image; decodes it only if it ends unusually.

    Args:
        file: Opened at its beginning.
        turn: Whether its decoder turns a JPEG as its EXIF entry says.

    Raises:
        ValueError: The file is empty or cut off; says so without its name.
        UnknownFormat: It is no image that Pillow reads.
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
    if turn and image.format == 'JPEG' and image.getexif().get(0x0112, 1) > 4:
        width, height = height, width
    bits, channels = _MODES.get(image.mode, (16 if '16' in image.mode else 32, 1))
    return Header((height, width), bits, channels, image.mode == 'P')


def _open(file: BinaryIO) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = 'unknown format' if isinstance(error, Image.UnidentifiedImageError) else error
        raise UnknownFormat(f'cannot be read as an image ({reason}); {_AGAIN}') from None


def decode(file: BinaryIO) -> np.ndarray:
    """The pixels of an image as mmseg reads a label; ValueError, without its name, if damaged."""
    image = _open(file)
    try:
        image.load()
        return np.asarray(image)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f'is damaged or cut off ({error}); {_AGAIN}') from None


def image_fault(header: Header) -> str | None:
    """What keeps an image from being the 8-bit colours that it is loaded as, or None."""
    if header.bits > 8:
        return (f'images of 8 bits a channel are needed, got {header.bits} bits, of which OpenCV '
                f'would drop the lower ones; convert it, or {_ACCEPT}')
    if header.channels == 3 or header.palette:
        return None
    if header.channels == 2:  # OpenCV makes four of them, Pillow two
        return ('images of 3 channels are needed, got 2 channels, grey and alpha; convert it to '
                f'RGB, or {_ACCEPT}')
    number = header.channels
    what = 'a grey image' if number == 1 else f'{number} channels'
    few = f'{number} value' + 's' * (number > 1)
    return (f'images of 3 channels are needed, got {what}; convert it to RGB, or train on '
            f"{number}: color_type='unchanged' in each LoadImageFromFile, no "
            f'PhotoMetricDistortion, in_channels={number} of the backbone, and in '
            f'data_preprocessor mean and std of {few} and bgr_to_rgb=False; or {_ACCEPT}')


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
