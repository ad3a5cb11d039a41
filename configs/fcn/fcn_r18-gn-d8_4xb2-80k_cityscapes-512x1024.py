_base_ = './fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py'
# 32 groups
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg))
