"""The model under training as NAT sees it: endpoint, chat rendering, recorder."""
