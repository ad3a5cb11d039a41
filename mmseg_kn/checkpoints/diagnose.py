"""Whose checkpoint this is, by the names of its weights, and what can be done with it."""
from collections.abc import Iterable, Mapping

from torch import Tensor

CONVERTER = 'tools/model_converters/norm_torch2mmseg.py'


def owner_of(keys: Iterable[str]) -> str:
    """Whose names these are.

    Returns:
        ``'BatchNorm'`` (a network with running statistics), ``'norm-torch'`` (the authors'
        repository), ``'segmentor'`` (a whole model whose backbone is a KNResNet), ``'KNResNet'``
        or ``'unknown'``.
    """
    keys = {str(key).removeprefix('module.') for key in keys}
    if any(key.endswith('running_mean') for key in keys):
        return 'BatchNorm'
    if 'block0.0.weight' in keys or 'model' in keys:
        return 'norm-torch'
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
