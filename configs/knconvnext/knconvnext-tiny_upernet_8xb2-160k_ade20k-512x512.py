# mmseg's config of ConvNeXt with UPerNet, with kernel normalization.
_base_ = [
    '../_base_/models/upernet_knconvnext-tiny.py',
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/datasets/ade20k.py',
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_160k.py'
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)))
train_dataloader = dict(batch_size=2)
