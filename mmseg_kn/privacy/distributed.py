"""Several processes under differential privacy."""
from mmengine.model import BaseModel
from mmengine.registry import MODEL_WRAPPERS
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel


@MODEL_WRAPPERS.register_module()
class MMDPDistributedDataParallel(DifferentiallyPrivateDistributedDataParallel):
    """opacus's wrapper for mmengine's runner, ``model_wrapper_cfg=dict(type=...)``.

    It starts all processes from the weights of the first. Gradients are summed once they are
    clipped and noised, by ``DPOptimWrapper``; torch's wrapper would exchange raw ones.

    Args:
        module: The model.
        kwargs: What mmengine passes to torch's wrapper; without effect.
    """

    def __init__(self, module: BaseModel, **kwargs) -> None:
        super().__init__(module)

    def train_step(self, data, optim_wrapper) -> dict:
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data) -> list:
        return self.module.val_step(data)

    def test_step(self, data) -> list:
        return self.module.test_step(data)
