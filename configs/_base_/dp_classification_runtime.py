# Differentially private training of classifiers, see docs/privacy.md
_base_ = './classification_runtime.py'
custom_imports = dict(
    imports=['mmseg_kn', 'mmseg_kn.privacy', 'mmseg_kn.baselines'])
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='StemSignalHook'),
    dict(type='DPHook')
]
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(by_epoch=False, interval=1560))
log_processor = dict(by_epoch=False)
# without effect on one GPU
model_wrapper_cfg = dict(type='MMDPDistributedDataParallel')
