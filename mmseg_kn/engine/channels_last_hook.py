"""Trains and tests any model with its feature maps in channels_last."""
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from torch.utils.hooks import RemovableHandle

from .wrappers import unwrap


def use_channels_last(model: BaseModel) -> RemovableHandle:
    """Hands ``model`` its images in torch's channels_last memory format.

    Convolutions keep the format of their input, so all feature maps follow; shapes stay
    (N, C, H, W) and values those of the usual format up to rounding. Parameters stay as they
    are, and with them checkpoints. For what it saves see docs/speed.md.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    return model.data_preprocessor.register_forward_hook(_to_channels_last)


def _to_channels_last(module, args, data: dict) -> dict:
    return dict(data, inputs=data['inputs'].contiguous(memory_format=torch.channels_last))


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """:func:`use_channels_last` for a whole training or test."""

    def before_run(self, runner) -> None:
        self.handle = use_channels_last(unwrap(runner.model))

    def after_run(self, runner) -> None:
        self.handle.remove()
