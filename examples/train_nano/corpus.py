"""Builds the training text: prose about software from the documentation of permissively licensed packages.

    python examples/train_nano/corpus.py DIR        # needs apt-get, dpkg, pip and lxml; 850 MB of downloads

Downloads the packages of `SOURCES` (Debian 12) and `WHEELS` (PyPI), keeps headings, paragraphs, list items and short
code blocks of every page as plain text, drops symbol tables, repeated paragraphs and pages that are not English
prose, and writes DIR/train.jsonl, DIR/heldout.jsonl (1 % of the pages, chosen by the hash of their path) and
DIR/sources.json (package, version, licence, kept characters). Each line: {"source": .., "path": .., "text": ..}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import docstrings
from lxml import etree, html

SOURCES = {
    "ant-doc": "Apache-2.0",
    "aodh-doc": "Apache-2.0",
    "apache2-doc": "Apache-2.0",
    "barbican-doc": "Apache-2.0",
    "bind9-doc": "MPL-2.0",
    "cinder-doc": "Apache-2.0",
    "clang-14-doc": "Apache-2.0 WITH LLVM-exception",
    "cmake-doc": "BSD-3-Clause",
    "crystal-doc": "Apache-2.0",
    "designate-doc": "Apache-2.0",
    "dpdk-doc": "BSD-3-Clause",
    "emscripten-doc": "MIT",
    "erlang-doc": "Apache-2.0",
    "ganeti-doc": "BSD-2-Clause",
    "ghc-doc": "BSD-3-Clause",
    "glance-doc": "Apache-2.0",
    "groovy-doc": "Apache-2.0",
    "h2o-doc": "MIT",
    "heat-doc": "Apache-2.0",
    "ironic-doc": "Apache-2.0",
    "kea-doc": "MPL-2.0",
    "keystone-doc": "Apache-2.0",
    "krb5-doc": "MIT",
    "libapr1-dev": "Apache-2.0",
    "libboost1.74-doc": "BSL-1.0",
    "libcommons-lang3-java-doc": "Apache-2.0",
    "libeigen3-doc": "MPL-2.0",
    "libpcl-doc": "BSD-3-Clause",
    "libsdl2-doc": "Zlib",
    "libtbb-doc": "Apache-2.0",
    "libx11-doc": "MIT (X11)",
    "llvm-15-doc": "Apache-2.0 WITH LLVM-exception",
    "manila-doc": "Apache-2.0",
    "masakari-doc": "Apache-2.0",
    "neutron-doc": "Apache-2.0",
    "nim-doc": "MIT",
    "nodejs-doc": "MIT",
    "nova-doc": "Apache-2.0",
    "ntpsec-doc": "NTP and BSD-2-Clause",
    "octavia-doc": "Apache-2.0",
    "openvswitch-doc": "Apache-2.0",
    "perl-doc": "Artistic or GPL-1+",
    "petsc3.18-doc": "BSD-2-Clause",
    "placement-doc": "Apache-2.0",
    "postgresql-doc-15": "PostgreSQL",
    "pypy3-doc": "MIT",
    "python-aiohttp-doc": "Apache-2.0",
    "python-astropy-doc": "BSD-3-Clause",
    "python-attr-doc": "MIT",
    "python-bs4-doc": "MIT",
    "python-celery-doc": "BSD-3-Clause",
    "python-cffi-doc": "MIT",
    "python-click-doc": "BSD-3-Clause",
    "python-coverage-doc": "Apache-2.0",
    "python-cryptography-doc": "Apache-2.0 or BSD-3-Clause",
    "python-dask-doc": "BSD-3-Clause",
    "python-distributed-doc": "BSD-3-Clause",
    "python-django-doc": "BSD-3-Clause",
    "python-django-extensions-doc": "MIT",
    "python-djangorestframework-doc": "BSD-3-Clause",
    "python-elasticsearch-doc": "Apache-2.0",
    "python-eventlet-doc": "MIT",
    "python-factory-boy-doc": "MIT",
    "python-flask-doc": "BSD-3-Clause",
    "python-fonttools-doc": "MIT",
    "python-fsspec-doc": "BSD-3-Clause",
    "python-gevent-doc": "MIT",
    "python-git-doc": "BSD-3-Clause",
    "python-h5py-doc": "BSD-3-Clause",
    "python-hypothesis-doc": "MPL-2.0",
    "python-ipython-doc": "BSD-3-Clause",
    "python-jinja2-doc": "BSD-3-Clause",
    "python-jsonschema-doc": "MIT",
    "python-jupyter-client-doc": "BSD-3-Clause",
    "python-keystoneauth1-doc": "Apache-2.0",
    "python-kombu-doc": "BSD-3-Clause",
    "python-lark-doc": "MIT",
    "python-markdown-doc": "BSD-3-Clause",
    "python-mongoengine-doc": "MIT",
    "python-mpmath-doc": "BSD-3-Clause",
    "python-nbconvert-doc": "BSD-3-Clause",
    "python-notebook-doc": "BSD-3-Clause",
    "python-openstacksdk-doc": "Apache-2.0",
    "python-oslo.config-doc": "Apache-2.0",
    "python-oslo.db-doc": "Apache-2.0",
    "python-oslo.policy-doc": "Apache-2.0",
    "python-pandas-doc": "BSD-3-Clause",
    "python-peewee-doc": "MIT",
    "python-pil-doc": "HPND",
    "python-pint-doc": "BSD-3-Clause",
    "python-psutil-doc": "BSD-3-Clause",
    "python-pwntools-doc": "MIT",
    "python-pygments-doc": "BSD-2-Clause",
    "python-pymongo-doc": "Apache-2.0",
    "python-pytest-doc": "MIT",
    "python-rdflib-doc": "BSD-3-Clause",
    "python-requests-doc": "Apache-2.0",
    "python-scipy-doc": "BSD-3-Clause",
    "python-scrapy-doc": "BSD-3-Clause",
    "python-selenium-doc": "Apache-2.0",
    "python-setuptools-doc": "MIT",
    "python-skimage-doc": "BSD-3-Clause",
    "python-sklearn-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT",
    "python-statsmodels-doc": "BSD-3-Clause",
    "python-structlog-doc": "Apache-2.0 or MIT",
    "python-sympy-doc": "BSD-3-Clause",
    "python-tables-doc": "BSD-3-Clause",
    "python-taskflow-doc": "Apache-2.0",
    "python-tornado-doc": "Apache-2.0",
    "python-traitlets-doc": "BSD-3-Clause",
    "python-uvicorn-doc": "BSD-3-Clause",
    "python-werkzeug-doc": "BSD-3-Clause",
    "python-whoosh-doc": "BSD-2-Clause",
    "python-wtforms-doc": "BSD-3-Clause",
    "python-xarray-doc": "Apache-2.0",
    "python3.11-doc": "PSF-2.0",
    "racket-doc": "Apache-2.0 or MIT (upstream; Debian's copyright file says LGPL-2.1+)",
    "rust-doc": "MIT or Apache-2.0",
    "sahara-doc": "Apache-2.0",
    "sbcl-doc": "public domain",
    "senlin-doc": "Apache-2.0",
    "sphinx-doc": "BSD-2-Clause",
    "sqlite3-doc": "public domain",
    "swi-prolog-doc": "BSD-2-Clause",
    "swift-doc": "Apache-2.0",
    "tomcat10-docs": "Apache-2.0",
    "trove-doc": "Apache-2.0",
    "varnish-doc": "BSD-2-Clause",
    "watcher-doc": "Apache-2.0",
}
"""Debian 12 package -> licence, as its copyright file gives it."""

WHEELS = {
    "accelerate==1.11.0": "Apache-2.0",
    "apache-airflow-core==3.1.2": "Apache-2.0",
    "bokeh==3.8.1": "BSD-3-Clause",
    "botocore==1.40.70": "Apache-2.0",
    "dagster==1.12.1": "Apache-2.0",
    "datasets==4.4.1": "Apache-2.0",
    "diffusers==0.35.2": "Apache-2.0",
    "flax==0.12.1": "Apache-2.0",
    "google-cloud-aiplatform==1.126.1": "Apache-2.0",
    "google-cloud-compute==1.40.0": "Apache-2.0",
    "google-cloud-dialogflow==2.43.0": "Apache-2.0",
    "jax==0.8.0": "Apache-2.0",
    "keras==3.12.0": "Apache-2.0",
    "kubernetes==34.1.0": "Apache-2.0",
    "langchain-core==1.0.4": "MIT",
    "matplotlib==3.10.7": "matplotlib (PSF-like)",
    "mlflow==3.6.0": "Apache-2.0",
    "networkx==3.5": "BSD-3-Clause",
    "nltk==3.9.2": "Apache-2.0",
    "numba==0.62.1": "BSD-2-Clause",
    "numpy==2.3.4": "BSD-3-Clause",
    "openai==2.7.1": "Apache-2.0",
    "optax==0.2.6": "Apache-2.0",
    "pip==25.3": "MIT",
    "plotly==6.4.0": "MIT",
    "polars==1.35.1": "MIT",
    "prefect==3.6.0": "Apache-2.0",
    "pulumi-aws==7.11.0": "Apache-2.0",
    "pulumi-gcp==9.4.0": "Apache-2.0",
    "pulumi-kubernetes==4.24.0": "Apache-2.0",
    "pydantic==2.12.4": "MIT",
    "pytorch-lightning==2.5.6": "Apache-2.0",
    "streamlit==1.51.0": "Apache-2.0",
    "stripe==13.2.0": "MIT",
    "textual==6.6.0": "MIT",
    "transformers==5.0.0": "Apache-2.0",
    "twisted==25.5.0": "MIT",
}
"""PyPI wheel -> licence. Their docstrings are read; nothing is installed."""

MOST_CHARS = 8_000_000  # of one package, so that none sets the tone

_SKIP_PATH = re.compile(r"genindex|py-modindex|/_modules/|/search\.html|/print\.html|modindex|/src/|_source|changelog|"
                        r"release_?notes|whatsnew|/release[./-]|/releases?/|/proptest|\.(js|css)$")  # fmt: skip
_DROP_TAGS = {"script", "style", "nav", "header", "footer", "table", "form", "img", "svg", "math", "button", "select"}
_DROP_CLASS = re.compile(
    r"headerlink|sphinxsidebar|nav(header|footer|igation)?\b|\btoc|\bcontents (topic|local)|breadcrumb|linenos|"
    r"related|search|viewcode|copybutton|footer|sidebar|highlight-(none|text|console)"
)
_MAIN = (
    "//*[@role='main']",
    "//main",
    "//div[@class='body']",
    "//*[@id='main-content']",
    "//*[@id='content']",
    "//body",
)
_BLOCKS = {
    "p",
    "li",
    "dt",
    "dd",
    "pre",
    "div",
    "section",
    "ul",
    "ol",
    "dl",
    "blockquote",
    "article",
    "main",
    "body",
    "details",
    "center",
}
_HEADINGS = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "### ", "h5": "### ", "h6": "### "}
_COMMON = frozenset(
    ("the", "of", "to", "a", "is", "in", "and", "for", "that", "this", "be", "it", "with", "as", "or", "an", "are",
     "by", "not", "if", "on", "can", "you", "from", "will", "which", "when")
)  # fmt: skip
_ASCII = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "...",
    "\u00a0": " ", "\u2192": "->", "\u00b6": "", "\u00d7": "x", "\u2022": "-", "\u00ad": "", "\u200b": "", "\uf0c1": "",
})  # fmt: skip


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(_ASCII)).strip()


def _blocks(node: html.HtmlElement) -> Iterator[tuple[str, str]]:
    """(kind, text) of the page in reading order; kind is `head`, `text`, `item`, `term` or `code`."""
    loose: list[str] = [node.text or ""]
    for child in node:
        if not isinstance(child.tag, str):
            loose.append(child.tail or "")
            continue
        tag, cls = child.tag.lower(), (child.get("class") or "") + " " + (child.get("id") or "")
        if tag in _DROP_TAGS or _DROP_CLASS.search(cls):
            loose.append(child.tail or "")
            continue
        if tag not in _BLOCKS and tag not in _HEADINGS:
            loose.append(child.text_content() + (child.tail or ""))
            continue
        if text := _plain("".join(loose)):
            yield ("item" if node.tag == "li" else "text"), text
        loose = [child.tail or ""]
        if tag in _HEADINGS:
            yield "head", _HEADINGS[tag] + re.sub(r"^[\d.]+\s+", "", _plain(_visible(child)))
        elif tag == "pre":
            yield "code", child.text_content().translate(_ASCII).strip("\n")
        elif tag == "p":
            yield ("item" if node.tag == "li" else "text"), _plain(_visible(child))
        elif tag == "dt":
            yield "term", _plain(_visible(child))
        else:
            yield from _blocks(child)
    if text := _plain("".join(loose)):
        yield ("item" if node.tag == "li" else "text"), text


def _visible(node: html.HtmlElement) -> str:
    """Text of an inline node without its permanent links."""
    parts = [node.text or ""]
    for child in node:
        if isinstance(child.tag, str) and not re.search("headerlink|viewcode", child.get("class") or ""):
            parts.append(_visible(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _is_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text.lower())
    letters = sum(c.isalpha() or c in " ,.'" for c in text)
    if len(words) < 4 or letters < 0.85 * len(text) or not text.isascii() or "\\" in text:
        return False
    return sum(w in _COMMON for w in words) >= 0.15 * len(words)


def page_blocks(path: str) -> list[tuple[str, str]]:
    """The blocks of one file worth keeping; empty if it cannot be parsed or holds no prose."""
    file = Path(path)
    if path.endswith(".html"):
        found = html_blocks(path)
    elif path.endswith(".py"):
        found = docstrings.python_blocks(
            file.read_bytes(), path.split("/site/")[-1].removesuffix(".py").replace("/", ".")
        )
    elif path.endswith(".json.gz"):
        found = docstrings.service_blocks(file.read_bytes())
    else:
        found = docstrings.pod_blocks(file.read_bytes())
    return keep(found)


def html_blocks(path: str) -> list[tuple[str, str]]:
    try:
        root = html.fromstring(Path(path).read_bytes())
    except (etree.ParserError, ValueError):
        return []
    main = next((found[0] for query in _MAIN if (found := root.xpath(query))), None)
    if main is None:
        return []
    return list(_blocks(main))


def keep(blocks: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Prose, headings, terms and short code; nothing of a file with little prose."""
    kept: list[tuple[str, str]] = []
    for kind, text in blocks:
        generated = text.startswith(("#", "File ", "Generated on ", "This graph ")) and kind != "head"
        if generated or text.endswith("More...") or not text.isascii():
            continue
        lines = text.split("\n")
        wanted = {
            "text": _is_prose(text),
            "item": _is_prose(text),
            "head": 4 < len(text) < 90,
            "term": 3 < len(text) < 90,
            "code": len(lines) <= 12 and max(map(len, lines)) < 89,
        }
        if wanted[kind]:
            kept.append((kind, text))
    prose = sum(len(t) for k, t in kept if k in ("text", "item"))
    return kept if prose >= 500 else []


