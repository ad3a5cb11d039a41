"""Pictures of images that may have any number of channels, and of labels."""
from collections.abc import Sequence

import numpy as np
from mmengine.config import Config, ConfigDict
from segmentors import network_config
from torch import Tensor

from mmseg_kn.datasets.walk import innermost


def add_bands_arg(parser) -> None:
    parser.add_argument('--bands', type=int, nargs=3, metavar=('R', 'G', 'B'),
                        help='channels to draw in red, green and blue, from 0 (the colours, or '
                        'the first three)')


def loads_bgr(cfg: Config, dataset: ConfigDict) -> bool:
    """Whether a data set's colours come in the order BGR.

    mmcv's loader gives BGR, but with imdecode_backend='tifffile' what is in the file; and a
    preprocessor with rgb_to_bgr expects RGB.
    """
    preprocessor = network_config(cfg).get('data_preprocessor') or cfg.get('data_preprocessor', {})
    steps = [step for part in innermost(dataset) for step in part.get('pipeline', ())]
    return not preprocessor.get('rgb_to_bgr') and all(
        step.get('imdecode_backend') != 'tifffile' for step in steps)


def picture(image: Tensor, bgr: bool, bands: Sequence[int] | None = None) -> np.ndarray:
    """An image (C, H, W) as (H, W, 3) in RGB, uint8.

    Fewer than three channels are drawn in grey, the first of them; of more than three, the first
    three. Values that are not of 8 bits are stretched, black to white from their 2 to their 98 %
    quantile.

    Args:
        image: As the pipeline gives it.
        bgr: Whether three or four channels begin with BGR.
        bands: The three channels to draw instead.
    """
    channels = len(image)
    if bands is None:
        bands = (0, 0, 0) if channels < 3 else (2, 1, 0) if bgr and channels < 5 else (0, 1, 2)
    if not all(0 <= band < channels for band in bands):
        raise SystemExit(f'--bands must be channels of the images, from 0 to {channels - 1}, got '
                         f'{" ".join(map(str, bands))}')
    shown = image.numpy()[list(bands)].transpose(1, 2, 0)
    if shown.dtype != np.uint8:
        shown = np.nan_to_num(shown.astype(np.float64), posinf=np.nan, neginf=np.nan, nan=np.nan)
        low, high = (np.nanquantile(shown, (.02, .98)) if np.isfinite(shown).any() else (0, 1))
        shown = np.nan_to_num((shown - low) / max(high - low, 1e-12)).clip(0, 1) * 255
    # contiguous: OpenCV draws into nothing else
    return np.ascontiguousarray(shown.round().astype(np.uint8))


def legend(metainfo: dict) -> tuple[list[str], list[list[int]]]:
    """Names and RGB colours of a data set's classes; numbers, where it names none."""
    names, palette = metainfo.get('classes'), metainfo.get('palette')
    names = [*map(str, range(256))] if names is None else list(names)
    if palette is None:
        palette = np.random.default_rng(0).integers(256, size=(len(names), 3))
    return names, np.asarray(palette).tolist()


def colourize(labels: np.ndarray, palette: Sequence) -> np.ndarray:
    """(H, W) class indices to (H, W, 3) RGB; what is no class is black."""
    colours = np.zeros((max(int(labels.max()), len(palette)) + 1, 3), np.uint8)
    colours[:len(palette)] = palette
    return colours[labels]
