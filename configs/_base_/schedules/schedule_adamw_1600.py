# A small experiment for two CPU cores: no stage has a rate of its own, since all
# start from scratch.
_base_ = './schedule_adamw_160k.py'
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0))
param_scheduler = [
    dict(_base_.param_scheduler[0], end=150),
    dict(_base_.param_scheduler[1], begin=150, end=1600)
]
train_cfg = dict(max_iters=1600, val_interval=400)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200))
