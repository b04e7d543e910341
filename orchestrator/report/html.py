"""Pages from templates: no network, no scripts, no other file. All share the rules of `base.css`."""

from pathlib import Path
from typing import Any


def render_page(template: Path, **values: Any) -> str:
    """A page. Text that comes from outside is escaped; what is marked as `Markup` stands as it is."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    places = FileSystemLoader([template.parent, Path(__file__).parent])
    pages = Environment(loader=places, autoescape=True, undefined=StrictUndefined)
    return pages.get_template(template.name).render(**values)
