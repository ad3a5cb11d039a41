"""Gives the layers of a converted network the outputs' mean and deviation of the one before."""
from collections.abc import Iterable
from functools import partial

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from .example import first_tensor, run_example

_ENOUGH = 8  # values of a channel from which to estimate its deviation


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


class Calibration:
    """Measures a network with BatchNorm, and :meth:`apply` fits its converted form to it.

    Layer by layer, in the order in which they work: each sees the outputs of those that were
    fitted before. A layer that works several times is fitted to the first; one whose output has
    too few values (pooled to one pixel, few images) keeps what the conversion gave it.

    Args:
        model: The network before its conversion; its mode and buffers stay as they are.
        convs: Normalization -> the convolutions in front of it.
        batches: What :func:`mmseg_kn.kernelize` takes as ``calibrate``.
    """

    def __init__(self, model: nn.Module, convs: dict[nn.Module, list[nn.Conv2d]],
                 batches: Iterable) -> None:
        self.images = _collect(model, batches)
        self.wanted = {}  # convolution -> moments of what BatchNorm puts out for it
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
            self.wanted[conv] = _moments(output)

    def apply(self, model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
        """Fits the layers of ``model`` that took the place of others, old -> new."""
        wanted = {new[conv]: moments for conv, moments in self.wanted.items() if moments}
        done = set()
        handles = [layer.register_forward_hook(partial(_fit, moments, done))
                   for layer, moments in wanted.items()]
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


def _fit(wanted: tuple[Tensor, Tensor], done: set, layer: nn.Module, args, output: Tensor
         ) -> Tensor | None:
    """Scales and shifts a layer at its first work, and passes on what it now puts out."""
    if layer in done:
        return None
    done.add(layer)
    found = _moments(output)
    if found is None:
        return None
    (mean, deviation), (wanted_mean, wanted_deviation) = found, wanted
    scale = torch.where(deviation > 0, wanted_deviation / deviation, 1.)
    shift = wanted_mean - mean * scale
    layer.weight.mul_(scale.view(-1, 1, 1, 1).to(layer.weight))
    layer.bias.mul_(scale.to(layer.bias)).add_(shift.to(layer.bias))
    return output * scale.view(1, -1, 1, 1).to(output) + shift.view(1, -1, 1, 1).to(output)
