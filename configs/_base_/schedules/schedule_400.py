# A small experiment for two CPU cores. The learning rate is the best for KernelNorm
# and for GroupNorm in so short a training (docs/choosing_a_normalization.md).
_base_ = './schedule_80k.py'
optim_wrapper = dict(optimizer=dict(lr=0.03))
param_scheduler = [dict(_base_.param_scheduler[0], end=400)]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200))
