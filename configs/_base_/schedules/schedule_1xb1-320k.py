# schedule_80k for one GPU with 1 image an iteration instead of 8: the learning
# rate is an eighth. It sees half as many images.
_base_ = './schedule_80k.py'
optim_wrapper = dict(optimizer=dict(lr=0.00125))
param_scheduler = [
    dict(_base_.param_scheduler[0], eta_min=1.25e-5, end=320000)
]
train_cfg = dict(max_iters=320000, val_interval=32000)
default_hooks = dict(checkpoint=dict(interval=32000))
