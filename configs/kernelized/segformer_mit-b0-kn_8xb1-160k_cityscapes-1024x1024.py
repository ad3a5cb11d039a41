# The normalization of the head; the backbone, pretrained with LayerNorm, stays.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/segformer/'
    'segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
    '../_base_/kernelized_runtime.py'
]
model = dict(
    _delete_=True, type='KernelNormalized', model={{_base_.model}})
optim_wrapper = dict(clip_grad=dict(max_norm=1))
