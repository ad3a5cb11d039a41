# Differentially private SGD, see docs/privacy.md. An iteration is a Poisson
# batch of train_dataloader.batch_size images on average; it passes through the
# model in parts.
_base_ = './schedule_80k.py'
optimizer = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0)
optim_wrapper = dict(
    _delete_=True,
    type='DPOptimWrapper',
    target_epsilon=8.0,
    target_delta=1e-5,
    max_grad_norm=1.0,
    optimizer=optimizer)
param_scheduler = [
    dict(_base_.param_scheduler[0], eta_min=1e-3, end=2000)
]
train_cfg = dict(
    type='DPIterBasedTrainLoop',
    max_iters=2000,
    val_interval=500,
    max_physical_batch_size=2)
default_hooks = dict(checkpoint=dict(interval=500))
