"""NAT's three finetuning interfaces: trajectory builder, trainer adapter and trainer."""
