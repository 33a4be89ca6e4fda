// The script of a report's page: makes tables sortable and replaces pictures with charts.
// The numbers of a chart are in a JSON script element inside its figure; see bnrnn/report/chart.py.
"use strict";
(() => {

// ---------------------------------------------------------------- elements

const SVG = (() => {
  const holder = document.createElement("div");
  holder.innerHTML = "<svg></svg>";
  return holder.firstChild.namespaceURI;
})();

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const html = (tag, attributes = {}, ...children) =>
  filled(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

// ---------------------------------------------------------------- tables

const SECONDS = { ms: 0.001, s: 1, min: 60, h: 3600 };
const NUMBER = /^[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?(?=$|[\s%,;:)])/i;
const letters = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

// "1,500 of 100,000" sorts as 1500, "−0.05" as a negative number, "3 min" as 180. In either
// direction, numbers come first, then text, then empty cells.
function sortKey(cell) {
  const text = cell.textContent.trim().replace(/−/g, "-");
  const found = text.match(NUMBER);
  if (found && /\d/.test(found[0])) {
    const unit = text.slice(found[0].length).trim().split(/[\s,;]/)[0];
    const number = Number(found[0].replace(/,/g, ""));
    return { rank: 0, value: number * (Object.hasOwn(SECONDS, unit) ? SECONDS[unit] : 1) };
  }
  return text === "" || text === "-" ? { rank: 2, value: "" } : { rank: 1, value: text };
}

function compared(a, b, sign) {
  if (a.rank !== b.rank) return a.rank - b.rank;
  return sign * (a.rank === 0 ? a.value - b.value : letters.compare(a.value, b.value));
}

// Clicks on a header sort ascending, then descending, then restore the report's order.
function sortable(table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) return;
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    if (!header.textContent.trim()) return;
    const button = html("button", { type: "button", class: "sort" }, ...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[header.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      for (const other of headers) other.removeAttribute("aria-sort");
      const sorted = [...rows];
      if (order) {
        header.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const keys = new Map(rows.map((row) => [row, sortKey(row.cells[column])]));
        sorted.sort((a, b) => compared(keys.get(a), keys.get(b), sign));
      }
      body.append(...sorted);
    });
  });
}

// ---------------------------------------------------------------- numbers

const UNITS = { steps: "step", epochs: "epoch", seconds: "seconds" };
const DASHES = { "--": "6 4", ":": "1.5 3" };

const grouped = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 2 });
const shown = (value, decimals) =>
  Math.abs(value) < 1e9 ? value.toFixed(decimals) : value.toPrecision(3);

// About `most` round numbers from low to high, each with its label.
function ticks(low, high, most) {
  const rough = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  const format = Math.abs(high) < 1e9 && step > 1e-9
    ? { minimumFractionDigits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) }
    : { notation: "scientific", maximumFractionDigits: 2 };
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    const number = k * step || 0; // not -0
    found.push([number, number.toLocaleString("en-US", format)]);
    if (found.length > 20) break;
  }
  return found;
}

function extent(numbers) {
  let low = Infinity, high = -Infinity;
  for (const number of numbers) {
    if (number < low) low = number;
    if (number > high) high = number;
  }
  return low <= high ? [low, high] : null;
}

// ---------------------------------------------------------------- charts

const MARKERS = {
  o: (x, y) => `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0`,
  s: (x, y) => `M${x - 2.6} ${y - 2.6}h5.2v5.2h-5.2z`,
  "^": (x, y) => `M${x} ${y - 3.4}l3.3 6h-6.6z`,
  v: (x, y) => `M${x} ${y + 3.4}l3.3 -6h-6.6z`,
  D: (x, y) => `M${x} ${y - 3.6}l3.6 3.6l-3.6 3.6l-3.6 -3.6z`,
};
const round = (number) => Math.round(number * 10) / 10;

