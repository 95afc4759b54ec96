"""What clients, backends and service share."""
