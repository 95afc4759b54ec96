"""Training algorithms over a Backend: each turns rows into Datums and a loss. One module each: rl, sft, sdft, dpo."""
