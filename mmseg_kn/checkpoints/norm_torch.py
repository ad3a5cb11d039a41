"""Checkpoints of the authors' classification models, converted to ours.

The repository norm-torch (https://github.com/reza-nasirigerdeh/norm-torch) releases KNResNet-18,
34 and 50 trained on ImageNet. Their files hold the weights under ``model``; beside them stand the
optimizer, the schedule, and the command line as an ``argparse.Namespace``. Its script for CIFAR
saves them under ``model_state_dict``. :mod:`.convnext` knows the names of ConvNeXt.
"""
import argparse
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..models.activation import KEY, activation_name, name_as_tensor
from ..models.knresnet import Block, Transition
from ..models.knresnet_cls import KNResNetClassifier
from ..models.layers import KNConv2d
from .convnext import convert_convnext, convnext_arch, convnext_source
from .diagnose import owner_of
from .files import save_with_hash, sha256
from .renaming import check_shapes, check_weights, copied, few
from .safe_load import load_from_local

DEPTHS = (18, 34, 50)  # that norm-torch has


def convert_norm_torch(state_dict: Mapping[str, Tensor], classifier: bool = False,
                       activation: str = 'relu') -> dict[str, Tensor]:
    """Renames the weights of norm-torch's ``knresnet*`` or ``knconvnext_*``, or of a ConvNeXt.

    Args:
        state_dict: Their state dict, or that of torchvision's or mmpretrain's ConvNeXt, of which
            all but the downsamplings is taken.
        classifier: Return the weights of :class:`mmseg_kn.KNResNetClassifier` or
            :class:`mmseg_kn.KNConvNeXtClassifier`, and so of mmpretrain's ``ImageClassifier``,
            else those of :class:`mmseg_kn.KNResNet` or :class:`mmseg_kn.KNConvNeXt`, without
            the tail and the linear layer.
        activation: What the KNResNet was trained with, which its weights do not tell. The authors'
            private networks (repository dp-torch), of the same names and shapes, have ``'mish'``.
            The converted weights carry it, and a network with another refuses them.

    Returns:
        Copies of the tensors, under our names.

    Raises:
        ValueError: A key is missing, unknown or of another shape, a value is not a dense tensor
            of finite floating-point numbers, this is another network, or ``activation`` names none
            that it can have.
    """
    activation = activation_name(activation)
    state_dict = _without_module(state_dict)
    if convnext_source(state_dict):
        if activation != 'relu':
            raise ValueError(f'the weights are those of a ConvNeXt, whose activations are fixed, '
                             f'got activation={activation!r}; leave it out')
        return convert_convnext(state_dict, classifier)
    depth = norm_torch_depth(state_dict)
    names = _names(depth)
    check_weights(state_dict, names, f"norm-torch's knresnet{depth}")

    stem, fc = state_dict['block0.0.weight'], state_dict['fc.weight']
    low_resolution = stem.dim() == 4 and stem.shape[2:] == (3, 3)
    if low_resolution and not classifier:
        raise ValueError(f'this knresnet{depth} is one for low resolution, whose 3x3 stem does '
                         'not fit KNResNet; it can be converted as a classifier only')
    with torch.device('meta'):  # shapes without memory
        net = KNResNetClassifier(depth, num_classes=fc.size(0) if fc.dim() else 1,
                                 low_resolution=low_resolution,
                                 in_channels=stem.size(1) if stem.dim() > 1 else 3)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    check_shapes(state_dict, {name: shapes[key] for name, key in names.items()},
                 f'knresnet{depth}')
    if not classifier:
        # The backbone's alone; segmentation has no tail.
        names = {name: key.removeprefix('backbone.') for name, key in names.items()
                 if key.startswith('backbone.') and not key.startswith('backbone.tail.')}
    converted = {key: copied(state_dict[name]) for name, key in names.items()}
    if activation != 'relu':
        converted[f'backbone.{KEY}' if classifier else KEY] = name_as_tensor(activation)
    return converted


