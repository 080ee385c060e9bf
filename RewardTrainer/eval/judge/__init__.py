"""A generative LLM as judge: its prompts, how its replies are read, what its verdicts say about it."""
