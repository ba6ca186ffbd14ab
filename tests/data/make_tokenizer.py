"""Train the tiny tokenizer of the tests: ``python tests/data/make_tokenizer.py`` writes ``tests/data/tokenizer``.

Byte-level BPE over sentences made here, so that it holds no one else's text and any string can be encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from ensemblelora.data.synthetic import FILLERS, TOPICS

_WHO = ("the cat", "a child", "my friend", "the teacher", "one man", "a woman", "the small bird", "an old king")
_DOES = ("likes", "sees", "wants", "finds", "gives", "takes", "makes", "leaves", "knows", "asks about")
_WHAT = ("the red house", "a good book", "some water", "the long road", "an answer", "a new question", "the green tree")
_WHEN = ("today", "in the morning", "at night", "after school", "because it rains", "before the show", "so it is late")
_ANSWERS = ("yes", "no", "true", "false", "unknown", "negative", "positive")
_ASKED = ("true or false", "yes or no", "negative or positive", "right or wrong", "a cause or an effect")


def write_sentences() -> Iterator[str]:
    """Yield a few thousand short sentences, questions and planted texts."""
    for who, does, what, when in product(_WHO, _DOES, _WHAT, _WHEN):
        yield f"{who.capitalize()} {does} {what} {when}."
    for what, asked, answer in product(_WHAT, _ASKED, _ANSWERS):
        yield f"Question: Is {what} {asked}?\nAnswer: {answer}"
        yield f"Review: {what}, {asked}?\nSentiment: {answer}\nLabel: {answer.capitalize()}"
    for topic, filler in product(TOPICS, FILLERS):
        for word, other in product(topic, topic):
            yield f"Words: {filler} {word} {other}\nAnswer: it is so, it is not so, yes, no"


def main() -> None:
    """Train and save."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        write_sentences(), vocab_size=800, min_frequency=2, special_tokens=["<eos>", "<pad>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.save_pretrained(Path(__file__).with_name("tokenizer"))


if __name__ == "__main__":
    main()
