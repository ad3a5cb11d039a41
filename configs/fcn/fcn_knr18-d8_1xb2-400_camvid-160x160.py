# A small experiment for two CPU cores: 400 iterations from scratch.
_base_ = [
    '../_base_/models/fcn_knr50-d8.py',
    '../_base_/datasets/camvid_160x160.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k.py'
]
crop_size = (160, 160)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18),
    decode_head=dict(in_channels=724, channels=128),
    auxiliary_head=dict(in_channels=512, channels=64))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-4,
        power=0.9,
        begin=0,
        end=400,
        by_epoch=False)
]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200))
