_base_ = './resnet18-gn_1xb8192-dp-eps8_imagenet32x32.py'
# LayerNorm: one group
model = dict(backbone=dict(norm_cfg=dict(num_groups=1)))
