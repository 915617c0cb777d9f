"""Makes matplotlib's SVG a part of a page: its colours are the page's, its text is text, its ids are its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
DROPPED = ("metadata", "style")  # whose rules would hold for the whole page
NUMBERS = ("d", "x", "y", "width", "height", "transform")
REFERENCE = re.compile(r"url\(#([^)]+)\)")
LONG_NUMBER = re.compile(r"(\d+\.\d{2})\d+")
FAMILY = re.compile(r"font-family: [^;]*;? ?")  # text is in the page's
FLAT = re.compile(r"rotate\(-0 [^)]*\)")
COLOR = re.compile(r"#[0-9a-f]{6}")


def inline_svg(svg: str, name: str, alt: str, colors: Mapping[str, str]) -> str:
    """An SVG file of matplotlib as an element for a page.

    Args:
        name: what its ids begin with, so that no two figures of a page have one in common.
        alt: what a person who does not see it reads.
        colors: CSS in place of colours as `#rrggbb`, which stay as what CSS falls back on.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in DROPPED or child.attrib.get("style") == "fill: none":  # a background
                parent.remove(child)
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        element.tag = _local(element.tag)
        _rewrite(element, name, used, colors)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    title = ElementTree.Element("title")
    title.text = alt
    root.insert(0, title)
    root.attrib |= {"xmlns": SVG, "role": "img", "aria-label": alt}
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")).strip()


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _references(element: ElementTree.Element) -> set[str]:
    values = element.attrib.values()
    links = {value[1:] for key, value in element.attrib.items() if _local(key) == "href" and value.startswith("#")}
    return links | {found for value in values for found in REFERENCE.findall(value)}


def _rewrite(element: ElementTree.Element, name: str, used: set[str], colors: Mapping[str, str]) -> None:
    attributes = {}
    for key, value in element.attrib.items():
        key = _local(key)
        if key == "id" and value not in used:
            continue
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = f"#{name}-{value[1:]}"
        elif key == "style":
            value = COLOR.sub(lambda found: colors.get(found[0], found[0]), FAMILY.sub("", value))
        value = REFERENCE.sub(rf"url(#{name}-\1)", value)
        if key != "transform" or not FLAT.fullmatch(value):
            attributes[key] = LONG_NUMBER.sub(r"\1", value) if key in NUMBERS else value
    element.attrib.clear()
    element.attrib.update(attributes)
