# The GroupNorm twin, whose images are shifted and scaled by ImageNet's mean and
# standard deviation. Weights start by torch's default.
_base_ = [
    '../_base_/models/resnet18_cls.py', '../_base_/datasets/imagenet32_dp.py',
    '../_base_/schedules/imagenet32_dp-eps8.py',
    '../_base_/dp_classification_runtime.py'
]
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
model = dict(
    backbone=dict(low_resolution=True, activation='mish', init_cfg=[]),
    head=dict(init_cfg=None))
