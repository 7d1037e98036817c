"""Trains one SentencePiece model: run as a script, which imports nothing else of this package.

A process of its own, because the trainer tells its progress on the process's stderr, keeps the
interpreter busy meanwhile, and ends the process where memory is short. Arguments: the trainer's
options as JSON, a file with one JSON string of text a line, and the model file to write. An error
is printed on stdout, with exit code 1.
"""

import io
import json
import signal
import sys

import sentencepiece

SPACE = "\u2581"  # SentencePiece's stand-in for a space
# SentencePiece adds scores up in 32 bits, `tokenizers` in 64: of scores that are multiples of this,
# the sums are equal, so both choose the same of two segmentations that are nearly or exactly tied.
SCORE_STEP = 1 / 16


def main(options: str, sample: str, model: str) -> int:
    """Train and write the model; returns the exit code."""
    if hasattr(signal, "SIGPIPE"):
        # Where nobody reads its progress any more, it ends.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        # Of a protobuf that is missing or older than sentencepiece's, an exception of any kind.
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:
        print(f"protobuf: {error}")
        return 1
    sentencepiece.set_random_generator_seed(0)
    trained = io.BytesIO()
    with open(sample, "rb") as lines:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=map(json.loads, lines),
                model_writer=trained,
                **json.loads(options),
            )
        except RuntimeError as error:
            print(error)
            return 1
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    _spell_with_spaces(proto)
    with open(model, "wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
    return 0


def _spell_with_spaces(proto) -> None:
    """Write pieces with spaces, so that U+2581 in a text is a character like others.

    The scores of a unigram model become multiples of `SCORE_STEP`.
    """
    proto.normalizer_spec.escape_whitespaces = False
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.piece = piece.piece.replace(SPACE, " ")
            if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
                piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
