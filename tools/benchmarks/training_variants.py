"""Variations of the training recipe, to be named in a config; none of them is a default.

    PYTHONPATH=tools/benchmarks python tools/train.py CONFIG \\
        --cfg-options "custom_imports.imports=[mmseg_kn,training_variants]" ...

docs/choosing_a_normalization.md says what came out.
"""
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS
from mmseg.models import EncoderDecoder
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mmseg_kn import KNConv2d


@OPTIM_WRAPPERS.register_module()
class AdaptiveClipOptimWrapper(OptimWrapper):
    """Clips each output unit's gradient to ``clipping`` times the norm of its weights.

    Source: A. Brock et al., "High-Performance Large-Scale Image Recognition Without
    Normalization", ICML 2021, https://arxiv.org/abs/2102.06171, equation 3.

    Args:
        clipping: Largest ratio of the two norms.
        eps: Norm that weights near zero are taken to have.
    """

    def __init__(self, *args, clipping: float = 0.01, eps: float = 1e-3, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.clipping = clipping
        self.eps = eps

    @torch.no_grad()
    def step(self, **kwargs) -> None:
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None or p.dim() < 2:
                    continue
                weight, grad = (t.flatten(1).norm(dim=1).clamp(min=low) for t, low in
                                ((p, self.eps), (p.grad, 1e-12)))
                scale = (self.clipping * weight / grad).clamp(max=1)
                p.grad.mul_(scale.view(-1, *[1] * (p.dim() - 1)))
        super().step(**kwargs)


@HOOKS.register_module()
class AnnealDropoutHook(Hook):
    """Brings the dropout of KNConv's and KernelNorm's statistics linearly to 0 at the end."""

    def before_train(self, runner) -> None:
        self.first = {m: m.dropout_p for m in runner.model.modules() if hasattr(m, 'dropout_p')}

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        left = 1 - runner.iter / runner.max_iters
        for module, p in self.first.items():
            module.dropout_p = p * left


@HOOKS.register_module()
class ClipRiseHook(Hook):
    """Lets the largest norm of gradients grow linearly from its setting to ``max_norm``.

    Args:
        max_norm: Where it ends.
        begin: Iteration at which it begins to grow.
        end: Iteration at which it has grown.
    """

    def __init__(self, max_norm: float, begin: int, end: int) -> None:
        self.max_norm, self.begin, self.end = max_norm, begin, end

    def before_train(self, runner) -> None:
        self.first = runner.optim_wrapper.clip_grad_kwargs['max_norm']

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        part = min(1, max(0, (runner.iter - self.begin) / (self.end - self.begin)))
        runner.optim_wrapper.clip_grad_kwargs['max_norm'] = (
            self.first + part * (self.max_norm - self.first))


@HOOKS.register_module()
class ScaleInitHook(Hook):
    """Multiplies the initial weights of every KNConv by ``factor``.

    What follows normalizes the layer's output, so the function stays nearly the same, but a step
    of the same length turns a shorter weight further.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @torch.no_grad()
    def before_run(self, runner) -> None:  # a checkpoint is loaded after this
        for module in runner.model.modules():
            if isinstance(module, KNConv2d):
                module.weight.mul_(self.factor)


class Gain(nn.Module):
    """weight[o] * gain[o]: what BatchNorm's gain is after a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


@MODELS.register_module()
class ParametrizedEncoderDecoder(EncoderDecoder):
    """An EncoderDecoder whose KNConv weights are ``'gain'`` (weight times a gain for each output
    channel) or ``'weight_norm'`` (direction and length, torch's).
    """

    def __init__(self, *args, parametrization: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        super().init_weights()  # afterwards the weights are computed, and cannot be initialised
        for module in list(self.modules()):
            if not isinstance(module, KNConv2d):
                continue
            if parametrization == 'gain':
                parametrize.register_parametrization(
                    module, 'weight', Gain(module.out_channels))
                continue
            dead = not module.weight.any()
            if dead:  # A zero weight has no direction: it gets one, and length zero.
                nn.init.kaiming_normal_(module.weight, mode='fan_out')
            parametrizations.weight_norm(module)
            if dead:
                nn.init.zeros_(module.parametrizations.weight.original0)

    def init_weights(self) -> None:
        pass


@HOOKS.register_module()
class LateTurnHook(Hook):
    """Raises the learning rate of KNConv's weights to ``factor`` times what the schedule gives.

    A network of KernelNorm is early with features that stay near random ones; this lets it learn
    them later. The optimizer must hold these weights in groups of their own: name :attr:`keys` in
    ``optim_wrapper.paramwise_cfg.custom_keys``, with ``lr_mult=1``.

    Args:
        factor: Where it ends.
        begin: Iteration at which it begins to grow, by the same ratio in each.
        end: Iteration at which it has grown.
    """

    keys = ('conv.weight', 'conv1.weight', 'stem.weight')  # of every KNConv but the zero-started

    def __init__(self, factor: float, begin: int, end: int) -> None:
        self.ratio, self.begin, self.end = factor ** (1 / (end - begin)), begin, end

    def before_train(self, runner) -> None:
        chosen = {id(p) for name, p in runner.model.named_parameters() if name.endswith(self.keys)}
        self.groups = [group for group in runner.optim_wrapper.param_groups
                       if all(id(p) in chosen for p in group['params'])]
        if sum(len(group['params']) for group in self.groups) < len(chosen):
            raise ValueError(f'the weights whose names end in {self.keys} must have groups of '
                             f'their own: name them in optim_wrapper.paramwise_cfg.custom_keys')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # The schedule multiplies what it finds, and a checkpoint holds it: one factor is enough.
        if self.begin <= runner.iter < self.end:
            for group in self.groups:
                group['lr'] *= self.ratio


@HOOKS.register_module()
class EpsHook(Hook):
    """Gives every layer of kernel normalization but the stem another ``eps``.

    Windows of a variance far below it are only scaled, and their noise is not raised to 1.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def before_run(self, runner) -> None:
        for name, module in runner.model.named_modules():
            if hasattr(module, 'dropout_p') and hasattr(module, 'eps') and (
                    not name.endswith('stem')):
                module.eps = self.eps


@HOOKS.register_module()
class FrozenBatchNormHook(Hook):
    """BatchNorm keeps the statistics of its checkpoint: images do not meet. All else trains."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        for module in runner.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