function strokes(curve, points) {
  let line = "", marks = "", down = false;
  for (const point of points) {
    if (point === null) {
      down = false;
      continue;
    }
    const [x, y] = point.map(round);
    line += `${down ? "L" : "M"}${x} ${y}`;
    if (curve.marker) marks += MARKERS[curve.marker](x, y);
    down = true;
  }
  const group = svg("g", { class: "curve", "data-name": curve.name, opacity: curve.alpha });
  group.style.setProperty("--colour", curve.colour || "var(--ink)");
  group.append(svg("path", {
    class: "line", d: line, "stroke-width": curve.width, "stroke-dasharray": DASHES[curve.dash],
  }));
  if (marks) group.append(svg("path", { class: "marks", d: marks }));
  return group;
}

function chart(figure, number) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const picture = figure.querySelector("img");
  const curves = data.panels.flatMap((panel) => panel.curves);
  const axes = Object.keys(data.labels).filter((axis) => curves.some((curve) => curve.x[axis]));
  if (!axes.length) return;
  const names = [...new Set(curves.map((curve) => curve.name))];
  const off = new Set();
  let axis = axes.includes(data.axis) ? data.axis : axes[0];
  const id = `chart-${number}`;

  const reading = html("p", { class: "reading", role: "status" });
  const hint = html("p", { class: "hint", id: `${id}-hint` },
    "Read a point with the mouse, or with the arrow keys: left and right for points, up and down " +
    "for curves.");
  if (curves.some((curve) => curve.of)) {
    hint.append(" Of a long curve 200 points are kept, the lowest and the highest of each stretch.");
  }
  const visible = (panel) =>
    panel.curves.filter((curve) => curve.x[axis] && !off.has(curve.name));

  const views = data.panels.map((panel) => {
    const root = svg("svg", {
      class: "plot", tabindex: 0, role: "application", "aria-roledescription": "chart",
      "aria-describedby": `${id}-hint`,
    });
    const view = { panel, root, at: null, place: null };
    root.addEventListener("pointermove", (event) => point(view, event));
    root.addEventListener("pointerdown", (event) => point(view, event));
    root.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") read(view, null); // lifting a finger keeps the reading
    });
    root.addEventListener("blur", () => read(view, null));
    root.addEventListener("keydown", (event) => key(view, event));
    return view;
  });

  // -------------------------------------------------------------- drawing

  function render(view) {
    const { panel, root } = view;
    const on = visible(panel);
    const width = Math.max(root.parentNode.clientWidth, 200);
    const height = Math.round(Math.min(Math.max(0.55 * width, 250), 400));
    const xs = extent(on.flatMap((c) => c.x[axis]).filter((x) => x !== null));
    const ys = extent(on.flatMap((c) => c.y.filter((y, k) => y !== null && c.x[axis][k] !== null)));
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    root.setAttribute("height", height);
    root.setAttribute("aria-label",
      `${panel.title || picture.alt}: ${panel.y} against ${data.labels[axis]}, ` +
      `${on.length} ${on.length === 1 ? "curve" : "curves"}`);
    view.at = view.place = null;
    const content = svg("g", { "aria-hidden": "true" });
    root.replaceChildren(content);
    const top = panel.title ? 42 : 24;
    if (panel.title) content.append(svg("text", { x: 0, y: 14, class: "title" }, panel.title));
    content.append(svg("text", { x: 0, y: top - 10, class: "label" }, panel.y));
    if (!xs || !ys) {
      const why = panel.curves.some((curve) => curve.x[axis])
        ? "No curve is switched on." : `No curve here is known by ${UNITS[axis]}.`;
      content.append(svg("text", { x: width / 2, y: height / 2, class: "none" }, why));
      return;
    }
    const left = Math.min(0, xs[0]);
    const right = left + (1.02 * (xs[1] - left) || 1); // room for the last marker
    const margin = 0.05 * (ys[1] - ys[0]) || 0.05 * Math.abs(ys[0]) || 1;
    const [low, high] = panel.limits || [ys[0] - margin, ys[1] + margin];
    const marks = ticks(low, high, (height - top) / 45);
    const start = 14 + 7 * Math.max(...marks.map(([, text]) => text.length));
    const widest = grouped(Math.round(right)).length;
    const end = Math.max(14, 2 + 3.5 * widest); // half the width of a tick label
    const inner = { width: width - start - end, height: height - top - 44 };
    view.place = (x, y) => [
      (x - left) / (right - left) * inner.width, (high - y) / (high - low) * inner.height,
    ];
    view.corner = [start, top];
    for (const [y, text] of marks) {
      const at = round(top + view.place(left, y)[1]);
      content.append(svg("path", { class: "grid", d: `M${start} ${at}h${inner.width}` }));
      content.append(svg("text", { x: start - 7, y: at + 4, class: "y" }, text));
    }
    const most = Math.max(2, inner.width / (22 + 8 * widest));
    for (const [x, text] of ticks(left, right, most)) {
      const at = round(start + view.place(x, low)[0]);
      content.append(svg("path", { class: "grid", d: `M${at} ${top}V${height - 44}` }));
      content.append(svg("text", { x: at, y: height - 26, class: "x" }, text));
    }
    content.append(svg("text", {
      x: start + inner.width / 2, y: height - 6, class: "x label",
    }, data.labels[axis]));
    // A nested svg clips its content.
    const inside = svg("svg", { x: start, y: top, width: inner.width, height: inner.height });
    if (panel.level !== null && panel.level !== undefined) {
      const at = round(view.place(left, panel.level)[1]);
      inside.append(svg("path", { class: "level", d: `M0 ${at}H${inner.width}` }));
    }
    view.drawn = on.map((curve) => ({
      curve,
      points: curve.y.map((y, k) =>
        y === null || curve.x[axis][k] === null ? null : view.place(curve.x[axis][k], y)),
    }));
    for (const { curve, points } of view.drawn) inside.append(strokes(curve, points));
    view.mark = svg("g", { class: "mark" });
    content.append(inside, view.mark);
  }

  function lit(name) {
    for (const { root } of views) {
      for (const group of root.querySelectorAll(".curve")) {
        group.classList.toggle("dim", name !== null && group.dataset.name !== name);
      }
    }
  }

  // -------------------------------------------------------------- reading off

  function words({ curve, index }, decimals) {
    const places = Object.keys(data.labels)
      .filter((name) => curve.x[name] && curve.x[name][index] !== null)
      .map((name) => name === "seconds" ? `${grouped(curve.x[name][index])} s`
        : `${UNITS[name]} ${grouped(curve.x[name][index])}`);
    const name = curve.note ? `${curve.name}, ${curve.note}` : curve.name;
    return [name, shown(curve.y[index], decimals), places.join(", ")];
  }

  function read(view, at, aloud = false) {
    view.at = at;
    reading.setAttribute("aria-live", aloud ? "polite" : "off");
    if (view.mark) view.mark.replaceChildren();
    if (at === null) {
      reading.replaceChildren();
      lit(null);
      return;
    }
    const [name, value, places] = words(at, view.panel.decimals);
    reading.replaceChildren(
      html("span", {}, `${name}: `), html("strong", {}, value), ` at ${places}`);
    const [x, y] = at.point.map((part, k) => round(part + view.corner[k]));
    const side = at.point[0] < 80 ? "start" : "end";
    view.mark.append(
      svg("circle", { cx: x, cy: y, r: 5 }),
      svg("text", { x: x + (side === "start" ? 9 : -9), y: y - 9, "text-anchor": side }, value),
    );
    lit(at.curve.name);
  }

  function nearest(view, x, y, among = view.drawn) {
    let found = null, least = Infinity;
    for (const { curve, points } of among) {
      points.forEach((point, index) => {
        if (point === null) return;
        const distance = (point[0] - x) ** 2 + (point[1] - y) ** 2;
        if (distance < least) [least, found] = [distance, { curve, index, point }];
      });
    }
    return found;
  }

  function point(view, event) {
    if (!view.place) return;
    const box = view.root.getBoundingClientRect();
    read(view, nearest(
      view, event.clientX - box.left - view.corner[0], event.clientY - box.top - view.corner[1]));
  }

  function key(view, event) {
    if (!view.place || event.ctrlKey || event.altKey || event.metaKey) return;
    const drawn = view.drawn.filter(({ points }) => points.some((point) => point !== null));
    const known = view.at ? drawn.findIndex(({ curve }) => curve === view.at.curve) : -1;
    const which = Math.max(known, 0);
    const { curve, points } = drawn[which];
    const there = points.flatMap((point, index) => point === null ? [] : [{ curve, index, point }]);
    const now = known < 0 ? -1 : there.findIndex(({ index }) => index === view.at.index);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    let at;
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      at = known < 0 ? there.at(step > 0 ? 0 : -1)
        : there[Math.min(Math.max(now + step, 0), there.length - 1)];
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const next = known < 0 ? 0 : (which + step + drawn.length) % drawn.length;
      at = nearest(view, ...(view.at ? view.at.point : [0, 0]), [drawn[next]]);
    } else if (event.key === "Home" || event.key === "End") {
      at = there.at(event.key === "Home" ? 0 : -1);
    } else if (event.key === "Escape") {
      at = null;
    } else {
      return;
    }
    event.preventDefault();
    read(view, at, true);
  }

  // -------------------------------------------------------------- switches

  const switches = names.map((name) => {
    const curve = curves.find((curve) => curve.name === name);
    const line = [[2, 6], [28, 6]];
    const sample = svg("svg", { width: 30, height: 12, viewBox: "0 0 30 12", "aria-hidden": "true" },
      strokes({ ...curve, marker: null }, line));
    if (curve.marker) {
      sample.append(strokes(curve, [[15, 6]]));
    }
    const missing = html("span", { class: "missing" });
    const button = html("button", { type: "button", class: "switch" }, sample, name, missing);
    button.addEventListener("click", () => {
      if (off.has(name)) off.delete(name);
      else off.add(name);
      update();
    });
    for (const event of ["pointerenter", "focus"]) {
      button.addEventListener(event, () => lit(off.has(name) ? null : name));
    }
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => lit(null));
    return { name, button, missing };
  });

  function update() {
    for (const { name, button, missing } of switches) {
      const known = curves.some((curve) => curve.name === name && curve.x[axis]);
      button.setAttribute("aria-pressed", String(!off.has(name)));
      button.disabled = !known;
      missing.textContent = known ? "" : ` (no ${axis})`;
    }
    reading.replaceChildren();
    views.forEach(render);
  }

  const group = html("div", { class: "switches", role: "group", "aria-label": "Curves" },
    ...switches.map(({ button }) => button));
  if (names.length > 2) {
    for (const [text, act] of [
      ["show all", () => off.clear()], ["hide all", () => names.forEach((name) => off.add(name))],
    ]) {
      const button = html("button", { type: "button", class: "all" }, text);
      button.addEventListener("click", () => { act(); update(); });
      group.append(button);
    }
  }
  const area = html("div", {
    class: "chart", id, role: "group", "aria-label": picture.alt,
  });
  if (axes.length > 1) {
    const choice = html("fieldset", { class: "axes" }, html("legend", {}, "x axis"));
    for (const name of axes) {
      const radio = html("input", {
        type: "radio", name: `${id}-axis`, value: name, checked: name === axis ? "" : null,
      });
      radio.addEventListener("change", () => { axis = name; update(); });
      choice.append(html("label", {}, radio, name));
    }
    area.append(choice);
  }
  area.append(
    html("div", { class: views.length > 1 ? "plots two" : "plots" },
      ...views.map(({ root }) => html("div", {}, root))),
    reading, group, hint,
  );
  picture.before(area);
  update();
  picture.hidden = true;
  let width = area.clientWidth;
  new ResizeObserver(() => {
    if (area.clientWidth !== width) {
      width = area.clientWidth;
      requestAnimationFrame(() => views.forEach(render));
    }
  }).observe(area);
}

document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll("figure:has(> script)").forEach(chart);

})();
