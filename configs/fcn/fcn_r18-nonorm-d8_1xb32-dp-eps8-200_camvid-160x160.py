_base_ = [
    '../_base_/models/fcn_r50-d8.py',
    '../_base_/datasets/camvid_160x160.py',
    '../_base_/dp_runtime.py', '../_base_/schedules/schedule_dp_200.py'
]
custom_imports = dict(
    imports=['mmseg_kn', 'mmseg_kn.privacy', 'mmseg_kn.baselines'])
crop_size = (160, 160)
data_preprocessor = dict(size=crop_size)
train_dataloader = dict(
    batch_size=32, batch_sampler=dict(type='PoissonBatchSampler'))
# scale and shift of each channel, nothing else
norm_cfg = dict(_delete_=True, type='NoNorm')
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(depth=18, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=512, channels=128, norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=256, channels=64, norm_cfg=norm_cfg))
