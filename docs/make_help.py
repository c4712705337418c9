"""Writes docs/help.md, the help pages of the command line, from the commands themselves."""

from __future__ import annotations

from pathlib import Path

from typer.main import get_command

from llmquant.cli.main import app

PAGE = Path(__file__).parent / "help.md"


def render() -> str:
    """The page: usage, description, arguments and options of every command."""
    group = get_command(app)
    parts = ["# Command line", "", "Written by `make docs`; a test keeps it current.", ""]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        parts += [f"## llmquant {name}", "", (command.help or "").strip(), ""]
        parts += ["| | | default |", "|---|---|---|"]
        for parameter in command.params:
            names = ", ".join(f"`{o}`" for o in parameter.opts) if parameter.param_type_name == "option" else ""
            names = names or f"`{parameter.name}`"
            text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
            default = "required" if parameter.required else _default(parameter.default)
            parts.append(f"| {names} | {text} | {default} |")
        parts.append("")
    return "\n".join(parts)


def _default(value: object) -> str:
    return "" if value in (None, False, ()) or callable(value) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
