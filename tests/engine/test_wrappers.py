"""The model within its wrappers."""
import pytest
from mmengine.model import BaseModel, BaseTTAModel, MMDistributedDataParallel
from torch import distributed, nn

from mmseg_kn.engine.wrappers import unwrap


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.layer(inputs)


class Augmented(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0,
                                   world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize('wrap', [
    lambda model: model, Augmented, MMDistributedDataParallel,
    lambda model: MMDistributedDataParallel(Augmented(model))])
def test_unwrap(wrap, one_process):
    model = Model()
    assert unwrap(wrap(model)) is model
