"""Checkpoints that survive a kill, and trainings that resume from the newest whole one."""
import contextlib
import errno
import os
import os.path as osp
import re
import shutil
import zipfile
from pathlib import Path

from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, FlexibleRunner

from ..checkpoints.files import PART, write_atomically
from ..checkpoints.safe_load import check_members, shown


class AtomicBackend(LocalBackend):
    """mmengine's ``LocalBackend`` whose ``put`` leaves a whole file or none, named ``atomic``.

    See :func:`mmseg_kn.checkpoints.files.write_atomically`: a kill leaves ``NAME.part``.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, obj)


register_backend('atomic', AtomicBackend, force=True)  # mmseg_kn may be imported again


def damage_of(path: str | Path) -> str | None:
    """Why a file is no whole checkpoint: all its checksums are computed. None if it is."""
    try:
        check_members(path)  # before anything is unpacked
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except Exception as error:  # damaged bytes can raise anything
        return shown(f'{type(error).__name__}: {error}')
    return altered and shown(f'the checksum of {altered} is wrong')


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with its arguments, for trainings that may be killed.

    mmengine writes a checkpoint in place, so that a kill leaves half of one; resumes from what
    ``last_checkpoint`` names, whole or not; with ``max_keep_ckpts`` deletes the oldest, and with
    ``save_best`` the best before, before the new one is written; and does not make up for the
    last validation if a kill interrupted that. Here, in local folders,

    * a checkpoint appears under its name when it is whole (:class:`AtomicBackend`);
    * ``--resume`` goes on from the newest whole one, and warns of each that is skipped;
    * what a new checkpoint replaces is deleted last, which takes the room of one checkpoint more;
    * a folder that cannot be written is refused, and one that is too full warned of, at the start;
    * a training that is resumed at its end validates.

    mmengine's ``FlexibleRunner`` (FSDP, DeepSpeed) resumes before any hook is asked, and writes
    without a file backend. There the first two do not hold: a kill while a checkpoint is written
    leaves half of one, which ``last_checkpoint`` does not name yet; and if that file is empty or
    what it names is damaged, it must be made to name another by hand.

    Raises:
        ValueError: ``--resume``, and no checkpoint of the folder is whole.
        OSError: A checkpoint cannot be written; says what to do. Those before are as they were.
    """

    def before_run(self, runner) -> None:
        if isinstance(runner, FlexibleRunner):
            return  # it has resumed already, so that nothing can be chosen any more
        # Runner.load_or_resume, which reads last_checkpoint in this case, comes next.
        if runner._resume and runner._load_from is None:
            if is_main_process():
                self._point_to_newest(runner)
            barrier()

    def _folder(self, runner) -> str:
        """Where the checkpoints are: mmengine sets out_dir to it later, before training."""
        if self.out_dir is None or self.out_dir == runner.work_dir:
            return runner.work_dir
        return osp.join(self.out_dir, osp.basename(runner.work_dir.rstrip(osp.sep)))

    def _point_to_newest(self, runner) -> None:
        """Makes last_checkpoint name the newest whole checkpoint, if there are any."""
        folder, pointer = self._folder(runner), osp.join(runner.work_dir, 'last_checkpoint')
        backend = get_file_backend(folder, backend_args=self.backend_args)
        if not isinstance(backend, LocalBackend):
            return
        named = Path(pointer).read_text().strip() if osp.isfile(pointer) else None
        if named and osp.isdir(named):
            return  # of a sharded training; if it does not fit this one, the loader says so
        order = self._newest_first(folder, named)
        for path in order:
            if (damage := damage_of(path)) is None:
                if path != named:
                    runner.logger.warning(f'{pointer} named {named}; resuming from {path}, the '
                                          'newest that is whole')
                    write_atomically(pointer, path.encode())
                return
            runner.logger.warning(f'{path} is damaged or half-written and is skipped ({damage}); '
                                  'it can be deleted')
        if order:
            raise ValueError(f'no checkpoint in {folder} is whole, so there is none to resume '
                             'from; delete them to start from the beginning, or restore one')

    def _newest_first(self, folder: str, named: str | None) -> list[str]:
        """The checkpoints of a folder, newest first.

        Another training's may lie beside, of more iterations and older; and times may have been
        lost in copying. So what counts as newer than the one named is later in both. Folders are
        sharded checkpoints, which nothing here can judge.
        """
        pattern = re.escape(self.filename_tmpl).replace(r'\{\}', r'(\d+)')
        found = {}
        for name in os.listdir(folder) if osp.isdir(folder) else ():
            path = osp.join(folder, name)
            if (match := re.fullmatch(pattern, name)) and osp.isfile(path):
                found[path] = (os.stat(path).st_mtime_ns, int(match[1]))
        order = sorted(found, key=found.get, reverse=True)
        same = next((p for p in order if named and osp.realpath(p) == osp.realpath(named)), None)
        if same is None:
            return order
        time, number = found[same]
        later = [p for p in order if found[p][0] > time and found[p][1] > number]
        return later + [named] + [p for p in order if p != same and p not in later]

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if self.file_client_args is None and type(self.file_backend) is LocalBackend:
            self.backend_args = dict(backend='atomic')
            if is_main_process():
                self._check_folder(runner)
        self._validate_at_end(runner)

    def _validate_at_end(self, runner) -> None:
        """Makes up for the last validation, which a kill may have interrupted."""
        if runner.val_loop is None:
            return
        done, end = runner.iter, runner.max_iters
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            done, end = runner.epoch, runner.max_epochs
        if done and done >= max(end, runner.val_begin):
            runner.logger.info('the training is resumed at its end; its last validation, which '
                               'may have been interrupted, is run')
            runner.val_loop.run()

    def _check_folder(self, runner) -> None:
        """Tells now what would otherwise end the training at its first checkpoint."""
        with _explained():
            os.makedirs(self.out_dir, exist_ok=True)
            if not os.access(self.out_dir, os.W_OK):
                raise PermissionError(errno.EACCES, 'Permission denied', self.out_dir)
        for part in Path(self.out_dir).glob(f'*.pth{PART}'):
            runner.logger.warning(f'{part} was left by a training that was killed while it wrote '
                                  'it, and is deleted')
            part.unlink()
        # Weights and momentum. Not by state_dict(), for which sharded models wait for each other.
        need = 2 * sum(p.nbytes for p in runner.model.parameters())
        if (free := shutil.disk_usage(self.out_dir).free) < need:
            runner.logger.warning(
                f'{self.out_dir} has room for {free / 2**20:.0f} MiB and a checkpoint takes about '
                f'{need / 2**20:.0f}: make room, or name another folder by '
                'default_hooks.checkpoint.out_dir')

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        with _explained():
            super().after_train_iter(runner, *args, **kwargs)

    def after_train_epoch(self, runner) -> None:
        with _explained():
            super().after_train_epoch(runner)

    def after_val_epoch(self, runner, metrics) -> None:
        with _explained():
            super().after_val_epoch(runner, metrics)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        oldest = None
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids and \
                len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            oldest = self.keep_ckpt_ids.popleft()  # which mmengine would delete first
        super()._save_checkpoint_with_step(runner, step, meta)
        if oldest is not None:
            self._remove(self.file_backend.join_path(
                self.out_dir, self.filename_tmpl.format(oldest)))

    def _save_best_checkpoint(self, runner, metrics) -> None:
        if not self.save_best:
            return
        # mmengine first deletes the best before, if it knows of one.
        one = len(self.key_indicators) == 1
        before = {None: self.best_ckpt_path} if one else self.best_ckpt_path_dict
        if one:
            self.best_ckpt_path = None
        else:
            self.best_ckpt_path_dict = dict.fromkeys(before)
        super()._save_best_checkpoint(runner, metrics)
        after = {None: self.best_ckpt_path} if one else self.best_ckpt_path_dict
        for key, path in before.items():
            if after[key] is None:  # it is still the best
                after[key] = path
            elif path and path != after[key]:
                self._remove(path)
        if one:
            self.best_ckpt_path = after[None]

    def _remove(self, path: str) -> None:
        """Deletes a checkpoint that is replaced, a folder if it is sharded."""
        barrier()  # each process writes its shard of the one that replaces it
        if is_main_process():
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                self.file_backend.rmtree(path)


@contextlib.contextmanager
def _explained():
    """Says of an error of writing what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, 'a checkpoint cannot be written '
            f'({error.strerror}{f": {error.filename}" if error.filename else ""}); those before '
            'it are whole. Make room, or keep fewer or name another folder '
            '(default_hooks.checkpoint.max_keep_ckpts and .out_dir), and go on with --resume'
        ) from error
