"""Stop strings that span pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference import StopStrings


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
