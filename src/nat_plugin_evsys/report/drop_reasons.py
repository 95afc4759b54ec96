"""The meaning of each DropReason: the docstring of the enum's member."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise

from nat_plugin_evsys.calls import DropReason


@cache
def drop_reason_meanings() -> dict[str, str]:
    """``{"zero_variance_group": "All trajectories of the dataset row …"}``, of every reason."""
    body = ast.parse(inspect.getsource(DropReason)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        ast.literal_eval(member.value): " ".join(ast.literal_eval(docstring.value).split())
        for member, docstring in pairwise(body.body)
        if isinstance(member, ast.Assign) and isinstance(docstring, ast.Expr)
    }
