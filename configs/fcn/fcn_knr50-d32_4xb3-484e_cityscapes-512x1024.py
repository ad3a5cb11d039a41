_base_ = [
    '../_base_/models/fcn_knr50-d32.py',
    '../_base_/datasets/cityscapes_fcn-paper.py',
    '../_base_/default_runtime.py', '../_base_/schedules/schedule_484e.py'
]
custom_imports = dict(imports=['mmseg_kn.baselines'])
crop_size = (512, 1024)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor)
