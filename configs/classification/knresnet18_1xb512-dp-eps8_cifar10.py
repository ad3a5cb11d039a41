# Beside Table 4: its network on CIFAR-10 with the default numbers of the
# authors' script, 50 epochs of 97 Poisson batches.
_base_ = './knresnet18_1xb8192-dp-eps8_imagenet32x32.py'
data_root = 'data/cifar10/'
train_dataloader = dict(
    batch_size=512, dataset=dict(type='CIFAR10', data_root=data_root))
val_dataloader = dict(
    dataset=dict(type='CIFAR10', data_root=data_root, split='test'))
test_dataloader = val_dataloader
model = dict(head=dict(num_classes=10))
optim_wrapper = dict(
    target_delta=1e-5, max_grad_norm=1.0, optimizer=dict(lr=1.0))
param_scheduler = dict(milestones=[4850])
train_cfg = dict(max_iters=4850, val_interval=485)
default_hooks = dict(checkpoint=dict(interval=485))
