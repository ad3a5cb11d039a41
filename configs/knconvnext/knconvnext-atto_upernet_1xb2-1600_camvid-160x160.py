# A small experiment for two CPU cores: 1600 iterations from scratch. The backbone
# is of the size that mmpretrain calls atto.
_base_ = [
    '../_base_/models/upernet_knconvnext-tiny.py',
    '../_base_/datasets/camvid_160x160.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_1600.py'
]
crop_size = (160, 160)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        arch=dict(
            _delete_=True,
            depths=(2, 2, 6, 2),
            channels=(40, 80, 160, 320)),
        drop_path_rate=0.1),
    decode_head=dict(in_channels=[40, 80, 160, 320], channels=128),
    auxiliary_head=dict(in_channels=160, channels=64))
