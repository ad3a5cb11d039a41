"""Trains and tests any model with its feature maps in channels_last."""
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Hands the model its images in torch's channels_last memory format.

    Convolutions keep the format of their input, so all feature maps follow; shapes stay
    (N, C, H, W) and values those of the usual format up to rounding. Parameters stay as they
    are, and with them checkpoints. For what it saves see docs/speed.md.
    """

    def __init__(self) -> None:
        self.handle = None

    def before_run(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.handle = model.data_preprocessor.register_forward_hook(_to_channels_last)

    def after_run(self, runner) -> None:
        self.handle.remove()


def _to_channels_last(module, args, data: dict) -> dict:
    return dict(data, inputs=data['inputs'].contiguous(memory_format=torch.channels_last))
