# The scenes of make demo, trained on privately.
_base_ = [
    '../_base_/models/deeplabv3_r50-d8.py',
    '../_base_/datasets/toy_cityscapes_128x256.py',
    '../_base_/dp_runtime.py', '../_base_/schedules/schedule_dp_200.py'
]
crop_size = (128, 256)
data_preprocessor = dict(size=crop_size)
train_dataloader = dict(
    batch_size=32, batch_sampler=dict(type='PoissonBatchSampler'))
# 32 groups
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=512, channels=64, dilations=(1, 3, 6, 9),
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=256, channels=64, norm_cfg=norm_cfg))
