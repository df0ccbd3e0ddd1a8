"""One decoder for every family: the configuration, the weights' names, the network."""
