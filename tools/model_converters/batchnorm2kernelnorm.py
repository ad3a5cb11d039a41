"""Turns a trained BatchNorm network into a KernelNorm network that starts near its function.

The convolutions keep their filters. Layer by layer, scale and shift of each channel are set such
that its outputs have the mean and deviation of the BatchNorm network's, on images of CONFIG's
train_dataloader, without their labels:

    python tools/model_converters/batchnorm2kernelnorm.py CONFIG CHECKPOINT OUT.pth

OUT.pth loads into model = dict(_delete_=True, type='KernelNormalized', model={{_base_.model}})
over CONFIG, in train.py (load_from) and test.py. All images are held in memory at once, with
their feature maps. OUT.pth depends on them, which the account of private training does not count:
for that, take public images, train_dataloader.dataset.data_root of --cfg-options.
"""
import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import mmseg_kn
from mmseg_kn.checkpoints.files import write_atomically
from mmseg_kn.models.kernel_normalized import model_and_options

# isort: split
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from mmseg.registry import MODELS

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'config of the BatchNorm model, or of KernelNormalized over it')
    parser.add_argument('checkpoint', help='checkpoint of the BatchNorm model')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--num-images', type=int, default=64,
                        help='how many crops to calibrate on (%(default)s)')
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error(f'--num-images must be at least 1, got {args.num_images}')
    return args


def train_images(cfg: Config, number: int) -> Iterator[dict]:
    """Batches of the train_dataloader of a config, of ``number`` images together."""
    set_random_seed(0)
    loader = Runner.build_dataloader(
        dict(cfg.train_dataloader, num_workers=0, persistent_workers=False), seed=0)
    for batch in loader:
        images = batch['inputs'][:number]
        yield dict(inputs=images, data_samples=batch['data_samples'][:number])
        number -= len(images)
        if not number:
            return


def convert(cfg: Config, checkpoint: str, number: int) -> tuple[torch.nn.Module, dict]:
    """The converted model, and the meta data of the checkpoint that still hold."""
    model, options = cfg.model, {}
    if model.type == 'KernelNormalized':
        model, options = model_and_options(
            **{name: value for name, value in model.items() if name != 'type'})
    if model.get('data_preprocessor') is None:
        model = dict(model, data_preprocessor=cfg.data_preprocessor)
    model = MODELS.build(model).to(get_device())
    loaded = load_checkpoint(model, checkpoint, 'cpu', strict=True)
    mmseg_kn.kernelize(model, calibrate=train_images(cfg, number), **options)
    meta = loaded.get('meta') or {}
    return model.cpu(), {key: meta[key] for key in ('dataset_meta', ) if key in meta}


def main() -> None:
    args = parse_args()
    try:
        cfg = load_config(args.config, args.cfg_options)
        model, meta = convert(cfg, args.checkpoint, args.num_images)
        buffer = io.BytesIO()
        torch.save(dict(meta=meta, state_dict=model.state_dict()), buffer)
        write_atomically(args.out, buffer.getbuffer())
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f'{error}') from error
    layers = sum(isinstance(module, mmseg_kn.KNConv2d) for module in model.modules())
    print(f'{args.out}: {layers} layers, calibrated on {args.num_images} images. It depends on '
          'these images; if they are private, so is the file')


if __name__ == '__main__':
    main()
