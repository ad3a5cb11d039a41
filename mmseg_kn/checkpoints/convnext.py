"""Weights of ConvNeXt and of the authors' KNConvNeXt, converted to ours.

Three kinds of names are known: those of the repository norm-torch
(https://github.com/reza-nasirigerdeh/norm-torch), whose KNConvNeXt converts as a whole; and those
of torchvision and of mmpretrain, whose ConvNeXt shares everything with KNConvNeXt but its three
downsamplings. There it has a LayerNorm before the convolution, and no ReLU: these convolutions
would not compute in KNConvNeXt what they were trained for, so they are left out and start from
scratch.
"""
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.knconvnext import ARCHS
from ..models.knconvnext_cls import KNConvNeXtClassifier
from .diagnose import owner_of
from .renaming import check_shapes, check_weights, copied

SOURCES = ('norm-torch', 'torchvision', 'mmpretrain')
_STEM = 'backbone.downsample_layers.0.0.weight'
# Places of the layers in torchvision's block.
_BLOCK = {'depthwise_conv': 0, 'norm': 2, 'pointwise_conv1': 3, 'pointwise_conv2': 5}


def convnext_source(state_dict: Mapping[str, Tensor]) -> str | None:
    """Which of ``SOURCES`` named these weights; None if they are of no ConvNeXt to convert."""
    owner = owner_of(state_dict)
    if owner == 'torchvision ConvNeXt':
        # Where torchvision has a LayerNorm, norm-torch has a ReLU, without weights.
        return 'torchvision' if 'features.2.0.weight' in state_dict else 'norm-torch'
    return 'mmpretrain' if owner == 'mmpretrain ConvNeXt' else None


def convnext_arch(state_dict: Mapping[str, Tensor]) -> str:
    """The size of the ConvNeXt that has these weights: a key of ``ARCHS``.

    Raises:
        ValueError: It is none of them.
    """
    bare = {str(name).removeprefix('backbone.'): value for name, value in state_dict.items()}
    stem, stage = (('downsample_layers.0.0.weight', 'stages.2.')
                   if convnext_source(state_dict) == 'mmpretrain' else
                   ('features.0.0.weight', 'features.5.'))
    stem = bare[stem] if stem in bare else None
    depth = len({name.split('.')[2] for name in bare if name.startswith(stage)})
    for name, arch in ARCHS.items():
        if isinstance(stem, Tensor) and stem.dim() == 4 and (
                len(stem), depth) == (arch.channels[0], arch.depths[2]):
            return name
    shape = tuple(stem.shape) if isinstance(stem, Tensor) else type(stem).__name__
    raise ValueError(f'the ConvNeXt must be {", ".join(ARCHS)}; got one whose stem has the shape '
                     f'{shape} and whose third stage has {depth} blocks')


def convert_convnext(state_dict: Mapping[str, Tensor],
                     classifier: bool = False) -> dict[str, Tensor]:
    """Renames the weights of a ConvNeXt; called by :func:`.norm_torch.convert_norm_torch`.

    Args:
        state_dict: The state dict of norm-torch's ``knconvnext_*``, torchvision's ``convnext_*``,
            or mmpretrain's ``ImageClassifier`` or ``ConvNeXt``.
        classifier: Return the weights of :class:`mmseg_kn.KNConvNeXtClassifier`, else those of
            :class:`mmseg_kn.KNConvNeXt`, without the linear layer.

    Returns:
        Copies of the tensors under our names, without the downsamplings where the source is a
        ConvNeXt.

    Raises:
        ValueError: As :func:`.norm_torch.convert_norm_torch`.
    """
    source, arch = convnext_source(state_dict), convnext_arch(state_dict)
    network = f"{source}'s {'kn' if source == 'norm-torch' else ''}convnext_{arch}"
    names = dict(_names(source, arch))
    whole = 'head.fc.weight' in state_dict or source != 'mmpretrain'
    if not whole and not classifier:  # a bare backbone will do
        names = {name: key for name, key in names.items() if not name.startswith('head.')}
        if not any(name.startswith('backbone.') for name in state_dict):
            names = {name.removeprefix('backbone.'): key for name, key in names.items()}
            if 'norm3.weight' not in state_dict:
                names = {n: key for n, key in names.items() if not n.startswith('norm3.')}
    check_weights(state_dict, names, network)

    stem = next(v for n, v in state_dict.items() if names[n] == _STEM)
    fc = next((v for n, v in state_dict.items() if names[n] == 'head.fc.weight'), None)
    with torch.device('meta'):  # shapes without memory
        net = KNConvNeXtClassifier(arch, fc.size(0) if fc is not None and fc.dim() else 1,
                                   stem.size(1))
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    for name, key in names.items():
        shape = shapes.get(key)
        if key is None:  # a LayerNorm before a downsampling
            shape = state_dict[name].shape
        elif name.endswith('.layer_scale'):
            shape = (*shape, 1, 1)
        check_shapes(state_dict, {name: shape}, network)

    converted = {key: copied(state_dict[name]).reshape(shapes[key])
                 for name, key in names.items() if key is not None
                 and not (source != 'norm-torch' and _is_downsampling(key))}
    if classifier:
        return converted
    return {key.removeprefix('backbone.'): value for key, value in converted.items()
            if key.startswith('backbone.')}


def _is_downsampling(key: str) -> bool:
    return key.startswith('backbone.downsample_layers.') and not key.startswith(
        'backbone.downsample_layers.0.')


@functools.cache
def _names(source: str, arch: str) -> dict[str, str | None]:
    """The name of every weight in the source -> its key in KNConvNeXtClassifier.

    None stands for the LayerNorms that KNConvNeXt has not.
    """
    with torch.device('meta'):
        keys = list(KNConvNeXtClassifier(arch, num_classes=1).state_dict())
    names = {}
    for key in keys:
        part, *rest = key.removeprefix('backbone.').split('.')
        kind = rest[-1]
        if source == 'mmpretrain':
            name = key.replace('.gamma.weight', '.gamma')
            if _is_downsampling(key):
                stem, _, kind = key.rpartition('.')
                name = f'{stem}.1.{kind}'
                names[f'{stem}.0.{kind}'] = None
        elif part == 'stages':
            stage, block, layer = 2 * int(rest[0]) + 1, rest[1], rest[2]
            name = f'features.{stage}.{block}.' + (
                'layer_scale' if layer == 'gamma' else f'block.{_BLOCK[layer]}.{kind}')
        elif part == 'downsample_layers' and rest[0] == '0':
            name = f'features.0.{rest[1]}.{kind}'
        elif part == 'downsample_layers':
            name = f'features.{2 * int(rest[0])}.1.{kind}'
            if source == 'torchvision':
                names[f'features.{2 * int(rest[0])}.0.{kind}'] = None
        else:
            name = f'classifier.{0 if part == "norm3" else 2}.{kind}'
        names[name] = key
    return names
