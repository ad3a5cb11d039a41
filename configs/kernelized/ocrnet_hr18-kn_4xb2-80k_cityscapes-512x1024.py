# From scratch, as the pretrained weights are those of a BatchNorm network.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/ocrnet/'
    'ocrnet_hr18_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/kernelized_runtime.py'
]
data_preprocessor = dict(mean=[0, 0, 0], std=[255, 255, 255])
model = dict(
    _delete_=True,
    type='KernelNormalized',
    model=dict(
        _base_.model,
        pretrained=None,
        data_preprocessor=dict(_base_.data_preprocessor,
                               **data_preprocessor)))
optim_wrapper = dict(clip_grad=dict(_delete_=True, max_norm=1))
