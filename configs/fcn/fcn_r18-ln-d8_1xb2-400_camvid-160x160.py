_base_ = './fcn_r18-d8_1xb2-400_camvid-160x160.py'
# LayerNorm: one group
norm_cfg = dict(_delete_=True, type='GN', num_groups=1)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg))
