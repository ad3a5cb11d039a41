# ImageNet32x32 as published, in pickles, for private training: every image as it
# is, because the authors augment none.
_base_ = './cifar100_bs32.py'
dataset = dict(type='ImageNet32', data_root='data/imagenet32x32/')
train_pipeline = [dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=8192,
    batch_sampler=dict(type='PoissonBatchSampler'),
    collate_fn=dict(type='private_collate'),
    dataset=dict(
        _delete_=True, **dataset, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=256,
    dataset=dict(_delete_=True, **dataset, split='val', pipeline=train_pipeline))
test_dataloader = val_dataloader
