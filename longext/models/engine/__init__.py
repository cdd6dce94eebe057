"""How prompts go through a model: shared prefixes once, answers in batches that were measured, and what that costs."""
