"""Turns a trained BatchNorm network into a KernelNorm network that starts near its function.

Layer by layer, the filters are fitted by least squares to what the BatchNorm network puts out on
images of CONFIG's train_dataloader, without their labels; then each channel's mean and deviation
are made those of the BatchNorm network:

    python tools/model_converters/batchnorm2kernelnorm.py CONFIG CHECKPOINT OUT.pth

OUT.pth loads into model = dict(_delete_=True, type='KernelNormalized', model={{_base_.model}})
over CONFIG, in train.py (load_from) and test.py. With --backbone, CHECKPOINT and OUT.pth are those
of the backbone alone, and OUT.pth is what pretrained= of CONFIG's model names then:

    python tools/model_converters/batchnorm2kernelnorm.py CONFIG open-mmlab://resnet50_v1c \\
        OUT.pth --backbone

All images are held in memory at once, with their feature maps. OUT.pth depends on them, which the
account of private training does not count: for that, take public images,
train_dataloader.dataset.data_root of --cfg-options.
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
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint, set_random_seed
from mmseg.registry import MODELS

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools, for what they share

from config_args import add_config_args, load_config  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_args(parser, 'config of the BatchNorm model, or of KernelNormalized over it')
    parser.add_argument('checkpoint', help='of the BatchNorm model: a file, or what mmengine '
                        'downloads, as open-mmlab://resnet50_v1c')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--num-images', type=int, default=128,
                        help='how many crops to calibrate on (%(default)s)')
    parser.add_argument('--backbone', action='store_true',
                        help='convert the backbone alone, of which CHECKPOINT is')
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


def load_backbone(backbone: torch.nn.Module, checkpoint: str) -> None:
    """Loads a backbone's checkpoint; the classifier that it was trained with is left out."""
    loaded = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    missing = backbone.load_state_dict(loaded.get('state_dict', loaded), strict=False).missing_keys
    if missing:
        raise ValueError(f"CHECKPOINT must hold the backbone of CONFIG, got none of {missing[:3]} "
                         'and others; name a config of its network, or leave --backbone out for '
                         'the checkpoint of a segmentor')


def convert(cfg: Config, checkpoint: str, number: int, backbone: bool = False
            ) -> tuple[torch.nn.Module, dict]:
    """The converted model or backbone, and the meta data of the checkpoint that still hold."""
    model, options = cfg.model, {}
    if model.type == 'KernelNormalized':
        model, options = model_and_options(
            **{name: value for name, value in model.items() if name != 'type'})
    if model.get('data_preprocessor') is None:
        model = dict(model, data_preprocessor=cfg.data_preprocessor)
    model = MODELS.build(model).to(get_device())
    if backbone:
        load_backbone(model.backbone, checkpoint)
        images = (model.data_preprocessor(batch, True)['inputs']
                  for batch in train_images(cfg, number))
        return mmseg_kn.kernelize(model.backbone, calibrate=images, **options).cpu(), {}
    loaded = load_checkpoint(model, checkpoint, 'cpu', strict=True)
    mmseg_kn.kernelize(model, calibrate=train_images(cfg, number), **options)
    meta = loaded.get('meta') or {}
    return model.cpu(), {key: meta[key] for key in ('dataset_meta', ) if key in meta}


def main() -> None:
    args = parse_args()
    try:
        cfg = load_config(args.config, args.cfg_options)
        model, meta = convert(cfg, args.checkpoint, args.num_images, args.backbone)
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
