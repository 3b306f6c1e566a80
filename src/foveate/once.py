"""An option that is given twice where one is taken: refused, where the last would win in silence."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from foveate.errors import InvalidInput


class Once(TyperCommand):
    """A command that takes each of its options once, but for those that may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=[*args])
        for option in given:
            single = option.param_type_name == "option" and not getattr(option, "is_flag", False)
            if single and not option.multiple and given.count(option) > 1:
                raise InvalidInput(
                    f"{option.opts[0]} was given {given.count(option)} times: wanted once; run the command for each"
                )
        return list(super().parse_args(ctx, args))
