# It downloads itself to data_root, and gives RGB, not BGR.
_base_ = './imagenet_bs32.py'
data_preprocessor = dict(to_rgb=False)
dataset = dict(type='CIFAR100', data_root='data/cifar100/')
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
test_pipeline = [dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(**dataset, split='test', pipeline=test_pipeline))
test_dataloader = val_dataloader