def join(blocks: list[tuple[str, str]], seen: set[bytes]) -> str:
    """Text of a page: repeated blocks, headings without a body and terms without a description are left out."""
    out: list[tuple[str, str]] = []
    code = prose = 0
    for kind, text in blocks:
        if kind in ("text", "item", "code") and len(text) > 30:
            key = hashlib.blake2b(re.sub(r"\W+", "", text.lower()).encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        if kind == "code":
            if code + len(text) > 0.3 * (prose + 300):
                continue
            code += len(text)
        elif kind in ("text", "item"):
            prose += len(text)
        while out and (
            (kind == "head" and out[-1][0] in ("head", "term")) or (kind == "term" and out[-1][0] == "term")
        ):
            if kind == "head" and len(text.split(" ")[0]) > len(out[-1][1].split(" ")[0]) and out[-1][0] == "head":
                break
            out.pop()
        out.append((kind, text))
    while out and out[-1][0] in ("head", "term"):
        out.pop()
    if prose < 400:
        return ""
    lines = []
    for kind, text in out:
        if kind == "code":
            lines.append("\n".join("    " + line for line in text.split("\n")) + "\n")
        elif kind == "item":
            lines.append("- " + text)
        else:
            lines.append(text + "\n")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(\n- [^\n]*)\n(?!- )", r"\1\n\n", "\n".join(lines))).strip() + "\n"


def download(work: Path) -> dict[str, str]:
    """Unpacks every package below work/x; returns package -> version."""
    (work / "debs").mkdir(parents=True, exist_ok=True)
    have = {p.name.split("_")[0]: p for p in (work / "debs").glob("*.deb")}
    missing = sorted(set(SOURCES) - set(have))
    if missing:
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=work / "debs", check=True)
    versions = {}
    for deb in sorted((work / "debs").glob("*.deb")):
        name, version = deb.name.split("_")[:2]
        versions[name] = version.replace("%3a", ":")
        if name in SOURCES and not (work / "x" / name).is_dir():
            subprocess.run(["dpkg", "-x", str(deb), str(work / "x" / name)], check=True)
    (work / "wheels").mkdir(exist_ok=True)
    for requirement in WHEELS:
        name, version = requirement.split("==")
        site = work / "x" / name / "site"
        if not site.is_dir():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d"]
            subprocess.run([*pip, str(work / "wheels"), requirement], check=True)
            wheel = next((work / "wheels").glob(f"{name.replace('-', '_')}-{version}-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site, [n for n in archive.namelist() if n.endswith((".py", "service-2.json.gz"))])
        versions[name] = version
    return versions


def pages(root: Path, source: str) -> list[str]:
    """Paths of a package's pages, sorted; of rust-doc the books only (the rest is a symbol listing)."""
    suffixes = {"perl-doc": ["*.pod"]}.get(source, ["*.html"])
    if (root / "site").is_dir():
        suffixes = ["*.py", "service-2.json.gz"]
    found = {
        str(p) for suffix in suffixes for p in root.rglob(suffix)
        if p.is_file() and not p.is_symlink() and 2000 < p.stat().st_size < 4_000_000
    }  # fmt: skip
    found = {p for p in found if not _SKIP_PATH.search(p.removeprefix(str(root)))}
    if source == "rust-doc":
        books = (
            r"/html/(book|reference|nomicon|cargo|rustc|rust-by-example|std|"
            r"edition-guide|embedded-book|rustdoc|unstable-book|error_codes)/"
        )
        found = {p for p in found if re.search(books, p)}
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    versions = download(args.work)
    seen: set[bytes] = set()
    report = {}
    with (
        (args.work / "train.jsonl").open("w") as train,
        (args.work / "heldout.jsonl").open("w") as heldout,
        ProcessPoolExecutor(args.jobs) as pool,
    ):
        licences = {**SOURCES, **{k.split("==")[0]: v for k, v in WHEELS.items()}}
        for source in sorted(licences):
            root = args.work / "x" / source
            paths = pages(root, source)
            size = count = 0
            for path, blocks in zip(paths, pool.map(page_blocks, paths, chunksize=32), strict=True):
                text = join(blocks, seen) if blocks else ""
                if not text or size > MOST_CHARS:
                    continue
                name = path.removeprefix(str(root))
                held = int.from_bytes(hashlib.blake2b((source + name).encode(), digest_size=4).digest()) % 100 == 0
                line = json.dumps({"source": source, "path": name, "text": text})
                (heldout if held else train).write(line + "\n")
                size, count = size + len(text), count + 1
            report[source] = {"version": versions[source], "licence": licences[source], "pages": count, "chars": size}
            print(f"{source:32} {len(paths):6} pages, {count:6} kept, {size / 1e6:7.2f} MB", flush=True)
    (args.work / "sources.json").write_text(json.dumps(report, indent=1))
    print(f"total {sum(r['chars'] for r in report.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
