"""What TensorBoard shows of a run: one file of events for each start of its training."""

import sys


class TensorBoardWriter:
    """Writes the figures of each epoch and, for TensorBoard's table of runs, the options.

    folder: that of the run, where the first epoch makes the file; options: plain values.
    """

    def __init__(self, folder, options):
        self.folder, self.options = folder, options
        self.writer = self.end = None

    def write(self, stats, network):
        """Writes an epoch's losses, accuracies and learning rate, and means of each alpha and beta.

        What is only shown may fail, with a word on stderr: the epoch is in the log.
        """
        figures = {name: value for name, value in stats.items()
                   if name.split('_')[-1] in ('loss', 'acc', 'acc5')}
        curves = {**figures, 'epoch_lr': stats['epoch_lr']}
        for name, parameter in network.named_parameters():
            if name.split('.')[-1] in ('alpha', 'beta'):
                curves[f'mean/{name}'] = parameter.mean().item()
        try:
            if self.writer is None:
                self._open(stats['epoch'], figures)
            for name, value in curves.items():
                self.writer.add_scalar(name, value, stats['epoch'])
            if stats['epoch'] == stats['epochs']:
                self.writer.file_writer.add_summary(self.end)
            self.writer.flush()
        except OSError as error:
            self.writer = None  # the next epoch tries another file
            print(f'{self.folder}: no events for TensorBoard ({error})', file=sys.stderr)

    def _open(self, epoch, figures):
        """Makes the file, of this epoch and those after it, which any older file loses."""
        from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import
        from torch.utils.tensorboard.summary import hparams

        options = {name: value if isinstance(value, (bool, int, float)) else str(value)
                   for name, value in self.options.items()}
        *beginning, self.end = hparams(options, dict.fromkeys(figures, 0.0))
        self.writer = SummaryWriter(self.folder, purge_step=epoch)
        for summary in beginning:  # not by add_hparams, which makes another file
            self.writer.file_writer.add_summary(summary)
