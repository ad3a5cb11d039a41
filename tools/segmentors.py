"""What the tools ask of a segmentor, which may have any channels and one head or several."""
import torch
from mmengine.config import Config, ConfigDict

import mmseg_kn  # noqa: F401 (first: it lets mmseg import beside mmcv-lite)

# isort: split
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from torch import Tensor, nn


def network_config(cfg: Config) -> ConfigDict:
    """The segmentor's part of a config, which ``KernelNormalized`` holds one level deeper."""
    model = cfg.model
    while 'decode_head' not in model and isinstance(model.get('model'), dict):
        model = model.model
    return model


def option_prefix(cfg: Config) -> str:
    """What --cfg-options puts before a setting of the segmentor: ``model.`` or deeper."""
    model, prefix = cfg.model, 'model.'
    while model is not network_config(cfg):
        model, prefix = model.model, f'{prefix}model.'
    return prefix


def build_segmentor(cfg: Config, checkpoint: str | None = None,
                    device: str | torch.device = 'cpu') -> nn.Module:
    """The segmentor of a config in evaluation mode, with random weights if there are no others.

    Beside what mmseg's ``init_model`` does, it keeps ``train_cfg``, which point heads train with,
    takes the data preprocessor that the Runner would take, and makes of SyncBN, which needs GPUs
    in training, BatchNorm.

    Raises:
        SystemExit: The config is not of a segmentor.
    """
    if 'decode_head' not in network_config(cfg):
        raise SystemExit(f'{cfg.filename} has no model.decode_head: not a segmentor')
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    settings = dict(cfg.model, pretrained=None)
    if network_config(cfg).get('data_preprocessor') is None and 'data_preprocessor' in cfg:
        settings['data_preprocessor'] = cfg.data_preprocessor
    model = revert_sync_batchnorm(MODELS.build(settings))
    if isinstance(model.decode_head, nn.ModuleList):
        # mmseg asks the list of a cascade for the threshold of its last head.
        model.decode_head.threshold = threshold(model)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, map_location='cpu')
    return model.to(device).eval()


def threshold(model: nn.Module) -> float | None:
    """Above which probability a pixel is foreground; None with one output for each class."""
    head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) \
        else model.decode_head
    return head.threshold if model.out_channels == 1 else None


def turns_colours(preprocessor: nn.Module) -> bool:
    """Whether a data preprocessor makes RGB of BGR, or BGR of RGB."""
    return getattr(preprocessor, 'channel_conversion',  # in mmsegmentation, and in its fork
                   getattr(preprocessor, '_channel_conversion', False))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """What predictions are made of, (N, out_channels, H, W), of normalized images (N, C, H, W)."""
    shape = tuple(images.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
    return model.encode_decode(images, [meta])  # mmseg looks at the first; len() fixes a size
