# 484 epochs of Cityscapes at 12 images an iteration, 247 iterations each: what the
# authors' fork of HRNet's code sets. Gradients are not clipped.
_base_ = './schedule_80k.py'
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=_base_.optimizer)
param_scheduler = [dict(_base_.param_scheduler[0], eta_min=0, end=119548)]
train_cfg = dict(max_iters=119548, val_interval=10868)
default_hooks = dict(checkpoint=dict(interval=10868))
