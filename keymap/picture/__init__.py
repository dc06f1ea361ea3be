"""A plan, or the rules of a format, drawn as one HTML page that needs no network."""

from keymap.picture.page import format_page, plan_page

__all__ = ["format_page", "plan_page"]
