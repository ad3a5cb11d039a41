"""Fits the layers of a converted network to the outputs of the one before."""
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..ops.geometry import Geometry, make_geometry, pad
from ..ops.reference import normalized_units
from .example import first_tensor, run_example
from .layers import KNConv2d

_ENOUGH = 8  # values of a channel from which to estimate its deviation
_POSITIONS = 4096  # of a layer's outputs, to which its filters are fitted
_RIDGE = 0.3  # what keeps filters near those they had, in mean squares of the windows' values


def _collect(model: nn.Module, batches: Iterable) -> Tensor:
    """All images of the batches, preprocessed as in training, as one batch."""
    images = []
    for batch in batches:
        if isinstance(model, BaseModel):
            batch = model.data_preprocessor(batch, True)['inputs']
        elif isinstance(batch, (tuple, list)):
            batch = batch[0]
        images.append(batch.to(first_tensor(model)))
    if not images:
        raise ValueError('calibrate must hold images, got an empty iterable; hand over a new one '
                         'if it is an iterator that was read before')
    return torch.cat(images)


def _moments(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each channel of x (N, C, H, W), or None if it has too few values."""
    x = x.double().transpose(0, 1).flatten(1)
    return (x.mean(1), x.std(1, correction=0)) if x.size(1) >= _ENOUGH else None


class _Wanted(NamedTuple):
    """What a layer is to put out: moments of channels, and values (M, C) at M places (n, y, x)."""
    moments: tuple[Tensor, Tensor] | None
    places: tuple[Tensor, ...]
    values: Tensor


def _wanted(output: Tensor) -> _Wanted:
    n, _, height, width = output.shape
    chosen = torch.randperm(n * height * width, generator=torch.Generator().manual_seed(0))
    chosen = chosen[:_POSITIONS].to(output.device)
    places = (chosen // (height * width), chosen // width % height, chosen % width)
    return _Wanted(_moments(output), places, output[places[0], :, places[1], places[2]])


class Calibration:
    """Measures a network with BatchNorm, and :meth:`apply` fits its converted form to it.

    Layer by layer, in the order in which they work, so that each sees the outputs of those that
    were fitted before. Its filters are fitted to the output that BatchNorm has, at positions drawn
    at random, by least squares from its normalized windows; what normalization takes away, as the
    contrast of a window, no filter can bring back. Then each channel is scaled and shifted to the
    mean and deviation that it has behind BatchNorm. A layer that works several times is fitted to
    the first; one whose output has too few values (pooled to one pixel, few images) keeps what the
    conversion gave it.

    Args:
        model: The network before its conversion; its mode and buffers stay as they are.
        convs: Normalization -> the convolutions in front of it.
        batches: What :func:`mmseg_kn.kernelize` takes as ``calibrate``.
    """

    def __init__(self, model: nn.Module, convs: dict[nn.Module, list[nn.Conv2d]],
                 batches: Iterable) -> None:
        self.images = _collect(model, batches)
        self.wanted = {}  # convolution -> what BatchNorm puts out for it
        handles = []
        for norm, sources in convs.items():
            handles += [conv.register_forward_hook(self._worked) for conv in sources]
            if sources:
                handles.append(norm.register_forward_hook(self._measure))
        self._run(model, handles, convs)

    def _worked(self, conv, args, output) -> None:
        output._kn_conv = conv

    def _measure(self, norm, args, output) -> None:
        conv = getattr(args[0], '_kn_conv', None)
        if conv is not None and conv not in self.wanted:
            self.wanted[conv] = _wanted(output)

    def apply(self, model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
        """Fits the layers of ``model`` that took the place of others, old -> new."""
        done = set()
        handles = [new[conv].register_forward_hook(partial(_fit, wanted, done))
                   for conv, wanted in self.wanted.items() if wanted.moments]
        self._run(model, handles, ())

    def _run(self, model: nn.Module, handles: list, norms: Iterable[nn.Module]) -> None:
        try:
            failures = run_example(model, self.images, norms)
        finally:
            for handle in handles:
                handle.remove()
        if len(failures) > 1:
            raise ValueError('the network must run on the images of calibrate, got '
                             f'{"; ".join(failures)}; hand over inputs as in training')


def _fit(wanted: _Wanted, done: set, layer: KNConv2d, args, output: Tensor) -> Tensor | None:
    """Fits a layer at its first work, and passes on what it now puts out."""
    if layer in done:
        return None
    done.add(layer)
    _fit_filters(layer, _windows(layer, args[0], wanted.places), wanted.values)
    output = layer.forward(args[0])
    found = _moments(output)
    (mean, deviation), (wanted_mean, wanted_deviation) = found, wanted.moments
    scale = torch.where(deviation > 0, wanted_deviation / deviation, 1.)
    shift = wanted_mean - mean * scale
    layer.weight.mul_(scale.view(-1, 1, 1, 1).to(layer.weight))
    layer.bias.mul_(scale.to(layer.bias)).add_(shift.to(layer.bias))
    return output * scale.view(1, -1, 1, 1).to(output) + shift.view(1, -1, 1, 1).to(output)


def _windows(layer: KNConv2d, x: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """The normalized windows (M, C * kh * kw) of x (N, C, H, W) behind M places of the output."""
    kernel, stride, padding, dilation = geometry = make_geometry(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    x, (n, rows, columns) = pad(x, geometry), places
    windows = torch.stack([x[n, :, rows * stride[0] + i * dilation[0],
                             columns * stride[1] + j * dilation[1]]
                           for i in range(kernel[0]) for j in range(kernel[1])], -1)
    windows = windows.view(*windows.shape[:2], *kernel)
    alone = Geometry(kernel, (1, 1), (0, 0, 0, 0), (1, 1))
    return normalized_units(windows, alone, layer.dropout_p, False, layer.eps)[0].squeeze(-1)


def _fit_filters(layer: KNConv2d, x: Tensor, y: Tensor) -> None:
    """Least squares of y (M, out_channels) on windows x (M, K), near the filters up to a scale."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y, filters = (part.to(dtype).unflatten(dim, (layer.groups, -1)).movedim(dim, 0)
                     for part, dim in ((x, 1), (y, 1), (layer.weight.flatten(1), 0)))
    x, y, filters = x - x.mean(1, True), y - y.mean(1, True), filters.mT  # groups stand first
    guess = x @ filters
    tiny = torch.finfo(dtype).tiny
    scale = (guess * y).sum(1, True) / guess.square().sum(1, True).clamp(min=tiny)
    filters = filters * scale
    left = y - guess * scale
    few = x.size(1) < x.size(2)  # positions: then the smaller of two equal forms
    gram = x @ x.mT if few else x.mT @ x
    ridge = _RIDGE * x.square().sum((1, 2)).clamp(min=1e-6) / x.size(2)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    solved = torch.cholesky_solve(left if few else x.mT @ left, torch.linalg.cholesky(gram))
    filters = filters + (x.mT @ solved if few else solved)
    layer.weight.copy_(filters.mT.reshape(layer.weight.shape))
