# Everything that is not here is mmengine's default.
custom_imports = dict(imports=['mmseg_kn'], allow_failed_imports=False)
default_scope = 'mmpretrain'
env_cfg = dict(cudnn_benchmark=True)
# Lays feature maps out as the kernels of a GPU want them.
custom_hooks = [dict(type='ChannelsLastHook', device='cuda')]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=100),
    checkpoint=dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=1))
