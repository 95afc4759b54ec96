"""Replies that say the same to rows that want different things."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from nat_plugin_evsys.report.replies import Reply

SAME_SHARE = 0.9
"""Share of the replies that must say the same before they count as one answer."""

ROWS_FOR_ONE_ANSWER = 3
"""Fewer rows than this may well have one answer."""


def one_answer(replies: Sequence[Reply]) -> tuple[str, list[Reply]] | None:
    """The answer that nearly all ``replies`` give although their rows want different ones, and those replies.

    Two texts are the same answer if they consist of the same words, in any order. The text returned is the most
    frequent of them.

    Returns:
        None if the replies differ, there are too few rows to tell, or all rows want the same answer.
    """
    scored = [reply for reply in replies if reply.reward is not None]
    wanted = {reply.expected for reply in scored}
    all_want_the_same = len(wanted) == 1 and None not in wanted
    if all_want_the_same or len({reply.row for reply in scored}) < ROWS_FOR_ONE_ANSWER:
        return None
    words = [frozenset(re.findall(r"\w+", reply.text.casefold())) for reply in scored]
    most, count = Counter(words).most_common(1)[0]
    if not most or count < SAME_SHARE * len(scored):
        return None
    same = [reply for reply, its in zip(scored, words, strict=True) if its == most]
    return Counter(reply.text for reply in same).most_common(1)[0][0], same
