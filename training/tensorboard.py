"""TensorBoard events of a run: a new file for each start or resume."""

from cli import warn


class TensorBoardWriter:
    """Writes the metrics of each epoch and, for the HParams view, the options of the run.

    folder: that of the run; options: plain values. The first epoch creates the file.
    """

    def __init__(self, folder, options):
        self.folder, self.options = folder, options
        self.writer = self.end_summary = None

    def write(self, stats, model):
        """Writes losses, accuracies, learning rate and the mean of each alpha and beta.

        stats: the log record of the epoch. A failure prints a warning and does not stop training.
        """
        metrics = {name: value for name, value in stats.items()
                   if name.split('_')[-1] in ('loss', 'acc', 'acc5')}
        scalars = {**metrics, 'epoch_lr': stats['epoch_lr']}
        for name, tensor in model.state_dict().items():
            if name.split('.')[-1] in ('alpha', 'beta'):
                scalars[f'mean/{name}'] = tensor.mean().item()
        try:
            if self.writer is None:
                self._open(stats['epoch'], metrics)
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, stats['epoch'])
            if stats['epoch'] == stats['epochs']:
                self.writer.file_writer.add_summary(self.end_summary)
            self.writer.flush()
        except OSError as error:
            self.writer = None  # the next epoch opens another file
            warn(f'{self.folder}: no TensorBoard events written ({error})')

    def _open(self, epoch, metrics):
        """Opens a file whose events replace those of older files from this epoch on."""
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import
        from torch.utils.tensorboard.summary import hparams

        options = {name: value if isinstance(value, (bool, int, float)) else str(value)
                   for name, value in self.options.items()}
        *start_summaries, self.end_summary = hparams(options, dict.fromkeys(metrics, 0.0))
        self.writer = SummaryWriter(self.folder, purge_step=epoch)
        for summary in start_summaries:  # add_hparams would write them to another file
            self.writer.file_writer.add_summary(summary)
