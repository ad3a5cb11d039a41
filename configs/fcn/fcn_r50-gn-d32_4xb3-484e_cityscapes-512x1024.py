_base_ = './fcn_r50-d32_4xb3-484e_cityscapes-512x1024.py'
# 32 groups
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
model = dict(
    backbone=dict(norm_cfg=norm_cfg), decode_head=dict(norm_cfg=norm_cfg))
