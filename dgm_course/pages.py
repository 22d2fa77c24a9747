"""Executed notebooks as web pages that load nothing: style, formulas and figures are inside each file."""

import base64
import html
import mimetypes
import re
from pathlib import Path
from string import Template

from dgm_course.notebooks import WIDGET, needs_dev

__all__ = ["write_index", "write_page", "write_readme"]

ASSETS = Path(__file__).parent / "assets"
PROGRESS = re.compile(r"\d+%\|.*|\d+it \[|\r")  # what tqdm writes to a console
ANCHOR = re.compile(r'<a class="anchor-link"[^>]*>.*?</a>')
DOLLAR = re.compile(r"(```.*?```|`[^`]*`)|\\\$", re.DOTALL)  # an escaped dollar, or code, where it stays
MONEY = "\ue024"  # stands for an escaped dollar while the text is rendered
HEADING = re.compile(r'<h([23])[^>]*\bid="([^"]*)"[^>]*>(.*?)</h\1>', re.DOTALL)
REMOTE = re.compile(
    r"<(script|link|img|iframe|source|video|audio)\b[^>]*\b(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^>]*>(?:\s*</\1>)?",
    re.IGNORECASE,
)
IMAGE = re.compile(r'(<img\b[^>]*\bsrc=")(?!data:)([^"]+)(")')
NEIGHBOUR = re.compile(r'(<a\b[^>]*\bhref=")((?:\./)?[^":/#]+)\.ipynb(["#])')


def write_page(notebook, target: str | Path, folder: str | Path = ".") -> Path:
    """Write an executed notebook as one HTML file that shows the same without a network.

    Widgets are shown by their `text/html` fallback; outputs that are a live widget only, and progress bars, are left
    out. Links between notebooks become links between pages. The page forbids the browser every outside request.

    Arguments:
        notebook: A notebook node, as `notebooks.execute` returns it.
        target: The .html file.
        folder: Where images that the text names by a relative path are found; they are put into the page.
    """
    try:
        from nbconvert import HTMLExporter
    except ImportError as error:
        raise needs_dev(error) from error
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    body, _ = exporter.from_notebook_node(for_reading(notebook), {"metadata": {"path": str(folder)}})
    body = NEIGHBOUR.sub(r"\1\2.html\3", REMOTE.sub("", ANCHOR.sub("", body)))
    body = IMAGE.sub(lambda found: found[1] + embedded(Path(folder) / found[2]) + found[3], body)
    body = body.replace('href="../README.md', 'href="readme.html').replace('href="notebooks/', 'href="')
    body = body.replace(MONEY, "<span>$</span>")  # alone in an element, a dollar opens no formula
    contents = "\n".join(
        f'<li class="h{level}"><a href="#{anchor}">{text}</a></li>' for level, anchor, text in HEADING.findall(body)
    )
    contents = (
        '<details class="toc" open><summary>Contents</summary>\n<ol>\n'
        f'<li><a href="index.html">← all notebooks</a></li>\n{contents}\n</ol></details>'
    )
    return write_html(target, title(notebook) or Path(target).stem, body, contents)


def embedded(image: Path) -> str:
    """A picture as a data URL. (nbconvert's own way parses the page anew, and tears boxes that unfold.)"""
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def write_readme(readme: Path, folder: Path) -> Path:
    """Write the README as `readme.html`, for the notebooks link to its symbols."""
    import nbformat.v4

    text = nbformat.v4.new_markdown_cell(readme.read_text(encoding="utf-8"))
    return write_page(nbformat.v4.new_notebook(cells=[text]), folder / "readme.html", readme.parent)


def write_index(folder: str | Path) -> Path:
    """Write `index.html`, which lists the pages of a folder by their titles."""
    folder = Path(folder)
    lines = []
    for page in sorted(folder.glob("*.html")):
        if page.name != "index.html":
            name = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"), re.DOTALL)[1]
            lines.append(f'<li><a href="{page.name}">{name}</a></li>')
    heading = "Deep Generative Models, part 2"
    body = f'<h1>{heading}</h1>\n<ul class="index">\n' + "\n".join(lines) + "\n</ul>"
    return write_html(folder / "index.html", heading, body)


def write_html(target: str | Path, name: str, body: str, contents: str = "") -> Path:
    """Fill the page template: style, contents, body, MathJax."""
    from pygments.formatters import HtmlFormatter

    style = (ASSETS / "page.css").read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight")
    scripts = ASSETS / "mathjax.config.js", ASSETS / "mathjax" / "tex-svg-full.js"
    page = Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(name),
        style=style,
        contents=contents,
        body=body,
        scripts="\n".join(f"<script>{inline(script)}</script>" for script in scripts),
    )
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def inline(script: Path) -> str:
    """JavaScript that may stand between script tags: inside its strings, nothing may look like the end of it."""
    return script.read_text(encoding="utf-8").replace("</script", r"<\/script").replace("<!--", r"<\!--")


def title(notebook) -> str:
    """The first level-one heading of a notebook, or nothing."""
    for cell in notebook.cells:
        found = cell.cell_type == "markdown" and re.search(r"^# +(.+?)\s*$", cell.source, re.MULTILINE)
        if found:
            return found[1]
    return ""


def for_reading(notebook):
    """A copy of a notebook without what a page cannot show: live widgets, progress bars, escaped dollars."""
    import nbformat

    notebook = nbformat.from_dict(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = DOLLAR.sub(lambda found: found[1] or MONEY, cell.source)
        elif cell.cell_type == "code":
            cell.outputs = [output for output in map(readable, cell.outputs) if output]
    return notebook


def readable(output):
    """An output as a page shows it, or None if nothing is left of it."""
    if output.output_type == "stream" and output.name == "stderr":
        lines = [line for line in output.text.splitlines(keepends=True) if not PROGRESS.search(line)]
        output.text = "".join(lines)
        return output if output.text.strip() else None
    data = output.get("data", {})
    if data.pop(WIDGET, None) is not None and "text/html" not in data:
        return None
    if "text/html" in data:  # nbconvert prefers a picture to HTML; the richer fallback is the HTML
        output.data = {"text/html": data["text/html"]}
    return output
