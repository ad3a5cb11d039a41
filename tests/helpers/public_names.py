"""The names that configs, checkpoints and scripts of users hold, and which therefore stay."""
import importlib

import torch
from mmengine.fileio import get_file_backend

# Packages whose import registers and defines what follows.
PACKAGES = ('mmseg_kn', 'mmseg_kn.baselines', 'mmseg_kn.fsdp', 'mmseg_kn.privacy')
# Registry: names that configs give as `type`, and the class or function each stands for.
REGISTERED = {
    'mmengine.registry.MODELS': {
        'KN': 'KernelNorm2d', 'KernelNorm2d': 'KernelNorm2d', 'KNConv': 'KNConv2d',
        'KNConv2d': 'KNConv2d', 'KNConvNeXt': 'KNConvNeXt', 'KNResNetCls': 'KNResNetCls',
        'LNConvNeXt': 'LNConvNeXt', 'NoNorm': 'NoNorm', 'PreActResNetCls': 'PreActResNetCls',
        'ResNetCls': 'ResNetCls'},
    'mmengine.registry.WEIGHT_INITIALIZERS': {'TorchConv': 'TorchConvInit'},
    'mmseg.registry.MODELS': {
        name: name for name in ('KNResNet', 'KernelNormalized', 'NormKNResNet', 'PaperFCNHead',
                                'PlainPoolASPPHead')},
    'mmengine.registry.DATASETS': {'ImageNet32': 'ImageNet32'},
    'mmseg.registry.DATASETS': {'KNCityscapesDataset': 'KNCityscapesDataset'},
    'mmengine.registry.HOOKS': {
        name: name for name in ('ChannelsLastHook', 'ClassCheckHook', 'CudaGraphHook',
                                'DPHook', 'IterationSeedHook', 'PartialNormHook',
                                'SafeCheckpointHook', 'ScheduleCheckHook',
                                'StemSignalHook')},
    'mmengine.registry.OPTIM_WRAPPERS': {'DPOptimWrapper': 'DPOptimWrapper'},
    'mmengine.registry.LOOPS': {'DPIterBasedTrainLoop': 'DPIterBasedTrainLoop'},
    'mmengine.registry.DATA_SAMPLERS': {'PoissonBatchSampler': 'PoissonBatchSampler'},
    'mmengine.registry.MODEL_WRAPPERS': {
        'MMDPDistributedDataParallel': 'MMDPDistributedDataParallel'},
    'mmengine.registry.FUNCTIONS': {
        name: name for name in ('private_collate', 'seed_worker_secretly')},
}
# Modules, and what their __all__ lists for scripts to import.
EXPORTED = {
    'mmseg_kn': ['KNConv2d', 'KNConvNeXt', 'KNConvNeXtClassifier', 'KNResNet',
                 'KNResNetClassifier', 'KNResNetCls', 'KernelNorm2d', 'conversion_table',
                 'kernelize', 'ops'],
    'mmseg_kn.ops': ['IMPLS', 'chosen_impl', 'kernel_norm2d', 'kn_conv2d'],
    'mmseg_kn.datasets': ['ImageNet32', 'KNCityscapesDataset'],
    'mmseg_kn.privacy': ['DPHook', 'DPIterBasedTrainLoop', 'DPOptimWrapper', 'GradSampler',
                         'MMDPDistributedDataParallel', 'PoissonBatchSampler'],
}
# Modules without __all__, and what configs and scripts take from them.
IMPORTED = {
    'mmseg_kn': ['__version__'],
    'mmseg_kn.baselines': ['LNConvNeXt', 'NoNorm', 'NormConv2d', 'NormKNResNet',
                           'PaperFCNHead', 'PlainPoolASPPHead', 'PreActResNetCls', 'ResNetCls'],
    'mmseg_kn.fsdp': ['FSDPOptimWrapper', 'ResumableFSDPStrategy', 'wrap_blocks'],
}
# What exported and compiled programs call.
OPERATORS = ['kn_conv2d', 'kn_conv2d_backward', 'unit_moments', 'unit_moments_backward',
             'pixel_norm', 'pixel_norm_backward']
IMPLS = ('auto', 'triton', 'fused', 'reference')
FILE_BACKEND = 'atomic'


def lookup(path: str):
    """The object at a dotted path, ``module.name``."""
    module, _, name = path.rpartition('.')
    return getattr(importlib.import_module(module), name)


def lost_names() -> list[str]:
    """Those of the names above that no longer stand for what they stood for."""
    try:
        for package in PACKAGES:
            importlib.import_module(package)
    except ImportError as error:
        return [f'{package} ({error})']
    lost = [f'{name} in {registry}' for registry, names in REGISTERED.items()
            for name, stands_for in names.items()
            if getattr(lookup(registry).get(name), '__name__', None) != stands_for]
    for module, names in EXPORTED.items():
        exported = lookup(f'{module}.__all__')
        lost += [f'{module}.__all__: {name}' for name in names if name not in exported]
    for module, names in [*EXPORTED.items(), *IMPORTED.items()]:
        found = importlib.import_module(module)
        lost += [f'{module}.{name}' for name in names if not hasattr(found, name)]
    lost += [f'operator mmseg_kn::{name}' for name in OPERATORS
             if not hasattr(torch.ops.mmseg_kn, name)]
    if lookup('mmseg_kn.ops.IMPLS') != IMPLS:
        lost.append(f'the strings {IMPLS} of impl')
    try:
        get_file_backend(backend_args=dict(backend=FILE_BACKEND))
    except KeyError:
        lost.append(f'the file backend {FILE_BACKEND}')
    return lost
