# Minutes on two CPU cores: what `make demo` trains.
_base_ = [
    '../_base_/models/deeplabv3_knr50-d8.py',
    '../_base_/datasets/toy_cityscapes_128x256.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_80k.py'
]
crop_size = (128, 256)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18),
    # dilations for a map of 16 x 32
    decode_head=dict(in_channels=724, channels=64, dilations=(1, 3, 6, 9)),
    auxiliary_head=dict(in_channels=512, channels=64))
optim_wrapper = dict(optimizer=dict(lr=0.1))
param_scheduler = [dict(_base_.param_scheduler[0], end=600)]
train_cfg = dict(max_iters=600, val_interval=300)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=300))
randomness = dict(seed=0)
