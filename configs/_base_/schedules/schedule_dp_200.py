# A small experiment with differentially private SGD.
_base_ = './schedule_dp_2k.py'
param_scheduler = [dict(_base_.param_scheduler[0], end=200)]
train_cfg = dict(max_iters=200, val_interval=200)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
