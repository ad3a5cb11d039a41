custom_imports = dict(imports=['mmseg_kn'], allow_failed_imports=False)
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False

tta_model = dict(type='SegTTAModel')

# The first logs stem_signal, and warns if the stem of a KernelNorm network is
# lost. The second compares the classes of heads, data and checkpoint. The third
# warns if kernel normalization does not reach all of the network. The fourth
# warns if a resumed training keeps another schedule or does not go on from its
# last checkpoint, and if an epoch never ends.
# The last lays feature maps out as the kernels of a GPU want them.
custom_hooks = [
    dict(type='StemSignalHook'), dict(type='ClassCheckHook'),
    dict(type='PartialNormHook'), dict(type='ScheduleCheckHook'),
    dict(type='ChannelsLastHook', device='cuda')
]
