"""Cuts an image classification set out of street scenes in Cityscapes layout.

Each crop is labelled with the class of the pixel at its centre; all classes are equally frequent.
The set, DST/train/CLASS/*.png and DST/val/CLASS/*.png, is read by train_classifier.py beside this
file, and by mmpretrain as a CustomDataset: image-level labels to pretrain a backbone with.

    python tools/benchmarks/street_crops.py data/toy_cityscapes data/street_crops
"""
import argparse
from collections import defaultdict
from pathlib import Path

import cv2
import mmengine
import numpy as np

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmseg.datasets import CityscapesDataset

LABELS = '_gtFine_labelTrainIds.png'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', type=Path, help='scenes in Cityscapes layout')
    parser.add_argument('dst', type=Path, help='folder to write, new or empty')
    parser.add_argument('--size', type=int, default=96, help='of a crop, pixels (%(default)s)')
    parser.add_argument('--per-class', type=int, default=300,
                        help='training crops of each class; a quarter for val (%(default)s)')
    parser.add_argument('--img-suffix', default='_leftImg8bit.png', help='(%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='(%(default)s)')
    args = parser.parse_args()
    if args.dst.is_file() or args.dst.is_dir() and any(args.dst.iterdir()):
        parser.error(f'{args.dst} must be a new or an empty folder')
    for split in ('train', 'val'):
        files = label_files(args.src, split)
        if not files:
            parser.error(f'no *{LABELS} in {args.src / "gtFine" / split}')
        image = image_of(files[0], args)
        if not image.is_file():
            parser.error(f'no image {image}; see --img-suffix')
    if args.size < 1 or args.per_class < 1:
        parser.error('--size and --per-class must be positive')
    return args


def label_files(src: Path, split: str) -> list[Path]:
    return sorted((src / 'gtFine' / split).rglob('*' + LABELS))


def image_of(label: Path, args: argparse.Namespace) -> Path:
    scene = label.relative_to(args.src / 'gtFine').parent
    name = label.name.removesuffix(LABELS) + args.img_suffix
    return args.src / 'leftImg8bit' / scene / name


def read(path: Path, flags: int) -> np.ndarray:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise SystemExit(f'{path} is missing or damaged')
    return image


def cut(args: argparse.Namespace, split: str, number: int) -> None:
    """Writes ``number`` crops of each class that occurs in the split."""
    rng = np.random.default_rng((args.seed, split == 'val'))
    names = [name.replace(' ', '_') for name in CityscapesDataset.METAINFO['classes']]
    holders = defaultdict(list)  # class -> the files it occurs in
    for file in mmengine.track_iter_progress(label_files(args.src, split)):
        for index in np.unique(read(file, cv2.IMREAD_UNCHANGED)):
            if index < len(names):
                holders[index].append(file)
    picks = defaultdict(list)  # file -> the classes to cut out of it
    for index, found in sorted(holders.items()):
        for file in rng.choice(found, number):
            picks[file].append(index)
        (args.dst / split / names[index]).mkdir(parents=True)
    half = args.size // 2
    for file in mmengine.track_iter_progress(sorted(picks)):
        label = read(file, cv2.IMREAD_UNCHANGED)
        path = image_of(file, args)
        image = read(path, cv2.IMREAD_COLOR)
        if image.shape[:2] != label.shape:
            raise SystemExit(f'{path} is of size {image.shape[:2]}, its label {label.shape}')
        image = cv2.copyMakeBorder(image, *[half] * 4, cv2.BORDER_REFLECT_101)
        for k, index in enumerate(picks[file]):
            ys, xs = np.nonzero(label == index)
            i = rng.integers(len(ys))
            crop = image[ys[i]:ys[i] + args.size, xs[i]:xs[i] + args.size]
            # Names of files may recur in other cities.
            name = f'{file.parent.name}_{file.name.removesuffix(LABELS)}_{k}.png'
            if not cv2.imwrite(str(args.dst / split / names[index] / name), crop):
                raise SystemExit(f'{args.dst / split / names[index] / name} cannot be written')
    print(f'\n{args.dst / split}: {number} crops of each of {len(holders)} classes, out of '
          f'{len(picks)} scenes')


def main() -> None:
    args = parse_args()
    cut(args, 'train', args.per_class)
    cut(args, 'val', max(1, args.per_class // 4))


if __name__ == '__main__':
    main()
