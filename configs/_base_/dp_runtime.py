# Differentially private training, see docs/privacy.md
_base_ = './default_runtime.py'
custom_imports = dict(imports=['mmseg_kn', 'mmseg_kn.privacy'])
custom_hooks = [
    dict(type='StemSignalHook'), dict(type='ClassCheckHook'),
    dict(type='PartialNormHook'), dict(type='ScheduleCheckHook'),
    dict(type='ChannelsLastHook', device='cuda'),
    dict(type='DPHook')
]
# without effect on one GPU
model_wrapper_cfg = dict(type='MMDPDistributedDataParallel')
