"""Segments images with a file that tools/deployment/export.py wrote; needs no mmseg and no torch.

    pip install numpy pillow onnxruntime
    python infer_onnx.py model.onnx street.png another.png --out-dir out

writes the labels of street.png to out/street.png, one byte a pixel, as mmseg's pred_sem_seg has
them. The file stands alone: copy it beside the model. --size resizes what the network sees,
height and width; the labels come back in the image's size, turned as its EXIF data say.
"""
import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def upright(image: Image.Image) -> Image.Image:
    """An image in RGB, turned as its EXIF data say: what OpenCV reads for mmseg."""
    if image.mode[0] in 'IF':  # whose values convert() would clip
        raise ValueError(f'images of 8 bits a channel are needed, got mode {image.mode} in '
                         f"{getattr(image, 'filename', 'the image')}; convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert('RGB')


def pixels(image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """What the network takes: (1, 3, H, W), RGB, uint8, resized to ``size``, (H, W)."""
    image = upright(image)
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[None])


def segment(session, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """Labels (H, W), uint8, of an image that is H x W when upright."""
    image = upright(image)
    output, = session.run(None, {session.get_inputs()[0].name: pixels(image, size)})
    labels = output[0] if output.ndim == 3 else output[0].argmax(0)  # --output logits
    labels = Image.fromarray(labels.astype(np.uint8))
    return np.asarray(labels.resize(image.size, Image.Resampling.NEAREST))


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
        labels = segment(session, Image.open(path), args.size)
        Image.fromarray(labels).save(out)
        print(f'{out}: {labels.shape[0]} x {labels.shape[1]}, labels {np.unique(labels).tolist()}')


if __name__ == '__main__':
    main()
