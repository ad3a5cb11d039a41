# For Cityscapes mmseg has no config of ConvNeXt: the schedule is that for
# ADE20K, with half as many images.
_base_ = [
    '../_base_/models/upernet_knconvnext-tiny.py',
    '../_base_/datasets/cityscapes.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_adamw_160k.py'
]
crop_size = (512, 1024)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor)
