# Differentially private training, see docs/privacy.md
_base_ = './default_runtime.py'
custom_imports = dict(imports=['mmseg_kn', 'mmseg_kn.privacy'])
custom_hooks = [*_base_.custom_hooks, dict(type='DPHook')]
# without effect on one GPU
model_wrapper_cfg = dict(type='MMDPDistributedDataParallel')
