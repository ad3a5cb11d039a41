_base_ = './knconvnext-tiny_upernet_4xb2-160k_cityscapes-512x1024.py'
model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
