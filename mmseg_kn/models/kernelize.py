"""Turns the normalization layers of any built model into kernel normalization."""
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from mmengine.model.utils import _BatchNormXd
from torch import Tensor, nn

from .calibrate import Calibration
from .layers import KernelNorm2d, KernelNormNd, KNConv2d
from .matching import Matches, match

# What norm_cfg calls them -> their classes. mmcv's own SyncBatchNorm is known by name, because
# only the compiled mmcv has it.
KINDS = {
    'BN': (nn.modules.batchnorm._BatchNorm, 'SyncBatchNorm'),
    'IN': (nn.modules.instancenorm._InstanceNorm, ),
    'GN': (nn.GroupNorm, ),
    'LN': (nn.LayerNorm, ),
}


class Row(NamedTuple):
    """What became of a layer."""
    name: str
    was: str
    became: str


def is_kind(module: nn.Module, kinds: Iterable[str]) -> bool:
    return any(type(module).__name__ == cls if isinstance(cls, str) else isinstance(module, cls)
               for kind in kinds for cls in KINDS[kind])


def kernelize(model: nn.Module,
              *,
              dropout_p: float = 0.05,
              eps: float = 1e-5,
              norms: Iterable[str] = ('BN', ),
              example: Tensor | tuple | Callable | None = None,
              calibrate: Iterable | None = None) -> nn.Module:
    """Replaces BatchNorm in a built model by kernel normalization, in place.

    A convolution and the BatchNorm behind it become a :class:`KNConv2d` with the weight of the
    convolution, times BatchNorm's scale, and BatchNorm's shift as its bias; BatchNorm leaves an
    ``nn.Identity``. Which convolution a BatchNorm follows is seen by running the model on an
    example, in evaluation mode and without changing its state. A BatchNorm that follows something
    else (a transposed convolution, a sum, a linear layer) becomes a :class:`KernelNorm2d`, which
    has no scale and shift. Nothing else changes. :func:`conversion_table` lists what became of
    each layer.

    Args:
        model: A segmentor of mmseg, or any ``nn.Module``.
        dropout_p: Dropout of the copy that training takes the statistics of.
        eps: Added to the variance.
        norms: What to replace: ``'BN'`` (synchronized ones too), ``'IN'``, ``'GN'``, ``'LN'``.
        example: An input of the model, a tuple of its arguments, or a function that is given the
            model and runs it. By default a black image.
        calibrate: Images of a trained BatchNorm network: a data loader of mmseg or an iterable of
            inputs. The layers are fitted to the outputs of the BatchNorm network on these images,
            see :class:`mmseg_kn.models.calibrate.Calibration`; all of them are held in memory at
            once. Do not take private images: the result depends on them, which the account of
            private training does not count.

    Returns:
        The model; a new module only where ``model`` itself is a BatchNorm.

    Raises:
        ValueError: A layer cannot be converted; its name and a remedy are given.
    """
    unknown = [kind for kind in norms if kind not in KINDS]
    if isinstance(norms, str) or unknown:
        raise ValueError(f'norms must be a tuple of {tuple(KINDS)}, got {norms!r}')
    names = {module: name for name, module in model.named_modules()}
    found = [module for module in names if is_kind(module, norms)]
    for module in model.modules():
        if getattr(module, 'efficient_conv_bn_eval_forward', None) is not None:
            module.turn_on_efficient_conv_bn_eval(False)  # it would bypass BatchNorm
    matches = match(model, found, example)
    _check(matches, names)
    calibration = calibrate is not None and Calibration(model, matches.convs, calibrate)

    rows, new = [], {}
    for norm in found:
        convs = matches.convs[norm]
        for conv in convs:
            if conv not in new:
                others = [n for n in found if conv in matches.convs[n]]
                new[conv] = _knconv(conv, others, dropout_p, eps, names)
                if len(others) == 1:
                    _fold_when_loading(model, names[conv], names[norm])
        new[norm] = nn.Identity() if convs else _kernel_norm(
            norm, matches.ranks.get(norm), dropout_p, eps)
        became = ', '.join(f'KNConv2d {names[conv]}' for conv in convs)
        rows.append(Row(names[norm], type(norm).__name__, became or type(new[norm]).__name__))
        new[norm].train(norm.training)
        children = dict(norm.named_children())
        if children:  # timm's BatchNormAct2d has its activation inside
            new[norm] = nn.Sequential(new[norm], *children.values())
    rows += [Row(name, type(module).__name__, 'as it was, no normalization behind it')
             for module, name in names.items()
             if isinstance(module, nn.modules.conv._ConvNd) and module not in new
             and not isinstance(module, KNConv2d)]
    _zero_init(model, new, matches)
    for parent in list(names):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    model = new.get(model, model)
    model.conversion = rows
    if calibration:
        calibration.apply(model, new)
    return model


def conversion_table(model: nn.Module) -> str:
    """What :func:`kernelize` made of each layer: its name, what it was and what it became."""
    rows = getattr(model, 'conversion', None)
    if rows is None:
        raise ValueError(f'conversion_table takes a model that kernelize converted, got '
                         f'{type(model).__name__}; call mmseg_kn.kernelize(model) first')
    rows = [Row('layer', 'was', 'became'), *rows]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    return '\n'.join(f'{row.name:{wide[0]}}  {row.was:{wide[1]}}  {row.became}' for row in rows)


