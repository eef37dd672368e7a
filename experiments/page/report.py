"""The report: one self-contained page that opens offline, from a finished run.

The charts are Vega-Lite, drawn by the library that vl-convert bundles; nothing is fetched. Texts from
outside are data: the template escapes them, the page's script sets them as text, and a content security
policy lets no script run but the two whose hashes it names.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from experiments.page.figures import DARK, LIGHT, VISIBLE, Figures, config, label_of

HERE = Path(__file__).parent
MARKS: Mapping[str, str] = {
    "holds": "\u2713",
    "does not hold": "\u2717",
    "true by construction": "=",
    "undecided": "?",
}
"""Beside the word, so that colour is not needed."""
OF_ANSWERS = ("corrupted", "answer", "foil", "direction", "span", "answers", "foils")
CLASSES: Mapping[str, str] = {
    "holds": "holds",
    "does not hold": "fails",
    "true by construction": "built",
    "undecided": "undecided",
}


def page(
    question: str, said: Mapping[str, Any], figures: Figures, basis: str, rows: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page of a run: `said` is its summary as summary.json holds it, `basis` what its numbers rest on.

    `rows` of its table are shown as they are.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    bundle = _bundle()
    script = _script((HERE / "report.js").read_text(encoding="utf-8"))
    return environment.get_template("report.html.jinja").render(
        title=question,
        lead=f"{said['settings']['model']}, {basis}.",
        tokens=[token.translate(VISIBLE) for token in said.get("tokens", [])],
        facts=_facts(said),
        checks=said["checks"],
        verdicts=_by_site(said["verdicts"]),
        marks=MARKS,
        classes=CLASSES,
        figures=figures.figures,
        rows=[{name: _number(value) for name, value in row.items()} for row in rows],
        predictions_title=figures.predictions_title if figures.predictions else "",
        command=said["command"],
        versions=", ".join(f"{name} {version}" for name, version in said["versions"].items()),
        data=_data(figures),
        bundle=bundle,
        script=script,
        script_sources=" ".join(f"'sha256-{_digest(code)}'" for code in (bundle, script)),
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and their embedding, as one script; made anew it takes seconds."""
    return _script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _facts(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what was run."""
    model, settings = said["model"], said["settings"]
    shape = model["config"]
    parity = said["parity"]
    facts = [
        ("model", f"{settings['model']}: {shape['n_layer']} blocks, {shape['n_embd']} wide, {shape['n_head']} heads"),
        *((f"sha256 of {name}", digest) for name, digest in (model.get("sha256") or {}).items()),
        ("parity with Hugging Face", parity if isinstance(parity, str) else parity["sentence"]),
        ("computed in", f"{settings['dtype']} on {settings['device']}"),
    ]
    if model.get("repository"):
        facts.insert(1, ("from the hub", f"{model['repository']} at commit {model['commit']}"))
    if corpus := said.get("corpus"):
        texts = settings["texts"]
        facts.append(("texts", f"{texts['path']}, sha256 {texts['sha256']}"))
        facts.append(("corpus", ", ".join(f"{count} {name}" for name, count in corpus.items())))
    asked = ("site", "layers", "factors", "doses", "indices", "positions", "target", "sites", "neurons", *OF_ANSWERS)
    facts += [(name, _listed(settings[name])) for name in asked if settings.get(name) is not None]
    return facts


def _listed(value: Any) -> str:
    return (
        ", ".join(label_of(item) if isinstance(item, float) else str(item) for item in value)
        if isinstance(value, list)
        else str(value)
    )


def _by_site(verdicts: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Verdicts by what was scaled."""
    found: dict[str, list[dict[str, Any]]] = {}
    for verdict in verdicts:
        found.setdefault(verdict["where"], []).append(verdict)
    return list(found.items())


def _data(figures: Figures) -> str:
    """All that the page's script reads, as JSON that cannot end its script element."""
    whole = {
        "figures": [{"name": figure.name, "alt": figure.alt, "spec": figure.spec} for figure in figures.figures],
        "data": figures.data,
        "places": figures.places,
        "controls": [vars(control) for control in figures.controls],
        "titles": figures.titles,
        "predictions": figures.predictions,
        "config": {theme: config(theme) for theme in (LIGHT, DARK)},
    }
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)  # ASCII: no line separators either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(code: str) -> str:
    """Code as it stands in a script element: nothing in it may end the element."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n")


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
