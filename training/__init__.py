"""What a training is made of: options, how it begins, data, files, figures, processes."""
