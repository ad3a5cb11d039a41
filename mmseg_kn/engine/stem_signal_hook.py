"""Tells during training whether the stem of a KernelNorm network still sees the image."""
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from ..models.layers import KNConv2d


def signal_share(y: Tensor) -> float:
    """How much of the variance of y (N, C, H, W) lies within channels, in [0, 1].

    V / (V + B), where V is the mean over channels of their variance over N, H and W, and B the
    variance of their means. The next layer normalizes windows over all channels: of what it
    passes on, V is what depends on the image, B is the same everywhere. 0 where y is constant.
    """
    y = y.detach().float()
    mean = y.mean((0, 2, 3), keepdim=True)
    within, between = (y - mean).square().mean(), mean.var(correction=0)
    return (within / (within + between).clamp(min=torch.finfo(torch.float32).tiny)).item()


@HOOKS.register_module()
class StemSignalHook(Hook):
    """Logs ``stem_signal``, the :func:`signal_share` of the stem, and warns when it is lost.

    Too large a step can throw the stem's bias so far that the stem puts out next to the same
    vector at every position. The layers above go on training on what is left, so that nothing
    but a low mIoU shows it (docs/stability.md). The stem is the model's first ``KNConv2d``; a
    model without one is left alone.

    Args:
        interval: Iterations between two measurements.
        threshold: Warn below this share.
    """

    def __init__(self, interval: int = 50, threshold: float = 0.1) -> None:
        if interval < 1 or not 0 <= threshold < 1:
            raise ValueError('interval must be at least 1 and threshold in [0, 1), got '
                             f'interval={interval}, threshold={threshold}')
        self.interval = interval
        self.threshold = threshold
        self.stem = self.handle = self.share = None
        self.lost = False

    def before_train(self, runner) -> None:
        layers = (m for m in runner.model.named_modules() if isinstance(m[1], KNConv2d))
        self.name, self.stem = next(layers, (None, None))

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.stem is not None and self.every_n_train_iters(runner, self.interval):
            self.share = None
            self.handle = self.stem.register_forward_hook(self._measure)

    def _measure(self, module, args, output) -> None:
        self.share = signal_share(output)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.handle is None:
            return
        self.handle.remove()
        self.handle = None
        if self.share is None:  # a compiled model calls no hook that came after its compilation
            return
        runner.message_hub.update_scalar('train/stem_signal', self.share)
        lost = self.share < self.threshold
        if lost and not self.lost:
            runner.logger.warning(
                f'the stem no longer sees the image: at iteration {runner.iter + 1} a share of '
                f'{self.share:.3f} of the variance of {self.name} depends on it (at first about '
                '0.9). Start again with clipped gradients, '
                'optim_wrapper=dict(clip_grad=dict(max_norm=1)), or a lower learning rate: '
                'docs/stability.md')
        self.lost = lost
