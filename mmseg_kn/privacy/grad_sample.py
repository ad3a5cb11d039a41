"""Per-sample gradients: what each sample of a batch alone adds to the gradient of a parameter.

opacus computes them layer by layer from the layer's input and the gradient of its output. For a
KNConv, with r = rstd, mu = mean and g = dL/dy (gated where the layer ends with a ReLU),

    dW[n] = sum_p (g r)[n, :, p] (unit(x)[n, :, p] - mu[n, p]),   db[n] = sum_p g[n, :, p]

where p runs over positions: the weight gradient of an ordinary convolution, less one product.
mu and r are those of the forward, since dropout would draw others.
"""
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..models.layers import KNConv2d
from ..ops.geometry import Geometry, make_geometry, pad

SMALL_MAP = 256  # positions up to which all windows of a batch are built at once
GRAD_SAMPLERS = GradSampleModule.GRAD_SAMPLERS  # by exact type of layer


def conv_grad_samples(x: Tensor, grad: Tensor, layer: nn.Conv2d, geometry: Geometry) -> Tensor:
    """Gradients of a convolution's weight for each sample, (N, *weight.shape).

    One convolution with the samples as groups would give them too, but on the CPU takes seconds
    for a layer where channels are many and maps small.

    Args:
        x: Padded input, (N, C, H, W).
        grad: dL/dy, (N, O, Ho, Wo).
    """
    n, shape, groups = len(x), layer.weight.shape, layer.groups
    stride, dilation = geometry.stride, geometry.dilation
    if grad[0, 0].numel() <= SMALL_MAP:
        windows = F.unfold(x, shape[2:], dilation, stride=stride)
        windows = windows.view(n, groups, shape[1:].numel(), -1)
        return (grad.reshape(n, groups, shape[0] // groups, -1) @ windows.mT).view(n, *shape)
    out = grad.new_empty(n, *shape)
    for i in range(n):
        out[i] = conv2d_weight(x[i:i + 1], shape, grad[i:i + 1], stride, 0, dilation, groups)
    return out


@register_grad_sampler(KNConv2d)
def kn_conv2d_grad_sample(layer: KNConv2d, activations: list[Tensor],
                          backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients of weight and bias for each sample, (N, *parameter.shape).

    Args:
        activations: x (N, C, H, W); mean and rstd (N, Ho, Wo); the output too, (N, O, Ho, Wo),
            where the layer ends with a ReLU.
        backprops: dL/dy, (N, O, Ho, Wo).
    """
    if len(activations) < 3:
        raise ValueError('per-sample gradients of KNConv2d need the statistics of its forward; '
                         'attach mmseg_kn.privacy.GradSampler(model) in place of '
                         "opacus's GradSampleModule")
    x, mean, rstd, *y = activations
    grad = backprops * (y[0] > 0) if y else backprops
    grads = {}
    if layer.bias is not None and layer.bias.requires_grad:
        grads[layer.bias] = grad.sum((2, 3))
    if layer.weight.requires_grad:
        geometry = make_geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        n, dtype = len(x), grad.dtype
        h, mean = grad * rstd.to(dtype).unsqueeze(1), mean.to(dtype)
        # Less its mean, x - mu does not cancel in what follows.
        centre = mean.mean((1, 2), keepdim=True)
        x = x.relu() if layer.input_activation else x
        x = pad(x.to(dtype), geometry) - centre.unsqueeze(1)
        dweight = conv_grad_samples(x, h, layer, geometry)
        of_mean = torch.einsum('nohw,nhw->no', h, mean - centre)
        grads[layer.weight] = dweight.sub_(of_mean.view(n, -1, 1, 1, 1))
    return grads


class GradSampler:
    """Lets every backward of a model leave per-sample gradients, as opacus's optimizers expect.

    They are in ``p.grad_sample``, (N, *p.shape), until ``clear()``; the loss must be a mean over
    samples. opacus's own hooks return views from the backward of a module, which networks that
    add or rectify in place may not touch, and copy every gradient twice. Here the gradient is met
    at the output tensor itself and bound to the input of that very call.

    Args:
        model: Its layers with parameters must take (N, ...) tensors and return one.

    Attributes:
        keep: What backward leaves: ``'gradients'``, or ``'norms'`` alone, (N,), in
            ``p.norm_sample``, or their ``'clipped sum'``, weighted by ``clip_factors``, in
            ``p.clipped_sum``. An element that is not finite counts as 0, so that no sample can
            spoil the sum.
        clip_factors: (N,).
    """

    def __init__(self, model: nn.Module) -> None:
        self.keep = 'gradients'
        self.clip_factors = None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.modules = list(_layers(model))
        for module in self.modules:
            if type(module) not in GRAD_SAMPLERS:
                prepare_layer(module)  # copies it: before it has hooks
        self.handles = [m.register_forward_hook(self._capture) for m in self.modules]
        self.handles += [m.register_forward_pre_hook(_ask_for_moments, with_kwargs=True)
                         for m in self.modules if isinstance(m, KNConv2d)]
        self.clear()

    def detach(self) -> None:
        """Takes everything back."""
        for handle in self.handles:
            handle.remove()
        for module in self.modules:
            vars(module).pop('ft_compute_sample_grad', None)
        self.clear()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad_sample = p.norm_sample = p.clipped_sum = None

    def norms(self) -> Tensor:
        """Norm of each sample's gradient over all parameters, (N,)."""
        return torch.stack([p.norm_sample for p in self.parameters]).norm(2, dim=0)

    def _capture(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | None:
        moments = ()
        if isinstance(module, KNConv2d):  # its pre-hook has asked for them
            output, *moments = output
        if not module.training or not torch.is_grad_enabled():
            return output
        if not isinstance(output, Tensor):
            raise ValueError(f'{type(module).__name__} returns a {type(output).__name__}; layers '
                             'with parameters must return one tensor to be trained privately')
        if not output.requires_grad:
            return output
        if output._is_view():  # which loses its hook when it is modified in place
            output = output.clone()
        inputs = args[:1] if isinstance(module, KNConv2d) else args  # a residual may follow
        captured = [t.detach() for t in (*inputs, *moments)]
        if isinstance(module, KNConv2d) and module.activation:
            captured.append(output.detach())
        versions = [t._version for t in captured]
        output.register_hook(partial(self._take, module, captured, versions))
        return output

    def _take(self, module: nn.Module, captured: list[Tensor], versions: list[int],
              grad: Tensor) -> None:
        if versions != [t._version for t in captured]:
            raise ValueError(f'the input or output of {type(module).__name__} was modified in '
                             'place after its forward, so that its per-sample gradients are '
                             'lost; switch the in-place operation off, e.g. '
                             "act_cfg=dict(type='ReLU', inplace=False)")
        # Norms in half precision could exceed the bound that they are clipped to.
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)) * len(grad)
        sampler = GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
        if not isinstance(module, KNConv2d):
            # opacus's, of convolutions, reads other elements where the format is channels_last.
            captured = [t.contiguous() for t in captured]
        for p, grad_sample in sampler(module, captured, grad).items():
            if not p.requires_grad:
                continue
            grad_sample.nan_to_num_(0, 0, 0)
            if self.keep == 'gradients':
                p.grad_sample = grad_sample if p.grad_sample is None else (
                    p.grad_sample + grad_sample)
            elif self.keep == 'clipped sum':
                p.clipped_sum = torch.einsum('n,n...', self.clip_factors, grad_sample)
            elif p.norm_sample is None:
                p.norm_sample = grad_sample.reshape(len(grad_sample), -1).norm(2, dim=1)
            else:
                raise ValueError(f'{type(module).__name__} runs twice in a forward, so that its '
                                 "norms are not known layer by layer; take clipping='flat'")


def _ask_for_moments(module: KNConv2d, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, dict(kwargs, return_moments=True)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with parameters of their own; what opacus knows not is differentiated as a whole."""
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        yield module
        if type(module) not in GRAD_SAMPLERS:
            return
    for child in module.children():
        yield from _layers(child)
