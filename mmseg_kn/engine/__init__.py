"""What runs around the model: hooks, one a file and named as its class, and launching."""
from .channels_last_hook import ChannelsLastHook
from .class_check_hook import ClassCheckHook
from .cuda_graph_hook import CudaGraphHook
from .iteration_seed_hook import IterationSeedHook
from .partial_norm_hook import PartialNormHook
from .safe_checkpoint_hook import SafeCheckpointHook
from .schedule_check_hook import ScheduleCheckHook
from .stem_signal_hook import StemSignalHook

__all__ = [
    'ChannelsLastHook', 'ClassCheckHook', 'CudaGraphHook', 'IterationSeedHook',
    'PartialNormHook', 'SafeCheckpointHook', 'ScheduleCheckHook', 'StemSignalHook'
]
