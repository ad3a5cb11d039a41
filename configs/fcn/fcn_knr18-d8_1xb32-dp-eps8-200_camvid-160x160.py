_base_ = [
    '../_base_/models/fcn_knr50-d8.py',
    '../_base_/datasets/camvid_160x160.py',
    '../_base_/dp_runtime.py', '../_base_/schedules/schedule_dp_200.py'
]
crop_size = (160, 160)
data_preprocessor = dict(size=crop_size)
train_dataloader = dict(
    batch_size=32, batch_sampler=dict(type='PoissonBatchSampler'))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18),
    decode_head=dict(in_channels=724, channels=128),
    auxiliary_head=dict(in_channels=512, channels=64))
