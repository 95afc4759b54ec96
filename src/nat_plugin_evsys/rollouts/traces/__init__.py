"""Trajectories that NAT's exporters wrote."""
