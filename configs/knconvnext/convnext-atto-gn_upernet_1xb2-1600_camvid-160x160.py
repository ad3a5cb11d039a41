# 32 groups in the heads.
_base_ = './convnext-atto_upernet_1xb2-1600_camvid-160x160.py'
norm = dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=32))
model = dict(decode_head=norm, auxiliary_head=norm)
