"""Starts several processes on CPUs too, and ends them in order; mmengine does neither."""
import atexit
import functools
import gc
import sys

import torch


def setup() -> None:
    """Makes `--launcher pytorch` work where mmengine finds no accelerator, and processes end.

    mmengine calls torch.cuda.set_device whatever there is, and names a device to
    DistributedDataParallel, which takes none for a model on the CPU.

    It never destroys the process group either. A thread of gloo that still holds a tensor when
    Python ends then aborts the process: `terminate called without an active exception`, after
    the results were printed (https://github.com/pytorch/pytorch/pull/179291).
    Called when mmseg_kn is imported; calling it again changes nothing.
    """
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    if utils._init_dist_pytorch.__module__ == __name__:
        return  # done already
    utils._init_dist_pytorch = _init_dist_pytorch(utils._init_dist_pytorch)
    MMDistributedDataParallel.__init__ = _wrap_on_cpu(MMDistributedDataParallel.__init__)
    atexit.register(_leave_group)


def _leave_group():
    """Destroys the process group of a program that ends well.

    Its threads end with the last reference to it, which a wrapped model holds. mmengine's runner,
    which holds that, refers to itself, so only the garbage collection frees it. After an
    exception, which Python keeps in sys, the others may never come to the same point.
    """
    ended_well = getattr(sys, 'last_value', None) is None
    if ended_well and torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _init_dist_pytorch(original):
    @functools.wraps(original, assigned=())
    def init(backend, *args, **kwargs):
        from mmengine.device import get_device

        if get_device() != 'cpu':  # asked when training starts, so that importing starts no GPU
            return original(backend, *args, **kwargs)
        if backend == 'nccl':
            raise ValueError(
                "the backend 'nccl' needs GPUs, and torch finds none: check nvidia-smi and "
                'CUDA_VISIBLE_DEVICES; or, to use the CPU, add '
                '--cfg-options env_cfg.dist_cfg.backend=gloo'
            )
        kwargs.pop('init_backend', None)  # DeepSpeed and ColossalAI have no such path
        torch.distributed.init_process_group(backend, *args, **kwargs)

    return init


def _wrap_on_cpu(original):
    @functools.wraps(original)
    def init(self, module, *args, device_ids=None, **kwargs):
        if all(p.device.type == 'cpu' for p in module.parameters()):
            device_ids = None
        original(self, module, *args, device_ids=device_ids, **kwargs)

    return init
