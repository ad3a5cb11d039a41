"""Trains and tests any model with its feature maps in channels_last."""
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .wrappers import unwrap


class Handles(list[RemovableHandle]):
    """Handles of several hooks, which end together."""

    def remove(self) -> None:
        for handle in self:
            handle.remove()


def use_channels_last(model: BaseModel) -> Handles:
    """Hands ``model`` its images in torch's channels_last memory format.

    Convolutions keep the format of their input, so all feature maps follow; shapes stay
    (N, C, H, W) and values those of the usual format up to rounding. Parameters stay as they
    are, and with them checkpoints. For what it saves see docs/speed.md.

    The logits go back to the usual format while they are small: upsampled, they would be copied
    by the loss, whose softmax over channels is several times slower in this format.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    heads = [head for head in model.modules() if isinstance(head, BaseDecodeHead)]
    return Handles([
        model.data_preprocessor.register_forward_hook(_to_channels_last),
        *(head.conv_seg.register_forward_hook(_to_contiguous) for head in heads
          if isinstance(getattr(head, 'conv_seg', None), nn.Module))])


def _to_channels_last(module, args, data: dict) -> dict:
    return dict(data, inputs=data['inputs'].contiguous(memory_format=torch.channels_last))


def _to_contiguous(module, args, logits: Tensor) -> Tensor:
    return logits.contiguous()


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """:func:`use_channels_last` for a whole training or test.

    Args:
        device: A type of device, as ``'cuda'``: nothing is changed where the model is on another.
            None for every device.

    Raises:
        ValueError: torch knows no such type of device.
    """

    def __init__(self, device: str | None = None) -> None:
        try:
            self.device = None if device is None else torch.device(device).type
        except (RuntimeError, TypeError):
            raise ValueError(f"device must be a type of torch's devices, got {device!r}; "
                             "use 'cuda', 'cpu' or None") from None
        self.handle = Handles()

    def before_run(self, runner) -> None:
        model = unwrap(runner.model)
        parameter = next(model.parameters(), None)
        if self.device is None or parameter is None or parameter.device.type == self.device:
            self.handle = use_channels_last(model)

    def after_run(self, runner) -> None:
        self.handle.remove()
