"""What is no experiment: the training of weights/tiny, and the benchmark."""
