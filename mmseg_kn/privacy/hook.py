"""Attaches privacy to a training, logs what is spent, keeps it in checkpoints."""
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS

from ..engine.wrappers import unwrap
from .checks import check_training
from .probe import check_batch
from .randomness import seed_secretly

_WARNING = (
    'losses, accuracies and other values of the training data in the log are not private; nor '
    'does epsilon cover choosing settings or checkpoints by private data, or an earlier '
    'training on the same data')
# What a checkpoint may hold of the log: functions of the settings, not of the data.
_PUBLIC = ('lr', 'base_lr', 'momentum', 'base_momentum', 'epsilon')


@HOOKS.register_module()
class DPHook(Hook):
    """What differentially private training needs beside ``DPOptimWrapper``.

    Before training it refuses what would break the guarantee and attaches the wrapper to the
    model, after a checkpoint has been loaded. Batches are probed for samples that influence each
    other. Epsilon is logged with every line of the log. Checkpoints carry the account in
    ``meta['privacy']``, and of the training's log only what does not depend on the data; a
    resumed training goes on with the account.

    Args:
        probe_interval: Iterations between two probes; the first batch is probed in any case.
    """

    def __init__(self, probe_interval: int = 500) -> None:
        if probe_interval < 1:
            raise ValueError(f'probe_interval must be at least 1, got {probe_interval}')
        self.probe_interval = probe_interval
        self.state = None
        self.loaded_private = False
        self.probe_due = True

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        state = checkpoint.get('meta', {}).get('privacy')
        if runner._resume:
            if state is None:
                raise ValueError('the checkpoint to resume from was not trained privately, so '
                                 'that no account of its steps exists; if its data were others, '
                                 'start a new training from it with load_from')
            self.state = state
        else:
            self.loaded_private = state is not None

    def before_train(self, runner) -> None:
        check_training(runner)
        seed_secretly()
        loop, wrapper = runner.train_loop, runner.optim_wrapper
        sampler = loop.dataloader.batch_sampler
        wrapper.attach(unwrap(runner.model), sample_rate=sampler.sample_rate,
                       batch_size=sampler.batch_size, steps=loop.max_iters,
                       num_items=len(loop.dataloader.dataset), state=self.state)
        self.interval = next((h.interval for h in runner.hooks if isinstance(h, LoggerHook)), 50)
        setting = wrapper.setting
        runner.logger.info(
            'differentially private training: noise multiplier {noise_multiplier:.4f}, sampling '
            'rate {sample_rate:.5f} ({batch_size} of {num_items} items), {steps} steps, clipped '
            'at {max_grad_norm}, delta {target_delta}, accountant {accountant}'.format(**setting))
        runner.logger.warning(_WARNING)
        if self.loaded_private:
            runner.logger.warning('load_from was itself trained privately; if on the same data, '
                                  'its epsilon adds to that of this training')
        if wrapper.noise_seed is not None:
            runner.logger.warning('noise_seed is set: whoever knows it can take the noise away, '
                                  'and nothing is protected')
        if setting['target_delta'] * setting['num_items'] >= 1:
            runner.logger.warning(
                f'target_delta={setting["target_delta"]} is not below 1 / {setting["num_items"]} '
                'items: publishing one of them outright would satisfy it')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.probe_due |= self.every_n_train_iters(runner, self.probe_interval)
        if self.probe_due and len(data_batch['inputs']):
            check_batch(unwrap(runner.model), runner.optim_wrapper, data_batch)
            self.probe_due = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            runner.message_hub.update_scalar('train/epsilon', runner.optim_wrapper.epsilon())

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        checkpoint['meta']['privacy'] = runner.optim_wrapper.privacy_state()
        scalars = checkpoint['message_hub']['log_scalars']
        for name in list(scalars):
            if name.startswith('train/') and name.removeprefix('train/') not in _PUBLIC:
                del scalars[name]
        checkpoint['message_hub']['runtime_info'].pop('eta', None)  # tells sizes of batches
