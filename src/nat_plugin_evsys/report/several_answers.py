"""Replies that name several of the answers that the dataset's rows want."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nat_plugin_evsys.report.replies import Reply

MOST_ANSWERS = 20
"""With more different answers than this the rows do not choose from a list, and a reply may well name two."""


def naming_several(replies: Sequence[Reply]) -> list[Reply]:
    """The replies that contain, as whole words, both their own row's answer and another row's.

    Returns:
        none if the rows want fewer than two or more than ``MOST_ANSWERS`` different answers, or name no answers.
    """
    wanted = {reply.expected for reply in replies}
    answers = {answer.casefold().strip() for answer in wanted if answer is not None and re.search(r"\w", answer)}
    if None in wanted or not 2 <= len(answers) <= MOST_ANSWERS:
        return []
    longest_first = sorted(answers, key=len, reverse=True)
    any_answer = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    return [
        reply
        for reply in replies
        if reply.expected is not None
        and reply.expected.casefold().strip() in (named := set(any_answer.findall(reply.text.casefold())))
        and len(named) > 1
    ]
