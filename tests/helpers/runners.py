"""The smallest training that mmengine's Runner takes, and what its checkpoints hold."""
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, y, mode='tensor'):
        error = self.linear(x) - y
        return dict(loss=error.square().mean()) if mode == 'loss' else error


def tiny_runner(work_dir, iterations, end=10, **kwargs):
    data = [(torch.full((2,), float(i)), torch.ones(1)) for i in range(4)]
    return Runner(
        Tiny(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        param_scheduler=dict(type='PolyLR', end=end, by_epoch=False),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
        ),
        experiment_name=f'{Path(work_dir).name}_{iterations}_{end}_{len(kwargs)}',
        **kwargs,
    )


def message_hub():
    hub = MessageHub('tests')
    hub.update_scalar('loss', np.float64(0.25))
    hub.update_scalar('loss', torch.tensor(0.5), 2)
    hub.update_info('best', np.float32(71.5))
    hub.update_info('epoch', np.int64(3))
    return hub.state_dict()
