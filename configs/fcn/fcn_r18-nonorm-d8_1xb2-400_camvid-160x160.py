_base_ = './fcn_r18-d8_1xb2-400_camvid-160x160.py'
custom_imports = dict(imports=['mmseg_kn.baselines'])
# scale and shift of each channel, nothing else
norm_cfg = dict(_delete_=True, type='NoNorm')
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg))
