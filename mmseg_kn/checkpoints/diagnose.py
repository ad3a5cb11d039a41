"""Whose checkpoint this is, by the names of its weights, and what can be done with it."""
from collections.abc import Iterable, Mapping

from torch import Tensor

CONVERTER = 'tools/model_converters/norm_torch2mmseg.py'


def owner_of(keys: Iterable[str]) -> str:
    """Whose names these are.

    Returns:
        ``'BatchNorm'`` (a network with running statistics), ``'norm-torch'`` (the authors'
        repository), ``'segmentor'`` (a whole model whose backbone is a KNResNet), ``'KNResNet'``,
        ``'torchvision ConvNeXt'`` (norm-torch's KNConvNeXt, too, has these names), ``'mmpretrain
        ConvNeXt'``, ``'KNConvNeXt'`` (bare, or the backbone of a whole model) or ``'unknown'``.
    """
    keys = {str(key).removeprefix('module.') for key in keys}
    if any(key.endswith('running_mean') for key in keys):
        return 'BatchNorm'
    if 'block0.0.weight' in keys or 'model' in keys:
        return 'norm-torch'
    if 'features.0.0.weight' in keys and 'features.1.0.block.0.weight' in keys:
        return 'torchvision ConvNeXt'
    bare = {key.removeprefix('backbone.') for key in keys}
    if 'stages.0.0.depthwise_conv.weight' in bare:
        # mmpretrain has a LayerNorm there, ours has none.
        return 'mmpretrain ConvNeXt' if 'downsample_layers.1.0.weight' in bare else 'KNConvNeXt'
    if 'backbone.stem.weight' in keys:
        return 'segmentor'
    return 'KNResNet' if any(key.endswith('stem.weight') for key in keys) else 'unknown'


def misfit(given: Mapping[str, Tensor], own: Mapping[str, Tensor], stem_kernel: tuple[int, int],
           prefix: str = '') -> str | None:
    """Why ``given`` are not the weights of a KNResNet, and a remedy; None if they are.

    mmengine loads with ``strict=False``. Without this look, the weights of another architecture
    would be skipped with a line in the log, and training would start from scratch.

    Args:
        given: Weights to be loaded. Those beyond ``own`` do not matter.
        own: The network's own, under the same names. The stem may take images of other channels:
            then it starts from scratch.
        stem_kernel: Size (h, w) of the network's stem.
        prefix: What stands before every name in the file, for the message.
    """
    given = dict(given)
    stem = given.get('stem.weight')
    if stem is not None and stem.shape[2:] == stem_kernel:
        given['stem.weight'] = own['stem.weight']
    absent = [key for key, value in own.items()
              if key not in given or given[key].shape != value.shape]
    if not given or not absent:
        return None
    first, owner = prefix + next(iter(given)), owner_of(given)
    remedy = 'use a checkpoint of a KNResNet trained with mmseg_kn, or none, to train from scratch'
    if owner == 'BatchNorm':
        statistics = next(key for key in given if key.endswith('running_mean'))
        reason = (f'it has running statistics ({prefix}{statistics}), so it is a BatchNorm '
                  'network')
    elif owner == 'norm-torch':
        reason = f'mmseg_kn does not name them so ({first})'
        remedy = f'if it is one of norm-torch, {CONVERTER} converts it'
    elif owner == 'segmentor':
        reason = f'it holds a whole model ({first})'
        remedy = "take its backbone: init_cfg=dict(..., prefix='backbone.')"
    elif not given.keys() & own.keys():
        reason = f'none of its {len(given)} keys matches, e.g. {first}'
    elif absent == ['stem.weight'] and stem is not None:
        reason = (f'its stem has a kernel of {tuple(stem.shape[2:])}, that of {stem_kernel} is '
                  'needed')
        remedy = 'low resolution and this network do not share a stem'
    else:
        reason = (f'{len(absent)} of {len(own)} weights are missing or of another shape, e.g. '
                  f'{prefix}{absent[0]}')
    return f'{reason}; {remedy}'


def convnext_misfit(given: Mapping[str, Tensor], own: Mapping[str, Tensor],
                    prefix: str = '') -> str | None:
    """Why ``given`` are not the weights of a KNConvNeXt, and a remedy; None if they are.

    Args:
        given: Weights to be loaded. Those beyond ``own`` do not matter.
        own: The network's own, under the same names. Three parts may start from scratch: the stem
            if it takes images of other channels, the LayerNorms of outputs, which classifiers
            have not, and all kernel normalized downsamplings together, for which a converted
            ConvNeXt has no weights.
        prefix: What stands before every name in the file, for the message.
    """
    absent = {key for key, value in own.items()
              if key not in given or given[key].shape != value.shape}
    stem = given.get('downsample_layers.0.0.weight')
    if stem is not None and stem.shape[2:] == own['downsample_layers.0.0.weight'].shape[2:]:
        absent.discard('downsample_layers.0.0.weight')
    downsamplings = {key for key in own if key.startswith('downsample_layers.')
                     and not key.startswith('downsample_layers.0.')}
    if not any(key.startswith('downsample_layers.') and key[18] != '0' for key in given):
        absent -= downsamplings
    absent = [key for key in own if key in absent
              and not (key.startswith('norm') and key not in given)]
    if not given or not absent:
        return None
    first, owner = prefix + next(iter(given)), owner_of(given)
    remedy = 'use a checkpoint of a KNConvNeXt of this size, or none, to train from scratch'
    if owner == 'BatchNorm':
        return f'it has running statistics, so it is a BatchNorm network; {remedy}'
    if owner.endswith(' ConvNeXt'):
        return f'mmseg_kn does not name them so ({first}); {CONVERTER} converts ConvNeXt'
    if not given.keys() & own.keys():
        if owner == 'KNConvNeXt':
            return (f'it holds a whole model ({first}); take its backbone: '
                    "init_cfg=dict(..., prefix='backbone.')")
        return f'none of its {len(given)} keys matches, e.g. {first}; {remedy}'
    return (f'{len(absent)} of {len(own)} weights are missing or of another shape, e.g. '
            f'{prefix}{absent[0]}; {remedy}')
