"""Segments images with a file that tools/deployment/export.py wrote; needs no mmseg and no torch.

    pip install numpy pillow onnxruntime
    python infer_onnx.py model.onnx street.png another.png --out-dir out

writes the labels of street.png to out/street.png, one byte a pixel (two with more than 256
classes), as mmseg's pred_sem_seg has them. The file stands alone: copy it beside the model. --size
resizes what the network sees, height and width; the labels come back in the image's size, turned
as its EXIF data say.

A network of one channel takes the image in grey, one of four takes RGBA files in the order of
OpenCV, BGRA. Any number of channels comes as .npy, (H, W, C) or (C, H, W), or as TIFF, for which
pip install tifffile; with values that are not of 8 bits if the file was exported with
--image-dtype float32.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Takes(NamedTuple):
    """What a network takes: images of ``channels`` and ``dtype``, of one ``size`` or of any."""
    name: str = 'image'
    channels: int = 3
    dtype: type = np.uint8
    size: tuple[int, int] | None = None


RGB = Takes()


def takes(session) -> Takes:
    given, = session.get_inputs()
    _, channels, *size = given.shape
    return Takes(given.name, channels, np.float32 if 'float' in given.type else np.uint8,
                 tuple(size) if all(isinstance(side, int) for side in size) else None)


def upright(image: Image.Image, network: Takes = RGB) -> np.ndarray:
    """An image (H, W, C), turned as its EXIF data say: what OpenCV reads for mmseg, but in RGB."""
    name = getattr(image, 'filename', 'the image')
    deep = image.mode[0] in 'IF'  # whose values convert() would clip
    if deep and (network.dtype is np.uint8 or network.channels != 1):
        raise ValueError(f'images of 8 bits a channel are needed, got mode {image.mode} in '
                         f'{name}; convert it to 8 bits')
    image = ImageOps.exif_transpose(image)
    if network.channels == 3:
        return np.asarray(image.convert('RGB'))
    if network.channels == 1:
        return np.asarray(image if deep else image.convert('L'))[..., None]
    if network.channels == 4 and image.mode == 'RGBA':
        return np.asarray(image)[..., (2, 1, 0, 3)]
    raise ValueError(f'images of {network.channels} channels are needed, got mode {image.mode} in '
                     f'{name}; save them as .npy, (H, W, {network.channels})')


def read(path: Path, network: Takes) -> np.ndarray:
    """An image (H, W, C) with the channels and of the dtype that a network takes."""
    path, usual = Path(path), network.channels in (1, 3) and network.dtype is np.uint8
    if path.suffix == '.npy':
        image = np.load(path)
    elif path.suffix.lower() in ('.tif', '.tiff') and not usual:
        import tifffile
        image = tifffile.imread(path)
    else:
        return upright(Image.open(path), network)
    shape = image.shape
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim == 3 and image.shape[2] != network.channels == image.shape[0]:
        image = np.moveaxis(image, 0, 2)
    if image.ndim != 3 or image.shape[2] != network.channels:
        raise ValueError(f'images of {network.channels} channels are needed, got {shape} in '
                         f'{path}; choose the channels that the network was trained on')
    if network.dtype is np.uint8 and image.dtype != np.uint8:
        raise ValueError(f'images of 8 bits a channel are needed, got {image.dtype} in {path}; '
                         'export the network with --image-dtype float32')
    return image


def pixels(image: np.ndarray, network: Takes = RGB,
           size: tuple[int, int] | None = None) -> np.ndarray:
    """What the network takes: (1, C, H, W) of an image (H, W, C), resized to ``size``, (H, W)."""
    size = size or network.size
    if network.size not in (None, size):
        raise ValueError(f'the network takes images of {network.size} only, got --size {size}; '
                         'leave --size out')
    image = image.astype(network.dtype).transpose(2, 0, 1)
    if size is not None:
        image = np.stack([np.asarray(Image.fromarray(channel).resize(
            size[::-1], Image.Resampling.BILINEAR)) for channel in image])
    return np.ascontiguousarray(image[None])


def segment(session, image: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Labels (H, W), uint8 or uint16, of an image (H, W, C)."""
    network = takes(session)
    output, = session.run(None, {network.name: pixels(image, network, size)})
    labels = output[0]
    if output.ndim == 4:  # --output logits
        labels = labels.argmax(0) if len(labels) > 1 else labels[0] > cut(session)
    kind = np.uint8 if labels.max(initial=0) < 256 else np.uint16
    labels = Image.fromarray(labels.astype(np.int32))
    return np.asarray(labels.resize(image.shape[1::-1], Image.Resampling.NEAREST)).astype(kind)


def cut(session) -> float:
    """The logit above which a pixel is foreground, of the probability in the file."""
    probability = float(session.get_modelmeta().custom_metadata_map['threshold'])
    with np.errstate(divide='ignore'):  # of thresholds 0 and 1
        return np.log(probability) - np.log1p(-probability)


def each(paths: list[Path], network: Takes, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """What the network takes, image by image."""
    for path in paths:
        yield pixels(read(path, network), network, size)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='ONNX file')
    parser.add_argument('images', nargs='+', type=Path)
    parser.add_argument('--out-dir', type=Path, default=Path('out'), help='(%(default)s)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                        help="that the network sees (each image's own)")
    parser.add_argument('--threads', type=int, default=0, help='0 for all cores (%(default)s)')
    args = parser.parse_args()
    args.size = args.size and tuple(args.size)
    args.outs = [args.out_dir / f'{path.stem}.png' for path in args.images]
    images, written = {path.resolve() for path in args.images}, set()
    for out in args.outs:
        path = out.resolve()
        if path in images:
            parser.error(f'{out} is one of the images and would be overwritten: name another '
                         '--out-dir')
        if path in written:
            parser.error(f'{out} would be written twice, by images of one name: segment them in '
                         'turn, each with its --out-dir')
        written.add(path)
    return args


def main() -> None:
    args = parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(args.model, options,
                                           providers=onnxruntime.get_available_providers())
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for path, out in zip(args.images, args.outs, strict=True):
        labels = segment(session, read(path, takes(session)), args.size)
        Image.fromarray(labels).save(out)
        print(f'{out}: {labels.shape[0]} x {labels.shape[1]}, labels {np.unique(labels).tolist()}')


if __name__ == '__main__':
    main()
