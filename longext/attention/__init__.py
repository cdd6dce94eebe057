"""S2-Attn and its relatives in training, through transformers' attention interface."""
