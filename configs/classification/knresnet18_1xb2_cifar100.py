# Two images an iteration: 25,000 iterations an epoch.
_base_ = './knresnet18_1xb32_cifar100.py'
optim_wrapper = dict(optimizer=dict(lr=0.0015625))
train_dataloader = dict(batch_size=2)
