"""Trains with CUDA graphs, so that the host no longer launches every kernel of a network."""
from collections.abc import Callable

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .channels_last_hook import Handles
from .wrappers import unwrap

# Parts of mmseg's segmentors that take a tensor or tensors, and give them.
NETWORKS = ('backbone', 'neck', 'decode_head', 'auxiliary_head')


class _Forward:
    """A module's forward, compiled for one mode of the module or for both."""

    def __init__(self, module: nn.Module, training: bool | None, options: dict) -> None:
        self.module = module
        self.training = training
        self.own = module.forward
        self.compiled: Callable = torch.compile(self.own, **options)
        module.forward = self

    def __call__(self, *args, **kwargs):
        applies = self.training in (None, self.module.training)
        return (self.compiled if applies else self.own)(*args, **kwargs)

    def remove(self) -> None:
        del self.module.forward  # the class's own appears again


def use_cuda_graphs(model: BaseModel, training: bool | None = True, **options) -> Handles:
    """Compiles the networks of a segmentor, by default into CUDA graphs.

    Backbone, neck and heads are compiled by themselves, each without a break; losses, metrics
    and the optimizer stay eager. One call from the host replays a graph, for the forward and for
    the backward pass each, and every replay draws other dropout. Every size of images needs
    graphs of its own, so crops of a fixed size should be trained on. Parameters and checkpoints
    stay as they are. Gradients must not be added up over several calls, because they may lie in
    the memory of a graph: step and ``zero_grad(set_to_none=True)`` after each.

    Args:
        model: An mmseg segmentor.
        training: Compile what runs in training mode; False: in evaluation mode; None: in both.
            The other mode stays eager.
        options: Of ``torch.compile``, in place of ``mode='reduce-overhead'``, which is inductor
            with CUDA graphs. On a CPU there are no graphs to make, only code that is compiled.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: ``model`` has none of these networks.
    """
    options = options or dict(mode='reduce-overhead')
    parts = [getattr(model, name, None) for name in NETWORKS]
    modules = [module for part in parts if part is not None
               for module in (part if isinstance(part, nn.ModuleList) else [part])]
    if not modules:
        raise ValueError(f'a model to compile must have one of {NETWORKS}, as the segmentors of '
                         f'mmseg have, got {type(model).__name__}; call torch.compile yourself')
    return Handles([_Forward(module, training, options) for module in modules])


@HOOKS.register_module()
class CudaGraphHook(Hook):
    """:func:`use_cuda_graphs` for a whole training, whose validations stay eager, or a test.

    Private training refuses it, because clipping needs the hooks of every layer.

    Args:
        options: Of ``torch.compile``.

    Raises:
        ValueError: The model is sharded by FSDP, or the gradients of several iterations are added
            up.
    """

    SHARDED = FullyShardedDataParallel

    def __init__(self, **options) -> None:
        self.options = options
        self.handles = None

    def _begin(self, runner, training: bool) -> None:
        if any(isinstance(module, self.SHARDED) for module in runner.model.modules()):
            raise ValueError('graphs need parameters that stay where they are, and FSDP exchanges '
                             'them while a network runs: leave CudaGraphHook out, or FSDP')
        self.handles = use_cuda_graphs(unwrap(runner.model), training, **self.options)

    def before_train(self, runner) -> None:
        # A gradient may lie in the memory of a graph, which the next iteration overwrites.
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        counts = max(getattr(part, '_accumulative_counts', 1) for part in wrappers)
        if counts > 1:
            raise ValueError('graphs need a step of the optimizer in each iteration, got '
                             f'accumulative_counts={counts} in optim_wrapper: leave that or '
                             'CudaGraphHook out')
        self._begin(runner, True)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # What the graphs of the last iteration put out may be overwritten from here on.
        torch.compiler.cudagraph_mark_step_begin()

    def after_train(self, runner) -> None:
        self.handles.remove()

    def before_test(self, runner) -> None:
        self._begin(runner, False)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    def after_test(self, runner) -> None:
        self.handles.remove()
