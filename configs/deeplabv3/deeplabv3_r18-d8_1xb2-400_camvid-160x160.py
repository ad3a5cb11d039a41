# The BatchNorm twin.
_base_ = [
    '../_base_/models/deeplabv3_r50-d8.py',
    '../_base_/datasets/camvid_160x160.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_400.py'
]
crop_size = (160, 160)
data_preprocessor = dict(size=crop_size)
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=512, channels=128, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=256, channels=64, norm_cfg=norm_cfg))
