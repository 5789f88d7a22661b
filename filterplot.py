"""One picture of a convolution: its filters, a matrix (out x in) for each tap of the kernel."""

from matplotlib import pyplot as plt


def plot_filters(weight, title):
    """Draws filters (out, in, height, width) as a grid of height x width matrices (out x in).

    All share one scale of colours, white at zero; it ends where 98 % of the weights do, or the
    diagonal that a Dirac term makes in the middle would leave everything else white. Returns the
    matplotlib Figure.
    """
    weight = weight.detach().cpu()
    rows, columns = weight.shape[2:]
    limit = weight.abs().flatten().kthvalue(int(0.98 * weight.numel())).values.item()
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns + 0.8, 2.4 * rows), sharex=True, sharey=True,
        squeeze=False, layout='constrained',
    )
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            picture = axis.imshow(
                weight[:, :, row, column], cmap='RdBu_r', vmin=-limit, vmax=limit,
                interpolation='nearest',
            )
            axis.set_title(f'tap ({row}, {column})', fontsize=9)
            if row == rows - 1:
                axis.set_xlabel('input channel')
            if column == 0:
                axis.set_ylabel('output channel')
    figure.colorbar(picture, ax=axes, label='weight', extend='both', shrink=0.8)
    figure.suptitle(title)
    return figure
