"""The few ideas behind longext in plain words: for `--explain` behind an error, and for what commands say."""

from __future__ import annotations

CONCEPTS: dict[str, str] = {
    "factor": (
        "The factor says how many times longer the context becomes: target length / trained length. A model "
        "trained on 4,096 tokens reaches 32,768 with factor 8. Give either --factor 8 or --target-length 32768; "
        "each follows from the other. Ask for no more than you need: every method costs a little on short texts, "
        "and more at a larger factor."
    ),
    "target length": (
        "The target length is the number of tokens that the model should be able to read at once. It is never "
        "below the length that the model was trained on, which it reads already. A token is about three quarters "
        "of an English word: a novel of 100,000 words has about 130,000 tokens."
    ),
    "trained length": (
        "The trained length is the number of tokens in the rows that the model was pre-trained on: up to there it "
        "knows every position. config.json gives it as max_position_embeddings, or as "
        "original_max_position_embeddings if the context was extended later. Factors count from it, whatever was "
        "done to the model since. If the config claims more than was trained, say so: --original-length N."
    ),
    "method": (
        "A method is a way to make positions beyond the trained length look like those that the model knows: "
        "`linear` squeezes all of them together, `yarn` leaves near ones exact and squeezes far ones. It changes "
        "nothing without a factor that says how far to reach. Not sure? Take yarn, or let `longext advise MODEL "
        "--target-length N` measure them on your text."
    ),
    "rope": (
        "A model finds out where a token stands by turning pairs of numbers, each pair at a speed of its own: "
        "this is its rotary position embedding (RoPE). A model that was trained under one RoPE computes nonsense "
        "under another, so a second method on top of a first one, or a change back, has to be asked for by name."
    ),
    "perplexity": "Perplexity says between how many tokens a model hesitates on average; less is better.",
    "passkey": "A passkey is a number hidden in a long text that the model has to repeat.",
}


def explanation(concept: str) -> str:
    """Return the paragraph on a concept, "" for none."""
    return CONCEPTS.get(concept, "")
