# The scenes of make demo, trained on privately.
_base_ = [
    '../_base_/models/deeplabv3_knr50-d8.py',
    '../_base_/datasets/toy_cityscapes_128x256.py',
    '../_base_/dp_runtime.py', '../_base_/schedules/schedule_dp_200.py'
]
crop_size = (128, 256)
data_preprocessor = dict(size=crop_size)
train_dataloader = dict(
    batch_size=32, batch_sampler=dict(type='PoissonBatchSampler'))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18),
    decode_head=dict(in_channels=724, channels=64, dilations=(1, 3, 6, 9)),
    auxiliary_head=dict(in_channels=512, channels=64))
