"""What a KNResNet needs of torch's FullyShardedDataParallel beyond mmengine's FSDPStrategy.

Configs name these by their dotted paths; docs/distributed.md has one.
"""
from mmengine._strategy import FSDPStrategy
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .models.knresnet import Block, Transition


def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """An ``auto_wrap_policy``: each residual block gathers its weights when it runs.

    Heads stay with the whole: mmseg calls their ``loss`` and ``predict``, and FSDP gathers the
    weights of what is called as a module.
    """
    return recurse or isinstance(module, (Block, Transition))


class FSDPOptimWrapper(OptimWrapper):
    """mmengine's ``OptimWrapper``, with its arguments, which clips by the norm of all shards.

    mmengine clips each process's shard by the shard's own norm, so that the processes scale the
    parts of one gradient differently.

    Raises:
        ValueError: Gradients are to be clipped by value, or the model is not sharded.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.clip_grad_kwargs and self.clip_func is not nn.utils.clip_grad_norm_:
            raise ValueError("FSDPOptimWrapper clips by norm, got a clip_grad of type 'value': "
                             "take type='norm', or OptimWrapper, for values need no other shard")

    def optim_context(self, model: nn.Module):
        if self.clip_grad_kwargs:
            if not isinstance(model, FullyShardedDataParallel):
                raise ValueError('FSDPOptimWrapper clips sharded models, got '
                                 f"{type(model).__name__}: take type='OptimWrapper', or "
                                 "runner_type='FlexibleRunner' and strategy FSDPStrategy")
            self.clip_func = lambda _, **kwargs: model.clip_grad_norm_(**kwargs)
        return super().optim_context(model)


class ResumableFSDPStrategy(FSDPStrategy):
    """mmengine's ``FSDPStrategy``, with its arguments, whose trainings resume.

    mmengine hands the optimizer's state to torch in an order of arguments of torch 2.0.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        self.optim_wrapper.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(
            self.model, self.optim_wrapper.optimizer, state_dict))