def _check(matches: Matches, names: dict[nn.Module, str]) -> None:
    if matches.unknown:
        shown = ', '.join(f'{names[norm]} ({type(norm).__name__})' for norm in matches.unknown)
        failed = f" (running the model failed: {'; '.join(matches.failures)})" * bool(
            matches.failures)
        raise ValueError(
            f'every normalization layer must be run by the example, got none that runs {shown}'
            f'{failed}; give kernelize(model, example=...) an input, or a function of the model '
            'that runs it, or delete the layer if nothing uses it')
    for norm in matches.convs:
        if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
            raise ValueError('a LayerNorm must normalize one dimension to be converted, got '
                             f'{names[norm]} with {tuple(norm.normalized_shape)}; leave LN out of '
                             'norms')


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    weight, bias = getattr(norm, 'weight', None), getattr(norm, 'bias', None)
    if weight is None:
        return None
    return weight.detach(), torch.zeros_like(weight) if bias is None else bias.detach()


def _knconv(conv: nn.Conv2d, norms: list[nn.Module], dropout_p: float, eps: float,
            names: dict[nn.Module, str]) -> KNConv2d:
    """Takes the place of ``conv`` and the norms behind it; the parameter is the same."""
    weight = conv.weight
    with torch.random.fork_rng(devices=[]):  # for its own weight, which is not kept
        layer = KNConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                         conv.padding, conv.dilation, conv.groups, dropout_p=dropout_p, eps=eps,
                         device='cpu', dtype=weight.dtype)
    layer.weight = weight
    shift = weight.new_zeros(conv.out_channels)
    affine = [a for a in map(_affine, norms) if a is not None]
    with torch.no_grad():
        if affine and all(torch.equal(a, b) for other in affine[1:]
                          for a, b in zip(affine[0], other, strict=True)):
            weight.mul_(affine[0][0].view(-1, 1, 1, 1).to(weight))
            shift = affine[0][1].to(weight).clone()
        elif affine:
            warnings.warn(f'{names[conv]} is shared by normalizations of different scale or shift '
                          f'({", ".join(names[norm] for norm in norms)}), which are dropped',
                          stacklevel=3)
    layer.bias = nn.Parameter(shift, requires_grad=weight.requires_grad)
    layer.train(conv.training)
    return layer


def _fold_when_loading(model: nn.Module, conv: str, norm: str) -> None:
    """Makes a BatchNorm network's checkpoint load as :func:`kernelize` converts its layers."""
    conv, norm = conv.split('.'), norm.split('.')
    common = 0
    while conv[common] == norm[common]:
        common += 1
    parent = model.get_submodule('.'.join(conv[:common]))  # below it, one does not see the other
    parent._register_load_state_dict_pre_hook(
        partial(_fold, '.'.join(conv[common:]), '.'.join(norm[common:])))


def _fold(conv: str, norm: str, state_dict: dict, prefix: str, *_) -> None:
    conv, norm = f'{prefix}{conv}', f'{prefix}{norm}'
    if f'{norm}.running_var' not in state_dict:
        return
    warnings.warn(
        'the checkpoint is that of a BatchNorm network: its convolutions are taken, with scale '
        "and shift of BatchNorm, but not its function; its other entries are listed as "
        'unexpected. tools/model_converters/batchnorm2kernelnorm.py makes a better start of it '
        '(docs/any_model.md)', stacklevel=2)
    weight = state_dict.get(f'{conv}.weight')
    scale, shift = (state_dict.get(f'{norm}.{name}') for name in ('weight', 'bias'))
    if weight is not None and scale is not None:
        state_dict[f'{conv}.weight'] = weight * scale.view(-1, 1, 1, 1)
    if shift is not None:
        state_dict[f'{conv}.bias'] = shift


def _kernel_norm(norm: nn.Module, rank: int | None, dropout_p: float, eps: float) -> nn.Module:
    """Takes the place of a normalization that stays a layer of its own."""
    last = isinstance(norm, nn.LayerNorm)
    if last:
        channels = norm.normalized_shape[0]
    else:
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    image = rank == 4 or rank is None and isinstance(
        norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, _BatchNormXd))
    if image and not last:
        return KernelNorm2d(channels, dropout_p=dropout_p, eps=eps)
    return KernelNormNd(channels, -1 if last else 1, dropout_p=dropout_p, eps=eps)


def _zero_init(model: nn.Module, new: dict[nn.Module, nn.Module], matches: Matches) -> None:
    """Lets residual blocks that start at zero still do so.

    mmseg's zero_init_residual sets the scale of a block's last BatchNorm to zero, by the init_cfg
    of the block. That BatchNorm is gone, so the convolution before it is named instead.
    """
    for block in model.modules():
        cfgs = getattr(block, 'init_cfg', None)
        for cfg in [cfgs] if isinstance(cfgs, dict) else cfgs or ():
            overrides = cfg.get('override') or ()
            for override in [overrides] if isinstance(overrides, dict) else overrides:
                constant = override if len(override) > 1 else cfg
                norm = getattr(block, override.get('name', ''), None)
                if norm in new and constant.get('type') == 'Constant' and not constant.get('val'):
                    names = [name for name, child in block.named_children()
                             if child in matches.convs[norm]]
                    if names:
                        override['name'] = names[0]
