# The authors' private training: 100 epochs of 156 Poisson batches, SGD without
# momentum, the learning rate halved at epochs 70 and 90. Their accountant then
# gives a noise multiplier of 0.85.
optim_wrapper = dict(
    type='DPOptimWrapper',
    target_epsilon=8.0,
    target_delta=8e-7,
    max_grad_norm=2.0,
    accountant='rdp',
    optimizer=dict(type='SGD', lr=4.0))
param_scheduler = dict(
    type='MultiStepLR', by_epoch=False, milestones=[10920, 14040], gamma=0.5)
train_cfg = dict(
    type='DPIterBasedTrainLoop',
    max_iters=15600,
    val_interval=1560,
    max_physical_batch_size=112)
val_cfg = dict()
test_cfg = dict()
