"""Matplotlib's SVG, made fit for a page: own ids, colours as CSS variables, titles to hover over, the page's font."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from llmquant.report.theme import COLOURS

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_ROLES = {light: role for role, (light, _) in COLOURS.items()}
_FONT = re.compile(r"font: ((?:[a-z0-9]+ )*?)([\d.]+)px [^;]+")
_COLOUR = re.compile("|".join(_ROLES))


def inline(source: str, prefix: str, alt: str, titles: Mapping[str, str]) -> str:
    """The `<svg>` element of a picture.

    Args:
        source: what matplotlib wrote, with text as text.
        prefix: goes before every id, so that several pictures of a page do not share any.
        alt: the description.
        titles: text to show on hovering, by gid.
    """
    root = ElementTree.fromstring(source)
    _drop(root, "metadata", "style")
    _scale_freely(root, alt)
    for element in root.iter():
        if element.get("id") in titles:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = titles[element.attrib["id"]]
            element.insert(0, title)
    used = _referred(root)
    for element in root.iter():
        _restyle(element, prefix, used)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK[1 : _LINK.index("}")])
    return ElementTree.tostring(root, encoding="unicode")


def _drop(root: ElementTree.Element, *names: str) -> None:
    """Removes elements: metadata has dates, and a `<style>` would rule the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}{name}" for name in names}:
                parent.remove(child)


def _scale_freely(root: ElementTree.Element, alt: str) -> None:
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", alt)


def _referred(root: ElementTree.Element) -> set[str]:
    """Ids that something points to; the others are dropped."""
    links = {element.get(_LINK, "#")[1:] for element in root.iter()}
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    return links | set(re.findall(r"url\(#([^)]+)\)", values))


def _restyle(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    """Ids with their prefix, the font left to the page, colours by their role."""
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{prefix}-{own}")
    for name, value in element.attrib.items():
        if name == _LINK:
            value = f"#{prefix}-{value[1:]}"
        value = value.replace("url(#", f"url(#{prefix}-")
        if name == "style":
            value = _FONT.sub(_font, value)
            value = _COLOUR.sub(lambda found: f"var(--{_ROLES[found.group()]})", value)
        element.set(name, value)


def _font(found: re.Match[str]) -> str:
    weight = "font-weight: 700; " if "bold" in found[1] or "700" in found[1] else ""
    return f"{weight}font-size: {found[2]}px"
