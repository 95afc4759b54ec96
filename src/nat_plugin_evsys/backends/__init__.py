"""Where training and sampling happen: the ``Backend`` protocol and its implementations."""
