"""Refuses, before training, settings that would silently break the guarantee."""
import os

from mmengine.dataset import ClassBalancedDataset, RepeatDataset
from mmseg.datasets import MultiImageMixDataset
from mmseg.models.losses import BoundaryLoss, LovaszLoss, OhemCrossEntropy
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import Subset

from ..datasets.walk import walk
from ..engine.cuda_graph_hook import CudaGraphHook
from ..engine.iteration_seed_hook import IterationSeedHook
from ..engine.wrappers import unwrap
from .distributed import MMDPDistributedDataParallel
from .loop import DPIterBasedTrainLoop
from .optim_wrapper import DPOptimWrapper
from .sampler import PoissonBatchSampler


def check_training(runner) -> None:
    """Raises ValueError, with the remedy, at the first setting that breaks the guarantee."""
    if not isinstance(runner.optim_wrapper, DPOptimWrapper):
        _refuse(f'optim_wrapper is {type(runner.optim_wrapper).__name__}, which neither clips '
                'samples nor adds noise', "optim_wrapper=dict(type='DPOptimWrapper', ...)")
    if not isinstance(runner.train_loop, DPIterBasedTrainLoop):
        _refuse(f'train_cfg is {type(runner.train_loop).__name__}, which skips empty batches',
                "train_cfg=dict(type='DPIterBasedTrainLoop', ...)")
    if type(runner.train_dataloader.batch_sampler) is not PoissonBatchSampler:
        _refuse('batches are not drawn as the accounting assumes, every item by chance, but by '
                f'{type(runner.train_dataloader.batch_sampler).__name__}',
                "train_dataloader=dict(batch_sampler=dict(type='PoissonBatchSampler'))")
    if runner.distributed and not isinstance(runner.model, MMDPDistributedDataParallel):
        _refuse(f'{type(runner.model).__name__} exchanges gradients that are not yet clipped',
                "model_wrapper_cfg=dict(type='MMDPDistributedDataParallel')")
    if any(isinstance(hook, IterationSeedHook) for hook in runner.hooks):
        _refuse('IterationSeedHook lets anyone repeat the dropout of each iteration, by the seed '
                'that checkpoints hold', 'custom_hooks without it')
    if runner.cfg.get('compile'):
        _refuse('a compiled model calls no hooks, which clipping needs', 'compile=False')
    if any(isinstance(hook, CudaGraphHook) for hook in runner.hooks):
        _refuse('CudaGraphHook compiles the networks, and compiled networks call no hooks, which '
                'clipping needs', 'custom_hooks without it')
    if runner.cfg.get('activation_checkpointing'):
        _refuse('activation checkpointing runs forward twice', 'activation_checkpointing=None')
    model = unwrap(runner.model)
    model.train()  # layers in the mode that training puts them in
    check_preprocessor(model.data_preprocessor)
    check_dataset(runner.train_dataloader.dataset)
    for name, module in model.named_modules():
        check_module(name, module)


def check_module(name: str, module: nn.Module) -> None:
    """Refuses a layer or loss that lets samples see each other."""
    kind = type(module).__name__
    if module.training and (isinstance(module, _NormBase) and not _per_sample(module)
                            or hasattr(module, 'running_mean')
                            and module.running_mean is not None):
        _refuse(f'{name} ({kind}) takes statistics over the batch, or keeps them beside the '
                "weights, where no noise reaches them", "conv_cfg=dict(type='KNConv'), "
                "norm_cfg=None, or norm_cfg=dict(type='GN', num_groups=32)")
    if next(module.buffers(recurse=False), None) is not None and any(
            p.requires_grad for p in module.parameters(recurse=False)):
        _refuse(f'{name} ({kind}) trains weights beside buffers, which per-sample gradients '
                'cannot account for', "requires_grad=False for it, e.g. "
                "norm_cfg=dict(type='BN', requires_grad=False)")
    if getattr(module, 'with_cp', False):
        _refuse(f'{name} ({kind}) has with_cp=True, which runs its forward twice',
                'with_cp=False and a smaller train_cfg.max_physical_batch_size')
    if getattr(module, 'sampler', None) is not None:
        _refuse(f'{name} ({kind}) chooses its pixels over the whole batch', 'sampler=None')
    problem = next((problem for applies, problem in (
        (isinstance(module, OhemCrossEntropy), 'chooses its pixels over the whole batch'),
        (isinstance(module, BoundaryLoss), 'counts the edges of the whole batch'),
        (isinstance(module, LovaszLoss) and not module.per_image,
         'ranks pixels over the whole batch (per_image=False)'),
        (getattr(module, 'avg_non_ignore', False),
         'divides by the labelled pixels of the whole batch (avg_non_ignore=True)'),
        (getattr(module, 'class_weight', None) is not None,
         'divides by the class weights of the whole batch (class_weight)'),
        (getattr(module, 'reduction', None) in ('sum', 'none'),
         f'is no mean over samples (reduction={getattr(module, "reduction", None)!r})'),
    ) if applies), None)
    if problem:
        _refuse(f'{name} ({kind}) {problem}', "a mean over samples, e.g. "
                "loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)")


def _per_sample(norm: nn.Module) -> bool:
    return isinstance(norm, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))


def check_preprocessor(preprocessor: nn.Module) -> None:
    if getattr(preprocessor, 'size_divisor', None) is not None:
        _refuse('data_preprocessor.size_divisor pads to the largest image of the batch',
                'data_preprocessor=dict(size=crop_size, size_divisor=None)')
    if getattr(preprocessor, 'batch_augments', None) is not None:
        _refuse('data_preprocessor.batch_augments mixes images', 'batch_augments=None')


def check_dataset(dataset) -> None:
    """Refuses data in which one image can come twice into a batch."""
    for part in walk(dataset):
        _check_part(part)


def _check_part(dataset) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, (RepeatDataset, ClassBalancedDataset)):
        _refuse(f'{kind} gives an image several chances to be drawn', 'the dataset itself')
    if isinstance(dataset, MultiImageMixDataset):
        _refuse(f'{kind} mixes images, so that one touches many items', 'the dataset itself')
    if getattr(dataset, 'max_refetch', 0):
        _refuse(f'{kind} takes another image where one fails', 'max_refetch=0')
    if isinstance(dataset, Subset):
        paths = list(dataset.indices)
    elif hasattr(dataset, 'get_data_info'):
        paths = [os.path.realpath(info['img_path']) if 'img_path' in info else i
                 for i, info in enumerate(map(dataset.get_data_info, range(len(dataset))))]
    else:
        return
    twice = len(paths) - len(set(paths))
    if twice:
        raise ValueError(f'{twice} of {len(paths)} items of the training data name an image that '
                         'another names, so that epsilon, which is for one item, says too '
                         'little; list every image once')


def _refuse(problem: str, remedy: str) -> None:
    raise ValueError(f'not private: {problem}. Set {remedy}')
