"""The truth of the embedded world as an adapter: the quality of a response, from 0 to 1 (see `world.quality`).

python -m RewardTrainer.eval.best_of_n --gold_adapter examples/gold.py ...
"""

import world


def load(model: str, device: str) -> None:
    """Nothing to load."""


def score(loaded: None, conversations: list[list[dict]]) -> list[float]:
    """The share of the asked facts that each conversation's last message states rightly."""
    return [world.quality(conversation[-2]["content"], conversation[-1]["content"]) for conversation in conversations]
