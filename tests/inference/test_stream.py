"""Whole characters, and stop strings that span pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference import StopStrings, TextStream
from tests.inference.helpers import ByteTokenizer

DECODE = ByteTokenizer().decode


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=30))
def test_streamed_text_is_the_decoded_text(pieces):
    """Tokens of arbitrary bytes: what streams out is final at once and equals decoding the whole."""
    stream = TextStream(lambda tokens: b"".join(pieces[t] for t in tokens).decode(errors="replace"))
    shown = ""
    whole = b"".join(pieces).decode(errors="replace")
    for token in range(len(pieces)):
        shown += stream.push(token)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole


def test_a_character_of_four_tokens_appears_whole():
    stream = TextStream(DECODE)
    assert [stream.push(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_cuts_where_searching_the_whole_text_cuts(pieces, stops):
    stream, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += stream.finish()
    whole = "".join(pieces)
    # a stop string that is complete first ends the text, even if a longer one began before it
    read = ""
    for piece in pieces:
        read += piece
        if any(stop in read for stop in stops):
            break
    places = [read.find(stop) for stop in stops if stop in read]
    assert stream.stopped == bool(places)
    assert shown == (read[: min(places)] if places else whole)


def test_holds_back_only_what_may_become_a_stop_string():
    stream = StopStrings(["\n\nUser:"])
    assert [stream.push(piece) for piece in ("Hi\n", "\nUs", "e", "less\n\nUse", "r: x", "y")] == [
        "Hi", "", "", "\n\nUseless", "", "",
    ]  # fmt: skip
    assert stream.stopped
    assert stream.finish() == ""