def norm_torch_depth(state_dict: Mapping[str, Tensor]) -> int:
    """The depth of norm-torch's KNResNet whose keys come closest to those of ``state_dict``.

    Raises:
        ValueError: The weights are those of another network.
    """
    keys = {str(name).removeprefix('module.') for name in state_dict}
    owner = owner_of(keys)
    if owner == 'norm-torch' and 'block0.0.weight' in keys:
        return min(DEPTHS, key=lambda depth: len(keys ^ _names(depth).keys()))
    remedy = ("norm-torch's checkpoints of KNResNet-18, 34, 50 and KNConvNeXt, and those of "
              'ConvNeXt, can be converted')
    if owner == 'BatchNorm':
        raise ValueError('the weights have running statistics, so they are those of a BatchNorm '
                         f'network; only {remedy}')
    if owner in ('segmentor', 'KNResNet', 'KNConvNeXt'):
        kind = 'KNConvNeXt' if owner == 'KNConvNeXt' else 'KNResNet'
        raise ValueError(f'the weights are those of a {kind} of mmseg_kn already; they need no '
                         'conversion')
    raise ValueError(f'no key block0.0.weight among {len(keys)}: {few(list(state_dict))}; only '
                     f'{remedy}')


def _without_module(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the prefix that DistributedDataParallel gives to every name."""
    if not all(str(name).startswith('module.') for name in state_dict):
        return state_dict
    return {name.removeprefix('module.'): v for name, v in state_dict.items()}


@functools.cache
def _names(depth: int) -> dict[str, str]:
    """Their name of every weight -> the key in KNResNetClassifier."""
    with torch.device('meta'):
        backbone = KNResNetClassifier(depth, num_classes=1).backbone
    modules = {'block0.0': 'stem'}
    counts = {Block: 0, Transition: 0}
    for path, unit in backbone.named_modules():
        if type(unit) in counts:
            counts[type(unit)] += 1
            theirs = ('res' if type(unit) is Block else 'trans') + f'_block{counts[type(unit)]}'
            for name, conv in unit.named_children():
                if not isinstance(conv, KNConv2d):
                    continue
                inner = '.conv1x1' if conv.kernel_size == (1, 1) else ''
                modules[f'{theirs}.{name}{inner}'] = f'{path}.{name}'
    if backbone.tail is not None:
        modules['conv_block_f.conv'] = 'tail'
    modules = {theirs: f'backbone.{ours}' for theirs, ours in modules.items()}
    modules['fc'] = 'head.fc'
    return {f'{theirs}.{kind}': f'{ours}.{kind}' for theirs, ours in modules.items()
            for kind in ('weight', 'bias')}


def convert_file(src: str | Path, dst: str | Path, classifier: bool = False,
                 activation: str = 'relu') -> tuple[Path, int | str]:
    """Converts a checkpoint file; nothing is written unless all of it converts.

    The source is read without running code it may carry. The result loads with
    ``torch.load(weights_only=True)``: ``state_dict``, and ``meta`` with the source's SHA-256, the
    depth of a KNResNet or the ``arch`` of a KNConvNeXt, and the version of mmseg_kn.

    Args:
        src: File with the weights under ``model`` or ``model_state_dict`` (norm-torch) or under
            ``state_dict`` (mmpretrain); or a bare state dict (torchvision).
        dst: File to write, see :func:`.files.save_with_hash`.
        classifier, activation: See :func:`convert_norm_torch`.

    Returns:
        The file written, and the depth of the KNResNet or the arch of the KNConvNeXt.

    Raises:
        ValueError: The source is damaged, holds more than plain data, or does not convert.
        FileNotFoundError: There is no source.
    """
    src = Path(src).expanduser()
    # The one class that their files hold and torch does not allow.
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = load_from_local(str(src), map_location='cpu')
    state_dict = checkpoint
    for key in ('model', 'model_state_dict', 'state_dict'):
        if isinstance(checkpoint, dict) and key in checkpoint:
            state_dict = checkpoint[key]
            break
    if not isinstance(state_dict, dict):
        raise ValueError(f"{src} must hold a state dict under 'model', got "
                         f'{type(state_dict).__name__}')
    # A pickled OrderedDict may bring methods of its own; a dict made of it does not.
    state_dict = {key: dict.__getitem__(state_dict, key) for key in dict.__iter__(state_dict)}
    try:
        weights = convert_norm_torch(state_dict, classifier, activation)
    except ValueError as error:
        raise ValueError(f'{src} cannot be converted: {error}') from None

    state_dict = _without_module(state_dict)
    size = dict(arch=convnext_arch(state_dict)) if convnext_source(state_dict) else dict(
        depth=norm_torch_depth(state_dict))
    meta = dict(source_sha256=sha256(src), **size, mmseg_kn_version=__version__)
    if activation_name(activation) != 'relu':
        meta['activation'] = activation_name(activation)
    path = save_with_hash(dict(meta=meta, state_dict=weights), dst)
    return path, *size.values()
