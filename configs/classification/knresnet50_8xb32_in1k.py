_base_ = './knresnet18_8xb32_in1k.py'
model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
