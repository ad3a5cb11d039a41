"""Takes a segmentor through what a training and a test call."""
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample


def check_steps(model, batch_size, size, stem, stride):
    """Forward, loss, backward and predict, on random images of ``size``.

    ``stem`` begins the name of the first layer, and ``stride`` is that of the last feature map,
    None if a config of mmseg decides on it.
    """
    def batch():
        samples = []
        for _ in range(batch_size):
            sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 19, (1, *size))))
            sample.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size, flip=False))
            samples.append(sample)
        images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in samples]
        return dict(inputs=images, data_samples=samples)

    train = model.data_preprocessor(batch(), training=True)
    losses = model(**train, mode='loss')
    loss = sum(v for k, v in losses.items() if 'loss' in k)
    loss.backward()
    assert loss.isfinite()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    first = next(p for name, p in parameters.items() if name.startswith(stem))
    assert (first.grad != 0).any()

    model.eval()
    with torch.no_grad():
        result = model.test_step(batch())[0]
        features = model.extract_feat(train['inputs'])
    assert result.pred_sem_seg.data.shape == (1, *size)
    assert stride is None or features[-1].shape[2:] == (size[0] // stride, size[1] // stride)
