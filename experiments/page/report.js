// The page's own script: controls set the charts' parameters, and fill the table of predictions.
// Everything from outside (prompts, tokens) goes in as data or as textContent, never as markup.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  for (const [name, places] of Object.entries(page.places)) {
    for (const row of page.data[name]) row.place = places;
  }
  const chosen = Object.fromEntries(page.controls.map((control) => [control.name, control.value]));
  const views = new Map();
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  let theme = scheme.matches ? "dark" : "light";

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function control(description) {
    const { name, label, options } = description;
    const first = options.findIndex(([value]) => value === chosen[name]);
    if (name === "factor" && options.length > 4) {
      const shown = element("output", { textContent: options[first][1] });
      const range = element("input", { type: "range", min: 0, max: options.length - 1, step: 1, value: first, name });
      range.setAttribute("aria-valuetext", options[first][1]);
      range.addEventListener("input", () => {
        const [value, text] = options[Number(range.value)];
        shown.textContent = text;
        range.setAttribute("aria-valuetext", text);
        choose(name, value);
      });
      return element("label", {}, element("span", {}, `${label} `, shown), range);
    }
    const select = element("select", { name });
    options.forEach(([, text], index) => select.append(element("option", { value: index, textContent: text })));
    select.value = first;
    select.addEventListener("change", () => choose(name, options[Number(select.value)][0]));
    return element("label", {}, `${label} `, select);
  }

  function choose(name, value) {
    chosen[name] = value;
    for (const figure of page.figures) {
      const parameters = (figure.spec.params || []).map((parameter) => parameter.name);
      if (!parameters.includes(name)) continue;
      const view = views.get(figure.name);
      if (name === "measure" || !view) draw(figure); // a measure has a title of its own
      else view.signal(name, value).runAsync();
    }
    fillTable();
  }

  function specification(figure) {
    const spec = JSON.parse(JSON.stringify(figure.spec).replaceAll("{measure}", page.titles[chosen.measure] || ""));
    for (const parameter of spec.params || []) {
      if (parameter.name in chosen) parameter.value = chosen[parameter.name];
    }
    const named = [spec, ...(spec.layer || [])].map((part) => part.data && part.data.name).filter(Boolean);
    const brought = named.filter((name) => name in page.data).map((name) => [name, page.data[name]]);
    spec.datasets = { ...spec.datasets, ...Object.fromEntries(brought) };
    spec.description = figure.alt;
    return spec;
  }

  let drawing = Promise.resolve(); // one after the other: two drawings of one chart would get in each other's way
  function draw(figure) {
    drawing = drawing.then(() => drawNow(figure));
    return drawing;
  }

  async function drawNow(figure) {
    const place = document.querySelector(`[data-figure="${figure.name}"]`);
    const options = { actions: false, ast: true, renderer: "svg", mode: "vega-lite", config: page.config[theme], tooltip: { theme } };
    const old = views.get(figure.name);
    const { view } = await window.vegaEmbed(place, specification(figure), options);
    if (old) old.finalize();
    views.set(figure.name, view);
  }

  function probability(value, largest) {
    const bar = element("span", { className: "bar" });
    bar.style.width = `${(60 * value) / largest}%`;
    return element("td", { className: "share" }, bar, value.toPrecision(3));
  }

  function fillTable() {
    const body = document.getElementById("likeliest");
    if (!body) return;
    const row = page.predictions.find((of) => Object.entries(of).every(([name, value]) => !(name in chosen) || chosen[name] === value));
    const ranks = row ? row.clean.map((before, rank) => [before, row.scaled[rank]]) : [];
    const largest = Math.max(...ranks.flat().map(([, value]) => value));
    body.replaceChildren(
      ...ranks.map(([before, after], rank) =>
        element(
          "tr", {}, element("td", { textContent: rank + 1 }),
          element("td", { className: "token", textContent: before[0] }), probability(before[1], largest),
          element("td", { className: "token", textContent: after[0] }), probability(after[1], largest),
        ),
      ),
    );
  }

  async function paint() {
    document.documentElement.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
    for (const figure of page.figures) await draw(figure);
    document.documentElement.dataset.ready = "yes";
  }

  document.getElementById("theme").addEventListener("click", () => {
    theme = theme === "dark" ? "light" : "dark";
    paint();
  });
  scheme.addEventListener("change", () => {
    theme = scheme.matches ? "dark" : "light";
    paint();
  });
  const bar = document.getElementById("controls");
  if (bar) bar.append(...page.controls.filter(({ options }) => options.length > 1).map(control));
  fillTable();
  paint();
})();
