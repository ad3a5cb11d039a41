# What a config over one of mmseg's own needs for kernel normalization.
custom_imports = dict(imports=['mmseg_kn'], allow_failed_imports=False)
custom_hooks = [
    dict(type='StemSignalHook'), dict(type='ClassCheckHook'),
    dict(type='PartialNormHook'), dict(type='ScheduleCheckHook'),
    dict(type='ChannelsLastHook', device='cuda')
]
